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
from rampart.data import Split, stratified_order, to_pixels
from rampart.errors import require, require_choices
from rampart.ledger import eps_key


@dataclass(frozen=True, kw_only=True)
class CertificationPlan:
    """How images are proved robust.

    Args:
        certify: the bounds tried, and all weaker ones before them: `none`, `ibp`, `crown-ibp`, `crown`, `alpha-crown`.
        certify_eps: radii in pixels.
        certify_images: how many test images, the same for every model, class by class; 0: all.
        certify_batch: images bounded at once.
        memory: MiB that the bounds' coefficients take at once.
    """

    certify: Literal["none", "ibp", "crown-ibp", "crown", "alpha-crown"] = "none"
    certify_eps: tuple[float, ...] = (1 / 255, 2 / 255)
    certify_images: int = 0
    certify_batch: int = 64
    memory: int = MEMORY

    def __post_init__(self) -> None:
        require_choices(self)
        require(bool(self.certify_eps), "certify_eps needs one radius or more, as in certify_eps=1/255,2/255")
        for eps in self.certify_eps:
            require(0 <= eps <= 1, f"certify_eps must lie between 0 and 1 (pixels), not {eps:g}")
        require(self.certify_images >= 0, f"certify_images must be 0 or more, not {self.certify_images}")
        for name in ("certify_batch", "memory"):
            require(getattr(self, name) >= 1, f"{name} must be 1 or more, not {getattr(self, name)}")


def certify(model: nn.Module, split: Split, ledger: pd.DataFrame, plan: CertificationPlan) -> pd.DataFrame:
    """The ledger of `evaluate` with a column certified/<ε> for every ε of the plan: true, false, or missing where the
    image is none of those to be proved.

    An image proved at one ε is proved at the smaller ones; one that an attack broke at one ε cannot be proved there or
    beyond: neither is bounded again.
    """
    if plan.certify == "none":
        return ledger
    ledger = ledger.copy()
    stages = METHODS[: METHODS.index(plan.certify) + 1]
    proved = torch.zeros(len(split), dtype=torch.bool)
    chosen = torch.zeros(len(split), dtype=torch.bool)
    chosen[stratified_order(split, 0)[: plan.certify_images or None]] = True
    correct = torch.from_numpy(ledger["correct"].to_numpy().copy()) & chosen
    columns = {}
    for eps in sorted(set(plan.certify_eps), reverse=True):
        open_ = correct & ~proved & ~_broken(ledger, eps)
        images = open_.nonzero().squeeze(1)
        for part in tqdm(
            images.split(plan.certify_batch), desc=f"certify {eps_key(eps)}", unit="batch", disable=None, leave=False
        ):
            left = part
            for stage in stages:
                if not len(left):
                    break
                batch = split[left.to(split.labels.device)]
                x = to_pixels(batch.images)
                bounds = margin_bounds(model, x, batch.labels, eps, stage, memory=plan.memory).amin(1).cpu()
                proved[left[bounds > PROVED]] = True
                left = left[bounds <= PROVED]
        columns[eps] = pd.array(proved.numpy(), dtype="boolean", copy=True)
    for eps in sorted(columns):
        ledger[f"certified/{eps_key(eps)}"] = columns[eps]
        ledger.loc[~chosen.numpy(), f"certified/{eps_key(eps)}"] = pd.NA
    return ledger


def _broken(ledger: pd.DataFrame, eps: float) -> torch.Tensor:
    """Images that an attack of radius `eps` or less broke."""
    broken = torch.zeros(len(ledger), dtype=torch.bool)
    for column in ledger.columns:
        kind, _, key = str(column).partition("/")
        if kind == "attacked" and float(key) <= eps * (1 + 1e-5):
            broken |= torch.from_numpy(ledger[column].to_numpy().copy())
    return broken
