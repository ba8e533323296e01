"""Projected gradient descent (Madry et al. 2018)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from rampart.attacks.ball import Ball, Norm, gradient
from rampart.attacks.objectives import OBJECTIVES, Loss, margin
from rampart.attacks.sweep import AttackResult, Attempt, Start, radii_of, require_budget, sweep
from rampart.errors import require, unknown
from rampart.models import classes_of

Schedule = Literal["constant", "cosine"]


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float | Sequence[float] | Tensor,
    steps: int = 10,
    step_size: float | Sequence[float] | None = None,
    restarts: int = 1,
    generator: torch.Generator | None = None,
    *,
    norm: Norm = "linf",
    loss: Loss = "ce",
    schedule: Schedule = "constant",
    surrogate: nn.Module | None = None,
) -> AttackResult:
    """Ascends a loss from random starts; every iterate counts, the last one too (`sweep` says how ε are shared).

    Args:
        model: pixels -> logits, in eval mode.
        x: images [B, C, H, W] in [0, 1].
        y: labels [B].
        eps: one radius or several, in pixels, in any order.
        steps: gradient steps a start, 1 or more.
        step_size: in pixels, one for all or one a radius; default 2.5 ε / steps.
        restarts: random starts, 1 or more; `start` of the result counts them.
        generator: of the starts, on x's device.
        norm: of the ball, `linf` or `l2`.
        loss: `ce` (cross-entropy), `margin` (Carlini & Wagner 2017) or `dlr` (Croce & Hein 2020).
        schedule: of the step size: `constant`, or `cosine` (down to 0).
        surrogate: a network of nearly the same outputs whose gradient is followed instead (`sweep`).

    Raises:
        SettingsError: a bad ε, step size or count, or what `sweep` refuses. ModelError: as `sweep`.
    """
    radii = radii_of(eps, norm)
    sizes = step_size if isinstance(step_size, Sequence) else [step_size] * len(radii)
    require_budget(steps, restarts, loss)
    require(len(sizes) == len(radii), f"{len(sizes)} step sizes for {len(radii)} eps: give one for each")
    require(all(s is None or s > 0 for s in sizes), f"step_size must be above 0, not {step_size}")
    require(schedule in get_args(Schedule), unknown("schedule", schedule, get_args(Schedule)))

    def starts(place: int) -> list[Start]:
        size = sizes[place]
        first = 2.5 * radii[place] / steps if size is None else size
        moves = [first * ((1 + math.cos(math.pi * t / steps)) / 2 if schedule == "cosine" else 1) for t in range(steps)]
        return [partial(_one_start, moves=moves, loss=loss, generator=generator)] * restarts

    return sweep(model, x, y, radii, starts, norm, surrogate)


@torch.enable_grad()
def _one_start(
    model: nn.Module, ball: Ball, y: Tensor, moves: Sequence[float], loss: Loss, generator: torch.Generator | None
) -> Attempt:
    example, step = ball.x.clone(), torch.zeros_like(y)
    best = torch.full(y.shape, -math.inf, dtype=ball.x.dtype, device=y.device)
    left = torch.arange(len(y), device=y.device)
    current = ball.random(generator)
    for iterate in range(len(moves) + 1):
        last = iterate == len(moves)
        current.requires_grad_(not last)
        logits = model(current)
        values, ahead = OBJECTIVES[loss](logits, y[left]), margin(logits.detach(), y[left]).to(best.dtype)
        wrong = classes_of(logits.detach()) != y[left]
        better = wrong | (ahead > best[left])
        rows = left[better]
        example[rows], best[rows], step[rows] = current.detach()[better], ahead[better], iterate
        if last or wrong.all():
            break
        slope, stay = gradient(values.sum(), current), ~wrong
        left, ball = left[stay], ball[stay]
        current = ball.ascend(current.detach()[stay], slope[stay], moves[iterate])
    return Attempt(example, step)


@torch.enable_grad()
def perturb(
    loss: Callable[[Tensor], Tensor],
    x: Tensor,
    eps: float,
    steps: int,
    step_size: float,
    generator: torch.Generator | None = None,
    wide: bool = False,
) -> Tensor:
    """The last iterate of PGD (for training): [B, C, H, W] in the ball and [0, 1].

    Args:
        loss: of the moved images; a scalar.
        wide: starts within twice the radius and brings nothing back to the ball (N-FGSM, de Jorge et al. 2022, with one
            step of size ε): the result lies in [0, 1] and within 2 ε + steps * step_size.
    """
    ball = Ball.around(x, eps)
    if wide:
        draw = torch.rand(x.shape, device=x.device, generator=generator).to(x.dtype)
        current = (x + 2 * eps * (2 * draw - 1)).clamp(0, 1)
    else:
        current = ball.random(generator)
    for _ in range(steps):
        current.requires_grad_()
        slope = gradient(loss(current), current)
        if wide:
            current = (current.detach() + step_size * slope.sign()).clamp(0, 1)
        else:
            current = ball.ascend(current.detach(), slope, step_size)
    return current.detach()
