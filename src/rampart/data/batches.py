"""Batches cut from device-resident tensors: no worker processes, no copies but the batch itself."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rampart.data.dataset import Split
from rampart.kernels import convolved


def to_pixels(images: Tensor) -> Tensor:
    """uint8 [..., C, H, W] -> float32 in [0, 1]; a batch lies in memory as its device's convolutions like it."""
    pixels = images.float().div_(255)
    return pixels.contiguous(memory_format=convolved(pixels)) if pixels.dim() == 4 else pixels


def batches(
    split: Split, size: int, generator: torch.Generator | None = None, drop_single: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (x float32 [B, C, H, W] in [0, 1], y int64 [B]); shuffled where a (CPU) `generator` is given.

    `drop_single` leaves out a last batch of one image, which BatchNorm cannot be trained on.
    """
    order = torch.randperm(len(split), generator=generator).to(split.labels.device) if generator else None
    for start in range(0, len(split), size):
        part = slice(start, start + size)
        batch = split[order[part]] if order is not None else split[part]
        if len(batch) == 1 and drop_single:
            return
        yield to_pixels(batch.images), batch.labels
