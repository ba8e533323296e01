"""How the encoder places images: UMAP (the study's Figure 1; McInnes et al. 2018) and distances."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from rampart.data import Split, batches
from rampart.errors import require
from rampart.models import Classifier, classes_of

# Images that UMAP can place.
FEWEST = 4


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

    require(len(chosen) >= FEWEST, f"UMAP needs {FEWEST} test images or more, not {len(chosen)}")
    part = split[torch.tensor(chosen, device=split.labels.device)]
    embeddings, logits = _forward(model, part)
    with warnings.catch_warnings():
        # A fixed seed makes UMAP single-threaded, and it says so each time.
        warnings.simplefilter("ignore")
        reducer = UMAP(n_neighbors=min(plan.neighbors, len(part) - 1), min_dist=plan.min_dist, random_state=seed)
        points = reducer.fit_transform(embeddings.cpu().numpy())
    known = {"image": chosen, "label": part.labels.cpu(), "prediction": classes_of(logits).cpu()}
    return pd.DataFrame({**known, "x": points[:, 0], "y": points[:, 1]})


def geometry(model: Classifier, split: Split) -> pd.DataFrame:
    """Where every image of the split lies among the others, by the Euclidean distances of unit-length embeddings.

    Columns image, label, prediction; within, the mean distance to the other images of its class; between, that to the
    images of the nearest other class (a and b of the silhouette: Rousseeuw 1987); margin, the logit of its label less
    the largest other one. NaN where there is no such image.
    """
    z, logits = _forward(model, split)
    labels = split.labels
    members = F.one_hot(labels, logits.shape[1]).to(z.dtype)
    sums = torch.zeros_like(members)  # of distances, over each class
    # A block of rows at a time: all distances at once may be more than there is room for.
    for rows in torch.arange(len(z), device=z.device).split(1024):
        # To itself it is 0, which rounding in a matrix product would miss.
        sums[rows] = torch.cdist(z[rows], z).scatter_(1, rows[:, None], 0.0) @ members
    own = members.bool()
    within = sums[own] / (members.sum(0)[labels] - 1).clamp(min=0)
    others = (members.sum(0) > 0) & ~own
    between = (sums / members.sum(0)).masked_fill(~others, torch.inf).amin(1)
    margin = logits[own] - logits.masked_fill(own, -torch.inf).amax(1)
    found = {"within": within, "between": between.masked_fill(between.isinf(), torch.nan), "margin": margin}
    known = {"image": range(len(split)), "label": labels.cpu(), "prediction": classes_of(logits).cpu()}
    return pd.DataFrame({**known, **{name: value.cpu() for name, value in found.items()}})


def _forward(model: Classifier, split: Split) -> tuple[Tensor, Tensor]:
    """(unit-length embeddings [N, D], logits [N, K])."""
    with torch.no_grad():
        found = [(z, model.head(z)) for x, _ in batches(split, 256) for z in (model.embed(x),)]
    embeddings, logits = zip(*found, strict=True)
    return F.normalize(torch.cat(embeddings), dim=1), torch.cat(logits)
