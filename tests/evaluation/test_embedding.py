"""The picture of the embeddings."""

from __future__ import annotations

import pytest
import torch

from rampart.data import Dataset, stratified_order
from rampart.errors import SettingsError
from rampart.evaluation import EmbeddingPlan, embed
from rampart.models import build_model


@pytest.mark.parametrize(
    "change", [{"points": 9}, {"neighbors": 1}, {"points": 20, "neighbors": 20}, {"min_dist": 1.5}]
)
def test_a_plan_refuses_what_cannot_be_drawn(change: dict[str, object]) -> None:
    with pytest.raises(SettingsError):
        EmbeddingPlan(**change)


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
