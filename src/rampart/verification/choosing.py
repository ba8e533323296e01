"""The neuron on which a narrowed part of the ball is split: the one by which the tree of parts grows least."""

from __future__ import annotations

import torch
from torch import Tensor

from rampart.bounds.box import Box
from rampart.bounds.domains import optimise
from rampart.verification.splitting import Domain, Search, pairs

# Neurons that are tried, and the steps of `optimise` for each of their two children, with this learning rate.
TRIED, STEPS, LR = 24, 6, 0.5
# By how much more the child that gains more will have gained once it is narrowed: where a neuron is as it seldom is,
# many others are known.
LEVER = 3.0
# Of what is missing, the least that a child is taken to gain.
LEAST_GAIN = 1e-3
# Of Newton, to float32's precision.
NEWTON_STEPS = 12


def least_growth(search: Search, parents: list[Domain], neurons: Box, layer: int) -> tuple[Tensor, Tensor]:
    """(signs [2 P, U] of the parents' children, [2 P] the parent of each).

    That is not the split whose worse child is best: many a last hidden neuron is hardly ever what it is in one of the
    two children, which is soon proved, so that the other has gained a little for next to nothing.

    Args:
        neurons: bounds [P, U] in each parent.
        layer: of whose neurons those are tried whose relaxation costs the bound most, beside the parents' candidates.
    """
    net, (first, stop) = search.net, search.net.layers[layer]
    signs = torch.stack([parent.signs for parent in parents]).to(net.lower)
    parent = torch.arange(len(parents), device=signs.device)
    whole = search.domains_of(parents, parent, signs, neurons)
    _, intercept = whole.parts.above
    cost = -whole.rows.of_relu[:, first:stop].clamp(max=0) * intercept[:, first:stop]
    costly = cost.topk(min(TRIED, stop - first)).indices + first
    tried = torch.cat([costly, torch.stack([parent.candidates for parent in parents])], 1)
    gains = _gains(search, parents, neurons, signs, tried)
    less, more = gains.clamp(LEAST_GAIN, 1).sort(2).values.unbind(2)
    rate = growth(less, (LEVER * more).clamp(max=1)).masked_fill(signs.gather(1, tried) != 0, torch.inf)
    chosen = tried.gather(1, rate.argmin(1, keepdim=True))
    return pairs(signs, chosen).flatten(0, 1), parent.repeat_interleave(2)


def growth(one: Tensor, other: Tensor) -> Tensor:
    """How fast a tree grows, as log φ, by splits whose children gain these shares of what is missing, each above 0.

    The root of φ^-one + φ^-other = 1 (Le Bodic and Nemhauser 2017, "ratio"): φ leaves prove what is missing.
    """
    rate = torch.zeros_like(one)
    for _ in range(NEWTON_STEPS):  # of a convex function, from its left: it does not overshoot
        first, second = torch.exp(-rate * one), torch.exp(-rate * other)
        rate = rate + (first + second - 1) / (one * first + other * second)
    return rate


def _gains(search: Search, parents: list[Domain], neurons: Box, signs: Tensor, tried: Tensor) -> Tensor:
    """[P, T, 2] what the two children by each neuron [P, T] gain, of what is missing in each parent."""
    parts = torch.cat([pairs(signs, tried), signs[:, None]], 1)
    parent = torch.arange(len(parents), device=signs.device).repeat_interleave(parts.shape[1])
    domains = search.domains_of(parents, parent, parts.flatten(0, 1), neurons).single()
    found = optimise(search.net.single, domains, STEPS, LR, target=search.target)
    bound, own = found.bound.view(len(parents), -1).tensor_split([-1], 1)
    missing = (search.target - own).clamp(min=torch.finfo(own.dtype).tiny)
    return ((bound - own) / missing).unflatten(1, (-1, 2))
