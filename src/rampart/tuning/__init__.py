from rampart.tuning.driver import check, tuning_identity
from rampart.tuning.publish import tuned_texts

__all__ = ["check", "tuned_texts", "tuning_identity"]
