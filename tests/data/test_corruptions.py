"""Corruptions do what their names say, and more of it from strength to strength."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rampart.data import Dataset
from rampart.data.corruptions import CORRUPTIONS, STRENGTHS, Corruption, corrupt
from rampart.errors import DataError, SettingsError


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Smooth coloured images, with black and white in them."""
    ramp = torch.linspace(0, 255, 32)
    red, green = ramp.expand(32, 32), ramp[:, None].expand(32, 32)
    base = torch.stack([red, green, 255 - red])
    return torch.stack([base, base.flip(1), base.roll(7, 2)]).to(torch.uint8)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_images_stay_images_and_change_more_from_strength_to_strength(images: Tensor, kind: Corruption) -> None:
    before = images.clone()
    changed = [corrupt(images, kind, strength, generator()) for strength in STRENGTHS]
    assert all(found.dtype == torch.uint8 and found.shape == images.shape for found in changed)
    moved = [(found.float() - images.float()).pow(2).mean().sqrt().item() for found in changed]
    assert 0.2 < moved[0] < moved[-1]
    if kind != "jpeg":  # whose error is not that regular
        assert moved == sorted(moved)
    assert torch.equal(images, before)


def test_noise_has_its_standard_deviation_and_its_seed() -> None:
    grey = torch.full((8, 3, 32, 32), 128, dtype=torch.uint8)
    noisy = corrupt(grey, "gaussian_noise", 3, generator())
    assert (noisy.float() / 255).std() == pytest.approx(0.08, rel=0.03)
    assert torch.equal(noisy, corrupt(grey, "gaussian_noise", 3, generator()))


def test_brightness_raises_the_largest_channel_alone_with_its_ratios() -> None:
    image = torch.tensor([[100, 50, 0], [0, 0, 0], [250, 200, 10]], dtype=torch.uint8).T[None, :, None]
    found = corrupt(image, "brightness", 2, None)[0, :, 0].T.tolist()
    assert found[0] == [125, 62, 0]  # 100 / 255 + 0.1, cut off
    assert found[1] == [25, 25, 25]
    assert found[2] == [255, 204, 10]


def test_contrast_shrinks_around_the_mean_and_blur_keeps_it(images: Tensor) -> None:
    x = images.float()
    for kind, tolerance in (("contrast", 1.5), ("gaussian_blur", 3.0)):
        found = corrupt(images, kind, 5, None).float()
        assert (found.mean((2, 3)) - x.mean((2, 3))).abs().max() < tolerance
        assert bool((found.std((2, 3)) < x.std((2, 3))).all())
    flat = corrupt(images, "contrast", 5, None).float()
    torch.testing.assert_close(flat.std((2, 3)), 0.15 * x.std((2, 3)), rtol=0.05, atol=0.5)


def test_jpeg_is_what_a_decoder_makes_of_it(images: Tensor) -> None:
    import io

    import numpy as np
    from PIL import Image

    for quality, strength in ((80, 1), (40, 5)):
        file = io.BytesIO()
        Image.fromarray(images[0].permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
        expected = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1).float()
        assert (corrupt(images[:1], "jpeg", strength)[0].float() - expected).abs().mean() < 1


@pytest.mark.parametrize("shape", [(2, 1, 28, 28), (2, 3, 4, 6), (1, 3, 64, 48)])
def test_other_shapes(shape: tuple[int, ...]) -> None:
    images = torch.randint(256, shape, dtype=torch.uint8)
    for kind in CORRUPTIONS:
        assert corrupt(images, kind, 5, generator()).shape == shape


def test_images_that_are_neither_grey_nor_coloured_are_refused() -> None:
    with pytest.raises(DataError, match="2 channels"):
        corrupt(torch.zeros(1, 2, 8, 8, dtype=torch.uint8), "jpeg", 1)


def test_bad_names_are_told(digits: Dataset) -> None:
    with pytest.raises(SettingsError, match="did you mean 'gaussian_noise'"):
        corrupt(digits.test.images[:2], "gausian_noise", 1)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="strength"):
        corrupt(digits.test.images[:2], "jpeg", 6)
