"""Supervised contrastive loss (Khosla et al. 2020, eq. 2; the study's eq. 1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rampart.errors import require


def supcon_loss(embeddings: Tensor, labels: Tensor, temperature: float = 0.07) -> Tensor:
    """Mean over the anchors i that have a positive of
    -1/|P(i)| * sum over p in P(i) of log( exp(z_i·z_p/τ) / sum over a in A(i) of exp(z_i·z_a/τ) ),
    with z normalised to unit length, P(i) the other images of i's class in the batch, A(i) all other images.

    Args:
        embeddings: [B, D], any length; normalised here.
        labels: [B].
        temperature: τ, above 0.

    Returns:
        A scalar; 0 (with zero gradient) where no anchor has a positive.

    Raises:
        SettingsError: a temperature of 0 or less, or shapes that do not fit.
    """
    require(temperature > 0, f"temperature must be above 0, not {temperature}")
    require(
        embeddings.dim() == 2 and labels.shape == embeddings.shape[:1],
        f"SupCon takes embeddings [B, D] and labels [B], not {tuple(embeddings.shape)} and {tuple(labels.shape)}",
    )
    z = F.normalize(embeddings, dim=1)
    similarity = z @ z.T / temperature
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    log_probability = similarity - torch.logsumexp(similarity.masked_fill(itself, -torch.inf), 1, keepdim=True)
    positives = (labels[:, None] == labels) & ~itself
    counts = positives.sum(1)
    # where, not a product with the mask: a batch of one has -inf in log_probability's only entry.
    sums = torch.where(positives, log_probability, 0.0).sum(1)
    # An anchor without positives adds 0. Nothing is picked out: a GPU would have to be waited for.
    return -(sums / counts.clamp(min=1)).sum() / (counts > 0).sum().clamp(min=1)
