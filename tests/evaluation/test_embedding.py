"""The picture of the embeddings."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import silhouette_samples

from rampart.data import Dataset, stratified_order
from rampart.errors import SettingsError
from rampart.evaluation import EmbeddingPlan, embed, geometry
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


def test_distances_are_those_of_the_silhouette(digits: Dataset) -> None:
    """(between - within) / max(between, within) is scikit-learn's, image by image."""
    model = build_model(width=0.125).eval()
    found = geometry(model, digits.test)
    with torch.no_grad():
        x = digits.test.images.float() / 255
        z, logits = torch.nn.functional.normalize(model.embed(x), dim=1), model(x)
    ours = (found["between"] - found["within"]) / found[["between", "within"]].max(axis=1)
    theirs = silhouette_samples(z.double().numpy(), digits.test.labels.numpy())
    assert torch.allclose(torch.tensor(ours.to_numpy()).double(), torch.tensor(theirs).double(), atol=2e-3)
    rows = torch.arange(len(logits))
    own = logits[rows, digits.test.labels]
    others = logits.index_put((rows, digits.test.labels), torch.tensor(-torch.inf)).amax(1)
    assert torch.allclose(torch.tensor(found["margin"].to_numpy()), own - others, atol=1e-5)
    assert ((found["margin"] > 0) == (found["prediction"] == found["label"])).all()


def test_an_image_alone_in_its_class_has_no_distance_to_it(digits: Dataset) -> None:
    """Of one 0 and three 1s: the 0 is within nothing; classes that have no image at all are not the nearest."""
    zeros, ones = ((digits.test.labels == label).nonzero().squeeze(1) for label in (0, 1))
    found = geometry(build_model(width=0.125).eval(), digits.test[torch.cat([zeros[:1], ones[:3]])])
    assert found["within"].isna().tolist() == [True, False, False, False]
    assert found["between"].notna().all()
    assert geometry(build_model(width=0.125).eval(), digits.test[ones[:3]])["between"].isna().all()


def test_too_few_images_to_draw_are_said(digits: Dataset) -> None:
    encoder = build_model(width=0.125).eval()
    plan = EmbeddingPlan(points=10, neighbors=3)
    assert len(embed(encoder, digits.test, list(range(4)), plan)) == 4
    with pytest.raises(SettingsError, match="4 test images or more, not 3"):
        embed(encoder, digits.test, list(range(3)), plan)
