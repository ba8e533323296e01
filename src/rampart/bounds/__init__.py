import torch

from rampart.bounds.margins import ENGINES, METHODS, find_layout, margin_bounds

# Convolutions whose factors are cut to ten bits, as GPUs do by default, give no bounds.
torch.backends.cudnn.allow_tf32 = False
torch.backends.cuda.matmul.allow_tf32 = False

__all__ = ["ENGINES", "METHODS", "find_layout", "margin_bounds"]
