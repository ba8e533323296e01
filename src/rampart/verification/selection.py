"""Which images are verified."""

from __future__ import annotations

import logging
from typing import Literal

import torch
from torch import nn

from rampart.attacks import pgd
from rampart.data import Split, in_parts, stratified_order, to_pixels

log = logging.getLogger(__name__)

Selection = Literal["common", "survivors"]
# Images that are attacked together, however many are wanted: their starts depend on it.
TOGETHER = 64


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

    def survivors(part: slice) -> list[int]:
        batch = split[torch.tensor(order[part], device=split.labels.device)]
        x, step = to_pixels(batch.images), survive_eps / 2 or None
        broken = pgd(model, x, batch.labels, survive_eps, 10, step, generator=generator).success[0]
        return [image for image, lost in zip(order[part], broken.tolist(), strict=True) if not lost]

    for part in in_parts(survivors, len(order), TOGETHER):
        found += part
        if len(found) >= count:
            return found[:count]
    log.warning("only %d of %d images survive PGD at ε %.5g: all of them are verified", len(found), count, survive_eps)
    return found
