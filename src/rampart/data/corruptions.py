"""Five corruptions of CIFAR-10-C, each at its five strengths (Hendrycks & Dietterich 2019)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from rampart.errors import DataError, require, unknown

Corruption = Literal["gaussian_noise", "gaussian_blur", "brightness", "contrast", "jpeg"]
CORRUPTIONS: tuple[Corruption, ...] = get_args(Corruption)
STRENGTHS = (1, 2, 3, 4, 5)
# Of each strength: standard deviation of the noise, that of the blur in pixels, what is added to the brightness, share
# of the contrast that is left, JPEG's quality.
LEVELS: dict[Corruption, tuple[float, ...]] = {
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),
    "gaussian_blur": (0.4, 0.6, 0.7, 0.8, 1.0),
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
    "jpeg": (80, 65, 58, 50, 40),
}


def corrupt(images: Tensor, kind: Corruption, strength: int, generator: torch.Generator | None = None) -> Tensor:
    """uint8 [B, C, H, W] -> the same, corrupted.

    Args:
        kind: one of CORRUPTIONS.
        strength: 1 to 5.
        generator: of the noise, on the images' device.

    Raises:
        SettingsError: an unknown corruption or strength. DataError: images of neither one nor three channels.
    """
    require(kind in CORRUPTIONS, unknown("corruption", kind, CORRUPTIONS))
    require(strength in STRENGTHS, f"strength must be one of 1 to 5, not {strength}")
    if images.shape[1] not in (1, 3):
        raise DataError(
            f"corruptions are of grey or colour images, not of {images.shape[1]} channels: take corruptions=none"
        )
    level = LEVELS[kind][strength - 1]
    if kind == "jpeg":
        return _jpeg(images, int(level))
    x = images.float() / 255
    if kind == "gaussian_noise":
        x = x + level * torch.randn(x.shape, device=x.device, generator=generator)
    else:
        x = _SMOOTH[kind](x, level)
    return (x.clamp(0, 1) * 255).to(torch.uint8)  # cut off, as the published images are


def _blur(x: Tensor, level: float) -> Tensor:
    from torchvision.transforms.v2.functional import gaussian_blur

    reach = round(4 * level)
    # Beyond its border an image goes on with its last pixels, as in the published images; what it mirrors is cut away.
    padded = F.pad(x, (reach,) * 4, mode="replicate")
    return gaussian_blur(padded, [2 * reach + 1] * 2, [level] * 2)[:, :, reach:-reach, reach:-reach]


def _brighten(x: Tensor, level: float) -> Tensor:
    """Raises HSV's value, which is the largest channel; hue and saturation stay, and black becomes grey."""
    value = x.amax(1, keepdim=True)
    raised = (value + level).clamp(max=1)
    return torch.where(value > 0, x * raised / value.clamp(min=1e-8), raised)


def _flatten(x: Tensor, level: float) -> Tensor:
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * level + mean


def _jpeg(images: Tensor, quality: int) -> Tensor:
    from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg

    mode = ImageReadMode.GRAY if images.shape[1] == 1 else ImageReadMode.RGB
    coded = [decode_jpeg(encode_jpeg(image, quality), mode) for image in images.cpu()]
    return torch.stack(coded).to(images.device)


_SMOOTH: dict[Corruption, Callable[[Tensor, float], Tensor]] = {
    "gaussian_blur": _blur,
    "brightness": _brighten,
    "contrast": _flatten,
}
