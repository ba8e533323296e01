"""Both engines on the networks that the study published."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rampart.bounds import margin_bounds
from rampart.data import Dataset, to_pixels
from rampart.models import load_model
from tests.nets import margins, points_in_ball

NAMES = ["normal", "contrastive", "adversarial", "adversarial-contrastive", "certified", "certified-contrastive"]
EPS = 2 / 255


@pytest.mark.parametrize("name", NAMES)
def test_native_bounds_of_a_published_model_are_sound_and_equal_those_of_auto_lirpa(
    name: str, study_models: dict[str, Path], digits: Dataset
) -> None:
    model = load_model(study_models[f"augmented-{name}"])
    x, y = to_pixels(digits.test.images[:2]), digits.test.labels[:2]
    pairs = zip(x, y.tolist(), strict=True)
    seen = torch.stack([margins(model, points_in_ball(image, EPS, 2000), label).amin(0) for image, label in pairs])
    entries = torch.arange(10) != y[:, None]
    for method in ("ibp", "crown-ibp", "crown"):
        ours = margin_bounds(model, x, y, EPS, method)
        theirs = margin_bounds(model, x, y, EPS, method, engine="auto_lirpa")
        scale = theirs[entries].abs().max().item()
        assert torch.allclose(ours[entries], theirs[entries], rtol=0, atol=1e-4 * scale), method
        assert bool((ours <= seen + 1e-4).all()), method
