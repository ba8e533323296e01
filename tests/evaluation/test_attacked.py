"""The ledger of an attacked split, and the rates that follow from it."""

from __future__ import annotations

import logging

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from rampart.attacks import ensemble, pgd
from rampart.data import Dataset, Split, to_pixels
from rampart.errors import ModelError, SettingsError
from rampart.evaluation import AttackPlan, evaluate
from rampart.ledger import attack_rates
from tests.nets import linear_classifier

PLAN = AttackPlan(eps=(0.05, 0.01, 0.05, 0.0), steps=4, batch_size=50)


@pytest.fixture(scope="module")
def network(digits: Dataset) -> nn.Module:
    """A linear classifier of the digits."""
    return linear_classifier(digits)


@pytest.fixture(scope="module")
def split(digits: Dataset) -> Split:
    return digits.test[:130]


def test_columns_are_the_radii_ascending_each_once(network: nn.Module, split: Split) -> None:
    ledger = evaluate(network, split, PLAN)
    assert list(ledger.columns[4:7]) == ["attacked/0", "attacked/0.01", "attacked/0.05"]
    assert ledger["image"].tolist() == list(range(130))


def test_labels_and_predictions_are_those_of_the_split(network: nn.Module, split: Split) -> None:
    ledger = evaluate(network, split, PLAN)
    with torch.no_grad():
        predictions = network(to_pixels(split.images)).argmax(1)
    assert ledger["label"].tolist() == split.labels.tolist()
    assert ledger["prediction"].tolist() == predictions.tolist()
    assert ledger["attacked/0"].tolist() == (predictions != split.labels).tolist()


def test_rates_are_those_counted_by_hand(network: nn.Module, split: Split) -> None:
    ledger = evaluate(network, split, PLAN)
    rates = attack_rates(ledger)
    rows = ledger.to_dict("records")
    correct = [row for row in rows if row["label"] == row["prediction"]]
    assert 0 < len(correct) < 130
    assert rates["accuracy"] == pytest.approx(len(correct) / 130)
    for key in ("0", "0.01", "0.05"):
        broken = [row for row in correct if row[f"attacked/{key}"]]
        assert rates[f"asr/{key}"] == pytest.approx(len(broken) / len(correct))
        assert rates[f"afr/{key}"] == pytest.approx(1 - len(broken) / len(correct))
        survivors = [row for row in rows if row in correct and not row[f"attacked/{key}"]]
        assert rates[f"robust_accuracy/{key}"] == pytest.approx(len(survivors) / 130)
        assert rates[f"robust_accuracy/{key}"] == pytest.approx(rates["accuracy"] * rates[f"afr/{key}"])
    assert rates["asr/0"] == 0 < rates["asr/0.01"] < rates["asr/0.05"]


def test_the_attack_is_pgd_with_the_plans_steps(network: nn.Module, split: Split) -> None:
    """In one batch, with the same draws."""
    plan = AttackPlan(eps=(0.02, 0.05), steps=3, rel_step=0.5, restarts=2, batch_size=200)
    x, generator = to_pixels(split.images), torch.Generator().manual_seed(7)
    expected = pgd(network, x, split.labels, (0.02, 0.05), 3, (0.01, 0.025), 2, generator)
    ledger = evaluate(network, split, plan, seed=7)
    assert ledger["attacked/0.02"].tolist() == expected.success[0].tolist()
    assert ledger["attacked/0.05"].tolist() == expected.success[1].tolist()


def test_what_broke_an_image_stands_in_its_row(network: nn.Module, split: Split) -> None:
    ledger = evaluate(network, split, AttackPlan(eps=(0.01, 0.05), steps=4, restarts=2, batch_size=50))
    broken = ledger["correct"] & ledger["attacked/0.05"]
    assert 0 < broken.sum() < ledger["correct"].sum()
    assert (ledger["broken_by"].notna() == broken).all()
    first = ledger.loc[broken, "attacked/0.01"].map({True: 0.01, False: 0.05})
    assert ledger.loc[broken, "broken_eps"].astype(float).tolist() == pytest.approx(first.tolist())
    assert set(ledger.loc[broken, "broken_by"]) == {"pgd"}
    assert set(ledger.loc[broken, "broken_restart"]) <= {0, 1}
    assert ledger.loc[broken, "broken_step"].between(0, 4).all()


@pytest.mark.parametrize("attack", ["pgd", "apgd"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_other_attacks_fill_the_same_ledger(network: nn.Module, split: Split, attack: str, norm: str) -> None:
    eps = (0.01, 0.05) if norm == "linf" else (0.3, 1.5)
    plan = AttackPlan(attack=attack, norm=norm, eps=eps, steps=10, loss="margin", step_schedule="cosine")
    rates = attack_rates(evaluate(network, split, plan))
    assert 0 < rates[f"asr/{eps[0]:g}"] < rates[f"asr/{eps[1]:g}"]


def test_the_ensemble_names_its_members(network: nn.Module, split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyautoattack", reason="pyautoattack is not installed")
    for name, value in (("STEPS", 4), ("QUERIES", 50)):
        monkeypatch.setattr(ensemble, name, value)
    ledger = evaluate(network, split[:30], AttackPlan(attack="autoattack", eps=(0.02,)))
    assert set(ledger["broken_by"].dropna()) >= {"apgd-ce"}
    assert set(ledger["broken_by"].dropna()) <= set(ensemble.MEMBERS)


def test_a_batch_that_does_not_fit_is_halved(
    network: nn.Module, split: Split, caplog: pytest.LogCaptureFixture
) -> None:
    class Small(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 20:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return network(x)

    whole = evaluate(network, split, AttackPlan(eps=(0.02,), steps=2, batch_size=13))
    with caplog.at_level(logging.WARNING):
        halved = evaluate(Small().eval(), split, AttackPlan(eps=(0.02,), steps=2, batch_size=50))
    assert "going on with 13 images a batch" in caplog.text
    pd.testing.assert_frame_equal(halved, whole)


def test_a_single_image_that_does_not_fit_is_an_error(split: Split) -> None:
    class Full(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    with pytest.raises(RuntimeError, match="can't allocate memory"):
        evaluate(Full().eval(), split, PLAN)


def test_an_interrupted_evaluation_goes_on_with_the_next_batch(network: nn.Module, split: Split) -> None:
    plan, kept = AttackPlan(eps=(0.02, 0.05), steps=3, batch_size=40), []
    whole = evaluate(network, split, plan, seed=3, keep=lambda parts: kept.append(pd.concat(parts)))
    assert [len(ledger) for ledger in kept] == [40, 80, 120, 130]

    class Asked(nn.Module):
        images = 0

        def forward(self, x: Tensor) -> Tensor:
            Asked.images = max(Asked.images, len(x))
            return network(x)

    resumed = evaluate(Asked().eval(), split, plan, seed=3, finished=kept[2])
    assert Asked.images == 10
    pd.testing.assert_frame_equal(resumed, whole)


def test_labels_beyond_the_models_classes_are_named(split: Split) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 4)).eval()
    with pytest.raises(ModelError, match=r"label 9.*4 classes") as raised:
        evaluate(model, split, PLAN)
    assert "\n" not in str(raised.value)


def test_a_model_that_gives_nan_is_named(split: Split) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)).eval()
    nn.init.constant_(model[1].bias, float("nan"))
    with pytest.raises(ModelError, match="NaN for test images") as raised:
        evaluate(model, split, PLAN)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 28, 28)], ids=["channels", "size"])
def test_images_of_another_shape_are_named(network: nn.Module, shape: tuple[int, int, int]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Flatten(), nn.Linear(1024, 10)).eval()
    foreign = Split(torch.zeros(5, *shape, dtype=torch.uint8), torch.arange(5))
    with pytest.raises(ModelError, match="x".join(map(str, shape))) as raised:
        evaluate(model, foreign, PLAN)
    assert "\n" not in str(raised.value)


def test_a_network_in_training_mode_is_refused(split: Split) -> None:
    with pytest.raises(ModelError, match=r"eval\(\)"):
        evaluate(nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)).train(), split, PLAN)


@pytest.mark.parametrize(
    "change",
    [
        {"eps": ()},
        {"eps": (-0.1,)},
        {"eps": (8.0,)},
        {"eps": (float("nan"),)},
        {"steps": 0},
        {"restarts": 0},
        {"batch_size": 0},
        {"rel_step": 0.0},
        {"attack": "fgsm"},
        {"norm": "l1"},
        {"loss": "hinge"},
    ],
)
def test_a_plan_refuses_what_cannot_be_done(change: dict[str, object]) -> None:
    with pytest.raises(SettingsError, match=next(iter(change))):
        AttackPlan(**change)
