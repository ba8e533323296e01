"""The training objectives. Each is a small object with one `batch_loss`, and a score that picks its best epoch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rampart.attacks import perturb, pgd
from rampart.bounds.box import Box, pixel_box
from rampart.bounds.fusion import fused_cross_entropy
from rampart.bounds.margins import chain_bounds, margin_bounds, margin_spec
from rampart.losses import worst_case_logits
from rampart.models import Chain, Classifier, Layout
from rampart.models.chain import Dense
from rampart.training.criterion import Criterion, Outputs
from rampart.training.recipe import Recipe


class Method(Protocol):
    score_name: str  # the share of validation images that `survives` counts

    def batch_loss(
        self, x: Tensor, y: Tensor, criterion: Criterion, eps: float, generator: torch.Generator | None
    ) -> Tensor:
        """The scalar loss on x [B, C, H, W] in [0, 1], y [B], at radius eps (pixels)."""
        ...

    def survives(self, x: Tensor, y: Tensor, eps: float, generator: torch.Generator | None) -> Tensor:
        """Whether the model (in eval mode) holds on each image, as the method understands it: bool [B]."""
        ...


class Normal:
    """Cross-entropy or SupCon on the images as they are."""

    score_name = "accuracy"

    def __init__(self, model: Classifier, recipe: Recipe) -> None:
        self.model = model

    def batch_loss(
        self, x: Tensor, y: Tensor, criterion: Criterion, eps: float, generator: torch.Generator | None
    ) -> Tensor:
        return criterion.on_images(self.model, x, y)

    def survives(self, x: Tensor, y: Tensor, eps: float, generator: torch.Generator | None) -> Tensor:
        return self.model(x).argmax(1) == y


class Adversarial:
    """The batch doubled with PGD examples that ascend the same loss (Madry et al. 2018; the study's section 2.2)."""

    score_name = "robust_accuracy"

    def __init__(self, model: Classifier, recipe: Recipe) -> None:
        self.model, self.steps, self.rel_step = model, recipe.attack_steps, recipe.attack_rel_step

    def batch_loss(
        self, x: Tensor, y: Tensor, criterion: Criterion, eps: float, generator: torch.Generator | None
    ) -> Tensor:
        # BatchNorm's running statistics are those that an attacker meets, and the attack must not move them.
        with evaluating(self.model):
            adversarial = perturb(
                lambda moved: criterion.on_images(self.model, moved, y),
                x,
                eps,
                self.steps,
                self.rel_step * eps,
                generator,
            )
        return criterion.on_images(self.model, torch.cat([x, adversarial]), torch.cat([y, y]))

    def survives(self, x: Tensor, y: Tensor, eps: float, generator: torch.Generator | None) -> Tensor:
        size = self.rel_step * eps or None
        return ~pgd(self.model, x, y, eps, self.steps, size, generator=generator).success[0]


class Certified:
    """The loss on CROWN-IBP bounds (Zhang et al. 2020) over the ball, mixed with the clean loss by κ."""

    score_name = "certified_accuracy"

    def __init__(self, model: Classifier, recipe: Recipe) -> None:
        self.model, self.recipe = model, recipe
        # The head is one linear map, so that the encoder's chain and the head make the network's.
        self.encoder = Layout(nn.Sequential(model.normalize, model.encoder))

    def batch_loss(
        self, x: Tensor, y: Tensor, criterion: Criterion, eps: float, generator: torch.Generator | None
    ) -> Tensor:
        chain = self.encoder.resolve(x)
        worst = criterion(self._bounds(chain, x, y, criterion, eps), y)
        share = self.recipe.clean_weight
        if not share:
            return worst
        clean = criterion(criterion.clean(self.model, chain.output, y), y)
        return share * clean + (1 - share) * worst

    def _bounds(self, chain: Chain, x: Tensor, y: Tensor, criterion: Criterion, eps: float) -> Outputs:
        box = pixel_box(x, eps)
        cross_entropy = embeddings = None
        if criterion.needs_logits:
            head = self.model.head
            assert isinstance(head, nn.Linear)
            whole = Chain([*chain.links, Dense(head.weight, head.bias)], chain.output)
            cross_entropy = self._worst_cross_entropy(whole, box, y, head.out_features)
        if criterion.needs_embeddings:
            spec = _identity(chain.output.shape[1], x)
            embeddings = chain_bounds(chain, box, spec, self.recipe.embedding_bound)
        return Outputs(cross_entropy, embeddings)

    def _worst_cross_entropy(self, chain: Chain, box: Box, y: Tensor, classes: int) -> Tensor:
        kind = self.recipe.certified_loss
        if kind == "logit-lower":
            return F.cross_entropy(chain_bounds(chain, box, _identity(classes, box.lower), "crown-ibp"), y)
        spec = margin_spec(y, classes)
        if kind == "fused":
            return fused_cross_entropy(chain, box, spec).mean()
        return F.cross_entropy(worst_case_logits(chain_bounds(chain, box, spec, "crown-ibp"), y), y)

    def survives(self, x: Tensor, y: Tensor, eps: float, generator: torch.Generator | None) -> Tensor:
        return (margin_bounds(self.model, x, y, eps, "crown-ibp") > 0).all(1)


METHODS: dict[str, type[Normal] | type[Adversarial] | type[Certified]] = {
    "normal": Normal,
    "adversarial": Adversarial,
    "certified": Certified,
}


def _identity(size: int, x: Tensor) -> Tensor:
    return torch.eye(size, dtype=x.dtype, device=x.device).expand(len(x), -1, -1)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while; every module gets its own mode back (a frozen encoder may be in eval mode already)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
