"""What attacks ascend: one number an image, from logits z [B, K] and labels y [B]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Loss = Literal["ce", "margin", "dlr"]
Objective = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, reduction="none")


def margin(z: Tensor, y: Tensor) -> Tensor:
    """max over j ≠ y of z_j - z_y: above 0 where the model errs. The f6 of Carlini & Wagner (2017), whose cut at 0
    changes nothing for an attack that stops there."""
    others = z.scatter(1, y[:, None], -float("inf"))
    return others.amax(1) - z.gather(1, y[:, None]).squeeze(1)


def dlr(z: Tensor, y: Tensor) -> Tensor:
    """The margin as a share of the distance between the largest and the third largest logit (Croce & Hein 2020,
    eq. 6): the scale of the logits does not matter. With two classes, where there is no third, the margin."""
    if z.shape[1] < 3:
        return margin(z, y)
    top = z.topk(3, 1).values
    return margin(z, y) / (top[:, 0] - top[:, -1] + 1e-12)


def targeted_dlr(target: Tensor) -> Objective:
    """(z_t - z_y) as a share of z_1 - (z_3 + z_4) / 2, sorted logits (Croce & Hein 2020's targeted DLR loss); with
    three classes the fourth is the third, with two the share is 1. `target` [B]."""

    def objective(z: Tensor, y: Tensor) -> Tensor:
        ahead = (z.gather(1, target[:, None]) - z.gather(1, y[:, None])).squeeze(1)
        if z.shape[1] < 3:
            return ahead
        top = z.topk(min(4, z.shape[1]), 1).values
        return ahead / (top[:, 0] - (top[:, 2] + top[:, -1]) / 2 + 1e-12)

    return objective


OBJECTIVES: dict[Loss, Objective] = {"ce": cross_entropy, "margin": margin, "dlr": dlr}
