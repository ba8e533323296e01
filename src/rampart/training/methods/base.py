"""What a training objective is: a small object with one `batch_loss`, and a score that picks its best epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from torch import Generator, Tensor, nn

from rampart.attacks import perturb
from rampart.models import Classifier
from rampart.training.criterion import Criterion
from rampart.training.recipe import Recipe


class Method(Protocol):
    score_name: str  # the share of validation images that `survives` counts

    def __init__(self, model: Classifier, recipe: Recipe) -> None: ...

    def batch_loss(self, x: Tensor, y: Tensor, criterion: Criterion, eps: float, generator: Generator | None) -> Tensor:
        """The scalar loss on x [B, C, H, W] in [0, 1], y [B], at radius eps (pixels)."""
        ...

    def survives(self, x: Tensor, y: Tensor, eps: float, generator: Generator | None) -> Tensor:
        """Whether the model (in eval mode) holds on each image, as the method understands it: bool [B]."""
        ...


def example(
    model: Classifier,
    recipe: Recipe,
    x: Tensor,
    y: Tensor,
    criterion: Criterion,
    eps: float,
    generator: Generator | None,
) -> Tensor:
    """The last iterate of the recipe's PGD on the criterion, at radius eps (pixels): [B, C, H, W]."""
    return ascend(model, recipe, lambda moved: criterion.on_images(model, moved, y), x, eps, generator)


def ascend(
    model: Classifier,
    recipe: Recipe,
    loss: Callable[[Tensor], Tensor],
    x: Tensor,
    eps: float,
    generator: Generator | None,
) -> Tensor:
    """As `example`, on any loss of the moved images."""
    step, wide = recipe.attack_rel_step * eps, recipe.attack_start == "wide"
    with evaluating(model) if recipe.attack_batchnorm == "eval" else standing(model):
        return perturb(loss, x, eps, recipe.attack_steps, step, generator, wide)


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


@contextmanager
def standing(model: nn.Module) -> Iterator[None]:
    """BatchNorm's running statistics stand still for a while; what a batch is normalised by stays as it is."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        norm.num_batches_tracked = None
    try:
        yield
    finally:
        for norm, (momentum, counted) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, counted
