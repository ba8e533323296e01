"""Tighter bounds of all neurons in the whole ball: by α-CROWN, and a convolution's by branch and bound, one by one.

A neuron of a convolution sees a small part of the image and reads few unstable neurons: a domain of its own problem
costs a hundredth of one of the outputs' or less, and what it gains makes every later bound tighter. Tjeng et al. 2019
tighten bounds in this way by mixed-integer programs.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from rampart.bounds.box import Box
from rampart.bounds.domains import Domains, Optimised, Parts, optimise
from rampart.bounds.narrowing import LR, narrowed
from rampart.bounds.reduced import Reduced, Rows
from rampart.verification.splitting import pairs, scores

# Of `optimise`: for a neuron over the whole ball, and for a domain. Its parent's slopes are nearly as good as its own.
STEPS, DOMAIN_STEPS = 10, 1
# How often the domains of a neuron are split: all while they are FEW, then the worse half.
ROUNDS, FEW = 8, 4
# Domains of a row that so many rounds leave, at most.
MOST = 64
# Of the terms of a pass over all neurons before a layer, what one over a site's problem may have.
LOCAL = 0.1
# Terms of a pass over the domains of neurons that are bounded together: a time limit is looked at between passes.
TERMS = 10**9


def tightened(net: Reduced, until: float) -> Reduced:
    """The problem with tighter bounds of its neurons, layer after layer; those found stable are read no more.

    Args:
        until: as time.perf_counter() tells it, after which what is left keeps its bounds.
    """
    layer = 1
    while layer < len(net.layers):
        count, local = len(net.layers), sites_of(net, layer)
        others = torch.ones_like(net.lower, dtype=torch.bool)
        for site in local:
            others[site.which] = False
        which = others[None, slice(*net.layers[layer])]
        parts = narrowed(net, Parts.whole(net, 1), layer, STEPS, until, which).parts
        lower, upper = parts.lower[0].clone(), parts.upper[0].clone()
        for site in local:
            ends = site.ends(net, until)
            lower[site.which], upper[site.which] = ends.lower, ends.upper
        net = net.without((lower >= 0).to(lower) - (upper <= 0).to(lower), lower, upper)
        # A layer whose neurons are all stable is gone.
        layer += len(net.layers) == count
    return net


@dataclass
class Site:
    """Neurons of one place of a map, and what they read.

    Args:
        which: [n] neurons of the problem, ascending.
        read: [R] neurons before them.
        seen: [I'] inputs of either.
    """

    which: Tensor
    read: Tensor
    seen: Tensor

    @classmethod
    def of(cls, net: Reduced, which: Tensor) -> Site:
        read, more = torch.zeros_like(net.lower, dtype=torch.bool), (net.neurons.of_relu[which] != 0).any(0)
        while bool((more != read).any()):
            read, more = more, more | (net.neurons.of_relu[more] != 0).any(0)
        numbers = read.nonzero().squeeze(1)
        seen = (net.neurons.of_input[torch.cat([numbers, which])] != 0).any(0)
        return cls(which, numbers, seen.nonzero().squeeze(1))

    @property
    def terms(self) -> int:
        """Of a pass over one domain."""
        return len(self.read) * (len(self.read) + len(self.seen))

    def problem(self, net: Reduced, rows: Rows, with_own: bool) -> Reduced:
        """The problem whose outputs are these rows, which read what the neurons read, and if `with_own` themselves."""
        kept = torch.cat([self.read, self.which]) if with_own else self.read

        def within(rows: Rows) -> Rows:
            return Rows(rows.of_input[:, self.seen], rows.of_relu[:, kept], rows.constant)

        ends = [0, *(int((kept < stop).sum()) for _, stop in net.layers)]
        return Reduced(
            [(start, stop) for start, stop in pairwise(ends) if stop > start],
            within(net.neurons.at(kept)),
            within(rows),
            net.lower[kept],
            net.upper[kept],
            net.center[self.seen],
            net.half[self.seen],
        )

    def ends(self, net: Reduced, until: float) -> Box:
        """Bounds [n] of the neurons by branch and bound; those known where time ran out."""
        lower, upper = net.lower[self.which].clone(), net.upper[self.which].clone()
        together = max(TERMS // (2 * MOST * max(self.terms, 1)), 1)
        for some in torch.arange(len(lower), device=lower.device).split(together):
            if time.perf_counter() > until:
                break
            # Of each neuron and its negative, on the scale of its width.
            width, rows = (upper - lower)[some], net.neurons.at(self.which[some])
            both = Rows.joined([rows.times(1 / width), rows.times(-1 / width)])
            low, high = branched_bounds(self.problem(net, both, with_own=False), until).view(2, -1) * width
            lower[some], upper[some] = torch.maximum(lower[some], low), torch.minimum(upper[some], -high)
        return Box(lower, upper)


def sites(net: Reduced) -> list[Site]:
    """Of all layers."""
    return [site for layer in range(len(net.layers)) for site in sites_of(net, layer)]


def sites_of(net: Reduced, layer: int) -> list[Site]:
    """Of a layer whose neurons each read little: those are together of which one reads all that the others read.

    Those that read no neuron have none: their bounds are exact.
    """
    start, stop = net.layers[layer]
    read = (net.neurons.of_relu[start:stop, :start] != 0).float()
    size, shared = read.sum(1), read @ read.T
    left, found = size > 0, []
    for widest in size.argsort(descending=True, stable=True).tolist():
        if left[widest]:
            within = left & (shared[widest] == size)
            left &= ~within
            found.append(Site.of(net, within.nonzero().squeeze(1) + start))
            if found[-1].terms > LOCAL * start * (start + len(net.center)):
                return []
    return found


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
    """Lower bounds [K] of the problem's outputs, by some rounds of branch and bound; 0 where they are 0 or more.

    Not by `Search`, which takes the worst domains of all outputs first: here each output gets its share of one pass,
    and the small problems of a network are bounded several times as fast.
    """
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
