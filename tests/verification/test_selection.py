"""Which images are verified: the same for every model, or those that a model classifies and that survive an attack."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from rampart.attacks import AttackResult, pgd
from rampart.data import Dataset, Split, to_pixels
from rampart.models import Classifier, build_model
from rampart.verification import choose, selection
from tests.nets import linear_classifier, randomised

EPS = 0.05


@pytest.fixture(scope="module")
def split(digits: Dataset) -> Split:
    return digits.test[:120]


@pytest.fixture(scope="module")
def two_models() -> list[Classifier]:
    torch.manual_seed(3)
    return [randomised(build_model(width=0.125)) for _ in range(2)]


@pytest.fixture(scope="module")
def learned(digits: Dataset) -> nn.Module:
    """A linear classifier of the digits: right on most, easily attacked on some."""
    return linear_classifier(digits)


def test_common_images_are_the_same_for_every_model(split: Split, two_models: list[Classifier]) -> None:
    first, second = (choose(model, split, 25, "common") for model in two_models)
    assert first == second
    assert len(set(first)) == 25


@pytest.mark.parametrize("seed", range(3))
def test_classes_take_turns(split: Split, two_models: list[Classifier], seed: int) -> None:
    chosen = choose(two_models[0], split, 50, "common", seed=seed)
    labels = split.labels[torch.tensor(chosen)]
    for turn in labels.split(10):
        assert sorted(turn.tolist()) == list(range(10))


def test_another_seed_takes_other_images(split: Split, two_models: list[Classifier]) -> None:
    first, again, other = (choose(two_models[0], split, 20, "common", seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert set(first) != set(other)


def test_more_images_begin_with_the_fewer(split: Split, learned: nn.Module) -> None:
    assert choose(learned, split, 30, "common")[:10] == choose(learned, split, 10, "common")


def test_no_more_common_images_than_there_are(split: Split, learned: nn.Module) -> None:
    assert sorted(choose(learned, split, 500, "common")) == list(range(120))


def test_survivors_are_classified_and_survive(split: Split, learned: nn.Module) -> None:
    chosen = choose(learned, split, 40, "survivors", EPS)
    part = split[torch.tensor(chosen)]
    x, y = to_pixels(part.images), part.labels
    assert len(set(chosen)) == 40
    with torch.no_grad():
        assert torch.equal(learned(x).argmax(1), y)
    # A linear network of several classes: PGD's sign steps from another start find next to nothing more.
    again = pgd(learned, x, y, EPS, 10, EPS / 2, generator=torch.Generator().manual_seed(5)).success
    assert int(again.sum()) <= 1


def test_survivors_leave_out_what_is_misclassified_or_broken_and_nothing_else(split: Split, learned: nn.Module) -> None:
    every = set(choose(learned, split, 120, "survivors", EPS))
    result = pgd(learned, to_pixels(split.images), split.labels, (0.0, EPS), steps=40)
    wrong, broken = ({int(i) for i in row.nonzero()} for row in result.success)
    assert wrong, "a network that is right on all images shows nothing"
    assert broken > wrong
    assert not every & wrong
    assert len(every & broken) <= 1
    assert len(every) >= 120 - len(broken)


def test_at_eps_0_survivors_are_the_correctly_classified(split: Split, learned: nn.Module) -> None:
    with torch.no_grad():
        correct = learned(to_pixels(split.images)).argmax(1) == split.labels
    assert sorted(choose(learned, split, 120, "survivors", 0.0)) == correct.nonzero().flatten().tolist()


@pytest.mark.parametrize("limit", [64, 24])
def test_however_many_survivors_are_wanted_few_images_are_attacked_together(
    split: Split, learned: nn.Module, limit: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And fewer where memory runs out."""

    def on_a_small_machine(model: nn.Module, x: torch.Tensor, *given: object, **named: object) -> AttackResult:
        if len(x) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return pgd(model, x, *given, **named)

    monkeypatch.setattr(selection, "pgd", on_a_small_machine)
    chosen = choose(learned, split, 100, "survivors", 0.0)
    with torch.no_grad():
        correct = learned(to_pixels(split.images)).argmax(1) == split.labels
    assert set(chosen) <= set(correct.nonzero().flatten().tolist())
    assert len(chosen) == min(100, int(correct.sum()))
    assert ("out of memory" in caplog.text) == (limit < 64)


def test_more_survivors_begin_with_the_fewer(split: Split, learned: nn.Module) -> None:
    survivors = choose(learned, split, 90, "survivors", EPS)
    assert len(survivors) > 64
    assert choose(learned, split, 20, "survivors", EPS) == survivors[:20]


def test_survivors_come_in_the_common_order(split: Split, learned: nn.Module) -> None:
    order = choose(learned, split, 120, "common")
    survivors = choose(learned, split, 30, "survivors", EPS)
    assert survivors == sorted(survivors, key=order.index)


def test_too_few_survivors_are_said_to_be(split: Split, learned: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        chosen = choose(learned, split, 120, "survivors", 0.5)
    assert len(chosen) < 120
    assert f"only {len(chosen)} of 120" in caplog.text
