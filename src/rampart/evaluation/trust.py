"""Whether a model's attack rates can be trusted: probes that find what the attack has missed.

A network can hide its gradients (Athalye et al. 2018; Carlini et al. 2019 list the signs): the attack fails, and the
robustness is none. Each check measures one sign on a sample of the images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rampart.attacks import Ball
from rampart.attacks.ball import gradient
from rampart.data import Split, in_parts, stratified_order, to_pixels
from rampart.errors import require
from rampart.evaluation.attacked import Attack, AttackPlan
from rampart.ledger import attacked_by
from rampart.models import predict

# A radius at which almost nothing can hold, and one at which every image can become grey.
LARGE, GREY = 64 / 255, 128 / 255
DRAWS = 50
# What each check allows, as a share of the correctly classified images of the sample.
ALLOWED = {
    "zero_gradients": 0.05,
    "one_step": 0.02,
    "more_steps": 0.05,
    "more_restarts": 0.05,
    "other_loss": 0.2,
    "noise": 0.02,
    "transfer": 0.03,
    "falls_with_eps": 0.02,
    "holds_at_large_eps": 0.05,
}
MEANING = {
    "zero_gradients": "images at which the cross-entropy has no gradient, or none that is finite",
    "one_step": "images that a single step breaks and the attack does not",
    "more_steps": "images that four times the steps break and the attack does not",
    "more_restarts": "images that four restarts more break and the attack does not",
    "other_loss": "images that APGD on another loss (DLR, or cross-entropy) breaks and the attack does not",
    "noise": f"images that the best of {DRAWS} random points of the ball breaks and the attack does not",
    "transfer": "images that another model's adversarial image breaks and the attack does not",
    "falls_with_eps": "by how much the success rate falls where ε rises, each ε attacked alone",
    "holds_at_large_eps": "images unbroken at ε 64/255 and, if need be, at 128/255, where all can become grey (in L2: "
    "the balls around those)",
}


@dataclass(frozen=True, kw_only=True)
class TrustPlan:
    """How a model's attack rates are checked.

    Args:
        trust_images: how many test images, the same for every model, class by class; 0: no check.
    """

    trust_images: int = 128

    def __post_init__(self) -> None:
        require(self.trust_images >= 0, f"trust_images must be 0 or more, not {self.trust_images}")


@dataclass(frozen=True)
class Trust:
    """What the checks found.

    Args:
        checks: a row a check: check, value, allowed (both shares of the sample's correctly classified images), passed
            (missing where it could not be made) and meaning.
        adversarial: [n, C, H, W], the attack's images of the sample, with which other models can be tried.
    """

    checks: pd.DataFrame
    adversarial: Tensor

    @property
    def suspect(self) -> list[str]:
        """The checks that failed."""
        return self.checks.loc[~self.checks["passed"].fillna(True).astype(bool), "check"].tolist()

    @property
    def verdict(self) -> str:
        """In a word or a few: ok, unchecked (where nothing could be), or suspect: and the checks that failed."""
        if self.suspect:
            return f"suspect: {', '.join(self.suspect)}"
        return "ok" if self.checks["value"].notna().any() else "unchecked"


def trust_eps(plan: AttackPlan) -> float:
    """The radius (pixels) at which an attack is probed: the middle one of those above 0."""
    above = [eps for eps in plan.radii if eps > 0]
    return above[(len(above) - 1) // 2] if above else 0.0


def sample(split: Split, plan: TrustPlan) -> Tensor:
    """The images that are probed, ascending."""
    return torch.tensor(sorted(stratified_order(split, 0)[: plan.trust_images]))


def trust(
    model: nn.Module,
    split: Split,
    ledger: pd.DataFrame,
    attacking: AttackPlan,
    plan: TrustPlan,
    others: Sequence[Tensor] = (),
    seed: int = 0,
) -> Trust:
    """Probes the attack that filled `ledger`.

    Args:
        others: adversarial images [n, C, H, W] of other models at `trust_eps(attacking)` for the `sample`.
    """
    images, eps = sample(split, plan), trust_eps(attacking)
    batch = split[images.to(split.labels.device)]
    x, y = to_pixels(batch.images), batch.labels
    generator = torch.Generator(y.device).manual_seed(seed)
    known = ledger.set_index("image").loc[images.tolist()].reset_index()
    correct = torch.tensor(known["correct"].tolist(), device=y.device)
    held = correct & ~torch.tensor(attacked_by(known, eps).tolist(), device=y.device)
    # An ensemble has no steps or restarts to vary: its first member has.
    ensemble = attacking.attack == "autoattack"
    attack = Attack(model, replace(attacking, attack="apgd", steps=100) if ensemble else attacking, x)

    def share(found: Tensor) -> float:
        return float(found.sum()) / max(int(correct.sum()), 1)

    def missed(**change: object) -> float:
        """Share that a changed attack breaks of what has held."""
        return share(attack.at(x[held], y[held], eps, generator, **change)[0])

    def rate(radius: float) -> float:
        return share(attack.at(x[correct], y[correct], radius, generator)[0])

    def seen(look: Callable[[Tensor, Tensor], Tensor], points: Tensor = x) -> Tensor:
        """look(images, labels) of all the sample, in batches."""
        return torch.cat(list(in_parts(lambda p: look(points[p], y[p]), len(y), attacking.batch_size)))

    values: dict[str, float | None] = dict.fromkeys(ALLOWED)
    adversarial = x
    if bool(correct.any()) and eps > 0:
        rates = [rate(radius) for radius in attacking.radii]
        widest = math.sqrt(x[0].numel()) if attacking.norm == "l2" else 1.0
        large = 1 - rate(LARGE * widest)
        one_step = {"attack": "pgd", "steps": 1, "rel_step": 1.25, "restarts": 1}
        values |= {
            "zero_gradients": share(seen(partial(_dead, model)) & correct),
            "one_step": missed(**one_step),
            "more_steps": missed(steps=4 * attack.plan.steps),
            "more_restarts": missed(restarts=attack.plan.restarts + 4),
            "other_loss": missed(attack="apgd", loss="dlr" if attacking.loss == "ce" else "ce"),
            "noise": share(
                seen(lambda points, y: _noise(model, Ball.around(points, eps, attacking.norm), y, generator)) & held
            ),
            "transfer": max(
                (share(seen(partial(_wrong, model), other.to(y.device)) & held) for other in others), default=None
            ),
            "falls_with_eps": max([0.0, *(low - high for low, high in pairwise(rates))]),
            "holds_at_large_eps": large
            if large <= ALLOWED["holds_at_large_eps"]
            else min(large, 1 - rate(GREY * widest)),
        }
        adversarial = attack.at(x, y, eps, generator)[1]
    checks = pd.DataFrame(
        {
            "check": list(values),
            "value": pd.array(list(values.values()), dtype="Float64"),
            "allowed": [ALLOWED[name] for name in values],
            "meaning": [MEANING[name] for name in values],
        }
    )
    checks.insert(3, "passed", checks["value"] <= checks["allowed"])
    return Trust(checks, adversarial)


def _dead(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Where the gradient of the cross-entropy at the image is zero, or nothing of it is finite, [B]."""
    point = x.clone().requires_grad_()
    return gradient(F.cross_entropy(model(point), y, reduction="sum"), point).flatten(1).abs().amax(1) == 0


def _wrong(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return predict(model, x) != y


def _noise(model: nn.Module, ball: Ball, y: Tensor, generator: torch.Generator) -> Tensor:
    """Where one of DRAWS random points of the ball is misclassified, [B]."""
    return torch.stack([_wrong(model, ball.random(generator), y) for _ in range(DRAWS)]).any(0)
