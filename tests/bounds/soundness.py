"""What bounds of margins are held against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.nets import margins, points_in_ball

EPS = 0.04


def assert_close(ours: Tensor, theirs: Tensor, labels: Tensor) -> None:
    """Equal to 1e-4 of the bounds' scale, apart from the labels' entries."""
    entries = ~F.one_hot(labels, ours.shape[1]).bool()
    assert torch.allclose(ours[entries], theirs[entries], rtol=0, atol=1e-4 * theirs[entries].abs().max().item())


def sampled_minima(model: nn.Module, x: Tensor, y: Tensor, eps: float | Tensor) -> Tensor:
    """[B, K]: the smallest margins seen at 10,000 points of each image's ball, +inf at the label."""
    radii = torch.as_tensor(eps).expand_as(x)
    return torch.stack(
        [
            margins(model, points_in_ball(image, radius, 10_000), int(label)).amin(0)
            for image, label, radius in zip(x, y, radii, strict=True)
        ]
    )


def assert_sound(bounds: Tensor, seen: Tensor, slack: float = 1e-5) -> None:
    """Finite apart from the label, and never above what was seen (but for float32's rounding)."""
    assert torch.equal(bounds.isfinite(), seen.isfinite())
    assert bool((bounds <= seen + slack).all()), (bounds - seen).nan_to_num(-torch.inf).max()
