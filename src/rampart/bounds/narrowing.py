"""Tighter bounds of a reduced problem's neurons than CROWN's."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from rampart.bounds.domains import Domains, Parts, optimise
from rampart.bounds.reduced import Reduced

# Rows that are optimised at once, and the terms of a pass over them: a second or two on a core, since a time limit is
# only looked at between them.
ROWS, TERMS = 512, 10**10
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
        parts, _ = narrowed(net, parts, layer, steps, until)
    return net.without(parts.signs[0], parts.lower[0], parts.upper[0])


def narrowed(net: Reduced, parts: Parts, layer: int, steps: int, until: float) -> tuple[Parts, Tensor]:
    """(parts with tighter bounds of a layer's neurons, [D] whether a part has turned out empty).

    A neuron's bounds hold where all known signs do, those of outputs among them (`Reduced.followed_by_outputs`): what
    is said of a neuron need only be true where the network may err (Kotha et al. 2023, whose multiplier of that
    condition is here β-CROWN's of the output's sign).

    Args:
        steps, until: as for `tightened`.
    """
    first, stop = net.layers[layer]
    part, neuron = (parts.signs[:, first:stop] == 0).nonzero(as_tuple=True)
    neuron = neuron + first
    low, high = parts.lower[part, neuron], parts.upper[part, neuron]
    # Each row on the scale of the neuron's width, so that one step suits all; of an upper end the negative one.
    scale = torch.cat([high - low, low - high])
    ends = torch.cat([low, -high])
    # Where nothing is known of later neurons, they say nothing.
    within, known = (net, parts) if bool(parts.signs[:, first:].any()) else (net.up_to(layer), parts.up_to(first))
    size = min(ROWS, max(TERMS // max(within.neurons.terms, 1), 16))
    for start in range(0, len(ends), size):
        if time.perf_counter() > until:
            break
        some = torch.arange(start, min(start + size, len(ends)), device=ends.device)
        which = some % len(part)
        rows = net.neurons.at(neuron[which]).times(1 / scale[some]).reading(len(within.lower))
        found = optimise(within, Domains.over(rows, known.at(part[which])), steps, LR, target=0.0).bound
        ends[some] = torch.maximum(ends[some], found * scale[some].abs())
    width, (low, high) = high - low, (ends[: len(part)], -ends[len(part) :])
    empty = torch.zeros(len(parts), dtype=torch.bool, device=width.device)
    empty[part[low - high > EMPTY * width]] = True
    signs, lower, upper = parts.signs.clone(), parts.lower.clone(), parts.upper.clone()
    lower[part, neuron], upper[part, neuron] = low, high
    signs[part, neuron] = torch.where(low >= 0, 1.0, torch.where(high <= 0, -1.0, 0.0)).to(signs.dtype)
    return Parts(signs, lower, upper), empty
