"""How the learning rate and ε move over a stage; `progress` runs from 0 at its first step to 1 at its end."""

from __future__ import annotations

import math


def lr_factor(schedule: str, progress: float) -> float:
    """What Adam's learning rate is multiplied by."""
    if schedule == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    if schedule == "linear":
        return 1 - progress
    return 1.0


def warmed_eps(eps: float, warmup: float, progress: float) -> float:
    """ε rising in a line from 0 over the first `warmup` share of the stage."""
    return eps * min(progress / warmup, 1.0) if warmup else eps
