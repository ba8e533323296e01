from rampart.losses.certified import worst_case_logits
from rampart.losses.supcon import supcon_loss

__all__ = ["supcon_loss", "worst_case_logits"]
