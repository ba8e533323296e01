from rampart.tuning.driver import check, finished_before, tune
from rampart.tuning.publish import tuned_texts

__all__ = ["check", "finished_before", "tune", "tuned_texts"]
