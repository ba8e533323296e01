"""Interval bound propagation (Gowal et al. 2018, eq. 6)."""

from __future__ import annotations

import torch
from torch import Tensor

from rampart.bounds.box import Box
from rampart.bounds.relaxation import rectified
from rampart.models.chain import Chain
from rampart.models.links import Add, Affine, Dense, Link, ReLU

# The boxes of values of a chain, by the place of the link that makes each; -1 is the input.
Intervals = dict[int, Box]


def step(link: Link, boxes: list[Box]) -> Box:
    """The box after one link, from those of the values that it reads."""
    box = boxes[0]
    if isinstance(link, Add):
        return Box.around(box.center + boxes[1].center, box.half + boxes[1].half)
    if isinstance(link, ReLU):
        return rectified(box)[0]
    return Box.around(link.apply(box.center), link.radius(box.half))


def intervals(chain: Chain, box: Box, value: int | None = None, known: Intervals | None = None) -> Intervals:
    """The boxes of `value` (default the output) and of all that it depends on; those in `known` are not made again."""
    found = {-1: box, **(known or {})}
    for place in chain.before(chain.last if value is None else value):
        if place not in found:
            found[place] = step(chain.links[place], [found[source] for source in chain.sources[place]])
    return found


def inputs(chain: Chain, found: Intervals) -> Intervals:
    """Of boxes of values those of the ReLUs' inputs, by the ReLU's place."""
    return {place: found[chain.sources[place][0]] for place in chain.relus if chain.sources[place][0] in found}


def lower_bounds(chain: Chain, found: Intervals, spec: Tensor, value: int | None = None) -> Tensor:
    """Lower bounds [B, K] of spec [B, K, out] @ output; arguments as in `bounds`."""
    return bounds(chain, found, spec, value).lower


def bounds(chain: Chain, found: Intervals, spec: Tensor, value: int | None = None) -> Box:
    """Lower and upper bounds, both [B, K], of spec [B, K, out] @ output.

    Args:
        found: boxes of values; that of `value` is used.
        value: the specification is pulled back to it through the affine maps behind it; default `merged(chain)`. The
            farther back, the tighter the bounds: `tail(chain)` is the farthest.
    """
    value = merged(chain) if value is None else value
    place = chain.last
    # The maps are the same for every image: they are multiplied out once, not for each row of a specification.
    rows = torch.eye(spec.shape[2], dtype=spec.dtype, device=spec.device)
    offset = spec.new_zeros(spec.shape[2])
    while place != value:
        link = chain.links[place]
        assert isinstance(link, Affine)
        offset = offset + link.offset(rows)
        rows = link.pull(rows)
        (place,) = chain.sources[place]
    rows, offset = spec @ rows.flatten(1), spec @ offset
    box = found[value]
    center = (rows @ box.center.flatten(1)[:, :, None]).squeeze(2) + offset
    return Box.around(center, (rows.abs() @ box.half.flatten(1)[:, :, None]).squeeze(2))


def merged(chain: Chain) -> int:
    """The value that a last linear map reads, else the output: what Gowal et al. 2018 (section 3) take bounds of."""
    return chain.sources[chain.last][0] if isinstance(chain.links[chain.last], Dense) else chain.last


def tail(chain: Chain) -> int:
    """The value that the output is an affine map of: that of the last ReLU or addition, or the input."""
    place = chain.last
    while place >= 0 and isinstance(chain.links[place], Affine):
        (place,) = chain.sources[place]
    return place
