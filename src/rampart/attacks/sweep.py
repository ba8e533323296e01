"""Runs an attack over several radii: the frame that all attacks share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn

from rampart.attacks.ball import Ball, Norm, with_gradients
from rampart.attacks.objectives import OBJECTIVES, Loss, margin
from rampart.errors import SettingsError, require, require_radii, unknown
from rampart.models import checked_logits, classes_of, require_fixed, require_labels, require_tensors


@dataclass(frozen=True)
class AttackResult:
    """What an attack at E radii made of B images.

    Args:
        adversarial: [E, B, C, H, W] in the ball and in [0, 1], also by float64: an image on which the model errs, or
            where none was found the one on which it came nearest to that.
        success: [E, B]: whether the model errs on it, by a forward pass of its own.
        eps: the radii in pixels, as given.
        broken_eps: [B], the smallest radius at which the image was broken; 0 where the model errs on the image as it
            is, infinity where it never did.
        start: [B], the number of the attack's start, or member, that broke it; -1 where none did.
        step: [B], gradient steps that took from the random start; -1 where none did or they are not known.
    """

    adversarial: Tensor
    success: Tensor
    eps: tuple[float, ...]
    broken_eps: Tensor
    start: Tensor
    step: Tensor


@dataclass
class Attempt:
    """What one start made of a batch: `example` [B, C, H, W], the first image found on which the model errs, else the
    one that came nearest to that; `step` [B] that found it."""

    example: Tensor
    step: Tensor


# model (logits alone are asked of it), balls, labels [B] -> Attempt
Start = Callable[[nn.Module, Ball, Tensor], Attempt]


@torch.inference_mode(False)  # where it is on there are no gradients, and no attack
def sweep(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float | Sequence[float] | Tensor,
    starts: Callable[[int], Sequence[Start]],
    norm: Norm = "linf",
    surrogate: nn.Module | None = None,
) -> AttackResult:
    """One start after the other, from the smallest radius to the largest.

    The balls are nested, so an image broken at one ε is broken at the larger ones: it leaves the batch, and its
    example stands for them all. An image that the model gets wrong is broken by itself; NaN is wrong, too.

    Args:
        model: pixels -> logits, in eval mode.
        x: images [B, C, H, W] in [0, 1].
        y: labels [B].
        eps: one radius or several, in pixels, in any order.
        starts: of the radius at that place in `eps`; the same number for each.
        surrogate: what the starts see instead of the model: a network of nearly the same outputs, such as a faster
            one. What it finds counts where the model confirms it.

    Raises:
        SettingsError: a bad ε, bad labels, or images outside of [0, 1]. ModelError: the model is in training mode, does
            not take the images, or overwrites them.
    """
    require(norm in get_args(Norm), unknown("norm", norm, get_args(Norm)))
    radii = radii_of(eps, norm)
    require_fixed(model, "an attack is on")
    require_tensors(images=x, labels=y)
    x, y = with_gradients(x), with_gradients(y)
    adversarial = x.expand(len(radii), *x.shape).clone()
    success = torch.zeros(len(radii), len(x), dtype=torch.bool, device=x.device)
    with torch.no_grad():
        logits = checked_logits(model, x)
    require_labels(y, len(x), logits.shape[1])
    broken, best = classes_of(logits) != y, margin(logits, y)
    broken_eps = torch.where(broken, 0.0, float("inf")).double()
    start_of = torch.full_like(y, -1)
    step_of = start_of.clone()
    example = x.clone()
    for place in sorted(range(len(radii)), key=lambda e: radii[e]):
        for number, start in enumerate(starts(place)):
            left = (~broken).nonzero().squeeze(1)
            if not len(left):
                break
            ball = Ball.around(x[left], radii[place], norm)
            tried = start(surrogate or model, ball, y[left])
            logits = _logits(model, tried.example)  # in another batch rounding may tell another class
            if surrogate is not None:
                seen = classes_of(_logits(surrogate, tried.example))
                doubtful = (classes_of(logits) == y[left]) & (seen != y[left])
                if doubtful.any():  # the two differ there: the start has stopped too early
                    again = start(model, ball[doubtful], y[left][doubtful])
                    tried.example[doubtful], tried.step[doubtful] = again.example, again.step
                    logits[doubtful] = _logits(model, again.example)
            found, ahead = classes_of(logits) != y[left], margin(logits, y[left])
            better = found | (ahead > best[left])
            example[left[better]], best[left[better]] = tried.example[better], ahead[better]
            rows = left[found]
            broken[rows], broken_eps[rows] = True, radii[place]
            start_of[rows], step_of[rows] = number, tried.step[found]
        adversarial[place], success[place] = example, broken
    return AttackResult(adversarial, success, radii, broken_eps, start_of, step_of)


@torch.no_grad()
def _logits(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def require_budget(steps: int, restarts: int, loss: Loss) -> None:
    """Raises SettingsError where an attack cannot be run so."""
    require(steps >= 1 and restarts >= 1, f"steps and restarts must be 1 or more, not {steps} and {restarts}")
    require(loss in OBJECTIVES, unknown("loss", loss, OBJECTIVES))


def radii_of(eps: float | Sequence[float] | Tensor, norm: Norm) -> tuple[float, ...]:
    """As a tuple; raises SettingsError where one is none."""
    try:
        radii = tuple(torch.as_tensor(eps, dtype=torch.float64).flatten().tolist())
    except (TypeError, ValueError, RuntimeError):
        raise SettingsError(f"eps must be a number of pixels, or several, not {eps!r}") from None
    require(len(radii) > 0 and all(e >= 0 for e in radii), f"eps must be 0 or more, not {eps}")
    if norm == "linf":
        require_radii(min(radii), max(radii))
    return radii
