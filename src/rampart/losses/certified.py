"""From bounds to losses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rampart.bounds.box import Box


def worst_case_logits(margins: Tensor, labels: Tensor) -> Tensor:
    """Logits [B, K] whose cross-entropy is an upper bound of the loss anywhere in the ball.

    With lower bounds m_j <= z_y - z_j, the logits -m_j (0 at j = y) satisfy
    cross-entropy(-m, y) >= cross-entropy(z(x'), y) for every x' in the ball
    (Wong & Kolter 2018, theorem 2; Zhang et al. 2020, eq. 8).

    Args:
        margins: [B, K] lower bounds of z_y - z_j; the entry at j = y is ignored.
        labels: [B].
    """
    return -margins.scatter(1, labels[:, None], 0.0)


def interval_regularizer(box: Box, inputs: Sequence[Box], tolerance: float = 0.5) -> Tensor:
    """Keeps intervals from exploding and ReLUs from dying together (Shi et al. 2021, eqs. 8 to 11): a scalar.

    Over all ReLUs, the mean of how far the ratio of the input box's mean width to the mean width of the ReLU's input
    falls below `tolerance`, and of how far active and inactive neurons differ in the mean and the spread of their
    centres; each as a share of `tolerance`.

    Args:
        box: of the network's input.
        inputs: of the ReLUs.
    """
    total = box.lower.new_zeros(())
    width = box.half.mean()
    for bounds in inputs:
        center, half = bounds.center, bounds.half
        total = total + F.relu(tolerance - width / half.mean().clamp(min=1e-12))
        active, inactive = bounds.lower > 0, bounds.upper < 0
        spread = (center - center.mean()) ** 2
        for kind in (center.abs(), spread):
            up, down = (kind * active).sum(), (kind * inactive).sum()
            ratio = torch.minimum(up, down) / torch.maximum(up, down).clamp(min=1e-12)
            # Where no neuron is active, or none inactive, the ratio is 0 and has no gradient that could mend it.
            total = total + F.relu(tolerance - ratio)
    return total / (tolerance * max(len(inputs), 1))
