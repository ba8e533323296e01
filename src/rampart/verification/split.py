"""Verifies chosen images of a split into a ledger."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from rampart.attacks import pgd
from rampart.bounds.crown import MEMORY
from rampart.data import Split, to_pixels
from rampart.errors import Contradiction, require, require_choices
from rampart.evaluation.attacked import logits_of
from rampart.ledger import PROVED
from rampart.verification.branching import Branching
from rampart.verification.cascade import STAGES, verify
from rampart.verification.selection import Selection, choose

COLUMNS = (
    *("image", "label", "prediction", "correct", "eps", "verdict", "stage", "lower_bound", "domains", "seconds"),
    *(f"seconds/{stage}" for stage in STAGES),
)


@dataclass(frozen=True, kw_only=True)
class VerificationPlan:
    """What is verified.

    Args:
        eps: radius in pixels.
        images: how many.
        selection: `common` (the same images for every model) or `survivors` (those that the model classifies
            correctly and on which PGD fails at survive_eps: the study's way).
        survive_eps: radius in pixels of that PGD.
        selection_seed: of the order in which images are taken.
        attack_first: whether PGD looks for a counterexample before bounds are computed.
        timeout: seconds an image after which no further stage, or batch of domains, is begun.
        memory: MiB that the bounds' coefficients take at once.
        complete: whether branch and bound follows where bounds do not settle an image.
        branching: which neuron it splits: `kfsb`, `babsr` or `gap` (`branch_and_bound`).
        max_domains: that it bounds at most, for one image.
    """

    eps: float = 2 / 255
    images: int = 20
    selection: Selection = "common"
    survive_eps: float = 4 / 255
    selection_seed: int = 0
    attack_first: bool = False
    timeout: float = 180.0
    memory: int = MEMORY
    complete: bool = True
    branching: Branching = "kfsb"
    max_domains: int = 1_000_000

    def __post_init__(self) -> None:
        require_choices(self)
        for name in ("eps", "survive_eps"):
            require(0 <= getattr(self, name) <= 1, f"{name} must lie between 0 and 1, not {getattr(self, name):g}")
        require(self.images >= 1, f"images must be 1 or more, not {self.images}")
        for name in ("memory", "max_domains"):
            require(getattr(self, name) >= 1, f"{name} must be 1 or more, not {getattr(self, name)}")
        require(self.timeout > 0, f"timeout must be above 0 seconds, not {self.timeout:g}")


def verify_split(
    model: nn.Module, split: Split, plan: VerificationPlan
) -> tuple[pd.DataFrame, dict[int, torch.Tensor]]:
    """The ledger (COLUMNS; an image that the model gets wrong has no verdict) and counterexamples by image.

    Raises:
        Contradiction: PGD breaks an image that was proved.
    """
    chosen = choose(model, split, plan.images, plan.selection, plan.survive_eps, plan.selection_seed)
    rows, examples = [], {}
    counts: Counter[str] = Counter()
    with tqdm(chosen, desc="verify", unit="image", disable=None, leave=False) as bar:
        for index in bar:
            image, label = to_pixels(split.images[index]), int(split.labels[index])
            with torch.no_grad():
                prediction = int(logits_of(model, image[None]).argmax())
            row: dict[str, object] = {
                "image": index,
                "label": label,
                "prediction": prediction,
                "correct": prediction == label,
            }
            row["eps"] = plan.eps
            if prediction == label:
                found = verify(
                    model,
                    image,
                    label,
                    plan.eps,
                    plan.timeout,
                    plan.attack_first,
                    memory=plan.memory,
                    complete=plan.complete,
                    branching=plan.branching,
                    max_domains=plan.max_domains,
                )
                row |= {"verdict": found.status, "stage": found.stage, "lower_bound": found.lower_bound}
                row |= {"domains": found.domains, "seconds": found.seconds}
                row |= {f"seconds/{stage}": seconds for stage, seconds in found.stage_seconds.items()}
                if found.counterexample is not None:
                    examples[index] = found.counterexample
            counts[str(row.get("verdict", "misclassified"))] += 1
            bar.set_postfix(counts)
            rows.append(row)
    ledger = pd.DataFrame(rows, columns=list(COLUMNS))
    _attack_the_proved(model, split, ledger, plan)
    return ledger, examples


def _attack_the_proved(model: nn.Module, split: Split, ledger: pd.DataFrame, plan: VerificationPlan) -> None:
    proved = torch.tensor(ledger.loc[ledger["verdict"].isin(PROVED), "image"].tolist(), dtype=torch.long)
    generator = torch.Generator(split.labels.device).manual_seed(plan.selection_seed)
    for part in proved.split(256):
        batch = split[part.to(split.labels.device)]
        broken = pgd(model, to_pixels(batch.images), batch.labels, plan.eps, 20, generator=generator).success[0].cpu()
        if bool(broken.any()):
            raise Contradiction(
                f"image {int(part[broken][0])} was proved robust at ε {plan.eps:.6g}, but PGD breaks it there: "
                "the bounds or the attack are wrong, no verdict of this run can be trusted"
            )
