"""The linear relaxation of a ReLU over an interval (Zhang et al. 2018, table 2), and a step of CROWN through it.

Both are written with their derivatives: training steps spend as long here as in the convolutions otherwise.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rampart.bounds.box import Box


class Relaxation(NamedTuple):
    """lower_slope * v <= ReLU(v) <= upper_slope * v + intercept for v in a box; each [B, *shape]."""

    lower_slope: Tensor
    upper_slope: Tensor
    intercept: Tensor


def relax(box: Box) -> Relaxation:
    """The triangle's upper side, and below it 0 or v, whichever leaves the smaller area."""
    slope, intercept = _UpperSide.apply(box.lower, box.upper)
    return Relaxation((slope > 0.5).to(slope.dtype), slope, intercept)


def through_relu(a: Tensor, relaxation: Relaxation, lower_slope: Tensor) -> tuple[Tensor, Tensor]:
    """(coefficients [B, K, *shape] of the ReLU's input, constant [B, K]) that bound a · ReLU(v) from below.

    Args:
        a: [B, K, *shape].
        lower_slope: [B, K or 1, *shape].
    """
    return _Through.apply(a, lower_slope, relaxation.upper_slope[:, None], relaxation.intercept[:, None])


class _UpperSide(torch.autograd.Function):
    """u / (u - l) and -l u / (u - l) with l cut to 0 from above and u from below."""

    @staticmethod
    def forward(ctx: Any, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        low = lower.clamp(max=0)
        # A box that is the point 0 counts as active.
        high = torch.maximum(upper.clamp(min=0), low + 1e-8)
        width = high - low
        slope = high / width
        ctx.save_for_backward(low, upper, width, slope)
        return slope, -low * slope

    @staticmethod
    def backward(ctx: Any, of_slope: Tensor, of_intercept: Tensor) -> tuple[Tensor, Tensor]:
        low, upper, width, slope = ctx.saved_tensors
        by_slope = torch.addcmul(of_slope, low, of_intercept, value=-1).div_(width)
        # A stable neuron has slope 0 or 1 whatever its box.
        to_low = (by_slope - of_intercept).mul_(slope).mul_(low < 0)
        to_high = (1 - slope).mul_(by_slope).mul_(upper > 0)
        return to_low, to_high


class _Through(torch.autograd.Function):
    """a+ * lower_slope + a- * upper_slope, and the sum of a- * intercept."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, lower_slope: Tensor, upper_slope: Tensor, intercept: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(a, lower_slope, upper_slope, intercept)
        negative = a.clamp(max=0)
        constant = (negative * intercept).sum(tuple(range(2, a.dim())))
        return (a - negative).mul_(lower_slope).addcmul_(negative, upper_slope), constant

    @staticmethod
    def backward(ctx: Any, of_a: Tensor, of_constant: Tensor) -> tuple[Tensor | None, ...]:
        a, lower_slope, upper_slope, intercept = ctx.saved_tensors
        to_a = to_lower = to_upper = to_intercept = None
        of_constant = of_constant.view(*a.shape[:2], *(1,) * (a.dim() - 2))
        negative = a.clamp(max=0)
        if ctx.needs_input_grad[0]:
            falling = (a < 0).to(a.dtype)
            to_a = torch.addcmul(lower_slope, falling, upper_slope - lower_slope).mul_(of_a)
            to_a.addcmul_(falling, intercept * of_constant)
        if ctx.needs_input_grad[1]:
            to_lower = (a - negative).mul_(of_a)
            to_lower = _over_rows(to_lower) if lower_slope.shape[1] == 1 else to_lower
        if ctx.needs_input_grad[2]:
            to_upper = _over_rows(negative * of_a)
        if ctx.needs_input_grad[3]:
            to_intercept = _over_rows(negative.mul_(of_constant))
        return to_a, to_lower, to_upper, to_intercept


def _over_rows(a: Tensor) -> Tensor:
    return a if a.shape[1] == 1 else a.sum(1, keepdim=True)
