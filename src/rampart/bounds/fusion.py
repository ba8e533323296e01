"""Loss fusion: one linear bound of the worst-case cross-entropy, not one for each margin (Xu et al. 2020, §3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from rampart.bounds import crown, ibp
from rampart.bounds.box import Box
from rampart.models.chain import Chain


def fused_cross_entropy(chain: Chain, box: Box, found: ibp.Intervals, spec: Tensor) -> Tensor:
    """Upper bounds [B] of the cross-entropy over the box; differentiable.

    The sum of exp(z_j - z_y) lies under the linear form `chords`; one backward row over the intervals' inner bounds
    bounds that form, and log of the bound bounds the loss.

    Args:
        chain: pixels -> logits.
        found: boxes of the values up to `ibp.tail(chain)`.
        spec: [B, K, K] rows e_y - e_j (`margin_spec`).
    """
    row, constant, shift = chords(chain, found, spec)
    linear = -crown.backward(chain, ibp.inputs(chain, found), box, -row[:, None]).squeeze(1)
    smallest = torch.finfo(linear.dtype).tiny
    return shift + (linear + constant).clamp(min=smallest).log()


def chords(chain: Chain, found: ibp.Intervals, spec: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(row [B, K], constant [B], shift [B]) with sum over j of exp(z_j - z_y) <= exp(shift) * (row · z + constant).

    Over the interval [l_j, u_j] of each z_j - z_y, exp lies under its chord.
    """
    margins = ibp.bounds(chain, found, spec, ibp.tail(chain))
    lower, upper = -margins.upper, -margins.lower
    # exp of bounds that are loose early in training overflows; the largest of them is taken out, and added at the end.
    shift = upper.amax(1, keepdim=True)
    width = (upper - lower).clamp(min=1e-6)
    slope = (lower - shift).exp() * torch.expm1(width.clamp(max=50)) / width
    # Beyond that width the lower end of the chord is nothing beside the upper one.
    slope = torch.where(width > 50, (upper - shift).exp() / width, slope)
    constant = (lower - shift).exp() - slope * lower
    return -(slope[:, :, None] * spec).sum(1), constant.sum(1), shift.squeeze(1)
