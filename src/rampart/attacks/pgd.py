"""Projected gradient descent in the L∞ ball (Madry et al. 2018)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rampart.errors import ModelError, require


@dataclass(frozen=True)
class AttackResult:
    """`adversarial` [E, B, C, H, W] in [0, 1] and `success` [E, B]: whether the model errs on it; E follows `eps`."""

    adversarial: Tensor
    success: Tensor
    eps: tuple[float, ...]


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float | Sequence[float],
    steps: int = 10,
    step_size: float | Sequence[float] | None = None,
    restarts: int = 1,
    generator: torch.Generator | None = None,
) -> AttackResult:
    """Attacks by ascending the cross-entropy from random starts; every iterate counts, the last one too.

    The balls are nested, so an image broken at one ε is broken at the larger ones: it leaves the batch, and its
    example stands for them all. An image that the model gets wrong is broken by itself.

    Args:
        model: pixels -> logits, in eval mode.
        x: images [B, C, H, W] in [0, 1].
        y: labels [B].
        eps: one radius or several, in pixels, in any order.
        steps: gradient steps a start, 1 or more.
        step_size: in pixels, one for all or one a radius; default 2.5 ε / steps.
        restarts: random starts, 1 or more.
        generator: of the starts, on x's device.

    Raises:
        SettingsError: a bad ε, step size, or count. ModelError: the model is in training mode.
    """
    radii = tuple(float(e) for e in (eps if isinstance(eps, Sequence) else [eps]))
    sizes = step_size if isinstance(step_size, Sequence) else [step_size] * len(radii)
    require(len(radii) > 0 and all(e >= 0 for e in radii), f"eps must be 0 or more, not {eps}")
    require(steps >= 1 and restarts >= 1, f"steps and restarts must be 1 or more, not {steps} and {restarts}")
    require(len(sizes) == len(radii), f"{len(sizes)} step sizes for {len(radii)} eps: give one for each")
    require(all(s is None or s > 0 for s in sizes), f"step_size must be above 0, not {step_size}")
    if model.training:
        raise ModelError("an attack needs a fixed network: call model.eval() first")
    adversarial = x.expand(len(radii), *x.shape).clone()
    success = torch.zeros(len(radii), len(x), dtype=torch.bool, device=x.device)
    with torch.no_grad():
        broken = model(x).argmax(1) != y
    example = x.clone()
    for place in sorted(range(len(radii)), key=lambda e: radii[e]):
        size = sizes[place]
        step = 2.5 * radii[place] / steps if size is None else size
        for _ in range(restarts):
            left = (~broken).nonzero().squeeze(1)
            if len(left):
                found, examples = _one_start(model, x[left], y[left], radii[place], step, steps, generator)
                broken[left[found]] = True
                example[left[found]] = examples[found]
        adversarial[place], success[place] = example, broken
    return AttackResult(adversarial, success, radii)


def _one_start(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, step: float, steps: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """(whether an iterate was misclassified [B], the first such iterate [B, C, H, W])."""
    found = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    examples = x.clone()
    left = torch.arange(len(x), device=x.device)
    lower, upper = (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)
    current = _random_start(lower, upper, generator)
    for iterate in range(steps + 1):
        current.requires_grad_()
        logits = model(current)
        wrong = logits.detach().argmax(1) != y[left]
        if wrong.any():
            found[left[wrong]] = True
            examples[left[wrong]] = current.detach()[wrong]
        if iterate == steps or wrong.all():
            break
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, y[left], reduction="sum"), current)
        stay = ~wrong
        left, lower, upper = left[stay], lower[stay], upper[stay]
        moved = current.detach()[stay] + step * gradient[stay].sign()
        current = torch.maximum(torch.minimum(moved, upper), lower)
    return found, examples


def perturb(
    loss: Callable[[Tensor], Tensor],
    x: Tensor,
    eps: float,
    steps: int,
    step_size: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The last iterate of PGD on any `loss` of the whole batch (for training): [B, C, H, W] in the ball and [0, 1]."""
    lower, upper = (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)
    current = _random_start(lower, upper, generator)
    for _ in range(steps):
        current.requires_grad_()
        (gradient,) = torch.autograd.grad(loss(current), current)
        current = torch.maximum(torch.minimum(current.detach() + step_size * gradient.sign(), upper), lower)
    return current.detach()


def _random_start(lower: Tensor, upper: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform in the box [lower, upper]."""
    return lower + (upper - lower) * torch.rand(lower.shape, device=lower.device, generator=generator)
