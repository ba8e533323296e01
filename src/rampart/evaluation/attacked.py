"""Clean accuracy and PGD over a list of ε on a whole split."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from rampart.attacks import pgd
from rampart.data import Split, batches
from rampart.errors import ModelError, require
from rampart.ledger import evaluation_ledger
from rampart.models import logits_of


@dataclass(frozen=True, kw_only=True)
class AttackPlan:
    """How a model is attacked.

    Args:
        eps: radii in pixels.
        steps: PGD steps a start.
        rel_step: step size as a share of ε (the study: 0.5).
        restarts: random starts.
        batch_size: images a batch.
    """

    eps: tuple[float, ...] = (1 / 255, 2 / 255, 4 / 255, 8 / 255, 16 / 255)
    steps: int = 10
    rel_step: float = 0.5
    restarts: int = 1
    batch_size: int = 256

    def __post_init__(self) -> None:
        require(bool(self.eps), "eps needs one radius or more, as in eps=1/255,2/255")
        for eps in self.eps:
            require(0 <= eps <= 1, f"eps must lie between 0 and 1 (pixels), not {eps:g}")
        for name in ("steps", "restarts", "batch_size"):
            require(getattr(self, name) >= 1, f"{name} must be 1 or more, not {getattr(self, name)}")
        require(self.rel_step > 0, f"rel_step must be above 0, not {self.rel_step}")


def evaluate(model: nn.Module, split: Split, plan: AttackPlan, seed: int = 0) -> pd.DataFrame:
    """The ledger of `split` (on the model's device); ε in ascending order, each once.

    Raises:
        ModelError: the labels do not fit the model's outputs, or the images its inputs.
    """
    radii = sorted(set(plan.eps))
    generator = torch.Generator(split.labels.device).manual_seed(seed)
    predictions, success = [], []
    for x, y in tqdm(
        batches(split, plan.batch_size),
        desc="attack",
        unit="batch",
        disable=None,
        leave=False,
        total=-(-len(split) // plan.batch_size),
    ):
        with torch.no_grad():
            logits = logits_of(model, x)
        if int(y.max()) >= logits.shape[1]:
            raise ModelError(f"the data have label {int(y.max())}, the model {logits.shape[1]} classes: wrong dataset?")
        steps = [plan.rel_step * eps or 1.0 for eps in radii]
        result = pgd(model, x, y, radii, plan.steps, steps, plan.restarts, generator)
        predictions.append(logits.argmax(1))
        success.append(result.success)
    return evaluation_ledger(split.labels, torch.cat(predictions), torch.cat(success, 1), radii)
