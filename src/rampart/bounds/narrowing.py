"""Tighter bounds of a reduced problem's neurons than CROWN's."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from rampart.bounds.domains import Domains, Parts, optimise
from rampart.bounds.reduced import Reduced, Rows

# Rows that are optimised at once: of more, the tensors of a step leave a processor's cache.
ROWS = 512
# By how much of a neuron's width its lower bound must be above the upper one to tell that there is no point: more than
# float32 loses on the way.
EMPTY = 1e-4
LR = 0.2


def tightened(net: Reduced, steps: int, until: float) -> Reduced:
    """The problem with bounds of its neurons by α-CROWN, layer after layer; those found stable are read no more.

    Args:
        until: as time.perf_counter() tells it, after which what is left keeps its bounds.
    """
    parts = Parts.whole(net, 1)
    for layer in range(1, len(net.layers)):
        start = net.layers[layer][0]
        before = net.up_to(layer)
        earlier = Parts(*(tensor[:, :start] for tensor in (parts.signs, parts.lower, parts.upper)))

        def bound(
            neurons: Tensor, rows: Rows, before: Reduced = before, start: int = start, earlier: Parts = earlier
        ) -> Tensor:
            rows = Rows(rows.of_input, rows.of_relu[:, :start], rows.constant)
            every = earlier.at(torch.zeros_like(neurons))
            return optimise(before, Domains.over(rows, every), steps, LR, target=0.0).bound

        parts, _ = _narrowed(net, parts, layer, bound, until)
    return net.without(parts.signs[0], parts.lower[0], parts.upper[0])


def narrowed(net: Reduced, parts: Parts, layer: int, steps: int, until: float) -> tuple[Parts, Tensor]:
    """(parts with tighter bounds of a layer's neurons, [D] whether a part has turned out empty).

    A neuron's bounds hold where all known signs do, those of outputs among them (`Reduced.followed_by_outputs`): what
    is said of a neuron need only be true where the network may err (Kotha et al. 2023, whose multiplier of that
    condition is here β-CROWN's of the output's sign).
    """

    def bound(part: Tensor, rows: Rows) -> Tensor:
        return optimise(net, Domains.over(rows, parts.at(part)), steps, LR, target=0.0).bound

    return _narrowed(net, parts, layer, bound, until)


def _narrowed(
    net: Reduced, parts: Parts, layer: int, bound: Callable[[Tensor, Rows], Tensor], until: float
) -> tuple[Parts, Tensor]:
    """Both ends of each neuron of unknown sign in each part; `bound` gets the part [R] of each row, and the rows."""
    first, stop = net.layers[layer]
    part, neuron = (parts.signs[:, first:stop] == 0).nonzero(as_tuple=True)
    neuron = neuron + first
    low, high = parts.lower[part, neuron], parts.upper[part, neuron]
    width = high - low
    # Each row on the scale of its own width, so that one step suits all; of an upper end the negative one.
    scale = torch.cat([width, -width])
    ends = torch.cat([low, -high])
    for start in range(0, len(ends), ROWS):
        if time.perf_counter() > until:
            break
        some = torch.arange(start, min(start + ROWS, len(ends)), device=ends.device)
        which = some % len(part)
        found = bound(part[which], net.neurons.at(neuron[which]).times(1 / scale[some]))
        ends[some] = torch.maximum(ends[some], found * scale[some].abs())
    low, high = ends[: len(part)], -ends[len(part) :]
    empty = torch.zeros(len(parts), dtype=torch.bool, device=width.device)
    empty[part[low - high > EMPTY * width]] = True
    signs, lower, upper = parts.signs.clone(), parts.lower.clone(), parts.upper.clone()
    lower[part, neuron], upper[part, neuron] = low, high
    on, off = low >= 0, high <= 0
    signs[part, neuron] = (on & ~off).to(signs.dtype) - (off & ~on).to(signs.dtype)
    return Parts(signs, lower, upper), empty
