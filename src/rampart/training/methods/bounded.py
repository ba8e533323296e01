"""Objectives on bounds of the network over the ball."""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from rampart.bounds import crown, ibp
from rampart.bounds.box import Box, pixel_box
from rampart.bounds.fusion import fused_cross_entropy
from rampart.bounds.margins import identity_spec, margin_bounds, margin_spec
from rampart.errors import ModelError
from rampart.losses import interval_regularizer, supcon_loss, worst_case_logits
from rampart.models import Chain, Classifier, Layout
from rampart.models.links import Dense
from rampart.training.criterion import Criterion, Outputs
from rampart.training.methods.base import Attacker
from rampart.training.recipe import Recipe
from rampart.training.schedules import ramp

log = logging.getLogger(__name__)

# The regularisers compare the widths of intervals. Those of a smaller ball are mostly float32's rounding, whose
# gradient is large and without meaning; Adam would remember it for a thousand steps.
SMALLEST_EPS = 1e-6


class Bounded:
    """What all objectives on bounds share: the network as a chain, its bounds, SupCon on them, regularisers."""

    score_name = "certified_accuracy"

    def __init__(self, model: Classifier, recipe: Recipe) -> None:
        self.model, self.recipe = model, recipe
        ramped = [name for name in ("clean_weight", "ibp_weight") if name not in recipe.idle()]
        pairs = [name for name in ramped if len(set(getattr(recipe, name))) > 1]
        idle = ["ibp_regularizer does nothing"] if recipe.ibp_regularizer else []
        idle += [f"of two values of {name} the second counts" for name in pairs]
        if idle and not recipe.eps_warmup:
            log.warning("ε does not rise: %s; take eps_warmup above 0", ", ".join(idle))
        # The head is one linear map, so that the encoder's chain and the head make the network's.
        if not isinstance(model.head, nn.Linear):
            raise ModelError(f"{recipe.method} training needs a head that is one linear map, not {type(model.head)}")
        self.head = model.head
        self.encoder = Layout(nn.Sequential(model.normalize, model.encoder))

    def survives(self, x: Tensor, y: Tensor, eps: float, generator: Generator | None) -> Tensor:
        return (margin_bounds(self.model, x, y, eps, "crown-ibp") > 0).all(1)

    def risen(self, eps: float) -> float:
        """How much of its full value ε has reached, in [0, 1]."""
        return eps / self.recipe.eps if self.recipe.eps else 1.0

    def whole(self, chain: Chain) -> Chain:
        """The encoder's chain with the head after it."""
        return chain.then(Dense(self.head.weight, self.head.bias))

    def spec(self, y: Tensor, x: Tensor) -> Tensor:
        return margin_spec(y, self.head.out_features).to(x.dtype)

    def supcon_view(
        self, chain: Chain, box: Box, found: ibp.Intervals, y: Tensor, criterion: Criterion
    ) -> Tensor | None:
        """What SupCon sees, [B or 2B, D]; `attack` is the business of the methods that attack."""
        kind, clean = self.recipe.embeddings, chain.output
        if not criterion.needs_embeddings:
            return None
        if kind == "worst":
            return torch.cat([clean[: len(y)], worst_corner(found[chain.last], y, criterion.temperature)])
        if kind == "attack":
            return clean
        spec = identity_spec(clean.shape[1], box.lower)
        if kind == "ibp":
            return ibp.lower_bounds(chain, found, spec)
        return crown.backward(chain, ibp.inputs(chain, found), box, spec)

    def regularizer(self, chain: Chain, box: Box, found: ibp.Intervals, eps: float) -> Tensor | float:
        weight = self.recipe.ibp_regularizer * (1 - self.risen(eps))
        if weight <= 0:
            return 0.0
        if eps < SMALLEST_EPS:
            box = pixel_box(box.center, SMALLEST_EPS)
            found = ibp.intervals(chain, box)
        return weight * interval_regularizer(box, list(ibp.inputs(chain, found).values()))

    def interval_cross_entropy(self, whole: Chain, found: ibp.Intervals, x: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy on interval bounds."""
        return F.cross_entropy(worst_case_logits(interval_margins(whole, found, self.spec(y, x)), y), y)


class Certified(Bounded):
    """Cross-entropy on CROWN-IBP bounds over the ball (Zhang et al. 2020, eq. 10), mixed with the clean loss by κ."""

    def batch_loss(self, x: Tensor, y: Tensor, criterion: Criterion, eps: float, generator: Generator | None) -> Tensor:
        chain, box = self.encoder.resolve(x), pixel_box(x, eps)
        found = ibp.intervals(chain, box)
        worst = self.worst_cross_entropy(self.whole(chain), box, found, y, eps) if criterion.needs_logits else None
        loss = criterion(Outputs(worst, self.supcon_view(chain, box, found, y, criterion)), y)
        clean_share = ramp(self.recipe.clean_weight, self.risen(eps))
        if clean_share:
            clean = criterion(criterion.clean(self.model, chain.output, y), y)
            loss = clean_share * clean + (1 - clean_share) * loss
        return loss + self.regularizer(chain, box, found, eps)

    def worst_cross_entropy(self, whole: Chain, box: Box, found: ibp.Intervals, y: Tensor, eps: float) -> Tensor:
        kind, spec, inputs = self.recipe.certified_loss, self.spec(y, box.lower), ibp.inputs(whole, found)
        if kind == "logit-lower":
            logits = crown.backward(whole, inputs, box, identity_spec(spec.shape[1], box.lower))
            return F.cross_entropy(logits, y)
        if kind == "fused":
            return fused_cross_entropy(whole, box, found, spec).mean()
        share, margins = ramp(self.recipe.ibp_weight, self.risen(eps)), spec.new_zeros(())
        if share < 1:
            margins = margins + (1 - share) * crown.backward(whole, inputs, box, spec)
        if share > 0:
            margins = margins + share * interval_margins(whole, found, spec)
        return F.cross_entropy(worst_case_logits(margins, y), y)


class Ibp(Certified):
    """Cross-entropy on interval bounds, the last maps merged with the margins (Gowal et al. 2018, eq. 12)."""

    def worst_cross_entropy(self, whole: Chain, box: Box, found: ibp.Intervals, y: Tensor, eps: float) -> Tensor:
        return self.interval_cross_entropy(whole, found, box.lower, y)


class Attacking(Bounded):
    """What objectives on bounds and PGD examples share. BatchNorm normalises by the examples' statistics."""

    def __init__(self, model: Classifier, recipe: Recipe) -> None:
        super().__init__(model, recipe)
        self.attacker = Attacker(model, recipe)

    def example_and_box(
        self, x: Tensor, y: Tensor, criterion: Criterion, eps: float, generator: Generator | None
    ) -> tuple[Tensor, Box]:
        """The PGD examples [B, C, H, W], and the boxes that are bounded."""
        raise NotImplementedError

    def cross_entropy(self, chain: Chain, found: ibp.Intervals, x: Tensor, y: Tensor) -> Tensor:
        """Of the encoder's chain, whose last B outputs are those of the examples."""
        return self.interval_cross_entropy(self.whole(chain), found, x, y)

    def batch_loss(self, x: Tensor, y: Tensor, criterion: Criterion, eps: float, generator: Generator | None) -> Tensor:
        moved, box = self.example_and_box(x, y, criterion, eps, generator)
        two_views = criterion.needs_embeddings and self.recipe.embeddings in ("worst", "attack")
        chain = self.encoder.resolve(torch.cat([x, moved]) if two_views else moved)
        found = ibp.intervals(chain, box)
        cross_entropy = self.cross_entropy(chain, found, x, y) if criterion.needs_logits else None
        loss = criterion(Outputs(cross_entropy, self.supcon_view(chain, box, found, y, criterion)), y)
        return loss + self.regularizer(chain, box, found, eps)


class Sabr(Attacking):
    """Cross-entropy on the intervals of a box of half-width λε around a PGD example, inside of the ball
    (Müller et al. 2023, eq. 5)."""

    def example_and_box(
        self, x: Tensor, y: Tensor, criterion: Criterion, eps: float, generator: Generator | None
    ) -> tuple[Tensor, Box]:
        half = self.recipe.sabr_lambda * eps
        center = self.attacker.example(x, y, criterion, eps - half, generator)
        return center, pixel_box(center, half)


class MtlIbp(Attacking):
    """(1 - α) times the loss of a PGD example and α times that on the ball's intervals (De Palma et al. 2024,
    eq. 8)."""

    def example_and_box(
        self, x: Tensor, y: Tensor, criterion: Criterion, eps: float, generator: Generator | None
    ) -> tuple[Tensor, Box]:
        moved = self.attacker.example(x, y, criterion, self.recipe.attack_rel_eps * eps, generator)
        return moved, pixel_box(x, eps)

    def cross_entropy(self, chain: Chain, found: ibp.Intervals, x: Tensor, y: Tensor) -> Tensor:
        alpha = self.recipe.mtl_alpha
        attacked = F.cross_entropy(self.head(chain.output[-len(x) :]), y)
        return (1 - alpha) * attacked + alpha * super().cross_entropy(chain, found, x, y)


def interval_margins(whole: Chain, found: ibp.Intervals, spec: Tensor) -> Tensor:
    """Interval bounds of the margins, [B, K], all maps behind the last ReLU merged with the specification."""
    return ibp.lower_bounds(whole, found, spec, ibp.tail(whole))


def worst_corner(box: Box, y: Tensor, temperature: float) -> Tensor:
    """The corner of the boxes of a batch of embeddings, [B, D], that the gradient of SupCon at their centres points to:
    its first-order worst case; differentiable."""
    center = box.center.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(supcon_loss(center, y, temperature), center)
    return box.center + box.half * gradient.sign()
