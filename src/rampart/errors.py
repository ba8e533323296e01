"""The errors that a user can mend. Each message is one line and says what to do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from numbers import Real
from typing import Literal, get_args, get_origin, get_type_hints

import torch


class RampartError(Exception):
    """Bad input or an unusable environment; the command line prints it without a traceback and exits with 2."""

    def __str__(self) -> str:
        return without_password(super().__str__())


class SettingsError(RampartError):
    """A setting that is unknown, out of range, or of the wrong kind."""


class DataError(RampartError):
    """A dataset that is missing, unreadable, or inconsistent."""


class ModelError(RampartError):
    """A model that is missing or does not fit what was asked of it."""


class UnsupportedLayer(ModelError):
    """A layer that a bound engine cannot express; `path` is its place in the model."""

    def __init__(self, path: str, kind: str, reason: str = "") -> None:
        self.path, self.kind, self.reason = path, kind, reason
        # As they came: an error that crosses processes is made anew from its arguments.
        super().__init__(path, kind, reason)

    def __str__(self) -> str:
        why = f": {self.reason}" if self.reason else ""
        return f"no bounds for layer '{self.path or 'model'}' ({self.kind}){why}"


class BrokenArtifact(RampartError):
    """An artifact of a run that cannot be read."""


class Contradiction(RampartError):
    """An image is both proved and broken."""


class BoundError(RampartError):
    """Bounds that are NaN, or a lower one above the upper one."""


class TrainingDiverged(RampartError):
    """A loss that became NaN or infinite, or a network whose output no image changes any more."""


def without_password(text: str) -> str:
    """The text, with stars for the password of a URL in it."""
    return _PASSWORD.sub(r"\1\2***", text)


_PASSWORD = re.compile(r"(://[^:/@\s]*:)[^\s]*(?=@)|([?&]password=)[^&\s]*")


def is_out_of_memory(error: Exception) -> bool:
    """Whether that is why: a GPU has an error of its own, a CPU and a GPU's libraries a message."""
    messages = ("can't allocate memory", "ALLOC_FAILED")
    if not isinstance(error, RuntimeError):
        return False
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in messages)


def unknown(kind: str, given: object, choices: Iterable[str]) -> str:
    """One line that names the nearest valid choice, and the others where they are few."""
    valid = sorted(choices)
    lowered = {choice.lower(): choice for choice in valid}
    near = [lowered[name] for name in difflib.get_close_matches(str(given).lower(), lowered, n=1, cutoff=0.5)]
    message = f"unknown {kind} '{given}'" + (f": did you mean '{near[0]}'?" if near else "")
    # A long list would bury the hint.
    return message if near and len(valid) > 12 else f"{message} (valid: {', '.join(valid)})"


def require_choices(settings: object) -> None:
    """Raises SettingsError where a Literal field of a dataclass holds a value that is none of its choices."""
    for name, kind in get_type_hints(type(settings)).items():
        if get_origin(kind) is Literal:
            require(getattr(settings, name) in get_args(kind), unknown(name, getattr(settings, name), get_args(kind)))


def require_numbers(**values: object) -> None:
    """Raises SettingsError where one of the values, by its name, is no number: a text, say, or a list."""
    for name, value in values.items():
        require(isinstance(value, Real), f"{name} must be one number, not {value!r}")


def require_radii(smallest: float, largest: float) -> None:
    """Raises SettingsError where radii of L∞ balls do not lie between 0 and 1, in pixels of [0, 1]."""
    require(smallest >= 0, f"eps must be 0 or more, not {smallest}")
    require(largest <= 1, f"eps must be 1 or less, in pixels of [0, 1], not {largest}: 8/255, say, instead of 8")


def require(condition: bool, message: str) -> None:
    """Raises SettingsError with `message` unless `condition` holds."""
    if not condition:
        raise SettingsError(message)
