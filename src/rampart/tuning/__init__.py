from rampart.tuning.driver import check, tune
from rampart.tuning.publish import tuned_texts

__all__ = ["check", "tune", "tuned_texts"]
