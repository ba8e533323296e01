"""Accuracy under natural corruptions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from rampart.data import Split, to_pixels
from rampart.data.corruptions import CORRUPTIONS, STRENGTHS, corrupt
from rampart.errors import require_choices
from rampart.models import predict

CASES = [(kind, strength) for kind in CORRUPTIONS for strength in STRENGTHS]
BATCH = 500


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
    model: nn.Module, split: Split, ledger: pd.DataFrame, plan: CorruptionPlan, seed: int = 0
) -> pd.DataFrame:
    """The ledger with a column withstood/<corruption>/<strength> for each: whether the model is right on the image so
    corrupted."""
    if plan.corruptions == "none":
        return ledger
    columns = {}
    for kind, strength in tqdm(CASES, desc="corrupt", disable=None, leave=False):
        # Every strength meets the same noise, only more of it.
        generator = torch.Generator(split.labels.device).manual_seed(seed)
        right = [
            predict(model, to_pixels(corrupt(images, kind, strength, generator))) == labels
            for images, labels in zip(split.images.split(BATCH), split.labels.split(BATCH), strict=True)
        ]
        columns[f"withstood/{kind}/{strength}"] = torch.cat(right).cpu().numpy()
    return ledger.assign(**columns)
