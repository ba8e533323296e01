"""What is known of one image, whatever found it out."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rampart.attacks import Ball
from rampart.bounds.box import covering
from rampart.bounds.margins import proof_tolerance
from rampart.models.classifier import NO_CLASS, classes_of, double_logits


@dataclass(frozen=True)
class Verdict:
    """What is known of one image.

    Args:
        status: `safe-incomplete`, `safe`, `unsafe`, `timeout`, `unknown` or `error`.
        lower_bound: the best proven lower bound of min over j of z_y - z_j; NaN where another verifier does not tell.
        counterexample: [C, H, W] for `unsafe`, checked in float64.
        domains: bounded by branch and bound; 0 where bounds or an attack settled it.
        seconds: spent on the image.
        stage: what settled it, of STAGES, or another verifier's name (of a results.csv the category that it wrote
            down); the last one tried where none did.
        stage_seconds: spent in each stage that was tried.
    """

    status: str
    lower_bound: float
    counterexample: Tensor | None
    domains: int
    seconds: float
    stage: str
    stage_seconds: dict[str, float] = field(default_factory=dict)


def is_counterexample(model: nn.Module, example: Tensor, image: Tensor, label: int, eps: float) -> bool:
    """Whether `example` lies in the ball, by float64, and in [0, 1], and the model in float64 errs on it. A model that
    cannot be run so must err in its own type by more than rounding; one that is in float64 need not be copied."""
    inside = _distance(example, image) <= eps
    in_range = bool((example >= 0).all() and (example <= 1).all())
    if not (inside and in_range):
        return False
    with torch.no_grad():
        logits = double_logits(model, example[None])
        if logits is not None:
            return int(classes_of(logits)) not in (label, NO_CLASS)
        logits = model(example[None])
        return bool(logits[0, label] < logits.max() - proof_tolerance(logits)[0])


def confirmed(model: nn.Module, example: Tensor, image: Tensor, label: int, eps: float) -> Tensor | None:
    """The counterexample that another tool's `example` is, or None. What such a tool is asked and answers is rounded to
    float32: a point that lies outside of the ball by no more is brought into it."""
    if _distance(example, image) > covering(eps):
        return None
    point = Ball.around(image[None], eps).clip(example[None])[0]
    return point if is_counterexample(model, point, image, label, eps) else None


def _distance(example: Tensor, image: Tensor) -> float:
    return float((example.double() - image.double()).abs().max())
