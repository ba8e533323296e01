"""UMAP of the encoder's embeddings (the study's Figure 1; McInnes et al. 2018)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import pandas as pd
import torch
import torch.nn.functional as F

from rampart.data import Split, batches
from rampart.errors import require
from rampart.models import Classifier


@dataclass(frozen=True, kw_only=True)
class EmbeddingPlan:
    """What is drawn.

    Args:
        points: test images, taken in a seeded order, as many of each class.
        neighbors: UMAP's n_neighbors.
        min_dist: UMAP's.
    """

    points: int = 500
    neighbors: int = 15
    min_dist: float = 0.1

    def __post_init__(self) -> None:
        require(self.points >= 10, f"points must be 10 or more, not {self.points}")
        require(2 <= self.neighbors < self.points, f"neighbors must lie between 2 and points, not {self.neighbors}")
        require(0 <= self.min_dist <= 1, f"min_dist must lie between 0 and 1, not {self.min_dist}")


def embed(model: Classifier, split: Split, chosen: list[int], plan: EmbeddingPlan, seed: int = 0) -> pd.DataFrame:
    """Columns image, label, prediction, x, y: the unit-length embeddings of the `chosen` images in two dimensions."""
    from umap import UMAP

    part = split[torch.tensor(chosen, device=split.labels.device)]
    embeddings, predictions = [], []
    with torch.no_grad():
        for x, _ in batches(part, 256):
            z = model.embed(x)
            embeddings.append(F.normalize(z, dim=1).cpu())
            predictions.append(model.head(z).argmax(1).cpu())
    with warnings.catch_warnings():
        # A fixed seed makes UMAP single-threaded, and it says so each time.
        warnings.simplefilter("ignore")
        reducer = UMAP(n_neighbors=min(plan.neighbors, len(part) - 1), min_dist=plan.min_dist, random_state=seed)
        points = reducer.fit_transform(torch.cat(embeddings).numpy())
    return pd.DataFrame(
        {
            "image": chosen,
            "label": part.labels.cpu(),
            "prediction": torch.cat(predictions),
            "x": points[:, 0],
            "y": points[:, 1],
        }
    )
