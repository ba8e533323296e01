"""AutoAttack's standard ensemble (Croce & Hein 2020): APGD on cross-entropy, APGD on the targeted DLR loss, targeted
FAB (Croce & Hein 2020b) and Square (Andriushchenko et al. 2020); the last two by the package pyautoattack."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rampart.attacks.apgd import targeted, untargeted
from rampart.attacks.ball import Ball, Norm
from rampart.attacks.sweep import AttackResult, Attempt, Start, sweep
from rampart.errors import SettingsError, require

STEPS, TARGETS, QUERIES = 100, 9, 5000
# Images to logits.
Logits = Callable[[Tensor], Tensor]
# The members by the number of their start.
MEMBERS = ("apgd-ce", *("apgd-t",) * TARGETS, "fab-t", "square")
_NORMS: dict[Norm, str] = {"linf": "Linf", "l2": "L2"}


def autoattack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float | Sequence[float] | Tensor,
    generator: torch.Generator | None = None,
    *,
    norm: Norm = "linf",
    surrogate: nn.Module | None = None,
) -> AttackResult:
    """The standard ensemble at one radius or several; each member sees what those before it left unbroken, and `start`
    of the result tells which one of MEMBERS it was.

    Arguments and errors as `apgd`'s; also SettingsError where pyautoattack is not installed, or has no L2 Square for
    images of this size.
    """
    try:
        from pyautoattack.fab_pt import FABAttack_PT
        from pyautoattack.square import SquareAttack
    except ImportError as error:
        raise SettingsError("attack=autoattack needs the package pyautoattack: pip install pyautoattack") from error

    height, width = x.shape[2:]
    require(
        norm == "linf" or _tiled(height, width),
        f"attack=autoattack: Square in L2 cannot be had for images of {height}x{width}: take attack=apgd",
    )

    def fab(predict: Logits, ball: Ball, **given: Any) -> Any:
        with torch.no_grad():
            classes = predict(ball.x[:1].float()).shape[1]
        return FABAttack_PT(predict, targeted=True, n_target_classes=min(TARGETS, classes - 1), n_iter=STEPS, **given)

    def square(predict: Logits, ball: Ball, **given: Any) -> Any:
        return SquareAttack(predict, n_queries=QUERIES, resc_schedule=False, **given)

    own = [untargeted(STEPS, "ce", generator), *targeted(STEPS, TARGETS, generator)]
    starts = [*own, _foreign(fab, generator), _foreign(square, generator)]
    return sweep(model, x, y, eps, lambda _: starts, norm, surrogate)


def _tiled(height: int, width: int) -> bool:
    """Whether pyautoattack's Square in L2, which begins with tiles of a fifth of the height, keeps within the image."""
    tile = height // 5
    if tile < 2:
        return tile == 1
    first = (height - 5 * tile) // 2
    return all(first + side // tile * tile <= side for side in (height, width))


def _foreign(make: Callable[..., Any], generator: torch.Generator | None) -> Start:
    """A start of another library's attack, `make(model, ball, norm=, eps=, seed=, device=, n_restarts=)`."""

    def start(model: nn.Module, ball: Ball, y: Tensor) -> Attempt:
        device = ball.x.device
        seed = int(torch.randint(2**31, (1,), device=device, generator=generator))
        unknown_step = torch.full_like(y, -1)
        if ball.eps == 0:  # they divide by it
            return Attempt(ball.x, unknown_step)

        # They work in float32 alone.
        def predict(images: Tensor) -> Tensor:
            return model(images.to(ball.x.dtype)).float()

        # They seed the global random state, and gather gradients of parameters where there are any.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), _frozen(model):
            given = {"norm": _NORMS[ball.norm], "eps": ball.eps, "seed": seed, "device": device, "n_restarts": 1}
            found = make(predict, ball, **given).perturb(ball.x.float().contiguous(), y)
        return Attempt(ball.project(found.detach().to(ball.x.dtype)), unknown_step)

    return start


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
