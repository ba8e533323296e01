"""α-CROWN: the slopes below unstable ReLUs optimised (Xu et al. 2021)."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from rampart.bounds import crown, domains, ibp, reduced
from rampart.bounds.box import Box
from rampart.bounds.domains import Domains
from rampart.models.chain import Chain

log = logging.getLogger(__name__)


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

    Every row of every image has its own slopes; the bounds of the ReLUs' inputs stay as given. The first bound is
    CROWN's, so the result is never looser. A row stops once it is above `target`. An image with too many unstable
    neurons for `reduced.LIMIT` keeps CROWN's bounds, and a warning tells so.
    """
    return torch.stack([_of_image(chain, inputs, box, spec, i, steps, lr, target, memory) for i in range(len(spec))])


def _of_image(
    chain: Chain,
    inputs: ibp.Intervals,
    box: Box,
    spec: Tensor,
    image: int,
    steps: int,
    lr: float,
    target: float,
    memory: int,
) -> Tensor:
    if reduced.size_of(inputs, box, image) > reduced.LIMIT:
        log.warning("too many unstable neurons for alpha-CROWN: CROWN's bound stands")
        part = slice(image, image + 1)
        own = {place: crown.at(bounds, part) for place, bounds in inputs.items()}
        return crown.lower_bounds(chain, own, crown.at(box, part), spec[part], memory)[0]
    with torch.no_grad():
        net = reduced.reduce(chain, inputs, box, spec, image, memory)
        return domains.optimise(net, Domains.roots(net, net.outputs), steps, lr, target).bound
