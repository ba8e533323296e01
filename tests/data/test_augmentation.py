"""Every step of the augmentation against another implementation of it."""

from __future__ import annotations

import colorsys
import math

import pytest
import torch
import torchvision.transforms.functional as T
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rampart.data import Augmentation, to_pixels
from rampart.data.augmentation import _rotate, _shift_hue
from rampart.errors import SettingsError
from rampart.kernels import convolved

OFF = {"crop_padding": 0, "flip": 0.0, "rotation": 0.0, "jitter": (0.0, 0.0, 0.0, 0.0), "noise_std": 0.0}
# One step alone.
STEPS = {
    "crop": {"crop_padding": 4},
    "flip": {"flip": 0.5},
    "rotation": {"rotation": 15.0},
    "brightness": {"jitter": (0.4, 0.0, 0.0, 0.0)},
    "contrast": {"jitter": (0.0, 0.4, 0.0, 0.0)},
    "saturation": {"jitter": (0.0, 0.0, 0.4, 0.0)},
    "hue": {"jitter": (0.0, 0.0, 0.0, 0.1)},
    "noise": {"noise_std": 0.025},
}


def only(**change: object) -> Augmentation:
    return Augmentation(**{**OFF, **change})


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def soft_images(count: int, spread: float = 0.2) -> Tensor:
    """Far enough from 0 and 1 that no colour step is cut off."""
    return 0.5 + spread * (torch.rand(count, 3, 8, 8) - 0.5)


@settings(max_examples=20, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 5), st.sampled_from([1, 3]), st.integers(5, 12), st.integers(5, 12)),
    strength=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_shape_and_range_are_kept(shape: tuple[int, int, int, int], strength: float, seed: int) -> None:
    jitter = (strength, strength, strength, strength / 2)
    augmentation = Augmentation(4, 0.5, 180 * strength, jitter, strength, 0.5)
    x = torch.rand(shape, generator=generator(seed)).round(decimals=1)
    out = augmentation(x, generator(seed))
    assert out.shape == x.shape
    assert out.dtype == x.dtype
    assert out.min() >= 0
    assert out.max() <= 1


def test_a_batch_lies_in_memory_as_before() -> None:
    batch = to_pixels(torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8))
    assert batch.is_contiguous(memory_format=convolved(batch))
    assert Augmentation()(batch, generator()).is_contiguous(memory_format=convolved(batch))


@pytest.mark.parametrize("settings", [OFF, {**OFF, "noise_std": 0.1, "noise_probability": 0.0}])
def test_with_everything_off_nothing_changes(settings: dict[str, object]) -> None:
    x = torch.rand(4, 3, 8, 8)
    assert torch.equal(Augmentation(**settings)(x, generator()), x)


@pytest.mark.parametrize("step", STEPS)
def test_every_image_has_its_own_draws_and_the_input_stays(step: str) -> None:
    x = torch.rand(1, 3, 8, 8).expand(64, -1, -1, -1).contiguous()
    before = x.clone()
    out = only(**STEPS[step])(x, generator())
    kinds = {image.numpy().tobytes() for image in out}
    assert len(kinds) == 2 if step == "flip" else len(kinds) > 10
    assert torch.equal(x, before)


def test_the_generators_seed_decides() -> None:
    x = torch.rand(8, 3, 8, 8)
    first, again, other = (Augmentation()(x, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_with_a_generator_the_global_state_is_left_alone() -> None:
    state = torch.get_rng_state()
    Augmentation()(torch.rand(8, 3, 8, 8, generator=generator()), generator())
    assert torch.equal(torch.get_rng_state(), state)


def crops(image: Tensor, padding: int) -> dict[bytes, tuple[int, int]]:
    """Every crop of an image with a black border, by an explicit loop."""
    height, width = image.shape[1:]
    found = {}
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            crop = torch.zeros_like(image)
            for row in range(height):
                for column in range(width):
                    y, x = row + top - padding, column + left - padding
                    if 0 <= y < height and 0 <= x < width:
                        crop[:, row, column] = image[:, y, x]
            found[crop.numpy().tobytes()] = (top, left)
    return found


def test_a_crop_is_one_of_the_windows_of_the_padded_image_and_all_of_them_occur() -> None:
    image = torch.rand(3, 5, 7)
    windows = crops(image, 2)
    assert len(windows) == 25
    out = only(crop_padding=2)(image.expand(600, -1, -1, -1), generator())
    drawn = [windows[crop.numpy().tobytes()] for crop in out]
    counts = [drawn.count(place) for place in windows.values()]
    # 24 on average: none is missing, none is the rule.
    assert min(counts) >= 8
    assert max(counts) <= 50


def test_a_flip_mirrors_columns_as_often_as_it_should() -> None:
    x = torch.rand(400, 3, 4, 5)
    assert torch.equal(only(flip=1.0)(x, generator()), torch.flip(x, [3]))
    out = only(flip=0.3)(x, generator())
    flipped = (out == torch.flip(x, [3])).all(dim=(1, 2, 3))
    assert bool((flipped | (out == x).all(dim=(1, 2, 3))).all())
    assert float(flipped.float().mean()) == pytest.approx(0.3, abs=0.08)


def test_a_half_turn_flips_both_axes() -> None:
    x = torch.rand(3, 2, 5, 8)
    assert torch.equal(_rotate(x, torch.full((3,), 180.0)), x.flip(2, 3))


@pytest.mark.parametrize("size", [6, 7])
def test_a_quarter_turn_is_rot90_and_the_other_one_turns_back(size: int) -> None:
    x = torch.rand(2, 3, size, size)
    turned = _rotate(x, torch.tensor([90.0, -90.0]))
    assert torch.equal(turned[0], torch.rot90(x[0], 1, (1, 2))) or torch.equal(turned[0], torch.rot90(x[0], -1, (1, 2)))
    assert torch.equal(_rotate(turned, torch.tensor([-90.0, 90.0])), x)


@pytest.mark.parametrize("shape", [(9, 9), (8, 13)])
@pytest.mark.parametrize("degrees", [7.3, -14.9, 41.0])
def test_a_rotation_is_that_of_torchvision_on_images_that_are_not_square_too(
    shape: tuple[int, int], degrees: float
) -> None:
    x = torch.rand(1, 3, *shape)
    ours = _rotate(x, torch.tensor([degrees]))
    # The direction is a matter of taste: angles are drawn from both sides.
    theirs = [T.rotate(x, angle) for angle in (degrees, -degrees)]
    assert any(torch.allclose(ours, turned) for turned in theirs)


def test_rotations_stay_within_their_limit_and_use_it() -> None:
    """Of a bright dot on a dark image: the angle that it has moved by."""
    x = torch.zeros(500, 1, 101, 101)
    x[:, :, 48:53, 88:93] = 1
    out = only(rotation=30.0)(x, generator()).squeeze(1)
    rows, columns = torch.meshgrid(torch.arange(101.0) - 50, torch.arange(101.0) - 50, indexing="ij")
    angles = torch.atan2((out * rows).sum((1, 2)), (out * columns).sum((1, 2))) * 180 / math.pi
    assert angles.abs().max() <= 31
    assert angles.max() > 27
    assert angles.min() < -27
    assert abs(float(angles.mean())) < 3


def test_brightness_scales_an_image_as_a_whole() -> None:
    x = soft_images(300)
    ratio = only(jitter=(0.4, 0.0, 0.0, 0.0))(x, generator()) / x
    factor = ratio.mean((1, 2, 3))
    assert torch.allclose(ratio, factor.view(-1, 1, 1, 1).expand_as(ratio), atol=1e-4)
    assert 0.6 <= factor.min() < 0.63
    assert 1.37 < factor.max() <= 1.4


@pytest.mark.parametrize(
    ("jitter", "adjust"),
    [((0.0, 0.4, 0.0, 0.0), T.adjust_contrast), ((0.0, 0.0, 0.4, 0.0), T.adjust_saturation)],
    ids=["contrast", "saturation"],
)
def test_contrast_and_saturation_are_those_of_torchvision_for_some_factor(jitter, adjust) -> None:
    x = soft_images(100)
    out = only(jitter=jitter)(x, generator())
    # Both are linear in their factor: it follows from the result at 0, which is grey.
    grey = torch.stack([adjust(image, 0.0) for image in x])
    factors = ((out - grey) * (x - grey)).sum((1, 2, 3)) / (x - grey).square().sum((1, 2, 3))
    for image, factor, found in zip(x, factors.tolist(), out, strict=True):
        assert torch.allclose(adjust(image, factor), found, atol=2e-3)
    assert 0.59 <= factors.min() < 0.67
    assert 1.33 < factors.max() <= 1.41


@settings(max_examples=60, deadline=None)
@given(st.tuples(*[st.floats(0, 1, width=32)] * 3), st.floats(-0.5, 0.5))
def test_a_hue_shift_is_that_of_colorsys(pixel: tuple[float, float, float], turns: float) -> None:
    hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
    expected = torch.tensor(colorsys.hsv_to_rgb((hue + turns) % 1, saturation, value))
    found = _shift_hue(torch.tensor(pixel).view(1, 3, 1, 1), torch.full((1, 1, 1), turns)).flatten()
    assert torch.allclose(found, expected, atol=2e-4)


def test_a_hue_shift_of_a_batch_is_that_of_torchvision() -> None:
    x, turns = torch.rand(5, 3, 6, 6), torch.tensor([-0.5, -0.1, 0.0, 0.07, 0.5])
    found = _shift_hue(x, turns[:, None, None])
    for image, turn, shifted in zip(x, turns.tolist(), found, strict=True):
        assert torch.allclose(T.adjust_hue(image, turn), shifted, atol=1e-4)


def test_grey_pixels_have_no_hue() -> None:
    x = torch.rand(4, 1, 5, 5).expand(-1, 3, -1, -1)
    assert torch.allclose(_shift_hue(x, torch.full((4, 1, 1), 0.3)), x)


def test_images_of_one_channel_have_no_colours_to_jitter() -> None:
    x = torch.rand(4, 1, 8, 8)
    assert torch.equal(only(jitter=(0.4, 0.4, 0.4, 0.1))(x, generator()), x)


def test_noise_has_its_size_and_comes_as_often_as_it_should() -> None:
    x = soft_images(400)
    moved = only(noise_std=0.03, noise_probability=0.25)(x, generator()) - x
    noisy = moved.abs().amax((1, 2, 3)) > 0
    assert float(noisy.float().mean()) == pytest.approx(0.25, abs=0.07)
    assert float(moved[noisy].std()) == pytest.approx(0.03, rel=0.03)
    assert abs(float(moved[noisy].mean())) < 1e-3


def test_the_defaults_are_the_studys() -> None:
    """Its noise of 0.05 on [-1, 1] is 0.025 on pixels."""
    assert Augmentation() == Augmentation(4, 0.5, 15.0, (0.4, 0.4, 0.4, 0.1), 0.025, 0.5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("crop_padding", -1),
        ("flip", 1.5),
        ("flip", -0.1),
        ("rotation", -1.0),
        ("rotation", 181.0),
        ("jitter", (1.1, 0.0, 0.0, 0.0)),
        ("jitter", (0.0, -0.1, 0.0, 0.0)),
        ("jitter", (0.0, 0.0, 0.0, 0.6)),
        ("noise_std", -0.1),
        ("noise_probability", 2.0),
    ],
)
def test_a_value_out_of_range_is_named(name: str, value: object) -> None:
    with pytest.raises(SettingsError, match=name) as raised:
        Augmentation(**{name: value})
    assert str(value) in str(raised.value)
