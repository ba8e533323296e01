"""Boxes and lower bounds of linear forms over them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rampart.errors import require


class Box(NamedTuple):
    """Element-wise bounds `lower` <= x <= `upper`, both [B, *shape]."""

    lower: Tensor
    upper: Tensor

    @property
    def center(self) -> Tensor:
        return self.lower + self.half

    @property
    def half(self) -> Tensor:
        return (self.upper - self.lower) * 0.5


def pixel_box(x: Tensor, eps: float | Tensor) -> Box:
    """The L∞ ball of radius `eps` (pixels; one for all, or per pixel, broadcastable to x) around x, cut to [0, 1]."""
    smallest = torch.as_tensor(eps).min().item()
    require(smallest >= 0, f"eps must be 0 or more, not {smallest:g}")
    return Box((x - eps).clamp(0, 1), (x + eps).clamp(0, 1))


def lower_on(box: Box, a: Tensor) -> Tensor:
    """min of a·x over the box, [B, K], for a [B, K, *shape]."""
    flat = a.flatten(2)
    half = box.half.flatten(1)
    center = box.lower.flatten(1) + half
    if flat.shape[1] == 1:  # a product of matrices is slow for single rows, and its derivative more so
        return (flat * center[:, None] - flat.abs() * half[:, None]).sum(2)
    return (flat @ center[:, :, None] - flat.abs() @ half[:, :, None]).squeeze(2)
