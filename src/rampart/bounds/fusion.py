"""Loss fusion: one linear bound of the worst-case cross-entropy, not one for each margin (Xu et al. 2020, §3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from rampart.bounds import crown, ibp
from rampart.bounds.box import Box
from rampart.models.chain import Chain


def fused_cross_entropy(chain: Chain, box: Box, spec: Tensor) -> Tensor:
    """Upper bounds [B] of the cross-entropy over the box; differentiable.

    Over IBP's interval [l_j, u_j] of each z_j - z_y, exp lies under its chord. The sum of the chords is one linear
    form of the logits, bounded by one backward row over IBP's inner bounds: log of it bounds the loss.

    Args:
        chain: pixels -> logits.
        spec: [B, K, K] rows e_y - e_j (`margin_spec`).
    """
    links, classes = chain.links, spec.shape[1]
    boxes = ibp.preactivations(links, box)
    last = max(boxes, default=0)
    outer = ibp.lower_bounds(links[last:], boxes.get(last, box), torch.cat([spec, -spec], 1))
    upper, lower = -outer[:, :classes], outer[:, classes:]
    # exp of bounds that are loose early in training overflows; the largest of them is taken out, and added at the end.
    shift = upper.amax(1, keepdim=True)
    width = (upper - lower).clamp(min=1e-6)
    slope = (lower - shift).exp() * torch.expm1(width.clamp(max=50)) / width
    # Beyond that width the lower end of the chord is nothing beside the upper one.
    slope = torch.where(width > 50, (upper - shift).exp() / width, slope)
    intercept = (lower - shift).exp() - slope * lower
    row = (slope[:, :, None] * spec).sum(1, keepdim=True)
    linear = -crown.backward(links, boxes, box, row).squeeze(1)
    smallest = torch.finfo(linear.dtype).tiny
    return shift.squeeze(1) + (linear + intercept.sum(1)).clamp(min=smallest).log()
