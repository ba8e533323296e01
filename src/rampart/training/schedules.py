"""How the learning rate and ε move over a stage; `progress` runs from 0 at its first step to 1 at its end."""

from __future__ import annotations

import math

# Share of the warm-up in which ε follows the fourth power.
SMOOTH = 0.25


def lr_factor(schedule: str, progress: float) -> float:
    """What Adam's learning rate is multiplied by."""
    if schedule == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    if schedule == "linear":
        return 1 - progress
    return 1.0


def warmed_eps(eps: float, warmup: float, progress: float) -> float:
    """ε rising from 0 over the first `warmup` share of the stage: as time's fourth power, then in a line
    (auto_LiRPA's smoothed schedule, Xu et al. 2020, appendix B)."""
    time = min(progress / warmup, 1.0) if warmup else 1.0
    # Value and slope of the two pieces agree where they meet.
    power = SMOOTH / (SMOOTH + 4 * (1 - SMOOTH))
    share = power * (time / SMOOTH) ** 4 if time < SMOOTH else power + (1 - power) * (time - SMOOTH) / (1 - SMOOTH)
    return eps * share


def ramp(values: tuple[float, ...], share: float) -> float:
    """From the first of one or two values to the last, as `share` goes from 0 to 1."""
    return values[0] + (values[-1] - values[0]) * share
