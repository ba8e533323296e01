"""The linear relaxation of a ReLU over an interval (Zhang et al. 2018, table 2)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rampart.bounds.box import Box


class Relaxation(NamedTuple):
    """lower_slope * v <= ReLU(v) <= upper_slope * v + intercept for v in a box; each [B, *shape]."""

    lower_slope: Tensor
    upper_slope: Tensor
    intercept: Tensor
    unstable: Tensor


def relax(box: Box) -> Relaxation:
    """The triangle's upper side, and below it 0 or v, whichever leaves the smaller area."""
    lower = box.lower.clamp(max=0)
    upper = torch.maximum(box.upper.clamp(min=0), lower + 1e-8)
    slope = upper / (upper - lower)
    unstable = (box.lower < 0) & (box.upper > 0)
    return Relaxation((slope > 0.5).to(slope.dtype), slope, -lower * slope, unstable)
