"""Accuracy under corruptions is counted image by image."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from rampart.data import Dataset, Split, to_pixels
from rampart.data.corruptions import CORRUPTIONS, corrupt
from rampart.evaluation import CorruptionPlan, withstand
from rampart.ledger import attack_rates, corruption_rates, evaluation_ledger
from tests.nets import linear_classifier


@pytest.fixture(scope="module")
def network(digits: Dataset) -> nn.Module:
    return linear_classifier(digits)


def ledger_of(network: nn.Module, split: Split) -> pd.DataFrame:
    with torch.no_grad():
        predictions = network(to_pixels(split.images)).argmax(1)
    return evaluation_ledger(split.labels, predictions, torch.zeros(0, len(split)), [])


def test_every_corruption_and_strength_has_its_column(network: nn.Module, digits: Dataset) -> None:
    split = digits.test[:120]
    before = ledger_of(network, split)
    ledger = withstand(network, split, before, CorruptionPlan())
    assert [c for c in ledger if c.startswith("withstood/")] == [
        f"withstood/{k}/{s}" for k in CORRUPTIONS for s in range(1, 6)
    ]
    pd.testing.assert_frame_equal(ledger[before.columns.tolist()], before)
    with torch.no_grad():
        right = network(to_pixels(corrupt(split.images, "contrast", 4))).argmax(1) == split.labels
    assert ledger["withstood/contrast/4"].tolist() == right.tolist()
    assert 0 < int(right.sum()) < 120


def test_rates_are_means_over_strengths_and_then_over_corruptions(network: nn.Module, digits: Dataset) -> None:
    ledger = withstand(network, digits.test[:120], ledger_of(network, digits.test[:120]), CorruptionPlan())
    rates = corruption_rates(ledger)
    assert set(rates) == {"corrupted_accuracy", *(f"corrupted/{kind}" for kind in CORRUPTIONS)}
    by_hand = [sum(ledger[f"withstood/jpeg/{s}"].sum() for s in range(1, 6)) / (5 * 120)]
    assert rates["corrupted/jpeg"] == pytest.approx(by_hand[0])
    assert rates["corrupted_accuracy"] == pytest.approx(sum(rates[f"corrupted/{k}"] for k in CORRUPTIONS) / 5)
    assert set(attack_rates(ledger)) == {"accuracy"}


def test_a_batch_that_does_not_fit_is_halved(
    network: nn.Module, digits: Dataset, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    split = digits.test[:60]
    expected = withstand(network, split, ledger_of(network, split), CorruptionPlan(), batch_size=15)

    def small(images: Tensor, *given: Any) -> Tensor:
        if len(images) > 15:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return corrupt(images, *given)

    monkeypatch.setattr("rampart.evaluation.corrupted.corrupt", small)
    found = withstand(network, split, ledger_of(network, split), CorruptionPlan())
    pd.testing.assert_frame_equal(found, expected)
    assert "going on with 15 images a batch" in caplog.text


def test_the_same_seed_gives_the_same_noise(network: nn.Module, digits: Dataset) -> None:
    split = digits.test[:60]
    first, again, other = (
        withstand(network, split, ledger_of(network, split), CorruptionPlan(), seed) for seed in (1, 1, 2)
    )
    pd.testing.assert_frame_equal(first, again)
    assert not first.equals(other)


def test_none_leaves_the_ledger_as_it_is(network: nn.Module, digits: Dataset) -> None:
    before = ledger_of(network, digits.test[:20])
    after = withstand(network, digits.test[:20], before, CorruptionPlan(corruptions="none"))
    assert after is before
    assert corruption_rates(after) == {}
