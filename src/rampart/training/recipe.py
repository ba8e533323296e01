"""Everything that decides how one arm is trained, beside its data and its augmentation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rampart.errors import require, require_choices, unknown
from rampart.models.classifier import ENCODERS

MethodName = Literal["normal", "adversarial", "certified"]
Contrastive = Literal["none", "double", "single"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One arm's training.

    Args:
        method: `normal` (cross-entropy), `adversarial` (the batch doubled with PGD examples, Madry et al. 2018) or
            `certified` (loss on CROWN-IBP bounds, Zhang et al. 2020).
        augment: whether training images are augmented.
        contrastive: `none`; `double` (encoder by SupCon, then frozen, then the head by cross-entropy: the study's
            DTM); `single` (both losses at once: STM).
        architecture: of the network.
        width: factor on its channels and hidden neurons.
        epochs: of `none` and `single`.
        encoder_epochs: of the encoder of `double`.
        head_epochs: of the head of `double`.
        batch_size: images a step.
        lr: Adam's learning rate.
        weight_decay: Adam's.
        schedule: of the learning rate over a stage: `constant`, `cosine` or `linear` (both down to 0).
        temperature: τ of SupCon.
        supcon_weight: a in a * SupCon + (1 - a) * cross-entropy, for `single`.
        encoder_supcon_weight: the same a for the encoder of `double`; 1 is SupCon alone (the study).
        head: how the head of `double` is trained: `normal` (cross-entropy on clean images, as in the study) or
            `method` (by the arm's own method, through the frozen encoder).
        eps: radius in pixels of the attack or of the certified ball.
        eps_warmup: share of a stage's steps in which ε rises from 0 (`certified` alone).
        attack_steps: PGD steps a batch (`adversarial` alone).
        attack_rel_step: PGD's step size as a share of ε.
        certified_loss: `margin` (cross-entropy on bounds of z_y - z_j: a bound of the loss), `fused` (one linear bound
            of that cross-entropy: looser, several times as fast) or `logit-lower` (on lower bounds of the logits: the
            study's, not a bound of the loss).
        clean_weight: share κ of the clean loss in the certified one (Gowal et al. 2018, eq. 12).
        embedding_bound: of the embedding under a certified SupCon loss: `crown-ibp` (one row for each of its
            dimensions: slow) or `ibp`.
        select: which epoch's weights are kept: `best` on validation (accuracy, robust or certified accuracy as the
            method has it, the loss for a SupCon encoder) or `last`.
    """

    method: MethodName = "normal"
    augment: bool = False
    contrastive: Contrastive = "none"
    architecture: str = "paper-cnn"
    width: float = 1.0
    epochs: int = 30
    encoder_epochs: int = 20
    head_epochs: int = 10
    batch_size: int = 128
    lr: float = 1e-3
    weight_decay: float = 0.0
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    temperature: float = 0.07
    supcon_weight: float = 0.5
    encoder_supcon_weight: float = 1.0
    head: Literal["normal", "method"] = "normal"
    eps: float = 8 / 255
    eps_warmup: float = 0.0
    attack_steps: int = 10
    attack_rel_step: float = 0.25
    certified_loss: Literal["margin", "fused", "logit-lower"] = "margin"
    clean_weight: float = 0.0
    embedding_bound: Literal["crown-ibp", "ibp"] = "crown-ibp"
    select: Literal["best", "last"] = "best"

    def __post_init__(self) -> None:
        require_choices(self)
        require(self.architecture in ENCODERS, unknown("architecture", self.architecture, ENCODERS))
        for name in ("epochs", "encoder_epochs", "head_epochs", "attack_steps"):
            require(getattr(self, name) >= 1, f"{name} must be 1 or more, not {getattr(self, name)}")
        require(self.batch_size >= 2, f"batch_size must be 2 or more (BatchNorm), not {self.batch_size}")
        for name in ("lr", "temperature", "attack_rel_step", "width"):
            require(getattr(self, name) > 0, f"{name} must be above 0, not {getattr(self, name)}")
        require(self.weight_decay >= 0, f"weight_decay must be 0 or more, not {self.weight_decay}")
        for name in ("supcon_weight", "encoder_supcon_weight", "clean_weight", "eps_warmup"):
            require(0 <= getattr(self, name) <= 1, f"{name} must lie between 0 and 1, not {getattr(self, name)}")
        require(0 <= self.eps <= 1, f"eps must lie between 0 and 1 (pixels), not {self.eps}")
