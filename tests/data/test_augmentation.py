"""Each step of the augmentation against another way to compute it."""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms.functional import adjust_hue

from rampart.data import Augmentation
from rampart.data.augmentation import _crop, _rotate, _shift_hue
from rampart.errors import SettingsError

OFF = {"crop_padding": 0, "flip": 0.0, "rotation": 0.0, "jitter": (0.0,) * 4, "noise_std": 0.0}


def test_everything_off_changes_nothing() -> None:
    x = torch.rand(3, 3, 8, 8)
    assert torch.equal(Augmentation(**OFF)(x), x)  # type: ignore[arg-type]


def test_the_studys_augmentation_keeps_shape_and_range_and_follows_its_seed() -> None:
    x = torch.rand(1, 3, 32, 32).repeat(8, 1, 1, 1)
    first, again, other = (Augmentation()(x, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert first.shape == x.shape
    assert 0 <= float(first.min()) <= float(first.max()) <= 1
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    # Every image has its own draws.
    assert len({image.numpy().tobytes() for image in first}) == 8


def test_crop_is_a_window_of_the_padded_image() -> None:
    x = torch.rand(5, 2, 6, 7)
    shifts = torch.randint(5, (2, 5))
    cropped = _crop(x, shifts, 2)
    padded = torch.nn.functional.pad(x, (2,) * 4)
    for i in range(5):
        top, left = int(shifts[0, i]), int(shifts[1, i])
        assert torch.equal(cropped[i], padded[i, :, top : top + 6, left : left + 7])


def test_flip_and_rotation_are_those_of_torch() -> None:
    x = torch.rand(4, 3, 8, 8)
    assert torch.equal(Augmentation(**{**OFF, "flip": 1.0})(x), x.flip(3))  # type: ignore[arg-type]
    for degrees, turns in ((90.0, 1), (180.0, 2), (-90.0, 3)):
        turned = _rotate(x, torch.full((4,), degrees))
        assert torch.equal(turned, torch.rot90(x, turns, (2, 3))) or torch.equal(turned, torch.rot90(x, -turns, (2, 3)))


def test_rotation_keeps_angles_on_images_that_are_not_square() -> None:
    """A point one pixel right of the centre goes one pixel up or down, not by the ratio of the sides."""
    x = torch.zeros(1, 1, 9, 21)
    x[0, 0, 4, 13] = 1
    turned = _rotate(x, torch.tensor([90.0]))
    assert {tuple(place) for place in turned[0, 0].nonzero().tolist()} in ({(1, 10)}, {(7, 10)})


@pytest.mark.parametrize("turn", [-0.4, -0.1, 0.05, 0.3, 0.5])
def test_hue_shift_is_torchvisions(turn: float) -> None:
    x = torch.rand(4, 3, 16, 16)
    assert torch.allclose(_shift_hue(x, torch.full((4, 1, 1), turn)), adjust_hue(x, turn), atol=1e-5)


def test_noise_has_the_std_and_the_share_that_were_asked_for() -> None:
    x = torch.full((400, 1, 16, 16), 0.5)
    y = Augmentation(**{**OFF, "noise_std": 0.05, "noise_probability": 0.5})(x)  # type: ignore[arg-type]
    changed = (y != x).flatten(1).any(1)
    assert 150 < int(changed.sum()) < 250
    assert float((y - x)[changed].std()) == pytest.approx(0.05, rel=0.05)


@pytest.mark.parametrize("bad", [{"flip": 1.2}, {"crop_padding": -1}, {"noise_std": -1.0}, {"jitter": (0, 0, 0, 0.6)}])
def test_bad_values_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(SettingsError):
        Augmentation(**bad)  # type: ignore[arg-type]
