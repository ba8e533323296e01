"""Everything that decides how one arm is trained, beside its data and its augmentation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rampart.errors import require, require_choices, unknown
from rampart.models.classifier import ENCODERS

MethodName = Literal["normal", "adversarial", "trades", "certified", "ibp", "sabr", "mtl-ibp"]
Contrastive = Literal["none", "double", "single"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One arm's training.

    Args:
        method: `normal` (cross-entropy), `adversarial` (the batch doubled with PGD examples, Madry et al. 2018),
            `trades` (Zhang et al. 2019), `certified` (loss on CROWN-IBP bounds, Zhang et al. 2020), `ibp` (on interval
            bounds, Gowal et al. 2018), `sabr` (on the intervals of a small box around a PGD example, Müller et al.
            2023) or `mtl-ibp` (loss of a PGD example and loss on intervals, De Palma et al. 2024).
        augment: whether training images are augmented.
        contrastive: `none`; `double` (encoder by SupCon, then frozen, then the head by cross-entropy: the study's
            DTM); `single` (both losses at once: STM).
        architecture: of the network.
        width: factor on its channels and hidden neurons.
        epochs: of `none` and `single`.
        encoder_epochs: of the encoder of `double`.
        head_epochs: of the head of `double`.
        batch_size: images a step.
        optimizer: `adam`, or `muon` (Jordan et al. 2024), which leaves the head and all vectors to Adam.
        lr: Adam's learning rate, and Muon's, whose steps are as large.
        weight_decay: of the weights, added to their gradients.
        schedule: of the learning rate over a stage: `constant`, `cosine` or `linear` (both down to 0).
        temperature: τ of SupCon.
        supcon_weight: a in a * SupCon + (1 - a) * cross-entropy, for `single`.
        encoder_supcon_weight: the same a for the encoder of `double`; 1 is SupCon alone (the study).
        head: how the head of `double` is trained: `normal` (cross-entropy on clean images, as in the study) or
            `method` (by the arm's own method, through the frozen encoder). With `normal`, and encoder_supcon_weight=1,
            no stage has the method's own loss on logits: `trades` then trains as `adversarial`, `ibp` as `certified`.
        eps: radius in pixels of the attack or of the certified ball.
        eps_warmup: share of a stage's steps in which ε rises from 0: as the fourth power of time in the first quarter
            of them, then in a line (Xu et al. 2020).
        attack_steps: PGD steps a batch, for the methods that attack. Where a single one trains, epochs are compared by
            ten.
        attack_rel_step: PGD's step size as a share of the attack's radius.
        attack_rel_eps: the attack's radius as a share of ε.
        attack_start: where the attack's noise lies: `ball`, or `wide`: within twice the radius, and what the steps make
            of it is not brought back to the ball. With attack_steps=1 and attack_rel_step=1 that is N-FGSM (de Jorge et
            al. 2022), with `ball` and 1.25 the fast training of Wong et al. 2020.
        attack_batchnorm: by which statistics BatchNorm normalises while training images are attacked: `eval` (the
            running ones, which an attacker of the finished network meets) or `train` (those of the batch).
        trades_beta: weight β of the divergence between the outputs on an image and on its example.
        sabr_lambda: half-width of SABR's box as a share λ of ε.
        mtl_alpha: share α of MTL-IBP's loss that is on intervals.
        certified_loss: `margin` (cross-entropy on bounds of z_y - z_j: a bound of the loss), `fused` (one linear bound
            of that cross-entropy: looser, several times as fast) or `logit-lower` (on lower bounds of the logits: the
            study's, not a bound of the loss).
        clean_weight: share κ of the clean loss in that of `certified` and `ibp` (Gowal et al. 2018, eq. 12); two
            values, as in 1,0.5: from the first to the second as ε rises.
        ibp_weight: share of the interval bounds in the margins of `certified` (Zhang et al. 2020, eq. 10: 1 - β), one
            value or two, as above; for certified_loss=margin alone.
        ibp_regularizer: weight λ of the regularisers of Shi et al. 2021 while ε rises (methods with bounds); widths are
            compared in pixels.
        init: of the weights: `default` (PyTorch's) or `ibp` (Shi et al. 2021: intervals keep their width).
        embeddings: what SupCon sees of an image under a method with bounds: `crown-ibp` or `ibp` (the lower bounds of
            its embedding, as in the study; the former costs one row for each dimension), `worst` (two views: its
            embedding, and the corner of the interval bounds that raises the loss most) or `attack` (two views: its
            embedding, and that of its PGD example; `sabr` and `mtl-ibp` alone).
        l1: weight of the sum of the absolute weights of convolutions and linear maps in the loss.
        dropout: share of the inputs of the encoder's first linear map that a step does without, the others being made
            larger for it (Srivastava et al. 2014; there each image has its own, here a batch has them in common, so
            that attacks and bounds are those of one thinned network; each of sam's two passes has its own). Take
            bn_batches, too: the running averages are those of thinned networks, whose variance is larger.
        sam: radius ρ of Sharpness-Aware Minimization (Foret et al. 2021): a step's gradient is taken at the weights
            moved by ρ (L2 norm of all) to where the loss is larger, which takes a second pass, and, where the method
            attacks, an attack on those weights from starts of its own; 0: where they are.
        grad_clip: largest L2 norm of a step's gradient; 0: any.
        ema: decay a step of an average of the weights, which then is what is validated and kept; 0: no average.
        bn_batches: training batches over which BatchNorm's statistics are measured anew, with the weights of the
            moment, before each validation: batches as they are drawn, augmented where the arm is, but never attacked,
            whatever the method trains on; 0: the running averages of training, as usual.
        compile: whether training passes, augmentation and element-wise work on bounds are compiled (torch.compile,
            which needs a C++ compiler): half a minute at the start, and steps up to 1.5 times as fast.
        precision: of the encoder's passes in training, and in attacks that fold BatchNorm (attack_batchnorm: eval):
            `fp32`, or `bf16` (autocast; not for methods with bounds). Losses, validation and all that comes after
            training are in fp32 either way.
        select: which epoch's weights are kept: `best` on validation (accuracy, robust or certified accuracy as the
            method has it; of an encoder that SupCon alone trains always the last) or `last`.
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
    optimizer: Literal["adam", "muon"] = "adam"
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
    attack_rel_eps: float = 1.0
    attack_start: Literal["ball", "wide"] = "ball"
    attack_batchnorm: Literal["eval", "train"] = "eval"
    trades_beta: float = 6.0
    sabr_lambda: float = 0.1
    mtl_alpha: float = 0.01
    certified_loss: Literal["margin", "fused", "logit-lower"] = "margin"
    clean_weight: tuple[float, ...] = (0.0,)
    ibp_weight: tuple[float, ...] = (0.0,)
    ibp_regularizer: float = 0.0
    init: Literal["default", "ibp"] = "default"
    embeddings: Literal["crown-ibp", "ibp", "worst", "attack"] = "crown-ibp"
    l1: float = 0.0
    dropout: float = 0.0
    sam: float = 0.0
    grad_clip: float = 0.0
    ema: float = 0.0
    bn_batches: int = 0
    compile: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    select: Literal["best", "last"] = "best"

    def __post_init__(self) -> None:
        require_choices(self)
        require(self.architecture in ENCODERS, unknown("architecture", self.architecture, ENCODERS))
        for name in ("epochs", "encoder_epochs", "head_epochs", "attack_steps"):
            require(getattr(self, name) >= 1, f"{name} must be 1 or more, not {getattr(self, name)}")
        require(self.batch_size >= 2, f"batch_size must be 2 or more (BatchNorm), not {self.batch_size}")
        for name in ("lr", "temperature", "attack_rel_step", "attack_rel_eps", "width"):
            require(getattr(self, name) > 0, f"{name} must be above 0, not {getattr(self, name)}")
        for name in ("weight_decay", "trades_beta", "ibp_regularizer", "l1", "sam", "grad_clip", "bn_batches"):
            require(getattr(self, name) >= 0, f"{name} must be 0 or more, not {getattr(self, name)}")
        for name in ("supcon_weight", "encoder_supcon_weight", "mtl_alpha"):
            require(0 <= getattr(self, name) <= 1, f"{name} must lie between 0 and 1, not {getattr(self, name)}")
        for name in ("clean_weight", "ibp_weight"):
            values = getattr(self, name)
            require(
                len(values) in (1, 2) and all(0 <= value <= 1 for value in values),
                f"{name} must be one or two numbers between 0 and 1, not {values}",
            )
        require(
            self.certified_loss == "margin" or not any(self.ibp_weight),
            f"ibp_weight mixes margins, of which certified_loss={self.certified_loss} has none: take ibp_weight=0 or "
            "certified_loss=margin",
        )
        require(0 < self.sabr_lambda <= 1, f"sabr_lambda must be above 0 and at most 1, not {self.sabr_lambda}")
        for name in ("ema", "dropout"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{name} must be 0 or more and below 1, not {value}")
        require(
            0 <= self.eps_warmup <= 1,
            f"eps_warmup must lie between 0 and 1, not {self.eps_warmup}: it is a share of the training's steps, "
            "and ε cannot rise for longer than the training",
        )
        require(
            self.supcon_weight < 1 or self.contrastive != "single",
            "supcon_weight=1 leaves the head of contrastive=single untrained: take less, or contrastive=double",
        )
        require(
            self.attack_start == "ball" or self.method != "sabr",
            "attack_start=wide would put the boxes of sabr outside of its balls: take attack_start=ball",
        )
        require(
            self.attack_rel_eps == 1 or self.method != "sabr",
            f"attack_rel_eps={self.attack_rel_eps:g} would put the boxes of sabr outside of its balls: take "
            "attack_rel_eps=1, and sabr_lambda for the boxes' size",
        )
        require(
            self.precision == "fp32" or self.method in ("normal", "adversarial", "trades"),
            f"precision=bf16 would spoil the bounds of {self.method}: take precision=fp32",
        )
        require(
            self.embeddings != "attack" or self.method not in ("certified", "ibp") or self.contrastive == "none",
            f"embeddings=attack needs a method that attacks and bounds (sabr, mtl-ibp), not {self.method}: "
            "take embeddings=worst",
        )
        require(0 <= self.eps <= 1, f"eps must lie between 0 and 1 (pixels), not {self.eps}")

    def idle(self) -> set[str]:
        """The settings that have no part in this training: those of other methods and of other stages."""
        supcon, double = self.contrastive != "none", self.contrastive == "double"
        bounds = self.method in ("certified", "ibp", "sabr", "mtl-ibp")
        of_attacks = ("attack_steps", "attack_rel_step", "attack_rel_eps", "attack_start", "attack_batchnorm")
        parts = {
            ("eps", "eps_warmup"): self.method != "normal",
            of_attacks: self.method in ("adversarial", "trades", "sabr", "mtl-ibp"),
            ("trades_beta",): self.method == "trades",
            ("sabr_lambda",): self.method == "sabr",
            ("mtl_alpha",): self.method == "mtl-ibp",
            ("certified_loss", "ibp_weight"): self.method == "certified",
            ("clean_weight",): self.method in ("certified", "ibp"),
            ("ibp_regularizer",): bounds,
            ("embeddings",): bounds and supcon,
            ("temperature",): supcon,
            ("supcon_weight",): self.contrastive == "single",
            ("encoder_supcon_weight", "encoder_epochs", "head_epochs", "head"): double,
            ("epochs",): not double,
        }
        return {name for names, has_part in parts.items() if not has_part for name in names}
