"""Interval bound propagation (Gowal et al. 2018, eq. 6)."""

from __future__ import annotations

from torch import Tensor

from rampart.bounds.box import Box, lower_on
from rampart.models.chain import Dense, Link, ReLU


def step(link: Link, box: Box) -> Box:
    """The box after one link."""
    if isinstance(link, ReLU):
        return Box(box.lower.clamp(min=0), box.upper.clamp(min=0))
    center, half = link.apply(box.center), link.radius(box.half)
    return Box(center - half, center + half)


def preactivations(links: list[Link], box: Box) -> dict[int, Box]:
    """Bounds of every ReLU's input, by the ReLU's place in `links`."""
    found: dict[int, Box] = {}
    for i, link in enumerate(links):
        if isinstance(link, ReLU):
            found[i] = box
        box = step(link, box)
    return found


def lower_bounds(links: list[Link], box: Box, spec: Tensor) -> Tensor:
    """Lower bounds [B, K] of spec [B, K, out] @ output; a last linear map is merged with the specification."""
    last = links[-1] if links else None
    offset: Tensor | float = 0.0
    if isinstance(last, Dense):
        links = links[:-1]
        offset = last.offset(spec)
        spec = last.pull(spec)
    for link in links:
        box = step(link, box)
    return lower_on(box, spec) + offset
