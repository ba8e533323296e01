"""Which images are verified."""

from __future__ import annotations

import logging
from typing import Literal

import torch
from torch import nn

from rampart.attacks import pgd
from rampart.data import Split, stratified_order, to_pixels

log = logging.getLogger(__name__)

Selection = Literal["common", "survivors"]


def choose(
    model: nn.Module, split: Split, count: int, selection: Selection, survive_eps: float = 0.0, seed: int = 0
) -> list[int]:
    """Indices of the images to verify, `count` or as many as there are.

    `common` gives the same images whatever the model, right or wrong on them; `survivors` the first that the model
    classifies correctly and on which PGD (10 steps of ε/2, as in the study) fails at `survive_eps` (pixels).
    """
    order = stratified_order(split, seed)
    if selection == "common":
        return order[:count]
    found: list[int] = []
    generator = torch.Generator(split.labels.device).manual_seed(seed)
    size = max(count, 64)
    for start in range(0, len(order), size):
        part = order[start : start + size]
        batch = split[torch.tensor(part, device=split.labels.device)]
        attacked = pgd(
            model, to_pixels(batch.images), batch.labels, survive_eps, 10, survive_eps / 2 or None, generator=generator
        ).success[0]
        found += [image for image, broken in zip(part, attacked.tolist(), strict=True) if not broken]
        if len(found) >= count:
            return found[:count]
    log.warning("only %d of %d images survive PGD at ε %.5g: all of them are verified", len(found), count, survive_eps)
    return found
