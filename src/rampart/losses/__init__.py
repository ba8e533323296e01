from rampart.losses.certified import interval_regularizer, worst_case_logits
from rampart.losses.supcon import supcon_loss

__all__ = ["interval_regularizer", "supcon_loss", "worst_case_logits"]
