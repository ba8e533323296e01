"""Proves or refutes the robustness of one image: IBP, CROWN, α-CROWN, then branch and bound.

Each stage works on the classes that those before it have not proved.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import get_args

import torch
from torch import Tensor, nn

from rampart.attacks import Ball, pgd
from rampart.attacks.ball import with_gradients
from rampart.bounds import crown, ibp, reduced
from rampart.bounds.box import covering, pixel_box
from rampart.bounds.domains import Domains, Optimised, optimise
from rampart.bounds.exact import Exact
from rampart.bounds.margins import Method, chain_bounds, check, margin_spec, overflowed, proof_tolerance, require_exact
from rampart.bounds.reduced import Reduced
from rampart.errors import BoundError, UnsupportedLayer, is_out_of_memory, require, require_numbers, unknown
from rampart.models import Chain, checked_logits, require_fixed, require_tensors
from rampart.verification.branching import Outcome, branch_and_bound
from rampart.verification.splitting import Branching
from rampart.verification.verdict import Verdict, is_counterexample

log = logging.getLogger(__name__)

ENGINES = ("native", "abcrown")
BOUNDS: tuple[Method, ...] = ("ibp", "crown", "alpha-crown")
STAGES = ("attack", *BOUNDS, "branch-and-bound")
ALPHA_STEPS = 20


@torch.inference_mode(False)  # where it is on there are no gradients
def verify(
    model: nn.Module,
    image: Tensor,
    label: int,
    eps: float,
    timeout: float = 180.0,
    attack_first: bool = False,
    engine: str = "native",
    memory: int = crown.MEMORY,
    complete: bool = True,
    branching: Branching = "kfsb",
    max_domains: int = 1_000_000,
    exact: Exact | None = None,
) -> Verdict:
    """Whether the model gives `label` on the whole L∞ ball of radius eps (pixels) around `image`, cut to [0, 1].

    Args:
        model: pixels -> logits, in eval mode; an architecture beyond the native engine is bounded by auto_LiRPA,
            without branch and bound.
        image: [C, H, W] in [0, 1]. One that is misclassified as it stands is its own counterexample (`unsafe`).
        timeout: seconds after which no further stage, or batch of domains, is begun.
        attack_first: whether PGD looks for a counterexample first.
        engine: `native`, or `abcrown`: α,β-CROWN, where it is installed, for which `attack_first` and the settings
            below mean nothing.
        memory: MiB that the native engine's coefficients take at once.
        complete: whether branch and bound follows where bounds do not settle the image.
        branching: its rule (`branch_and_bound`).
        max_domains: that it bounds at most.
        exact: the model as it is bounded, where that is known already.

    Raises:
        SettingsError: a bad ε, label, time limit, engine or image. ModelError: the model does not take the image, or
            overwrites it. UnsupportedLayer: no engine can bound the model.
    """
    require(engine in ENGINES, unknown("verification engine", engine, ENGINES))
    require(branching in get_args(Branching), unknown("branching rule", branching, get_args(Branching)))
    require(memory >= 1, f"memory must be 1 MiB or more, not {memory}")
    require_numbers(eps=eps, timeout=timeout)
    require(timeout > 0, f"timeout must be above 0 seconds, not {timeout:g}")
    require(0 <= eps <= 1, f"eps must lie between 0 and 1 (pixels), not {eps:g}")
    require_fixed(model, "a verdict is on")
    require_tensors(image=image)
    require_exact(image)
    image = with_gradients(image)
    with torch.no_grad():
        logits = checked_logits(model, image[None])
    require(label in range(logits.shape[1]), f"label {label} is not one of the model's {logits.shape[1]} classes")
    finite = bool(logits.isfinite().all())
    if engine == "abcrown" and finite:
        from rampart.verification import abcrown

        return abcrown.verify(model, image, label, eps, timeout)
    deadline = time.perf_counter() + timeout
    problem = _Problem(model, exact or Exact.of(model, image[None]), image, label, eps, deadline, memory)
    if not finite:
        log.error("verification failed: the network's output is NaN or infinite on the image itself")
        return problem.verdict("error")
    while True:
        try:
            return problem.settle(attack_first, complete, branching, max_domains)
        except (BoundError, RuntimeError) as error:
            if not is_out_of_memory(error) or problem.memory == 1:
                log.error("verification failed: %s", error)
                return problem.verdict("error")
        problem.memory //= 2
        log.warning("out of memory: beginning the image anew with memory=%d", problem.memory)


class _Problem:
    """One image on its way through the stages: what float32 rounds, wherever in the ball, is no proof (`Exact`)."""

    def __init__(
        self,
        model: nn.Module,
        exact: Exact,
        image: Tensor,
        label: int,
        eps: float,
        deadline: float,
        memory: int,
    ) -> None:
        self.model, self.image, self.label, self.eps = model, image, label, eps
        self.deadline, self.memory, self.started = deadline, memory, time.perf_counter()
        self.stage = ""
        self.exact, self.x = exact, image[None].to(exact.dtype)
        self.y = torch.tensor([label], device=image.device)
        self.seconds: dict[str, float] = {}
        self.bounds: Tensor | None = None  # [K], +inf at the label
        self.beyond: UnsupportedLayer | None = None  # why a stage could bound nothing
        self.found: Tensor | None = None  # a counterexample that branch and bound came upon
        self.reduced: Reduced | None = None
        self.roots: Optimised | None = None
        self.inputs: ibp.Intervals = {}
        with torch.no_grad():
            self.chain: Chain | None = exact.layout.resolve(self.x) if exact.layout else None
            logits = self.chain.output if self.chain else exact.logits(self.x)
        self.target = proof_tolerance(logits).item()  # what a bound must exceed

    def settle(self, attack_first: bool, complete: bool, branching: Branching, max_domains: int) -> Verdict:
        """Goes through the stages; settings as in `verify`."""
        with self.timed("attack"):
            example = self.image if self.holds(self.image) else None
            example = self.attacked() if example is None and attack_first else example
        if example is not None:
            return self.verdict("unsafe", example)
        for stage in BOUNDS:
            with self.timed(stage), torch.no_grad():
                self.raise_bound(stage)
            if self.proved:
                return self.verdict("safe-incomplete")
            if self.late:
                return self.verdict("timeout" if complete else "unknown")
        if self.bounds is None and self.beyond:
            raise self.beyond
        if self.reduced is not None and complete:
            with self.timed("branch-and-bound"), torch.no_grad():
                outcome = self.search(branching, max_domains)
            return self.verdict(outcome.status, self.found, outcome.domains)
        # Branch and bound would have come upon what an attack finds.
        if complete and not attack_first:
            with self.timed("attack"):
                example = self.attacked()
        return self.verdict("unknown" if example is None else "unsafe", example)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        self.stage = stage
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started

    @property
    def late(self) -> bool:
        return time.perf_counter() > self.deadline

    @property
    def proved(self) -> bool:
        return self.bounds is not None and bool((self.bounds > self.target).all())

    def verdict(self, status: str, example: Tensor | None = None, domains: int = 0) -> Verdict:
        nothing = self.bounds is None or example is not None or status == "error"
        bound = -torch.inf if nothing else self.bounds.min().item()  # type: ignore[union-attr]
        return Verdict(status, bound, example, domains, time.perf_counter() - self.started, self.stage, self.seconds)

    def raise_bound(self, stage: Method) -> None:
        """Bounds the classes that are left by the stage's method."""
        if self.chain is None:
            try:
                bounds = self.exact.bounds(self.x, self.y, self.eps, stage)[0]
            except UnsupportedLayer as beyond:  # for this method, or all
                self.beyond = beyond
            else:
                self.bounds = bounds if self.bounds is None else torch.maximum(self.bounds, bounds)
            return
        box = pixel_box(self.x, covering(self.eps))
        spec = margin_spec(self.y, self.chain.output.shape[1]).to(self.x.dtype)
        if stage == "ibp":
            self.bounds = _checked(chain_bounds(self.chain, box, spec, "ibp")[0])
            self.bounds[self.y] = torch.inf
            return
        assert self.bounds is not None
        left = (~(self.bounds > self.target)).nonzero().squeeze(1)
        if stage == "crown":
            self.inputs = crown.preactivations(self.chain, box, self.memory, single=True)
            check(self.inputs)
            found = crown.backward(self.chain, self.inputs, box, spec[:, left])[0]
        else:
            if reduced.size_of(self.inputs, box, 0) > reduced.LIMIT:
                log.warning("too many unstable neurons for alpha-CROWN and branch and bound: CROWN's bound stands")
                return
            self.reduced = reduced.reduce(self.chain, self.inputs, box, spec[:, left], 0, self.memory)
            roots = Domains.roots(self.reduced, self.reduced.outputs)
            self.roots = optimise(self.reduced, roots, ALPHA_STEPS, target=self.target)
            found = self.roots.bound
        self.bounds[left] = torch.maximum(self.bounds[left], _checked(found))

    def search(self, branching: Branching, max_domains: int) -> Outcome:
        """Branch and bound from the roots of α-CROWN, on the rows that it left."""
        assert self.reduced is not None
        assert self.roots is not None
        assert self.bounds is not None
        outcome = branch_and_bound(
            self.reduced, self.roots, self.refute, self.deadline, self.target, branching, max_domains=max_domains
        )
        # Every class that is not proved is among the rows; the others have bounds above the tolerance already.
        self.bounds = self.bounds.clamp(min=outcome.bound)
        return outcome

    def attacked(self) -> Tensor | None:
        (example,) = attack(self.model, self.exact.model, self.image[None], self.y, self.eps)
        return example

    def holds(self, example: Tensor) -> bool:
        return is_counterexample(self.exact.model, example, self.image, self.label, self.eps)

    def refute(self, points: Tensor) -> Tensor | None:
        """A point that the model gets wrong, [I], among the points [N, I] of the ball or near the best of them."""
        # Bounds are over a ball that is a little larger.
        ball = Ball.around(self.image[None], self.eps)
        images = ball.clip(points.to(self.image).view(-1, *self.image.shape))
        margins = _margins(self.model, images, self.label)
        nearest = images[margins.topk(min(PGD_SEEDS, len(images)), largest=False).indices]
        with torch.enable_grad():
            for _ in range(PGD_STEPS):
                nearest = nearest.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(_margins(self.model, nearest, self.label).sum(), nearest)
                nearest = ball.clip(nearest - self.eps / 4 * gradient.sign())
        tried = torch.cat([images[margins <= 0], nearest.detach()])
        for example in tried[_margins(self.model, tried, self.label) <= 0]:
            if self.holds(example):
                self.found = example
                return example.flatten()
        return None


def attack(model: nn.Module, exact: nn.Module, x: Tensor, y: Tensor, eps: float, seed: int = 0) -> list[Tensor | None]:
    """For each of B images the counterexample that PGD (20 steps, 3 restarts) finds, or None.

    Args:
        exact: the model in float64 (`Exact.model`), which confirms what is found.
        seed: of the starts, which depend on the whole batch.
    """
    found = pgd(model, x, y, eps, 20, restarts=3, generator=torch.Generator(x.device).manual_seed(seed))
    tried = zip(found.adversarial[0], found.success[0].tolist(), x, y.tolist(), strict=True)
    return [
        example if broken and is_counterexample(exact, example, image, label, eps) else None
        for example, broken, image, label in tried
    ]


def _checked(bounds: Tensor) -> Tensor:
    """Lower bounds as they are, or BoundError."""
    if overflowed(bounds):
        raise BoundError("a bound is NaN or infinite: the network's weights or activations overflow")
    return bounds


# Points of a batch of domains that PGD starts from, and its steps.
PGD_SEEDS, PGD_STEPS = 4, 5


def _margins(model: nn.Module, images: Tensor, label: int) -> Tensor:
    """z_label minus the largest other logit, [N]."""
    logits = model(images)
    others = logits.index_fill(1, torch.tensor([label], device=logits.device), -torch.inf)
    return logits[:, label] - others.amax(1)
