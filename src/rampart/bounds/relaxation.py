"""The linear relaxation of a ReLU over an interval (Zhang et al. 2018, table 2), and a step of CROWN through it.

Both are written with their derivatives: training steps spend as long here as in the convolutions otherwise.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rampart.bounds.box import Box
from rampart.kernels import Kernel, keep_where


class Relaxation(NamedTuple):
    """lower_slope * v <= ReLU(v) <= upper_slope * v + intercept for v in a box; each [B, *shape]."""

    upper_slope: Tensor
    intercept: Tensor

    @property
    def lower_slope(self) -> Tensor:
        """0 or 1, whichever leaves the smaller area."""
        return (self.upper_slope > 0.5).to(self.upper_slope.dtype)


def rectified(box: Box) -> tuple[Box, Relaxation]:
    """The box of ReLU(v) for v in `box`, and its relaxation there: the triangle's upper side, and below it 0 or v,
    whichever leaves the smaller area."""
    if box.rectified is None:
        center, half, slope, intercept = _Rectified.apply(*box.made_of)
        box.rectified = Box.around(center, half), Relaxation(slope, intercept)
    return box.rectified


def relax(box: Box) -> Relaxation:
    """The second of `rectified`."""
    return rectified(box)[1]


def through_relu(a: Tensor, relaxation: Relaxation, lower_slope: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(coefficients [B, K, *shape] of the ReLU's input, constant [B, K]) that bound a · ReLU(v) from below.

    Args:
        a: [B, K, *shape].
        lower_slope: [B, K or 1, *shape]; default the relaxation's own.
    """
    return _Through.apply(a, lower_slope, relaxation.upper_slope.unsqueeze(1), relaxation.intercept.unsqueeze(1))


class _Rectified(torch.autograd.Function):
    """What a box is made of -> centre and half-width after the ReLU; u / (u - l) and -l u / (u - l), where l is cut to
    0 from above and u from below."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor, around: bool) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        center, half, slope, intercept = _rectify(first, second, around)
        ctx.save_for_backward(first, second, slope)
        ctx.around = around
        return center, half, slope, intercept

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(gradient is None for gradient in gradients):
            return None, None, None
        return *_rectify_backward(*ctx.saved_tensors, ctx.around, *gradients), None


@Kernel
def _rectify(first: Tensor, second: Tensor, around: bool) -> tuple[Tensor, ...]:
    lower, upper = (first - second, first + second) if around else (first, second)
    low, inner, outer = lower.clamp(max=0), lower.relu(), upper.relu()
    # A box that is the point 0 counts as active.
    slope = torch.where(low < 0, outer / (outer - low), 1.0)
    half = (outer - inner) * 0.5
    return inner + half, half, slope, -low * slope


@Kernel
def _rectify_backward(
    first: Tensor,
    second: Tensor,
    slope: Tensor,
    around: bool,
    of_center: Tensor | None,
    of_half: Tensor | None,
    of_slope: Tensor | None,
    of_intercept: Tensor | None,
) -> tuple[Tensor | float, Tensor | float]:
    lower, upper = (first - second, first + second) if around else (first, second)
    to_lower: Tensor | float = 0.0
    to_upper: Tensor | float = 0.0
    if of_center is not None or of_half is not None:
        of_center, of_half = (torch.zeros_like(lower) if of is None else of for of in (of_center, of_half))
        to_lower = keep_where((of_center - of_half) * 0.5, lower)
        to_upper = keep_where((of_center + of_half) * 0.5, upper)
    if of_slope is not None or of_intercept is not None:
        of_slope, of_intercept = (torch.zeros_like(lower) if of is None else of for of in (of_slope, of_intercept))
        # Of the narrowest boxes the slope says nothing, and its derivative would drown all others.
        by_slope = (of_slope - lower * of_intercept) / (upper - lower).clamp(min=1e-8)
        # A stable neuron has slope 0 or 1 whatever its box.
        to_lower = to_lower + keep_where((by_slope - of_intercept) * slope, 1 - slope)
        to_upper = to_upper + keep_where(by_slope * (1 - slope), slope)
    return (to_lower + to_upper, to_upper - to_lower) if around else (to_lower, to_upper)


class _Through(torch.autograd.Function):
    """a+ * lower_slope + a- * upper_slope, and the sum of a- * intercept."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, lower_slope: Tensor | None, upper_slope: Tensor, intercept: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(a, lower_slope, upper_slope, intercept)
        if a.is_cuda and lower_slope is None:
            # Not above: Triton is not where PyTorch has been built for other devices.
            from rampart.bounds.onepass import through

            return through(a, upper_slope, intercept)
        return _through(a, lower_slope, upper_slope, intercept)

    @staticmethod
    def backward(ctx: Any, of_a: Tensor, of_constant: Tensor) -> tuple[Tensor | None, ...]:
        a, lower_slope, upper_slope, intercept = ctx.saved_tensors
        if a.is_cuda and lower_slope is None:
            from rampart.bounds.onepass import through_backward

            to_a, *to_upper = through_backward(a, upper_slope, intercept, of_a, of_constant)
            return to_a, None, *to_upper
        return _through_backward(a, lower_slope, upper_slope, intercept, of_a, of_constant, *ctx.needs_input_grad)


@Kernel
def _through(a: Tensor, lower_slope: Tensor | None, upper_slope: Tensor, intercept: Tensor) -> tuple[Tensor, Tensor]:
    negative = a.clamp(max=0)
    positive = lower_side(a - negative, upper_slope, lower_slope)
    return torch.addcmul(positive, negative, upper_slope), (negative * intercept).sum(tuple(range(2, a.dim())))


@Kernel
def _through_backward(
    a: Tensor,
    lower_slope: Tensor | None,
    upper_slope: Tensor,
    intercept: Tensor,
    of_a: Tensor,
    of_constant: Tensor,
    *wanted: bool,
) -> tuple[Tensor | None, ...]:
    of_constant = of_constant.view(*a.shape[:2], *(1,) * (a.dim() - 2))
    negative = a.clamp(max=0)
    to_a = to_lower = None
    if wanted[0]:
        rising = lower_side(of_a, upper_slope, lower_slope)
        falling = torch.addcmul(upper_slope * of_a, intercept, of_constant)
        to_a = rising + keep_where(falling - rising, -negative)
    if wanted[1]:
        assert lower_slope is not None
        to_lower = _over_rows((a - negative) * of_a, lower_slope)
    to_upper = _over_rows(negative * of_a, upper_slope) if wanted[2] else None
    to_intercept = _over_rows(negative * of_constant, intercept) if wanted[3] else None
    return to_a, to_lower, to_upper, to_intercept


def lower_side(x: Tensor, upper_slope: Tensor, lower_slope: Tensor | None = None) -> Tensor:
    """x [B, K, *shape] times the lower slopes, those of `Relaxation` where none are given."""
    return keep_where(x, upper_slope.expand_as(x), 0.5) if lower_slope is None else x * lower_slope


def _over_rows(x: Tensor, like: Tensor) -> Tensor:
    """x [B, K, *shape], summed over the rows where `like` has one for all."""
    return x if x.shape[1] == like.shape[1] else x.sum(1, keepdim=True)
