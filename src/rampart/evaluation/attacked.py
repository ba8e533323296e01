"""Clean accuracy and attacks over a list of ε on a whole split."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from rampart.attacks import MEMBERS, AttackResult, Norm, apgd, autoattack, pgd
from rampart.attacks.objectives import Loss
from rampart.attacks.pgd import Schedule
from rampart.data import Split, in_parts, to_pixels
from rampart.errors import ModelError, UnsupportedLayer, require, require_choices
from rampart.ledger import evaluation_ledger
from rampart.models import NO_CLASS, Folded, Layout, classes_of, logits_of


@dataclass(frozen=True, kw_only=True)
class AttackPlan:
    """How a model is attacked.

    Args:
        attack: `pgd`, `apgd` (its step size follows the loss), or `autoattack` (the standard ensemble, which knows
            neither steps nor restarts nor loss).
        eps: radii in pixels; above 1 in L2 alone.
        norm: of the ball: `linf` or `l2`.
        steps: gradient steps a start.
        rel_step: PGD's step size as a share of ε (the study: 0.5).
        step_schedule: PGD's: `constant` or `cosine` (down to 0).
        restarts: random starts.
        loss: what is ascended: `ce`, `margin` or `dlr`.
        batch_size: images a batch.
    """

    attack: Literal["pgd", "apgd", "autoattack"] = "pgd"
    eps: tuple[float, ...] = (1 / 255, 2 / 255, 4 / 255, 8 / 255, 16 / 255)
    norm: Norm = "linf"
    steps: int = 10
    rel_step: float = 0.5
    step_schedule: Schedule = "constant"
    restarts: int = 1
    loss: Loss = "ce"
    batch_size: int = 256

    def __post_init__(self) -> None:
        require_choices(self)
        require(bool(self.eps), "eps needs one radius or more, as in eps=1/255,2/255")
        for eps in self.eps:
            require(
                0 <= eps <= 1 or (self.norm == "l2" and 0 <= eps < math.inf),
                f"eps must lie between 0 and 1 (pixels; above 1 with norm=l2 alone), not {eps:g}",
            )
        for name in ("steps", "restarts", "batch_size"):
            require(getattr(self, name) >= 1, f"{name} must be 1 or more, not {getattr(self, name)}")
        require(self.rel_step > 0, f"rel_step must be above 0, not {self.rel_step}")

    @property
    def radii(self) -> tuple[float, ...]:
        """Ascending, each once."""
        return tuple(sorted(set(self.eps)))

    def members(self) -> list[tuple[str, int]]:
        """(name, restart) of each start of the attack, by the numbers that an AttackResult calls them."""
        if self.attack == "autoattack":
            return [(name, MEMBERS[:number].count(name)) for number, name in enumerate(MEMBERS)]
        return [(self.attack, restart) for restart in range(self.restarts)]


class Attack:
    """A plan's attack on one model, whose gradient is followed through a faster twin where it has one."""

    def __init__(self, model: nn.Module, plan: AttackPlan, x: Tensor) -> None:
        """`x` [B, C, H, W]: images that the model takes."""
        self.model, self.plan = model, plan
        self.twin: nn.Module | None = None
        if not model.training:
            with suppress(UnsupportedLayer):
                self.twin = Folded(Layout(model), x)

    def at(
        self, x: Tensor, y: Tensor, eps: float, generator: torch.Generator, **change: object
    ) -> tuple[Tensor, Tensor]:
        """(success [B], adversarial [B, C, H, W]) at one radius (pixels), in batches of the plan's size; some of its
        settings may be changed."""
        found = [
            (result.success[0], result.adversarial[0])
            for result in in_parts(
                lambda part: self(x[part], y[part], (eps,), generator, **change), len(y), self.plan.batch_size
            )
        ]
        if not found:
            return torch.zeros(0, dtype=torch.bool, device=y.device), x
        success, adversarial = zip(*found, strict=True)
        return torch.cat(success), torch.cat(adversarial)

    def __call__(
        self, x: Tensor, y: Tensor, eps: tuple[float, ...], generator: torch.Generator, **change: object
    ) -> AttackResult:
        """At any radii (pixels), with some of the plan's settings changed; x [B, C, H, W], y [B]."""
        plan = replace(self.plan, **change)  # type: ignore[arg-type]
        kind: dict[str, Any] = {"norm": plan.norm, "surrogate": self.twin}
        if plan.attack == "autoattack":
            return autoattack(self.model, x, y, eps, generator, **kind)
        if plan.attack == "apgd":
            return apgd(self.model, x, y, eps, plan.steps, plan.restarts, generator, loss=plan.loss, **kind)
        sizes = [plan.rel_step * e or 1.0 for e in eps]
        kind |= {"loss": plan.loss, "schedule": plan.step_schedule}
        return pgd(self.model, x, y, eps, plan.steps, sizes, plan.restarts, generator, **kind)


def evaluate(
    model: nn.Module,
    split: Split,
    plan: AttackPlan,
    seed: int = 0,
    finished: pd.DataFrame | None = None,
    keep: Callable[[Sequence[pd.DataFrame]], None] = lambda _: None,
) -> pd.DataFrame:
    """The ledger of `split` (on the model's device); ε in ascending order, each once.

    Beside what every ledger has: broken_eps, broken_by, broken_restart and broken_step, the smallest radius at which
    the attack broke a correctly classified image, and which of its members, starts and steps did (`certify` may enter
    branch and bound for them).

    Args:
        finished: the ledger of an interrupted evaluation with the same plan, whose images are not attacked again.
        keep: called after each batch with the parts of the ledger so far.

    Raises:
        ModelError: the labels do not fit the model's outputs, or the images its inputs.
    """
    first = to_pixels(split.images[:1])
    with torch.no_grad():
        logits_of(model, first)  # raises where it does not take them
    attack = Attack(model, plan, first)
    ledgers = [finished] if finished is not None and len(finished) else []
    start = sum(len(ledger) for ledger in ledgers)

    def work(part: slice) -> pd.DataFrame:
        # A batch's draws are its own, so that an evaluation that is gone on with draws them again.
        generator = torch.Generator(split.labels.device).manual_seed(seed + part.start)
        ledger = _attacked_batch(attack, split[part], generator)
        ledger["image"] += part.start
        return ledger

    with tqdm(total=len(split), initial=start, desc="attack", unit="image", disable=None, leave=False) as bar:
        for ledger in in_parts(work, len(split), plan.batch_size, start):
            ledgers.append(ledger)
            bar.update(len(ledger))
            keep(ledgers)
    return pd.concat(ledgers, ignore_index=True)


def _attacked_batch(attack: Attack, batch: Split, generator: torch.Generator) -> pd.DataFrame:
    model, plan = attack.model, attack.plan
    x, y = to_pixels(batch.images), batch.labels
    with torch.no_grad():
        logits = logits_of(model, x)
    predictions = classes_of(logits)
    if bool((predictions == NO_CLASS).any()):
        raise ModelError("the model gives NaN for test images: train or export it anew")
    if int(y.max()) >= logits.shape[1]:
        raise ModelError(f"the data have label {int(y.max())}, the model {logits.shape[1]} classes: wrong dataset?")
    result = attack(x, y, plan.radii, generator)
    ledger = evaluation_ledger(y, predictions, result.success, plan.radii)
    broken = result.start >= 0
    starts = result.start[broken].tolist()
    members = plan.members()
    rows = broken.cpu().numpy()
    ledger["broken_eps"] = pd.array([pd.NA] * len(ledger), dtype="Float64")
    ledger["broken_by"] = pd.array([pd.NA] * len(ledger), dtype="string")
    for name in ("broken_restart", "broken_step"):
        ledger[name] = pd.array([pd.NA] * len(ledger), dtype="Int64")
    ledger.loc[rows, "broken_eps"] = result.broken_eps[broken].tolist()
    ledger.loc[rows, "broken_by"] = [members[start][0] for start in starts]
    ledger.loc[rows, "broken_restart"] = [members[start][1] for start in starts]
    steps = result.step[broken].tolist()
    ledger.loc[rows, "broken_step"] = [step if step >= 0 else pd.NA for step in steps]
    return ledger
