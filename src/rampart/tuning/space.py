"""Search spaces: which settings of `train` are searched, and where."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import Trial

from rampart.data import Augmentation
from rampart.errors import SettingsError, require, unknown
from rampart.settings import EPS_NAMES, PIXELS, TrainSettings, resolve
from rampart.settings.mappings import read_yaml
from rampart.training import Recipe

SPACES = Path(__file__).parents[3] / "tuning"
Space = dict[str, BaseDistribution]
# Of an arm, which is what is tuned.
ARM = {"method", "augment", "contrastive"}
KEYS = ("choices", "low", "high", "log", "step")


def read_space(method: str, path: str, given: Mapping[str, str]) -> Space:
    """The space in the YAML file `path`, default tuning/<method>.yaml, without the settings that the user has `given`.

    Args:
        given: texts of the training's other settings, `method` among them; every end of a range and every choice is
            tried out with them.

    Raises:
        SettingsError: the file cannot be read, an unknown setting, an empty or reversed range, a value out of place.
    """
    file = Path(path) if path else SPACES / f"{method}.yaml"
    try:
        read = read_yaml(file.read_text(), f"search space '{file}'")
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SettingsError(f"search space '{file}' cannot be read: {' '.join(str(error).split())}") from error
    require(isinstance(read, dict) and bool(read), f"search space '{file}' must name a setting or more, and its range")
    valid = {field.name for kind in (Recipe, Augmentation) for field in dataclasses.fields(kind)} - ARM
    space = {}
    for name, range_ in read.items():
        require(name in valid, unknown(f"setting in search space {file.name}", name, valid))
        space[name] = _distribution(name, range_)
        for value in _ends(space[name]):
            try:
                resolve("train", {**given, name: text(value)})
            except SettingsError as error:
                raise SettingsError(f"search space {file.name}: {error}") from None
    fixed = sorted(set(space) & set(given))
    require(len(fixed) < len(space), f"nothing to search: all of {file.name} is given ({', '.join(fixed)})")
    return {name: distribution for name, distribution in space.items() if name not in fixed}


def suggest(trial: Trial, name: str, distribution: BaseDistribution) -> Any:
    """The trial's value of a setting."""
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)
    if isinstance(distribution, IntDistribution):
        return trial.suggest_int(
            name, distribution.low, distribution.high, step=distribution.step, log=distribution.log
        )
    assert isinstance(distribution, FloatDistribution)
    return trial.suggest_float(name, distribution.low, distribution.high, step=distribution.step, log=distribution.log)


def texts(point: Mapping[str, Any]) -> dict[str, str]:
    """A point of a space as a user would give it."""
    return {name: text(value) for name, value in point.items()}


def said(point: Mapping[str, Any]) -> str:
    """A point for people."""
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in point.items())


def text(value: Any) -> str:
    return repr(value) if isinstance(value, float) else str(value)


def starting_point(space: Space, given: Mapping[str, str]) -> dict[str, Any] | None:
    """The settings as they are without tuning; None where they lie outside of the space."""
    settings = resolve("train", given)
    assert isinstance(settings, TrainSettings)
    point: dict[str, Any] = {}
    for name, distribution in space.items():
        value = getattr(settings, name)
        if isinstance(distribution, CategoricalDistribution):
            # Choices are compared as settings: 1/255 and 0.00392… are one.
            same = [
                c for c in distribution.choices if getattr(resolve("train", {**given, name: text(c)}), name) == value
            ]
            if not same:
                return None
            point[name] = same[0]
        else:
            low, high = _ends(distribution)
            value = value / PIXELS[settings.eps_space] if name in EPS_NAMES else value
            if not low <= value <= high:
                return None
            point[name] = value
    return point


def _distribution(name: str, range_: Any) -> BaseDistribution:
    """From {choices: […]} or {low, high} with log or step."""
    require(isinstance(range_, dict), f"{name} needs a range such as {{low: 0.1, high: 1}} or {{choices: [1, 2]}}")
    for key in range_:
        require(key in KEYS, unknown(f"word for the range of {name}", key, KEYS))
    if "choices" in range_:
        choices = range_["choices"]
        require(
            len(range_) == 1 and isinstance(choices, list) and len({str(choice) for choice in choices}) > 1,
            f"{name} needs two choices or more, as in {{choices: [1, 2]}}, and nothing else",
        )
        # Optuna keeps numbers, texts and truth values; a list is a text, as on the command line.
        return CategoricalDistribution([",".join(map(str, c)) if isinstance(c, list) else c for c in choices])
    require({"low", "high"} <= set(range_), f"{name} needs low and high, or choices")
    kind = get_type_hints(TrainSettings)[name]
    require(kind in (int, float), f"{name} has no order: give choices instead of low and high")
    try:
        low, high = kind(range_["low"]), kind(range_["high"])
        exact = all(
            math.isfinite(end) and kind(end) == float(end) for end in map(float, (range_["low"], range_["high"]))
        )
        require(
            exact, f"the range of {name} needs finite {'whole ' if kind is int else ''}numbers: {low:g} to {high:g}"
        )
        step = range_.get("step")
        log = range_.get("log", False)
        require(isinstance(log, bool), f"log of {name} is true or false, not {log}")
        whole = step is None or kind is float or float(step).is_integer()
        require(whole, f"step of {name} must be a whole number, not {step}")
        require(step is None or 0 < float(step) <= high - low, f"step of {name} does not fit into its range: {step}")
        require(low < high, f"the range of {name} is {'empty' if low == high else 'reversed'}: {low:g} to {high:g}")
        if kind is int:
            return IntDistribution(low, high, log, 1 if step is None else int(step))
        return FloatDistribution(low, high, log, None if step is None else float(step))
    except (OverflowError, TypeError, ValueError) as error:
        raise SettingsError(f"the range of {name}: {' '.join(str(error).split())}") from None


def _ends(distribution: BaseDistribution) -> tuple[Any, ...]:
    if isinstance(distribution, CategoricalDistribution):
        return tuple(distribution.choices)
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    return distribution.low, distribution.high
