"""Parts of the ball, split until each is proved (Bunel et al. 2020), with β-CROWN's bounds (Wang et al. 2021)."""

from __future__ import annotations

import heapq
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Literal

import torch
from torch import Tensor

from rampart.bounds import domains as linear
from rampart.bounds.box import Box
from rampart.bounds.domains import Domains, Optimised, Parts, optimise
from rampart.bounds.reduced import Reduced
from rampart.verification.program import linear_program

Branching = Literal["kfsb", "babsr", "gap"]

# Neurons that a domain remembers as worth a split, best first.
CANDIDATES = 6
# Those of each score that `kfsb` tries.
FILTERED = 3
# Beyond this the search of an image ends, as at its time limit.
OPEN_BYTES = 2 << 30

log = logging.getLogger(__name__)


@dataclass(order=True)
class Domain:
    """A row and the signs of some neurons; what its children start from.

    Args:
        bound: of the row where the signs hold.
        number: tells domains of equal bounds apart.
        origin: the place of what it came from among what was worked on together.
        row: of the outputs.
        signs: [U] int8.
        slopes, multipliers: [U] float16: a start, not part of a proof.
        candidates: [CANDIDATES] neurons to split next, best first.
    """

    bound: float
    number: int
    origin: int = field(compare=False)
    row: int = field(compare=False)
    signs: Tensor = field(compare=False)
    slopes: Tensor = field(compare=False)
    multipliers: Tensor = field(compare=False)
    candidates: Tensor = field(compare=False)


@dataclass
class Search:
    """What is asked, and what is known so far.

    Args:
        net: the problem, of whose neurons the first `relus` may be split.
        refute: given points [N, I] of the ball, a counterexample among or near them, or None.
        target: above which a row is proved.
        deadline: as time.perf_counter() tells it.
        rule: of the neuron that is split (`branch_and_bound`).
        batch: children bounded at once.
        steps: of `optimise` for each.
        max_domains: bounded in all.
        example: [I] a counterexample.
        unresolved: bounds of linear programs that neither prove nor refute: nearer to 0 than the tolerance of a proof,
            or -inf of those that were not solved.
        domains: bounded so far.
        late: whether a limit was reached.
    """

    net: Reduced
    relus: int
    refute: Callable[[Tensor], Tensor | None]
    target: float
    deadline: float
    rule: Branching
    batch: int
    steps: int
    max_domains: int
    example: Tensor | None = None
    unresolved: list[float] = field(default_factory=list)
    domains: int = 0
    late: bool = False
    numbers: int = 0

    def examine(self, row: Tensor, found: Optimised, bound: Tensor) -> list[Domain]:
        """The domains that are not proved; looks for a counterexample where they are worst."""
        left = (~(bound > self.target)).nonzero().squeeze(1)
        if not len(left):
            return []
        order = left[bound[left].argsort()]
        self.example = self.refute(found.last.x[order[:32]])
        if self.example is not None:
            return []
        signs = found.domains.parts.signs
        settled = (signs[left, : self.relus] != 0).all(1)
        for domain in left[settled].tolist():
            self.solve(int(row[domain]), signs[domain])
            if self.example is not None:
                return []
        left = left[~settled]
        best = self.candidates(found, left)
        self.numbers += len(left)
        return [
            Domain(
                float(bound[domain]),
                self.numbers - place,
                domain,
                int(row[domain]),
                signs[domain].to(torch.int8),
                *found.domains.start(domain),
                best[place],
            )
            for place, domain in enumerate(left.tolist())
        ]

    def settle(self, found: list[Domain], neurons: Box, patience: float) -> list[Domain]:
        """Splits domains, the worst first; returns what is left at the end.

        That is nothing if all are proved. Else there is a counterexample, a limit is reached, or it does not go well:
        more than `patience` domains have been bounded, and of the last ones more than half were not proved.

        Args:
            found: domains in all of which the neurons have the bounds `neurons` [U].
        """
        opened, first, share = list(found), self.domains, 0.0
        heapq.heapify(opened)
        while opened and self.example is None and not self.is_late(self.size * len(opened)):
            if share > 0.5 and self.domains - first > patience:
                break
            parents = [heapq.heappop(opened) for _ in range(min(max(self.batch // 2, 1), len(opened)))]
            before = self.domains
            try:
                children = self.children(parents, neurons, *self.split(parents, neurons, self.batch))
            except torch.OutOfMemoryError:
                if self.batch <= 2:
                    raise
                self.batch //= 2
                log.warning("the GPU ran out of memory: going on with %d domains at once", self.batch)
                children = parents
            else:
                share = len(children) / (self.domains - before)
            for child in children:
                heapq.heappush(opened, child)
        return opened

    @property
    def size(self) -> int:
        """Bytes of an open domain."""
        return 5 * len(self.net.lower)

    def is_late(self, opened: int) -> bool:
        """Whether a limit is reached, with so many bytes of open domains."""
        if opened > OPEN_BYTES:
            log.warning("open domains take more than %d MiB: giving up", OPEN_BYTES >> 20)
            self.late = True
        self.late |= time.perf_counter() > self.deadline or self.domains >= self.max_domains
        return self.late

    def children(self, parents: list[Domain], neurons: Box, signs: Tensor, parent: Tensor) -> list[Domain]:
        """Those of signs [C, U] that are not proved; `parent` [C] of each; `neurons` as for `domains_of`."""
        domains = self.domains_of(parents, parent, signs, neurons)
        found = optimise(self.net, domains, self.steps, target=self.target)
        row = torch.tensor([domain.row for domain in parents], device=parent.device)[parent]
        known = found.bound.new_tensor([domain.bound for domain in parents])[parent]
        self.domains += len(signs)
        # A part of a ball is no worse than the whole.
        left = self.examine(row, found, torch.maximum(found.bound, known))
        return [replace(child, origin=int(parent[child.origin])) for child in left]

    def domains_of(self, parents: list[Domain], parent: Tensor, signs: Tensor, neurons: Box) -> Domains:
        """Parts of the given signs [C, U], `parent` [C] of each, to start from their parents' bounds.

        Args:
            neurons: their bounds, [U] in all parents or [P, U] in each.
        """
        row = torch.tensor([domain.row for domain in parents], device=parent.device)[parent]
        slopes = torch.stack([domain.slopes for domain in parents])[parent].to(signs)
        multipliers = torch.stack([domain.multipliers for domain in parents])[parent].to(signs)
        lower, upper = (ends.expand(len(parents), -1)[parent] for ends in (neurons.lower, neurons.upper))
        parts = Parts(signs, lower, upper)
        return Domains(self.net.outputs.at(row), parts, slopes, multipliers)

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
        """Neurons [N, CANDIDATES] to split next, best first; those of known sign come last."""
        known = found.domains.parts.signs[which, : self.relus] != 0
        scored = {
            name: score[which, : self.relus].masked_fill(known, -torch.inf) for name, score in scores(found).items()
        }
        count = min(CANDIDATES, self.relus)
        if self.rule != "kfsb":
            return scored[self.rule].topk(count).indices
        # In turns the best by each.
        best = [score.topk(min(FILTERED, count)).indices for score in scored.values()]
        return torch.stack(best, 2).flatten(1)

    def split(self, parents: list[Domain], neurons: Box, batch: int) -> tuple[Tensor, Tensor]:
        """(signs [C, U] of the children, [C] the parent of each): on one neuron, or on several of few parents."""
        signs = torch.stack([domain.signs for domain in parents]).to(neurons.lower)
        candidates = torch.stack([domain.candidates for domain in parents])
        free = signs.gather(1, candidates) == 0
        rounds = max((batch // len(parents)).bit_length() - 1, 1)
        if self.rule == "kfsb" and rounds == 1:
            candidates = self.filtered(parents, signs, candidates, free, neurons)
            free = signs.gather(1, candidates) == 0
        children, origins = [], []
        for parent in range(len(parents)):
            chosen = list(dict.fromkeys(candidates[parent][free[parent]].tolist()))[:rounds]
            for values in product((1.0, -1.0), repeat=len(chosen)):
                child = signs[parent].clone()
                child[chosen] = child.new_tensor(values)
                children.append(child)
                origins.append(parent)
        return torch.stack(children), torch.tensor(origins, device=signs.device)

    def filtered(self, parents: list[Domain], signs: Tensor, candidates: Tensor, free: Tensor, neurons: Box) -> Tensor:
        """The best candidate [P, 1] of each parent: whose worse child has the better bound, before any step on it."""
        count, tried = candidates.shape
        parent = torch.arange(count, device=signs.device).repeat_interleave(tried * 2)
        tries = self.domains_of(parents, parent, pairs(signs, candidates).flatten(0, 1), neurons)
        bound = linear.back(self.net.single, tries.single()).bound.view(count, tried, 2).clamp(max=self.target)
        # Of equally bad worse children the better other one.
        score = (bound.amin(2) + 1e-3 * bound.amax(2)).masked_fill(~free, -torch.inf)
        return candidates.gather(1, score.argmax(1, keepdim=True))


def pairs(signs: Tensor, neurons: Tensor) -> Tensor:
    """[P, 2 T, U] signs [P, U] where each of the neurons [P, T] passes, and where it does not."""
    place, sign = neurons.repeat_interleave(2, 1), signs.new_tensor([1.0, -1.0]).repeat(neurons.shape[1])
    children = signs[:, None].repeat(1, len(sign), 1)
    return children.scatter_(2, place[..., None], sign[:, None].expand(len(signs), -1, 1))


def scores(found: Optimised) -> dict[str, Tensor]:
    """[D, U] of each rule: how much of the bound a neuron's relaxation costs."""
    relu, v = found.last.relu, found.v
    slope, intercept = found.domains.parts.above
    negative = relu.clamp(max=0)
    below = (relu - negative) * (v.relu() - found.domains.slopes * v)
    above = -negative * (slope * v + intercept - v.relu())
    return {"gap": below + above, "babsr": -negative * intercept}
