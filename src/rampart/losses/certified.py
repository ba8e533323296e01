"""From certified margins to a loss."""

from __future__ import annotations

from torch import Tensor


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
