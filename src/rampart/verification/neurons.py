"""Tighter bounds of all neurons in the whole ball: by α-CROWN, and a convolution's by branch and bound, one by one.

A neuron of a convolution sees a small part of the image and reads few unstable neurons: a domain of its own problem
costs a hundredth of one of the outputs' or less, and what it gains makes every later bound tighter. Tjeng et al. 2019
tighten bounds in this way by mixed-integer programs.
"""

from __future__ import annotations

import time
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from rampart.bounds.domains import Domains, Optimised, Parts, optimise
from rampart.bounds.narrowing import LR, narrowed
from rampart.bounds.reduced import Reduced, Rows
from rampart.verification.splitting import pairs, scores

# Of `optimise`: for a neuron over the whole ball, and for a domain. Its parent's slopes are nearly as good as its own.
STEPS, DOMAIN_STEPS = 10, 1
# How often the domains of a neuron are split: all while they are FEW, then the worse half.
ROUNDS, FEW = 8, 4
# Domains of a neuron's end, at most, that come of it.
MOST = 64
# Terms of a pass over the domains of neurons that are bounded together: a time limit is looked at between passes.
TERMS = 10**9


def tightened(net: Reduced, until: float) -> Reduced:
    """The problem with tighter bounds of its neurons, layer after layer; those found stable are read no more.

    Args:
        until: as time.perf_counter() tells it, after which what is left keeps its bounds.
    """
    layer = 1
    while layer < len(net.layers):
        count, places = len(net.layers), sites(net, layer)
        # Those that read all the same, as of a linear map, have domains that cost as much as the outputs'.
        if len(places) > 1:
            net = _branched(net, places, until)
        else:
            parts = narrowed(net, Parts.whole(net, 1), layer, STEPS, until).parts
            net = net.without(parts.signs[0], parts.lower[0], parts.upper[0])
        # A layer whose neurons are all stable is gone.
        layer += len(net.layers) == count
    return net


def _branched(net: Reduced, places: list[Tensor], until: float) -> Reduced:
    """The problem with neurons bounded one by one, place by place."""
    lower, upper = net.lower.clone(), net.upper.clone()
    for place in places:
        rows = max(TERMS // (2 * MOST * max(site(net, place).neurons.terms, 1)), 1)
        for which in place.split(rows):
            if time.perf_counter() > until:
                break
            low, high = branched_bounds(site(net, which), until).view(2, -1) * (net.upper - net.lower)[which]
            lower[which] = torch.maximum(lower[which], low)
            upper[which] = torch.minimum(upper[which], -high)
    return net.without((lower >= 0).to(lower) - (upper <= 0).to(lower), lower, upper)


def sites(net: Reduced, layer: int) -> list[Tensor]:
    """A layer's neurons by which neurons they read: those at one place of a map are together."""
    start, stop = net.layers[layer]
    _, of = (net.neurons.of_relu[start:stop] != 0).unique(dim=0, return_inverse=True)
    return [(of == place).nonzero().squeeze(1) + start for place in range(int(of.max()) + 1)]


def site(net: Reduced, which: Tensor) -> Reduced:
    """The problem of the neurons `which` [n], of what they read alone.

    Its outputs are each of them, then the negative of each, on the scale of its width.
    """
    rows = net.neurons.at(which)
    read, more = torch.zeros_like(net.lower, dtype=torch.bool), (rows.of_relu != 0).any(0)
    while bool((more != read).any()):
        read, more = more, more | (net.neurons.of_relu[more] != 0).any(0)
    neurons = net.neurons.at(read)
    seen = (Rows.joined([neurons, rows]).of_input != 0).any(0)

    def within(rows: Rows) -> Rows:
        return Rows(rows.of_input[:, seen], rows.of_relu[:, read], rows.constant)

    ends = [0, *(int(read[:stop].sum()) for _, stop in net.layers)]
    scale = 1 / (net.upper - net.lower)[which]
    return Reduced(
        [(start, stop) for start, stop in pairwise(ends) if stop > start],
        within(neurons),
        within(Rows.joined([rows.times(scale), rows.times(-scale)])),
        net.lower[read],
        net.upper[read],
        net.center[seen],
        net.half[seen],
    )


class _Domains(NamedTuple):
    """N domains that are left of a problem's outputs.

    Args:
        row, bound: [N], of the output.
        signs: [N, U] int8.
        slopes, multipliers: [N, U] float16.
        neuron: [N] that is to be split; -1 where all are.
    """

    row: Tensor
    bound: Tensor
    signs: Tensor
    slopes: Tensor
    multipliers: Tensor
    neuron: Tensor

    def at(self, which: Tensor) -> _Domains:
        return _Domains(*(tensor[which] for tensor in self))


def branched_bounds(net: Reduced, until: float) -> Tensor:
    """Lower bounds [K] of the problem's outputs, by some rounds of branch and bound; 0 where they are 0 or more."""
    count = len(net.outputs.constant)
    roots = optimise(net, Domains.roots(net, net.outputs), STEPS, LR, target=0.0)
    left = _left(torch.arange(count, device=roots.bound.device), roots, roots.bound)
    for _ in range(ROUNDS):
        chosen = _worse(left, count)
        if not bool(chosen.any()) or time.perf_counter() > until:
            break
        children = _children(net, left.at(chosen))
        left = _Domains(*(torch.cat(both) for both in zip(left.at(~chosen), children, strict=True)))
    return roots.bound.new_zeros(count).scatter_reduce(0, left.row, left.bound, "amin")


def _left(row: Tensor, found: Optimised, bound: Tensor) -> _Domains:
    """Those with a bound below 0."""
    score = torch.stack([*scores(found).values()]).sum(0).masked_fill(~found.domains.parts.free, -1)
    best, neuron = score.max(1)
    signs = found.domains.parts.signs.to(torch.int8)
    domains = _Domains(row, bound, signs, *found.domains.start(), neuron.masked_fill(best < 0, -1))
    return domains.at(bound < 0)


def _worse(domains: _Domains, count: int) -> Tensor:
    """[N] those to split: of each of `count` rows all, or the half of lower bounds."""
    order = domains.bound.argsort()
    order = order[domains.row[order].argsort(stable=True)]
    size = torch.bincount(domains.row, minlength=count)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    rank = place - (size.cumsum(0) - size)[domains.row]
    chosen = torch.where(size <= FEW, size, (size + 1) // 2)
    return (rank < chosen[domains.row]) & (domains.neuron >= 0)


def _children(net: Reduced, parents: _Domains) -> _Domains:
    signs = pairs(parents.signs, parents.neuron[:, None]).flatten(0, 1).to(net.lower)
    parent = torch.arange(len(parents.row), device=signs.device).repeat_interleave(2)
    row, lower, upper = parents.row[parent], *(end.expand_as(signs) for end in (net.lower, net.upper))
    start = (values[parent].to(signs) for values in (parents.slopes, parents.multipliers))
    found = optimise(net, Domains(net.outputs.at(row), Parts(signs, lower, upper), *start), DOMAIN_STEPS, target=0.0)
    # A part of a ball is no worse than the whole.
    return _left(row, found, torch.maximum(found.bound, parents.bound[parent]))
