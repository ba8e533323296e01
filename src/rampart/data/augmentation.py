"""The study's augmentation as tensor code on whole batches, every image with its own random draws."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rampart.errors import require
from rampart.kernels import Kernel, convolved


@dataclass(frozen=True)
class Augmentation:
    """Random crop, flip, rotation, colour jitter and noise, in the study's order; each is off at 0.

    Args:
        crop_padding: pixels of black border from which a crop of the image's own size is taken.
        flip: probability of a horizontal flip.
        rotation: largest angle in degrees (nearest pixel, black corners).
        jitter: largest relative change of (brightness, contrast, saturation) and absolute change of hue, in turns.
        noise_std: of Gaussian noise, in pixels [0, 1] (the study's 0.05 on [-1, 1] is 0.025).
        noise_probability: of adding that noise to an image.
    """

    crop_padding: int = 4
    flip: float = 0.5
    rotation: float = 15.0
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    noise_std: float = 0.025
    noise_probability: float = 0.5

    def __post_init__(self) -> None:
        require(self.crop_padding >= 0, f"crop_padding must be 0 or more pixels, not {self.crop_padding}")
        require(0 <= self.flip <= 1, f"flip is a probability, not {self.flip}")
        require(0 <= self.rotation <= 180, f"rotation must lie between 0 and 180 degrees, not {self.rotation}")
        require(
            all(0 <= j <= 1 for j in self.jitter) and self.jitter[3] <= 0.5,
            f"jitter must lie between 0 and 1 (hue: 0.5), not {self.jitter}",
        )
        require(self.noise_std >= 0, f"noise_std must be 0 or more, not {self.noise_std}")
        require(0 <= self.noise_probability <= 1, f"noise_probability is a probability, not {self.noise_probability}")

    def __call__(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """x [B, C, H, W] in [0, 1] -> the same shape and range, as convolutions like it in memory; `generator` lives on
        x's device."""

        def uniform(low: float, high: float) -> Tensor:
            return torch.empty(len(x), device=x.device).uniform_(low, high, generator=generator)

        if self.crop_padding:
            shifts = torch.randint(2 * self.crop_padding + 1, (2, len(x)), device=x.device, generator=generator)
            x = _crop(x, shifts, self.crop_padding)
        if self.flip:
            x = torch.where((uniform(0, 1) < self.flip)[:, None, None, None], x.flip(3), x)
        if self.rotation:
            x = _rotate(x, uniform(-self.rotation, self.rotation))
        if any(self.jitter) and x.shape[1] == 3:
            x = self._colours(x, uniform, generator)
        if self.noise_std and self.noise_probability:
            noisy = (uniform(0, 1) < self.noise_probability)[:, None, None, None]
            # Drawn in plain order, whatever x's: many times as fast on a CPU.
            noise = torch.empty(x.shape, device=x.device).normal_(std=self.noise_std, generator=generator)
            x = _noisy(x, noise, noisy)
        return x.contiguous(memory_format=convolved(x))

    def _colours(
        self, x: Tensor, uniform: Callable[[float, float], Tensor], generator: torch.Generator | None
    ) -> Tensor:
        brightness, contrast, saturation, hue = self.jitter

        def factor(strength: float) -> Tensor:
            return uniform(1 - strength, 1 + strength)[:, None, None, None]

        # As in torchvision's ColorJitter the order is random; here one order serves a batch.
        for step in torch.randperm(4, generator=_on_host(generator)).tolist():
            if step == 0 and brightness:
                x = _away_from(x, x.new_zeros(()), factor(brightness))
            elif step == 1 and contrast:
                x = _away_from(x, _grey(x).mean((2, 3), keepdim=True), factor(contrast))
            elif step == 2 and saturation:
                x = _away_from(x, _grey(x), factor(saturation))
            elif step == 3 and hue:
                x = _shift_hue(x, uniform(-hue, hue)[:, None, None])
        return x


def _on_host(generator: torch.Generator | None) -> torch.Generator | None:
    """A generator whose numbers the host may read. That of a GPU is a seed and a count of what has been drawn, known to
    the host: a generator made of both waits for nothing that the GPU has yet to do."""
    if generator is None or generator.device.type == "cpu":
        return generator
    drawn = generator.get_state().numpy().tobytes()
    return torch.Generator().manual_seed(zlib.crc32(drawn))


def _crop(x: Tensor, shifts: Tensor, padding: int) -> Tensor:
    """Image i becomes the window of its padded self that begins at row shifts[0, i], column shifts[1, i]."""
    height, width = x.shape[2:]
    padded = F.pad(x, (padding,) * 4).permute(0, 2, 3, 1)
    # Every window of every image as a view: what is copied are the chosen ones, whole rows of pixels at a time.
    windows = padded.unfold(1, height, 1).unfold(2, width, 1).permute(0, 1, 2, 4, 5, 3)
    return windows[torch.arange(len(x), device=x.device), shifts[0], shifts[1]].permute(0, 3, 1, 2)


def _rotate(x: Tensor, degrees: Tensor) -> Tensor:
    angle = degrees * (math.pi / 180)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    # affine_grid works in coordinates scaled to [-1, 1]; the ratio keeps angles true on images that are not square.
    ratio = x.shape[2] / x.shape[3]
    theta = torch.stack([cos, -sin * ratio, zero, sin / ratio, cos, zero], 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="nearest", padding_mode="zeros", align_corners=False)


@Kernel
def _grey(x: Tensor) -> Tensor:
    """Luma [B, 1, H, W] (ITU-R 601, as in PIL)."""
    return 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]


@Kernel
def _away_from(x: Tensor, origin: Tensor, factor: Tensor) -> Tensor:
    """x moved from the origin (`factor` above 1) or towards it, cut to [0, 1]."""
    return (origin + factor * (x - origin)).clamp(0, 1)


@Kernel
def _noisy(x: Tensor, noise: Tensor, chosen: Tensor) -> Tensor:
    return (x + noise * chosen).clamp(0, 1)


@Kernel
def _shift_hue(x: Tensor, turns: Tensor) -> Tensor:
    """x [B, 3, H, W] with the hue of every pixel moved by `turns` [B, 1, 1], through HSV."""
    red, green, blue = x.unbind(1)
    value, chroma = x.amax(1), x.amax(1) - x.amin(1)
    safe = chroma.clamp(min=1e-8)
    sixth = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    sixth = sixth + 6 * turns

    def channel(n: int) -> Tensor:
        k = (n + sixth) % 6
        return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)

    return torch.stack([channel(5), channel(3), channel(1)], 1)
