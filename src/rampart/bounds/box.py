"""Boxes and lower bounds of linear forms over them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rampart.errors import SettingsError, require, require_numbers, require_radii
from rampart.kernels import Kernel


class Box:
    """Element-wise bounds `lower` <= x <= `upper`, both [B, *shape]; `center` and `half` are its middle and half-width.

    Made of either pair; the other is worked out when it is asked for first.
    """

    def __init__(self, lower: Tensor, upper: Tensor) -> None:
        # Kept by rampart.bounds.relaxation: intervals and linear bounds come of the same pass over memory.
        self.rectified: Any = None
        self._ends: tuple[Tensor, Tensor] | None = (lower, upper)
        self._middle: tuple[Tensor, Tensor] | None = None

    @classmethod
    def around(cls, center: Tensor, half: Tensor) -> Box:
        box = cls(center, center)
        box._ends, box._middle = None, (center, half)
        return box

    @property
    def made_of(self) -> tuple[Tensor, Tensor, bool]:
        """(lower, upper, False) where these are known, else (center, half, True)."""
        return (*self._ends, False) if self._ends is not None else (*self._found_middle(), True)

    @property
    def lower(self) -> Tensor:
        return self._found_ends()[0]

    @property
    def upper(self) -> Tensor:
        return self._found_ends()[1]

    @property
    def center(self) -> Tensor:
        return self._found_middle()[0]

    @property
    def half(self) -> Tensor:
        return self._found_middle()[1]

    @property
    def unstable(self) -> Tensor:
        """Where a ReLU is neither always off nor always on."""
        return (self.lower < 0) & (self.upper > 0)

    def _found_ends(self) -> tuple[Tensor, Tensor]:
        if self._ends is None:
            assert self._middle is not None
            self._ends = _Ends.apply(*self._middle)
        return self._ends

    def _found_middle(self) -> tuple[Tensor, Tensor]:
        if self._middle is None:
            assert self._ends is not None
            lower, upper = self._ends
            half = (upper - lower) * 0.5
            self._middle = (lower + half, half)
        return self._middle


class _Ends(torch.autograd.Function):
    """(centre, half-width) -> (lower, upper)."""

    @staticmethod
    def forward(ctx: Any, center: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
        return _ends(center, half)

    @staticmethod
    def backward(ctx: Any, of_lower: Tensor, of_upper: Tensor) -> tuple[Tensor, Tensor]:
        return _ends_backward(of_lower, of_upper)


@Kernel
def _ends(center: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
    return center - half, center + half


@Kernel
def _ends_backward(of_lower: Tensor, of_upper: Tensor) -> tuple[Tensor, Tensor]:
    return of_lower + of_upper, of_upper - of_lower


def pixel_box(x: Tensor, eps: float | Tensor) -> Box:
    """The L∞ ball of radius `eps` (pixels; one for all, or per pixel, broadcastable to x) around x, cut to [0, 1]."""
    if isinstance(eps, Tensor):
        require(eps.numel() > 0, "eps is empty: give one radius, or one for each pixel")
        require_radii(*(end.item() for end in eps.detach().aminmax()))
        eps = eps.to(x)
        try:
            eps.expand_as(x)
        except RuntimeError:
            shapes = f"shape {tuple(eps.shape)} does not broadcast to images of shape {tuple(x.shape)}"
            raise SettingsError(f"eps of {shapes}") from None
    else:
        require_numbers(eps=eps)
        require_radii(eps, eps)
    return Box((x - eps).clamp(0, 1), (x + eps).clamp(0, 1))


def covering(eps: float) -> float:
    """The radius over which a proof is made: with what float32 rounds of an attacked image's pixels."""
    return min(eps + 2**-24, 1.0)


def lower_on(box: Box, a: Tensor) -> Tensor:
    """min of a·x over the box, [B, K], for a [B, K, *shape]."""
    flat = a.flatten(2)
    half, center = box.half.flatten(1), box.center.flatten(1)
    if flat.shape[1] == 1:  # a product of matrices is slow for single rows, and its derivative more so
        return (flat * center.unsqueeze(1) - flat.abs() * half.unsqueeze(1)).sum(2)
    return (flat @ center[:, :, None] - flat.abs() @ half[:, :, None]).squeeze(2)
