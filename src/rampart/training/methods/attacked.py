"""Objectives on images and their PGD examples."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from rampart.attacks import pgd
from rampart.models import Classifier, predict
from rampart.training.criterion import Criterion, Outputs
from rampart.training.methods.base import Attacker, in_training
from rampart.training.recipe import Recipe

# Of the attack that chooses an epoch where training attacks with a single step (Wong et al. 2020).
VALIDATION_STEPS = 10


class Normal:
    """Cross-entropy or SupCon on the images as they are."""

    score_name = "accuracy"

    def __init__(self, model: Classifier, recipe: Recipe) -> None:
        self.model, self.network = model, in_training(model, recipe)

    def batch_loss(self, x: Tensor, y: Tensor, criterion: Criterion, eps: float, generator: Generator | None) -> Tensor:
        return criterion.on_images(self.network, x, y)

    def survives(self, x: Tensor, y: Tensor, eps: float, generator: Generator | None) -> Tensor:
        return predict(self.model, x) == y


class Adversarial:
    """The batch doubled with PGD examples that ascend the same loss (Madry et al. 2018; the study's section 2.2)."""

    score_name = "robust_accuracy"

    def __init__(self, model: Classifier, recipe: Recipe) -> None:
        self.model, self.network, self.recipe = model, in_training(model, recipe), recipe
        self.attacker = Attacker(model, recipe)

    def batch_loss(self, x: Tensor, y: Tensor, criterion: Criterion, eps: float, generator: Generator | None) -> Tensor:
        adversarial = self.attacker.example(x, y, criterion, self.recipe.attack_rel_eps * eps, generator)
        return criterion.on_images(self.network, torch.cat([x, adversarial]), torch.cat([y, y]))

    def survives(self, x: Tensor, y: Tensor, eps: float, generator: Generator | None) -> Tensor:
        steps, size = self.recipe.attack_steps, self.recipe.attack_rel_step * eps or None
        if steps == 1:  # a network that resists the single step it is trained on may resist nothing else
            steps, size = VALIDATION_STEPS, None
        return ~pgd(self.model, x, y, eps, steps, size, generator=generator).success[0]


class Trades(Adversarial):
    """Cross-entropy on the image, and β times the divergence of the outputs on an example that ascends just that
    divergence (Zhang et al. 2019, eq. 5); SupCon, where asked for, is on both."""

    def batch_loss(self, x: Tensor, y: Tensor, criterion: Criterion, eps: float, generator: Generator | None) -> Tensor:
        model, radius = self.model, self.recipe.attack_rel_eps * eps
        if not criterion.needs_logits:  # an encoder alone has no outputs to compare
            return super().batch_loss(x, y, criterion, eps, generator)
        with self.attacker.view(x) as network, torch.no_grad():
            target = F.log_softmax(network(x), 1)
        adversarial = self.attacker.ascend(
            lambda network, moved: _divergence(target, F.log_softmax(network(moved), 1)), x, radius, generator
        )
        embeddings = self.network.embed(torch.cat([x, adversarial]))
        clean, moved = F.log_softmax(model.head(embeddings), 1).chunk(2)
        loss = F.nll_loss(clean, y) + self.recipe.trades_beta * _divergence(clean, moved)
        return criterion(Outputs(loss, embeddings if criterion.needs_embeddings else None), y)


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q), mean over the batch, of log-probabilities [B, K]."""
    return F.kl_div(q, p, reduction="batchmean", log_target=True)
