"""Masked gradients are caught, honest models are not."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from rampart.data import Dataset, Split, to_pixels
from rampart.errors import SettingsError
from rampart.evaluation import AttackPlan, TrustPlan, evaluate, sample, trust, trust_eps
from rampart.evaluation.trust import ALLOWED
from rampart.models import build_model
from tests.nets import fitted

PLAN = AttackPlan(eps=(2 / 255, 8 / 255, 4 / 255), steps=10, rel_step=0.25)
TRUST = TrustPlan(trust_images=80)


@pytest.fixture(scope="module")
def honest(digits: Dataset) -> nn.Module:
    torch.manual_seed(0)
    return fitted(build_model("paper-cnn", (3, 32, 32), 10, width=0.125).train(), digits, lr=0.01, steps=15)


class Loud(nn.Module):
    """Logits so far apart that the softmax is 0 and 1, and its gradient nothing."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return 1e4 * self.model(x)


class Quantised(Loud):
    """Pixels rounded to 16 values: as good a classifier, with no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return self.model((x * 15).round() / 15)


def checked(model: nn.Module, split: Split, others: list[Tensor] | None = None) -> pd.DataFrame:
    ledger = evaluate(model, split, PLAN)
    found = trust(model, split, ledger, PLAN, TRUST, others or [])
    assert found.checks["check"].tolist() == list(ALLOWED)
    assert found.adversarial.shape == (80, 3, 32, 32)
    failed = found.checks.loc[found.checks["passed"].eq(False).fillna(False), "check"].tolist()
    assert found.suspect == failed
    return found.checks.set_index("check")


def test_an_honest_model_passes(honest: nn.Module, digits: Dataset) -> None:
    checks = checked(honest, digits.test)
    assert pd.isna(checks.loc["transfer", "passed"])
    assert bool(checks["passed"].drop("transfer").all())
    assert bool((checks["value"].drop("transfer") >= 0).all())


def test_an_honest_model_passes_in_l2_too(honest: nn.Module, digits: Dataset) -> None:
    plan = AttackPlan(eps=(0.25, 0.5, 1.0), norm="l2", steps=10, rel_step=0.25)
    assert trust(honest, digits.test, evaluate(honest, digits.test, plan), plan, TRUST).suspect == []


@pytest.mark.parametrize("mask", [Loud, Quantised])
def test_masked_gradients_are_caught(honest: nn.Module, digits: Dataset, mask: type[Loud]) -> None:
    checks = checked(mask(honest).eval(), digits.test)
    assert checks.loc["zero_gradients", "value"] > 0.5
    assert not checks.loc["zero_gradients", "passed"]
    assert not checks.loc["holds_at_large_eps", "passed"]
    if mask is Loud:
        assert not checks.loc["other_loss", "passed"]


def test_transferred_images_break_a_masked_model(honest: nn.Module, digits: Dataset) -> None:
    """And not an honest one any more than its own attack does."""
    ledger = evaluate(honest, digits.test, PLAN)
    images = trust(honest, digits.test, ledger, PLAN, TRUST).adversarial
    assert not checked(Loud(honest).eval(), digits.test, [images]).loc["transfer", "passed"]
    assert checked(honest, digits.test, [images]).loc["transfer", "passed"]


def test_examples_that_are_handed_on_lie_in_the_ball(honest: nn.Module, digits: Dataset) -> None:
    chosen = sample(digits.test, TRUST)
    assert len(set(chosen.tolist())) == 80
    assert len(torch.unique(digits.test.labels[chosen])) == 10
    found = trust(honest, digits.test, evaluate(honest, digits.test, PLAN), PLAN, TRUST)
    distance = (found.adversarial.double() - to_pixels(digits.test.images[chosen]).double()).abs().max()
    assert 0 < distance <= trust_eps(PLAN) == 4 / 255


def test_a_weak_attack_is_told(honest: nn.Module, digits: Dataset) -> None:
    """One step of next to nothing."""
    weak = AttackPlan(eps=(4 / 255, 8 / 255), steps=1, rel_step=0.01)
    found = trust(honest, digits.test, evaluate(honest, digits.test, weak), weak, TRUST)
    assert {"one_step", "other_loss"} & set(found.suspect)


def test_a_model_that_is_always_wrong_has_nothing_to_check(honest: nn.Module, digits: Dataset) -> None:
    wrong = Split(digits.test.images, (digits.test.labels + 1) % 10)
    with torch.no_grad():
        wrong = wrong[honest(to_pixels(wrong.images)).argmax(1) != wrong.labels]
    found = trust(honest, wrong, evaluate(honest, wrong, PLAN), PLAN, TRUST)
    assert found.suspect == []
    assert found.checks["value"].isna().all()


def test_the_number_of_images_is_checked() -> None:
    with pytest.raises(SettingsError, match="trust_images"):
        TrustPlan(trust_images=-1)
