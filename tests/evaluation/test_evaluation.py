"""Accuracy and attacks on a split, and the picture of the embeddings."""

from __future__ import annotations

import pytest
import torch

from rampart.attacks import pgd
from rampart.data import Dataset, Split, to_pixels
from rampart.errors import ModelError, SettingsError
from rampart.evaluation import AttackPlan, EmbeddingPlan, embed, evaluate
from rampart.models import Classifier, build_model
from rampart.verification.selection import stratified_order


@pytest.fixture
def model() -> Classifier:
    return build_model(width=0.125).eval()


def test_the_ledger_holds_predictions_and_what_the_attack_broke(digits: Dataset) -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10)).eval()
    split = digits.test[slice(0, 60)]
    with torch.no_grad():
        predictions = model(to_pixels(split.images)).argmax(1)
    # Labels that the random model mostly agrees with, so that there is something to break.
    split = Split(split.images, torch.where(torch.arange(60) % 4 > 0, predictions, (predictions + 1) % 10))
    ledger = evaluate(model, split, AttackPlan(eps=(0.1, 0.001, 0.1, 0.3), steps=3, batch_size=25))
    columns = ["attacked/0.001", "attacked/0.1", "attacked/0.3"]
    assert [column for column in ledger.columns if column.startswith("attacked")] == columns
    assert ledger["prediction"].tolist() == predictions.tolist()
    assert ledger["correct"].sum() == 45
    assert ledger.loc[~ledger["correct"], columns].all(axis=None)
    shares = ledger[columns].mean()
    assert shares.is_monotonic_increasing
    assert shares.iloc[-1] > shares.iloc[0]
    # An image counted as broken at the largest ε falls to a stronger attack, too.
    strong = pgd(model, to_pixels(split.images), split.labels, 0.3, 40, restarts=5).success[0]
    assert strong[torch.tensor(ledger["attacked/0.3"].to_numpy())].float().mean() > 0.95


def test_the_same_seed_gives_the_same_ledger(model: Classifier, digits: Dataset) -> None:
    split, plan = digits.test[slice(0, 40)], AttackPlan(eps=(0.02,), steps=2)
    assert evaluate(model, split, plan, seed=3).equals(evaluate(model, split, plan, seed=3))


def test_data_that_do_not_fit_the_model_are_refused(model: Classifier, digits: Dataset) -> None:
    split = digits.test[slice(0, 4)]
    with pytest.raises(ModelError, match="classes"):
        evaluate(model, Split(split.images, split.labels + 20), AttackPlan())
    with pytest.raises(ModelError, match="3 channels, not 1"):
        evaluate(model, Split(split.images[:, :1], split.labels), AttackPlan())


@pytest.mark.parametrize("bad", [{"eps": ()}, {"eps": (2.0,)}, {"steps": 0}, {"restarts": 0}, {"rel_step": 0.0}])
def test_bad_plans_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(SettingsError):
        AttackPlan(**bad)  # type: ignore[arg-type]


def test_umap_puts_images_of_one_class_together(digits: Dataset) -> None:
    """On an encoder that separates the classes by construction, a point's nearest neighbour is of its class."""
    encoder = build_model(width=0.125).eval()
    encoder.encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 16))
    chosen = stratified_order(digits.test, 0)[:60]
    points = embed(encoder, digits.test, chosen, EmbeddingPlan(points=60, neighbors=8))
    assert list(points.columns) == ["image", "label", "prediction", "x", "y"]
    assert points["image"].tolist() == chosen
    assert points["label"].tolist() == digits.test.labels[chosen].tolist()
    coordinates = torch.tensor(points[["x", "y"]].to_numpy())
    nearest = (torch.cdist(coordinates, coordinates) + 1e9 * torch.eye(60)).argmin(1)
    labels = torch.tensor(points["label"].to_numpy())
    # A random linear map of digits keeps classes apart far better than chance (one in ten).
    assert (labels[nearest] == labels).double().mean() > 0.3
