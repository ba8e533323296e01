"""Tighter bounds of a reduced problem's neurons than CROWN's."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rampart.bounds.domains import Domains, Parts, optimise
from rampart.bounds.reduced import Reduced

# Rows that are optimised at once, by the kind of device, and the terms of a pass over them: a second or two on a core,
# since a time limit is only looked at between them. On a GPU what costs time is the start of a product.
ROWS, TERMS = {"cpu": 512, "cuda": 8192}, 10**10
# By how much of a neuron's width its lower bound must be above the upper one to tell that there is no point: more than
# float32 loses on the way.
EMPTY = 1e-4
LR = 0.2


class Starts(NamedTuple):
    """What bounds of neurons were found with: where the search for tighter ones in a smaller part of the ball begins.

    Args:
        place: [N] of each neuron, ascending: counted in its layer, on from part to part.
        slopes, multipliers: [2 N, U'] float16 of the rows of the lower ends, then of the upper ones.
    """

    place: Tensor
    slopes: Tensor
    multipliers: Tensor

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(tensor.nbytes for tensor in self)

    def of(self, place: Tensor) -> Starts:
        """Those of some of these neurons [n]."""
        found = torch.searchsorted(self.place, place)
        rows = torch.cat([found, found + len(self.place)])
        return Starts(place, self.slopes[rows], self.multipliers[rows])

    def of_part(self, number: int, size: int) -> Starts:
        """Those of one of several parts, as those of the only one; `size` is the layer's."""
        begin, end = torch.searchsorted(self.place, self.place.new_tensor([number, number + 1]) * size).tolist()
        found = self.of(self.place[begin:end])
        return found._replace(place=found.place - number * size)

    @classmethod
    def joined(cls, parts: Sequence[Starts], size: int) -> Starts:
        """Those of several parts, each given as the only one; `size` is the layer's."""

        def rows(values: list[Tensor]) -> Tensor:
            lower, upper = zip(*(value.tensor_split(2) for value in values), strict=True)
            return torch.cat([*lower, *upper])

        place = torch.cat([part.place + number * size for number, part in enumerate(parts)])
        return cls(place, rows([part.slopes for part in parts]), rows([part.multipliers for part in parts]))


class Narrowed(NamedTuple):
    """What came of it.

    Args:
        parts: with tighter bounds of a layer's neurons.
        empty: [D] whether a part has turned out empty.
        starts: of the neurons that were narrowed; None where time ran out, or there were none.
    """

    parts: Parts
    empty: Tensor
    starts: Starts | None


def mattering(net: Reduced, outputs: Tensor, layer: int) -> Tensor:
    """[D, neurons of the last hidden layer] those whose bounds matter to each of D outputs'.

    Of the others, which it reads with a factor of 0 or more, it takes the lower side of the relaxation, which is the
    same whatever their bounds.
    """
    first, stop = net.layers[layer]
    return net.outputs.of_relu[outputs, first:stop] < 0


def narrowed(
    net: Reduced,
    parts: Parts,
    layer: int,
    steps: int,
    until: float,
    which: Tensor | None = None,
    starts: Starts | None = None,
) -> Narrowed:
    """Tighter bounds of a layer's neurons in D parts of the ball.

    A neuron's bounds hold where all known signs do, those of outputs among them (`Reduced.followed_by_outputs`): what
    is said of a neuron need only be true where the network may err (Kotha et al. 2023, whose multiplier of that
    condition is here β-CROWN's of the output's sign).

    Args:
        steps: of `optimise`.
        until: as time.perf_counter() tells it, after which what is left keeps its bounds.
        which: [D, neurons of the layer] those that get bounds, if not all.
        starts: what the same neurons were narrowed with in D parts that these are parts of.
    """
    first, stop = net.layers[layer]
    free = parts.signs[:, first:stop] == 0
    part, place = (free if which is None else free & which).nonzero(as_tuple=True)
    neuron, place = place + first, place + part * (stop - first)
    low, high = parts.lower[part, neuron], parts.upper[part, neuron]
    # Each row on the scale of the neuron's width, so that one step suits all; of an upper end the negative one.
    scale = torch.cat([high - low, low - high])
    ends = torch.cat([low, -high])
    # Where nothing is known of later neurons, they say nothing.
    within, known = (net, parts) if bool(parts.signs[:, first:].any()) else (net.up_to(layer), parts.up_to(first))
    begun = None if starts is None else starts.of(place)
    ended: list[tuple[Tensor, Tensor]] = []
    size = min(ROWS[ends.device.type], max(TERMS // max(within.neurons.terms, 1), 16))
    for begin in range(0, len(ends), size):
        if time.perf_counter() > until:
            break
        some = torch.arange(begin, min(begin + size, len(ends)), device=ends.device)
        of = some % len(part)
        rows = net.neurons.at(neuron[of]).times(1 / scale[some]).reading(len(within.lower))
        domains = Domains.over(rows, known.at(part[of]))
        if begun is not None:
            # These have none of later neurons, where nothing was known of them.
            for values, start in ((domains.slopes, begun.slopes), (domains.multipliers, begun.multipliers)):
                values[:, : start.shape[1]] = start[some]
        found = optimise(within, domains, steps, LR, target=0.0)
        ends[some] = torch.maximum(ends[some], found.bound * scale[some].abs())
        ended.append(found.domains.start())
    width, (low, high) = high - low, (ends[: len(part)], -ends[len(part) :])
    empty = torch.zeros(len(parts), dtype=torch.bool, device=width.device)
    empty[part[low - high > EMPTY * width]] = True
    signs, lower, upper = parts.signs.clone(), parts.lower.clone(), parts.upper.clone()
    lower[part, neuron], upper[part, neuron] = low, high
    signs[part, neuron] = torch.where(low >= 0, 1.0, torch.where(high <= 0, -1.0, 0.0)).to(signs.dtype)
    late = sum(len(slopes) for slopes, _ in ended) < len(ends)
    left = None if late or not ended else Starts(place, *map(torch.cat, zip(*ended, strict=True)))
    return Narrowed(Parts(signs, lower, upper), empty, left)
