"""What a training objective is: a small object with one `batch_loss`, and a score that picks its best epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Protocol

import torch
from torch import Generator, Tensor, nn

from rampart.attacks import perturb
from rampart.errors import UnsupportedLayer
from rampart.kernels import Kernel
from rampart.models import Classifier, Folded, Layout
from rampart.training.criterion import Criterion, Network
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


class Encoded:
    """A classifier's head behind another way to its embeddings, which is gone in the recipe's precision."""

    def __init__(self, encode: Callable[[Tensor], Tensor], head: nn.Module, recipe: Recipe) -> None:
        self.encode, self.head, self.lowered = encode, head, recipe.precision == "bf16"

    def embed(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.lowered):
            return self.encode(x).to(x.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))


def in_training(model: Classifier, recipe: Recipe) -> Encoded:
    """The classifier whose passes are compiled inside of `compiling`."""
    return Encoded(Kernel(model.embed, dynamic=False), model.head, recipe)


class Attacker:
    """A recipe's PGD on a network in training, which its BatchNorm statistics do not notice."""

    def __init__(self, model: Classifier, recipe: Recipe) -> None:
        self.model, self.recipe = model, recipe
        self.encoder: Layout | None = None
        with suppress(UnsupportedLayer):
            self.encoder = Layout(nn.Sequential(model.normalize, model.encoder))

    def example(self, x: Tensor, y: Tensor, criterion: Criterion, eps: float, generator: Generator | None) -> Tensor:
        """The last iterate on the criterion at radius eps (pixels), [B, C, H, W]."""
        return self.ascend(lambda network, moved: criterion.on_images(network, moved, y), x, eps, generator)

    def ascend(
        self,
        loss: Callable[[Network, Tensor], Tensor],
        x: Tensor,
        eps: float,
        generator: Generator | None,
    ) -> Tensor:
        """As `example`, on any loss of a network and the moved images."""
        step, wide = self.recipe.attack_rel_step * eps, self.recipe.attack_start == "wide"
        with self.view(x) as network:
            return perturb(partial(loss, network), x, eps, self.recipe.attack_steps, step, generator, wide)

    @contextmanager
    def view(self, x: Tensor) -> Iterator[Network]:
        """The network as it is attacked: as an attacker of the finished one would meet it, or as it trains."""
        if self.recipe.attack_batchnorm == "train":
            with standing(self.model):
                yield self.model
            return
        with evaluating(self.model):
            folded: Folded | None = None
            if self.encoder is not None:
                with suppress(UnsupportedLayer):
                    folded = Folded(self.encoder, x)
            yield self.model if folded is None else Encoded(folded, self.model.head, self.recipe)


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
