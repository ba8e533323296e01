"""Auto-PGD, whose step size follows the progress of the loss (Croce & Hein 2020, algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor, nn

from rampart.attacks.ball import Ball, Norm, gradient
from rampart.attacks.objectives import OBJECTIVES, Loss, Objective, targeted_dlr
from rampart.attacks.sweep import AttackResult, Attempt, Start, require_budget, sweep
from rampart.errors import require
from rampart.models import classes_of

# Shares of the paper: of a step that is new (α), of steps that must have raised the loss (ρ), and of the budget before
# the first and the shortest check of the step size, by which the time between checks shrinks.
MOMENTUM, RISING = 0.75, 0.75
FIRST, SHORTEST, SHRINKS = 0.22, 0.06, 0.03


def apgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float | Sequence[float] | Tensor,
    steps: int = 100,
    restarts: int = 1,
    generator: torch.Generator | None = None,
    *,
    norm: Norm = "linf",
    loss: Loss = "ce",
    targets: int = 0,
    surrogate: nn.Module | None = None,
) -> AttackResult:
    """Auto-PGD at one radius or several (`sweep` says how they are shared).

    Args:
        model: pixels -> logits, in eval mode.
        x: images [B, C, H, W] in [0, 1].
        y: labels [B].
        eps: in pixels, in any order.
        steps: gradient steps a start, 1 or more.
        restarts: random starts, 1 or more.
        generator: of the starts, on x's device.
        norm: of the ball, `linf` or `l2`.
        loss: `ce`, `margin` or `dlr`.
        targets: 0, or how many of the other classes, the likeliest first, are aimed at in turn with the targeted DLR
            loss, whatever `loss` says; `start` of the result counts them.
        surrogate: a network of nearly the same outputs whose gradient is followed instead (`sweep`).

    Raises:
        SettingsError: a bad ε or count. ModelError: the model is in training mode.
    """
    require_budget(steps, restarts, loss)
    require(targets >= 0, f"targets must be 0 or more, not {targets}")
    starts = [untargeted(steps, loss, generator)] if not targets else targeted(steps, targets, generator)
    return sweep(model, x, y, eps, lambda _: starts * restarts, norm, surrogate)


def untargeted(steps: int, loss: Loss, generator: torch.Generator | None) -> Start:
    def start(model: nn.Module, ball: Ball, y: Tensor) -> Attempt:
        return _one_start(model, ball, y, lambda _: OBJECTIVES[loss], steps, generator)

    return start


def targeted(steps: int, targets: int, generator: torch.Generator | None) -> list[Start]:
    """Starts that aim at the likeliest other class, the second, …; a model of fewer classes has the fewer."""

    def start(model: nn.Module, ball: Ball, y: Tensor, rank: int) -> Attempt:
        with torch.no_grad():
            logits = model(ball.x)
        if rank >= logits.shape[1] - 1:
            return Attempt(ball.x, torch.zeros_like(y))
        others = logits.scatter(1, y[:, None], -float("inf"))
        target = others.topk(rank + 1, 1).indices[:, rank]
        return _one_start(model, ball, y, lambda rows: targeted_dlr(target[rows]), steps, generator)

    return [partial(start, rank=rank) for rank in range(targets)]


@dataclass
class _State:
    """Of the images still unbroken, a row each."""

    row: Tensor  # [B] in the batch
    y: Tensor
    current: Tensor
    before: Tensor
    slope: Tensor
    size: Tensor  # of the step, [B, 1, 1, 1]
    value: Tensor
    best: Tensor
    best_value: Tensor
    best_slope: Tensor
    rises: Tensor  # steps since the last check that raised the value
    checked: Tensor  # best_value at the last check
    halved: Tensor  # whether that check halved the step

    def __getitem__(self, rows: Tensor) -> _State:
        return _State(*(getattr(self, field.name)[rows] for field in fields(self)))


@torch.enable_grad()
def _one_start(
    model: nn.Module,
    ball: Ball,
    y: Tensor,
    objective_of: Callable[[Tensor], Objective],
    steps: int,
    generator: torch.Generator | None,
) -> Attempt:
    """One run from a random start; `objective_of` gives the objective of some rows of the batch."""
    example, step = ball.x.clone(), torch.zeros_like(y)

    def look(point: Tensor, rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values, gradients, and where the model errs."""
        point.requires_grad_()
        logits = model(point)
        values = objective_of(rows)(logits, labels)
        slope = gradient(values.sum(), point)
        point.requires_grad_(False)
        return values.detach(), slope, classes_of(logits.detach()) != labels

    rows = torch.arange(len(y), device=y.device)
    start = ball.random(generator)
    value, slope, wrong = look(start, rows, y)
    size = torch.full((len(y), *(1,) * (start.dim() - 1)), 2 * ball.eps, dtype=start.dtype, device=start.device)
    none = torch.zeros_like(y)
    s = _State(rows, y, start, start, slope, size, value, start, value, slope, none, value, torch.ones_like(wrong))
    interval, since = max(int(FIRST * steps), 1), 0
    for iterate in range(1, steps + 2):
        # What is broken leaves at once: its example is found.
        example[s.row[wrong]], step[s.row[wrong]] = s.current[wrong], iterate - 1
        if wrong.any():
            s, ball = s[~wrong], ball[~wrong]
        if iterate > steps or not len(s.row):
            break
        aimed = ball.ascend(s.current, s.slope, s.size)
        share = MOMENTUM if iterate > 1 else 1.0
        moved = ball.project(s.current + share * (aimed - s.current) + (1 - share) * (s.current - s.before))
        s.before, s.current, old = s.current, moved, s.value
        s.value, s.slope, wrong = look(moved, s.row, s.y)
        s.rises = s.rises + (s.value > old)
        risen = s.value > s.best_value
        s.best_value = torch.where(risen, s.value, s.best_value)
        s.best, s.best_slope = _where(risen, moved, s.best), _where(risen, s.slope, s.best_slope)
        since += 1
        if since == interval:
            # Halved where too few steps rose, or where nothing did since a check that halved nothing.
            halve = (s.rises <= RISING * interval) | (~s.halved & (s.checked >= s.best_value))
            s.size = torch.where(halve.view_as(s.size), s.size / 2, s.size)
            # A point that breaks the image stays: it is taken at the top of the loop.
            back = halve & ~wrong
            s.current, s.slope = _where(back, s.best, s.current), _where(back, s.best_slope, s.slope)
            s.checked, s.halved, s.rises = s.best_value, halve, torch.zeros_like(s.rises)
            interval, since = max(interval - max(int(SHRINKS * steps), 1), max(int(SHORTEST * steps), 1)), 0
    example[s.row] = s.best
    return Attempt(example, step)


def _where(rows: Tensor, one: Tensor, other: Tensor) -> Tensor:
    return torch.where(rows.view(-1, *(1,) * (one.dim() - 1)), one, other)
