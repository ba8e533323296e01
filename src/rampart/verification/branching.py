"""Branch and bound over the signs of unstable neurons (Bunel et al. 2020), with β-CROWN's bounds (Wang et al. 2021)."""

from __future__ import annotations

import heapq
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rampart.bounds import reduced
from rampart.bounds.reduced import Domains, Optimised, Reduced, Rows, optimise

Branching = Literal["kfsb", "babsr", "gap"]

# Neurons that a domain remembers as worth a split, best first.
CANDIDATES = 6
# Those of each score that `kfsb` tries.
FILTERED = 3


# Multiplier that float16 keeps.
LARGEST = 6e4
# Beyond this the search of an image ends, as at its time limit.
OPEN_BYTES = 2 << 30

log = logging.getLogger(__name__)


class Outcome(NamedTuple):
    """How the search ended.

    Args:
        status: `safe`, `unsafe`, `timeout` (time or domains ran out) or `unknown` (what is left is nearer to 0 than the
            tolerance of a proof).
        bound: the lowest bound of a domain that is left; above the target for `safe`.
        example: [I] for `unsafe`.
        domains: bounded in all.
    """

    status: str
    bound: float
    example: Tensor | None
    domains: int


@dataclass(order=True)
class _Domain:
    bound: float
    number: int
    row: int = field(compare=False)
    signs: Tensor = field(compare=False)  # [U] int8
    slopes: Tensor = field(compare=False)  # [U] float16: a start for the children, not part of a proof
    multipliers: Tensor = field(compare=False)  # [U] float16
    candidates: Tensor = field(compare=False)  # [CANDIDATES]


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
    neurons are all split is a linear program, which HiGHS solves.

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
    search = _Search(net, refute, target, rule)
    search.examine(torch.arange(len(roots.bound)), roots, roots.bound)
    while search.open and search.example is None:
        if time.perf_counter() > deadline or search.domains >= max_domains:
            return search.outcome("timeout")
        if search.bytes > OPEN_BYTES:
            log.warning("%d open domains take %d MiB: giving up", len(search.open), OPEN_BYTES >> 20)
            return search.outcome("timeout")
        parents = search.worst(max(batch // 2, 1))
        try:
            signs, parent = search.split(parents, batch)
            found = optimise(net, search.domains_of(parents, parent, signs), steps, target=target)
        except torch.OutOfMemoryError:
            if batch <= 2:
                raise
            batch //= 2
            log.warning("the GPU ran out of memory: going on with %d domains at once", batch)
            search.back(parents)
            continue
        row = torch.tensor([domain.row for domain in parents], device=parent.device)[parent]
        # A part of a ball is no worse than the whole.
        known = torch.tensor([domain.bound for domain in parents], device=parent.device)
        bound = torch.maximum(found.bound, known[parent])
        search.domains += len(signs)
        search.examine(row, found, bound)
    if search.example is not None:
        return search.outcome("unsafe")
    return search.outcome("unknown" if search.unresolved else "safe")


class _Search:
    """The open domains, and what is known."""

    def __init__(self, net: Reduced, refute: Callable[[Tensor], Tensor | None], target: float, rule: Branching) -> None:
        self.net, self.refute, self.target, self.rule = net, refute, target, rule
        self.open: list[_Domain] = []
        self.example: Tensor | None = None
        self.unresolved: list[float] = []
        self.domains = self.numbers = 0

    def outcome(self, status: str) -> Outcome:
        left = [domain.bound for domain in self.open[:1]] + self.unresolved
        return Outcome(status, min(left, default=self.target), self.example, self.domains)

    @property
    def bytes(self) -> int:
        """That the open domains take, about."""
        return 5 * len(self.net.lower) * len(self.open)

    def back(self, domains: list[_Domain]) -> None:
        for domain in domains:
            heapq.heappush(self.open, domain)

    def worst(self, count: int) -> list[_Domain]:
        """Takes the `count` domains of the lowest bounds."""
        return [heapq.heappop(self.open) for _ in range(min(count, len(self.open)))]

    def domains_of(self, parents: list[_Domain], parent: Tensor, signs: Tensor) -> Domains:
        """Children of the given signs [C, U], `parent` [C] of each, to start from their parents' bounds."""
        row = torch.tensor([domain.row for domain in parents], device=parent.device)[parent]
        slopes = torch.stack([domain.slopes for domain in parents])[parent].float()
        multipliers = torch.stack([domain.multipliers for domain in parents])[parent].float()
        return Domains(self.net.outputs.at(row), signs, slopes, multipliers)

    def examine(self, row: Tensor, found: Optimised, bound: Tensor) -> None:
        """Keeps the domains that are not proved; looks for a counterexample where they are worst."""
        left = (bound <= self.target).nonzero().squeeze(1)
        if not len(left):
            return
        order = left[bound[left].argsort()]
        self.example = self.refute(found.last.x[order[:32]])
        if self.example is not None:
            return
        signs = found.domains.signs
        settled = (signs[left] != 0).all(1)
        for domain in left[settled].tolist():
            self.solve(int(row[domain]), signs[domain])
            if self.example is not None:
                return
        left = left[~settled]
        best = self.candidates(found, left)
        for place, domain in enumerate(left.tolist()):
            self.numbers += 1
            heapq.heappush(
                self.open,
                _Domain(
                    float(bound[domain]),
                    self.numbers,
                    int(row[domain]),
                    signs[domain].to(torch.int8),
                    found.domains.slopes[domain].half(),
                    found.domains.multipliers[domain].clamp(max=LARGEST).half(),
                    best[place],
                ),
            )

    def solve(self, row: int, signs: Tensor) -> None:
        """Settles a domain in which every neuron is linear."""
        bound, x = linear_program(self.net, self.net.outputs.at(slice(row, row + 1)), signs)
        if bound > self.target:
            return
        if x is not None:
            self.example = self.refute(x[None])
        if self.example is None:
            self.unresolved.append(bound)

    def candidates(self, found: Optimised, which: Tensor) -> Tensor:
        """Neurons [N, CANDIDATES] to split next, best first; those split already come last."""
        split = found.domains.signs[which] != 0
        scores = {name: score[which].masked_fill(split, -1) for name, score in _scores(self.net, found).items()}
        count = min(CANDIDATES, split.shape[1])
        if self.rule != "kfsb":
            return scores[self.rule].topk(count).indices
        # In turns the best by each.
        best = [score.topk(min(FILTERED, count)).indices for score in scores.values()]
        return torch.stack(best, 2).flatten(1)

    def split(self, parents: list[_Domain], batch: int) -> tuple[Tensor, Tensor]:
        """(signs [C, U] of the children, [C] the parent of each)."""
        signs = torch.stack([domain.signs for domain in parents]).float()
        candidates = torch.stack([domain.candidates for domain in parents])
        free = signs.gather(1, candidates) == 0
        rounds = max((batch // len(parents)).bit_length() - 1, 1)
        if self.rule == "kfsb" and rounds == 1:
            candidates = self.filtered(parents, signs, candidates, free)
            free = signs.gather(1, candidates) == 0
        children, origins = [], []
        for parent in range(len(parents)):
            chosen = list(dict.fromkeys(candidates[parent][free[parent]].tolist()))[:rounds]
            for values in product((1.0, -1.0), repeat=len(chosen)):
                child = signs[parent].clone()
                child[chosen] = torch.tensor(values, device=child.device)
                children.append(child)
                origins.append(parent)
        return torch.stack(children), torch.tensor(origins, device=signs.device)

    def filtered(self, parents: list[_Domain], signs: Tensor, candidates: Tensor, free: Tensor) -> Tensor:
        """The best candidate [P, 1] of each parent: whose worse child has the better bound, before any step on it."""
        count, tried = candidates.shape
        parent = torch.arange(count, device=signs.device).repeat_interleave(tried * 2)
        children = signs[parent]
        place = torch.arange(len(parent), device=signs.device)
        pair = torch.tensor([1.0, -1.0], device=signs.device)
        children[place, candidates.flatten().repeat_interleave(2)] = pair.repeat(count * tried)
        bound = reduced.back(self.net, self.domains_of(parents, parent, children)).bound.view(count, tried, 2)
        bound = bound.clamp(max=self.target)
        # Of equally bad worse children the better other one.
        score = (bound.amin(2) + 1e-3 * bound.amax(2)).masked_fill(~free, -torch.inf)
        return candidates.gather(1, score.argmax(1, keepdim=True))


def _scores(net: Reduced, found: Optimised) -> dict[str, Tensor]:
    """[D, U] of each rule: how much of the bound a neuron's relaxation costs."""
    relu, v = found.last.relu, found.v
    negative = relu.clamp(max=0)
    intercept = -net.lower * net.slope
    below = (relu - negative) * (v.relu() - found.domains.slopes * v)
    above = -negative * (net.slope * v + intercept - v.relu())
    return {"gap": below + above, "babsr": -negative * intercept}


def linear_program(net: Reduced, row: Rows, signs: Tensor) -> tuple[float, Tensor | None]:
    """(minimum of a row where every neuron has its sign, [I] the point); inf and None where there is no such point."""
    try:
        from scipy.optimize import linprog
    except ImportError:  # a machine that has PyTorch alone
        log.warning("scipy is not installed: a domain without unstable neurons stays unsolved")
        return float("-inf"), None
    exact = replace(net, neurons=net.neurons.double(), outputs=row.double(), lower=net.lower.double())
    neurons, output = exact.substituted(signs)
    ends = torch.stack([net.center - net.half, net.center + net.half], 1).double()
    found = linprog(
        output.of_input[0].numpy(force=True),
        (-signs.double()[:, None] * neurons.of_input).numpy(force=True) if len(signs) else None,
        (signs.double() * neurons.constant).numpy(force=True) if len(signs) else None,
        bounds=ends.numpy(force=True),
        method="highs",
    )
    if found.status == 2:  # infeasible
        return float("inf"), None
    if found.status != 0:
        return float("-inf"), None
    return float(found.fun + output.constant[0]), torch.from_numpy(found.x).to(net.center)
