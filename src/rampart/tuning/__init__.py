from rampart.tuning.driver import check, finished_before
from rampart.tuning.publish import tuned_texts

__all__ = ["check", "finished_before", "tuned_texts"]
