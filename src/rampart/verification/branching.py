"""Branch and bound, in which hard parts of the ball get tighter bounds of their neurons before they are split."""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from rampart.bounds.box import Box
from rampart.bounds.domains import Domains, Optimised, Parts, back, optimise
from rampart.bounds.narrowing import Starts, mattering, narrowed
from rampart.bounds.reduced import Reduced
from rampart.verification.choosing import least_growth
from rampart.verification.joint import charge, joint_gain
from rampart.verification.neurons import Site, sites, tightened
from rampart.verification.splitting import Branching, Domain, Search

# Of the time left, what tighter bounds of all neurons of the ball may take.
TIGHTENING_SHARE = 0.25
# Of `optimise`, for the neurons' bounds of a part of it.
NARROWING_STEPS = 5
# Of the outputs' bounds with them.
ROOT_STEPS = 20
# Of the cost of narrowing a part, what an attempt at it by splits alone may cost that does not go well.
PROBE_SHARE = 0.25
# Parts that are narrowed together.
AT_ONCE = 16
# A part is narrowed again if narrowing has brought its bound nearer to the target by this share.
WORTHWHILE = 0.15
# Splits alone are tried where no more is missing to the target than this share of what they gained on a larger part.
HOPE = 0.8
# Of what a part's bound is charged with for neurons of convolutions, what bounding them together may bring.
JOINT_SHARE = 0.25
# Of a problem's layers, where the outputs are its last one.
LAST_HIDDEN = -2


class Outcome(NamedTuple):
    """How the search ended.

    Args:
        status: `safe`, `unsafe`, `timeout` (time or domains ran out) or `unknown` (what is left is nearer to 0 than the
            tolerance of a proof).
        bound: the lowest bound of a domain that is left; the target for `safe` and `unsafe`.
        example: [I] for `unsafe`.
        domains: bounded in all.
    """

    status: str
    bound: float
    example: Tensor | None
    domains: int


@dataclass(order=True)
class _Node:
    """A domain whose neurons have bounds [U] of their own.

    Args:
        starts: what they were found with.
        own: the row's bound by them, which that of the domain, of splits tried before, may be above.
        reach: by how much splits alone raise it, as far as they have been tried.
    """

    domain: Domain
    neurons: Box = field(compare=False)
    own: float = field(compare=False)
    starts: Starts | None = field(default=None, compare=False)
    reach: float = field(default=math.inf, compare=False)

    def size(self, search: Search) -> int:
        """Bytes."""
        own = self.neurons.lower.nbytes + self.neurons.upper.nbytes + (0 if self.starts is None else self.starts.size)
        return search.size + own


def branch_and_bound(
    net: Reduced,
    roots: Optimised,
    refute: Callable[[Tensor], Tensor | None],
    deadline: float,
    target: float,
    rule: Branching = "kfsb",
    batch: int = 256,
    steps: int = 6,
    max_domains: int = 1_000_000,
) -> Outcome:
    """Whether every output of the problem is above `target` all over the ball.

    A domain is an output and signs of some neurons. The worst domains of all outputs are split together, on one neuron
    each, or on several while there are few; a child starts from its parent's slopes and multipliers. A domain whose
    neurons are all split is a linear program, which HiGHS solves: the bound is that of the duals that it finds.

    Where that does not go well, all neurons of the ball get tighter bounds (`tightened`), and then the last hidden ones
    of the worst domains, in that part of each where the output is no more than the target: this is all that has to be
    shown empty. Where it may suffice, what the relaxations of each place's neurons cost is bounded for all of them
    together (`joint_gain`). With these bounds the domain is split as above, if that has any hope; if it does not go
    well either, its two children are treated in the same way.

    Args:
        roots: the outputs over the whole ball (`optimise`).
        refute: given points [N, I] of the ball, a counterexample among or near them, or None.
        deadline: as time.perf_counter() tells it.
        rule: of the neuron that is split: `babsr` (the largest intercept of its relaxation, after Bunel et al. 2020),
            `gap` (the largest error of its relaxation at the point that the linear bound takes for the worst) or `kfsb`
            (of the best few by both, the one whose children have the best bounds: De Palma et al. 2021).
        batch: children bounded at once.
        steps: of `optimise` for each.
        max_domains: bounded in all.
    """
    search = Search(net, len(net.lower), refute, target, deadline, rule, batch, steps, max_domains)
    opened = search.examine(torch.arange(len(roots.bound), device=roots.bound.device), roots, roots.bound)
    if opened:
        opened = search.settle(opened, Box(net.lower, net.upper), _patience(opened[0], net.layers[-1]))
    if opened and search.example is None and not search.late:
        opened = _narrowing(search, roots.bound, opened)
    if search.example is not None:
        return Outcome("unsafe", target, search.example, search.domains)
    status = "timeout" if opened else "unknown" if search.unresolved else "safe"
    left = [domain.bound for domain in opened] + search.unresolved
    return Outcome(status, min(left, default=target), None, search.domains)


def _patience(domain: Domain, layer: tuple[int, int]) -> float:
    """Domains that may be bounded before new bounds of a layer's neurons in this one are the better bargain."""
    start, stop = layer
    return PROBE_SHARE * 2 * int((domain.signs[start:stop] == 0).sum())


def _narrowing(search: Search, bounds: Tensor, opened: list[Domain]) -> list[Domain]:
    """What is left of the rows of `opened` at the end, and of the whole ball; `bounds` [K] are those of the rows."""
    now = time.perf_counter()
    net = tightened(search.net, now + TIGHTENING_SHARE * (search.deadline - now))
    search.net, search.relus = net.followed_by_outputs(bounds, search.target), len(net.lower)
    local = sites(search.net)
    rows = torch.tensor(sorted({domain.row for domain in opened}), device=bounds.device)
    parts = Parts.whole(search.net, len(rows))
    parts.signs[torch.arange(len(rows), device=rows.device), search.relus + rows] = -1
    roots = optimise(search.net, Domains.over(search.net.outputs.at(rows), parts), ROOT_STEPS, target=search.target)
    search.domains += len(rows)
    least = {int(row): min(d.bound for d in opened if d.row == row) for row in rows}
    known = bounds.new_tensor([least[int(row)] for row in rows])
    nodes = [
        _Node(domain, Box(search.net.lower, search.net.upper), float(roots.bound[domain.origin]))
        for domain in search.examine(rows, roots, torch.maximum(roots.bound, known))
    ]
    heapq.heapify(nodes)
    while nodes and search.example is None and not search.is_late(sum(node.size(search) for node in nodes)):
        worst = [heapq.heappop(nodes)]
        # All that are narrowed together have starts, or none has.
        while nodes and len(worst) < AT_ONCE and (nodes[0].starts is None) == (worst[0].starts is None):
            worst.append(heapq.heappop(nodes))
        for node in _worked_on(search, local, worst):
            heapq.heappush(nodes, node)
    return [node.domain for node in nodes]


def _worked_on(search: Search, local: list[Site], nodes: list[_Node]) -> list[_Node]:
    """What is left of nodes: of each nothing, itself where it is to be narrowed anew or a limit is reached, or its
    children."""
    again: list[_Node] = []
    parents: list[_Node] = []
    for node in _bounded(search, local, nodes):
        domain, before = node.domain, nodes[node.domain.origin].own
        worthwhile = node.own - before >= WORTHWHILE * (search.target - before)
        if search.target - node.own <= HOPE * node.reach:
            left = search.settle([domain], node.neurons, _patience(domain, search.net.layers[LAST_HIDDEN]))
            if not left:
                continue
            least = min(part.bound for part in left)
            node.reach = least - node.own
            domain.bound = max(domain.bound, least)
        (again if worthwhile else parents).append(node)
    if search.late or search.example is not None or not parents:
        return again + parents
    domains, neurons = [node.domain for node in parents], _neurons(parents)
    split = least_growth(search, domains, neurons, LAST_HIDDEN)
    children = search.children(domains, neurons, *split)
    return again + [replace(parents[child.origin], domain=child) for child in children]


def _bounded(search: Search, local: list[Site], nodes: list[_Node]) -> list[_Node]:
    """Those that are not proved by narrowing them, with their new bounds; where it may suffice, the neurons of each
    site of `local` are bounded together."""
    net, (first, stop) = search.net, search.net.layers[LAST_HIDDEN]
    domains = [node.domain for node in nodes]
    rows = torch.tensor([domain.row for domain in domains], device=net.lower.device)
    signs = torch.stack([domain.signs for domain in domains]).to(net.lower)
    start = search.domains_of(domains, torch.arange(len(nodes), device=rows.device), signs, _neurons(nodes))
    begun = [node.starts for node in nodes if node.starts is not None]
    parts, empty, starts = narrowed(
        net,
        start.parts,
        LAST_HIDDEN,
        NARROWING_STEPS,
        search.deadline,
        mattering(net, rows, LAST_HIDDEN),
        Starts.joined(begun, stop - first) if begun else None,
    )
    found = optimise(net, replace(start, parts=parts), search.steps, target=search.target)
    search.domains += len(nodes)
    bound, missing = found.bound.clone(), search.target - found.bound
    if local:
        relu = back(net, found.domains).relu
        hope = -JOINT_SHARE * charge(relu, found.domains, local).sum(1)
        near = ((missing >= 0) & (missing < hope) & ~empty).nonzero().squeeze(1)
        bound[near] += joint_gain(net, found.domains.at(near), relu[near], local, missing[near], search.deadline)
    known = net.lower.new_tensor([domain.bound for domain in domains])
    return [
        _Node(
            domain,
            Box(parts.lower[domain.origin], parts.upper[domain.origin]),
            float(found.bound[domain.origin]),
            None if starts is None else starts.of_part(domain.origin, stop - first),
            nodes[domain.origin].reach,
        )
        for domain in search.examine(rows, found, torch.maximum(bound, known).masked_fill(empty, torch.inf))
    ]


def _neurons(nodes: list[_Node]) -> Box:
    """Their neurons' bounds, [N, U]."""
    lower, upper = zip(*((node.neurons.lower, node.neurons.upper) for node in nodes), strict=True)
    return Box(torch.stack(lower), torch.stack(upper))
