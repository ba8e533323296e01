"""The one place where ε is converted: text on either scale to pixels, and pixels to the text that people write."""

from __future__ import annotations

import math
import re
from typing import Any, Literal

from rampart.errors import SettingsError

EpsSpace = Literal["pixel", "normalized"]
# Names of settings that are radii; each is logged twice: as `eps` in the user's space and `eps_pixel`.
EPS_NAMES = ("eps", "survive_eps", "certify_eps", "radius", "objective_eps")
# The study's data were normalised with std 0.5, so that its radii are twice as long as in pixels.
PIXELS = {"pixel": 1.0, "normalized": 0.5}


def eps_text(eps: float) -> str:
    """A radius as people write it: 8/255, 1/510, or a decimal; also from the six digits that metric names keep."""
    if abs(eps - round(eps, 3)) < 1e-9:
        return f"{eps:g}"
    for denominator in (255, 510):
        count = round(eps * denominator)
        if count and f"{count / denominator:.6g}" == f"{eps:.6g}":
            return f"{count}/{denominator}"
    return f"{eps:.6g}"


def parse_eps(name: str, text: Any, space: str, largest: float = 1.0) -> float:
    """One radius in pixels from '8/255', '0.03' or a number on the scale of `space`; `largest` is in pixels, too."""
    match = re.fullmatch(r"\s*([^/\s]+)\s*(?:/\s*([^/\s]+)\s*)?", str(text))
    try:
        assert match is not None
        value = float(match[1]) / float(match[2] or 1) * PIXELS[space]
    except (AssertionError, ValueError, ZeroDivisionError):
        raise SettingsError(f"{name} must be a number or a fraction such as 8/255, not '{text}'") from None
    if not (math.isfinite(value) and 0 <= value <= largest):
        top = f"{largest / PIXELS[space]:g} ({'pixels' if space == 'pixel' else space})"
        whole = f": {text}/255, say" if str(text).isdigit() and 0 < int(text) <= 255 else ""
        raise SettingsError(f"{name} must lie between 0 and {top}, not '{text}'{whole}")
    return value
