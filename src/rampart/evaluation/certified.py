"""Certified accuracy of a whole split: which images bounds, or branch and bound, prove robust."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from rampart.bounds import METHODS
from rampart.bounds.crown import memory_on
from rampart.bounds.exact import Exact
from rampart.bounds.margins import Method, proof_tolerance
from rampart.data import Split, stratified_order, to_pixels
from rampart.errors import is_out_of_memory, require, require_choices
from rampart.ledger import PROVED as PROVED_VERDICTS
from rampart.ledger import attacked_by, eps_key, mark_attacked
from rampart.verification import verify

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CertificationPlan:
    """How images are proved robust.

    Args:
        certify: what is tried, and all weaker bounds before it: `none`, `ibp`, `crown-ibp`, `crown`, `alpha-crown`, or
            `branch-and-bound` (`rampart.verification.verify`), whose counterexamples count as attacks.
        certify_eps: radii in pixels.
        certify_images: how many test images, the same for every model, class by class; 0: all.
        certify_timeout: seconds an image and radius that branch and bound may take.
        certify_batch: images bounded at once.
        memory: MiB that the bounds' coefficients take at once; 0: 16 on a CPU, 4,096 on a GPU. Where there is not so
            much it is halved.
    """

    certify: Literal["none", "ibp", "crown-ibp", "crown", "alpha-crown", "branch-and-bound"] = "none"
    certify_eps: tuple[float, ...] = (1 / 255, 2 / 255)
    certify_images: int = 0
    certify_timeout: float = 10.0
    certify_batch: int = 64
    memory: int = 0

    def __post_init__(self) -> None:
        require_choices(self)
        require(bool(self.certify_eps), "certify_eps needs one radius or more, as in certify_eps=1/255,2/255")
        for eps in self.certify_eps:
            require(0 <= eps <= 1, f"certify_eps must lie between 0 and 1 (pixels), not {eps:g}")
        require(self.certify_images >= 0, f"certify_images must be 0 or more, not {self.certify_images}")
        require(self.certify_timeout > 0, f"certify_timeout must be above 0 seconds, not {self.certify_timeout:g}")
        require(self.certify_batch >= 1, f"certify_batch must be 1 or more, not {self.certify_batch}")
        require(self.memory >= 0, f"memory must be 0 or more MiB, not {self.memory}")


def certify(
    model: nn.Module,
    split: Split,
    ledger: pd.DataFrame,
    plan: CertificationPlan,
    keep: Callable[[pd.DataFrame], None] = lambda _: None,
) -> pd.DataFrame:
    """The ledger of `evaluate` with a column certified/<ε> for every ε of the plan: true, false, or missing where the
    image is none of those to be proved.

    The smallest ε comes first: an image that is not proved at one is not tried at larger ones, nor is one that an
    attack broke there or below.

    Args:
        ledger: that of an interrupted certification by the same plan may be given, too: what it has settled is not
            bounded again.
        keep: called after each batch with the ledger so far, in which the columns miss what is not yet settled.
    """
    if plan.certify == "none":
        return ledger
    work = _Certification(model, split, ledger.copy(), plan)
    for eps in sorted(set(plan.certify_eps)):
        images = work.open(eps)
        for part in tqdm(
            images.split(plan.certify_batch), desc=f"certify {eps_key(eps)}", unit="batch", disable=None, leave=False
        ):
            work.prove(part, eps)
            work.settle(part, eps)
            keep(work.ledger)
        work.close(eps)
    return work.ledger


class _Certification:
    """Which images are proved, from the smallest ε up; counterexamples go into the ledger."""

    def __init__(self, model: nn.Module, split: Split, ledger: pd.DataFrame, plan: CertificationPlan) -> None:
        self.model, self.split, self.ledger, self.plan = model, split, ledger, plan
        self.exact = Exact.of(model, to_pixels(split.images[:1]))
        self.memory = memory_on(split.labels.device, plan.memory)
        self.chosen = torch.zeros(len(split), dtype=torch.bool)
        self.chosen[stratified_order(split, 0)[: plan.certify_images or None]] = True
        # Proved at the present ε, and at all before it.
        self.proved = torch.zeros(len(split), dtype=torch.bool)
        self.left = self.chosen & _mask(ledger["correct"])
        for eps in sorted(set(plan.certify_eps)):
            if _column(eps) not in ledger:
                ledger[_column(eps)] = pd.array([pd.NA] * len(ledger), dtype="boolean")

    def open(self, eps: float) -> Tensor:
        """Images of which it is not known whether they are robust at `eps`."""
        column = self.ledger[_column(eps)]
        self.proved = _mask(column.fillna(False))
        return (self.left & ~_mask(column.notna() | attacked_by(self.ledger, eps))).nonzero().squeeze(1)

    def settle(self, images: Tensor, eps: float) -> None:
        """Enters what has been found of these images."""
        rows = self.ledger.index[images.numpy()]
        self.ledger.loc[rows, _column(eps)] = self.proved[images].numpy()

    def close(self, eps: float) -> None:
        """The rest of the chosen images is not proved at `eps`, and those alone that are stay in the running."""
        self.settle(self.chosen.nonzero().squeeze(1), eps)
        self.left = self.proved

    def prove(self, images: Tensor, eps: float) -> None:
        """Tries the plan's bounds on the images, the weakest first, and branch and bound where it is asked for."""
        certify = self.plan.certify
        # A search begins with CROWN's bounds itself.
        last = METHODS.index("crown") if certify == "branch-and-bound" else METHODS.index(certify) + 1
        for method in METHODS[:last]:
            if len(images):
                proved = self.proved_by(method, images, eps)
                self.proved[images[proved]] = True
                images = images[~proved]
        if certify == "branch-and-bound":
            for index in images.tolist():
                self.search(index, eps)

    def proved_by(self, method: Method, images: Tensor, eps: float) -> Tensor:
        """Which of the images a bound proves, [N]."""
        batch = self.split[images.to(self.split.labels.device)]
        x = to_pixels(batch.images)
        while True:
            try:
                bounds = self.exact.bounds(x, batch.labels, eps, method, self.memory)
                return (bounds.amin(1) > proof_tolerance(self.exact.logits(x))).cpu()
            except RuntimeError as error:
                if not is_out_of_memory(error) or self.memory == 1:
                    raise
            self.memory //= 2
            log.warning("out of memory: going on with memory=%d", self.memory)

    def search(self, index: int, eps: float) -> None:
        image, label = to_pixels(self.split.images[index]), int(self.split.labels[index])
        timeout = self.plan.certify_timeout
        found = verify(self.model, image, label, eps, timeout, memory=self.memory, exact=self.exact)
        self.proved[index] = found.status in PROVED_VERDICTS
        if found.status == "unsafe":
            mark_attacked(self.ledger, index, eps)


def _column(eps: float) -> str:
    return f"certified/{eps_key(eps)}"


def _mask(column: pd.Series) -> Tensor:
    return torch.tensor(column.to_numpy(dtype=bool))
