"""α-CROWN: the slopes below unstable ReLUs optimised (Xu et al. 2021)."""

from __future__ import annotations

import torch
from torch import Tensor

from rampart.bounds import crown, ibp
from rampart.bounds.box import Box
from rampart.bounds.relaxation import relax
from rampart.models.chain import Chain


def optimise(
    chain: Chain,
    inputs: ibp.Intervals,
    box: Box,
    spec: Tensor,
    steps: int = 20,
    lr: float = 0.1,
    target: float = float("inf"),
    memory: int = crown.MEMORY,
) -> Tensor:
    """The best lower bounds [B, K] of spec · output seen in `steps` of Adam on the lower slopes.

    Every row of every image has its own slopes; the bounds of the ReLUs' inputs stay as given. The first iterate uses
    CROWN's slopes, so the result is never looser than CROWN's. Stops early when every bound is above `target`. As many
    images at once as `memory` (MiB) allows, and one at least.
    """
    if not inputs:
        return crown.lower_bounds(chain, inputs, box, spec, memory)
    # Slopes, their gradients, Adam's two moments and what autograd keeps: about four times a plain backward pass.
    size = crown.rows_at_once(4 * crown.widest(chain), memory) // max(spec.shape[1], 1)

    def part_of(part: slice) -> Tensor:
        own = {place: crown.at(bounds, part) for place, bounds in inputs.items()}
        return _optimise(chain, own, crown.at(box, part), spec[part], steps, lr, target)

    return crown.in_parts(part_of, len(spec), size)


def _optimise(
    chain: Chain, inputs: ibp.Intervals, box: Box, spec: Tensor, steps: int, lr: float, target: float
) -> Tensor:
    relaxed = {place: relax(bounds) for place, bounds in inputs.items()}
    with torch.enable_grad():
        slopes = {}
        for place, relaxation in relaxed.items():
            start = relaxation.lower_slope[:, None]
            slopes[place] = start.expand(-1, spec.shape[1], *start.shape[2:]).detach().clone().requires_grad_()
        stable = {place: ~((bounds.lower < 0) & (bounds.upper > 0))[:, None] for place, bounds in inputs.items()}
        optimizer = torch.optim.Adam(slopes.values(), lr=lr)
        best = spec.new_full(spec.shape[:2], -torch.inf)
        for i in range(steps + 1):
            bounds = crown.backward_relaxed(chain, relaxed, box, spec, slopes=slopes)
            best = torch.maximum(best, bounds.detach())
            if i == steps or bool((best > target).all()):
                break
            optimizer.zero_grad()
            # To the slopes alone: the network's weights must not gather gradients.
            (-bounds.sum()).backward(inputs=list(slopes.values()))
            optimizer.step()
            with torch.no_grad():
                for place, slope in slopes.items():
                    slope.copy_(torch.where(stable[place], relaxed[place].lower_slope[:, None], slope.clamp(0, 1)))
            for group in optimizer.param_groups:
                group["lr"] *= 0.98
    return best
