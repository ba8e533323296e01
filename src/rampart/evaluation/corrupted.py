"""Accuracy under natural corruptions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from rampart.data import Split, in_parts, to_pixels
from rampart.data.corruptions import CORRUPTIONS, STRENGTHS, Corruption, corrupt
from rampart.errors import require_choices
from rampart.models import predict

CASES = [(kind, strength) for kind in CORRUPTIONS for strength in STRENGTHS]


@dataclass(frozen=True, kw_only=True)
class CorruptionPlan:
    """Under which natural corruptions a model is tried.

    Args:
        corruptions: `all` (Gaussian noise and blur, brightness, contrast and JPEG, at the five strengths of CIFAR-10-C)
            or `none`.
    """

    corruptions: Literal["all", "none"] = "all"

    def __post_init__(self) -> None:
        require_choices(self)


def withstand(
    model: nn.Module, split: Split, ledger: pd.DataFrame, plan: CorruptionPlan, seed: int = 0, batch_size: int = 256
) -> pd.DataFrame:
    """The ledger with a column withstood/<corruption>/<strength> for each: whether the model is right on the image so
    corrupted."""
    if plan.corruptions == "none":
        return ledger
    columns = {}
    for kind, strength in tqdm(CASES, desc="corrupt", disable=None, leave=False):

        def right(part: slice, kind: Corruption = kind, strength: int = strength) -> Tensor:
            # Every strength meets the same noise, only more of it.
            generator = torch.Generator(split.labels.device).manual_seed(seed + part.start)
            images = corrupt(split.images[part], kind, strength, generator)
            return predict(model, to_pixels(images)) == split.labels[part]

        found = torch.cat(list(in_parts(right, len(split), batch_size)))
        columns[f"withstood/{kind}/{strength}"] = found.cpu().numpy()
    return ledger.assign(**columns)
