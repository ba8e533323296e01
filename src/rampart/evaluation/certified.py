"""Certified accuracy of a whole split: which images incomplete bounds prove robust."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from rampart.bounds import METHODS, margin_bounds
from rampart.bounds.crown import MEMORY
from rampart.bounds.margins import PROVED
from rampart.data import Split, to_pixels
from rampart.errors import require, require_choices
from rampart.ledger import eps_key


@dataclass(frozen=True, kw_only=True)
class CertificationPlan:
    """How images are proved robust.

    Args:
        certify: the bounds tried, and all weaker ones before them: `none`, `ibp`, `crown-ibp`, `crown`, `alpha-crown`.
        certify_eps: radii in pixels.
        certify_batch: images bounded at once.
        memory: MiB that the bounds' coefficients take at once.
    """

    certify: Literal["none", "ibp", "crown-ibp", "crown", "alpha-crown"] = "none"
    certify_eps: tuple[float, ...] = (1 / 255, 2 / 255)
    certify_batch: int = 64
    memory: int = MEMORY

    def __post_init__(self) -> None:
        require_choices(self)
        require(bool(self.certify_eps), "certify_eps needs one radius or more, as in certify_eps=1/255,2/255")
        for eps in self.certify_eps:
            require(0 <= eps <= 1, f"certify_eps must lie between 0 and 1 (pixels), not {eps:g}")
        for name in ("certify_batch", "memory"):
            require(getattr(self, name) >= 1, f"{name} must be 1 or more, not {getattr(self, name)}")


def certify(model: nn.Module, split: Split, ledger: pd.DataFrame, plan: CertificationPlan) -> pd.DataFrame:
    """The ledger of `evaluate` with a column certified/<ε>, true or false, for every ε of the plan.

    An image proved at one ε is proved at the smaller ones; one that an attack broke at one ε cannot be proved there or
    beyond: neither is bounded again.
    """
    if plan.certify == "none":
        return ledger
    ledger = ledger.copy()
    stages = METHODS[: METHODS.index(plan.certify) + 1]
    proved = torch.zeros(len(split), dtype=torch.bool)
    correct = torch.from_numpy(ledger["correct"].to_numpy().copy())
    columns = {}
    for eps in sorted(set(plan.certify_eps), reverse=True):
        open_ = correct & ~proved & ~_broken(ledger, eps)
        images = open_.nonzero().squeeze(1)
        for part in tqdm(
            images.split(plan.certify_batch), desc=f"certify {eps_key(eps)}", unit="batch", disable=None, leave=False
        ):
            left = part
            for stage in stages:
                batch = split[left.to(split.labels.device)]
                x = to_pixels(batch.images)
                bounds = margin_bounds(model, x, batch.labels, eps, stage, memory=plan.memory).amin(1).cpu()
                proved[left[bounds > PROVED]] = True
                left = left[bounds <= PROVED]
                if not len(left):
                    break
        columns[eps] = proved.clone().numpy()
    for eps in sorted(columns):
        ledger[f"certified/{eps_key(eps)}"] = columns[eps]
    return ledger


def _broken(ledger: pd.DataFrame, eps: float) -> torch.Tensor:
    """Images that an attack of radius `eps` or less broke."""
    broken = torch.zeros(len(ledger), dtype=torch.bool)
    for column in ledger.columns:
        kind, _, key = str(column).partition("/")
        if kind == "attacked" and float(key) <= eps * (1 + 1e-5):
            broken |= torch.from_numpy(ledger[column].to_numpy().copy())
    return broken
