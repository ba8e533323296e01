"""From what the user gives as text, and the profile, to settings; and back to the text that a run logs.

A value comes from, in this order: what the user gives, the profile's rules for the arm (the last one that fits; each
sees what those before it have set), the profile's section of the entry point, its `common` section, the default in
code. Each of the first four may speak of ε on the study's scale (`eps_space: normalized`); settings hold pixels.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from rampart.errors import SettingsError, require, unknown, without_password
from rampart.settings.kinds import DECIDED, DEFAULT_PROFILE, STEPS, Settings, TrainSettings, kind_of, names, own_names
from rampart.settings.profiles import load_profile, profile_name
from rampart.settings.scale import EPS_NAMES, PIXELS, eps_text, parse_eps


def resolve(step: str, given: Mapping[str, str]) -> Settings:
    """The settings of a step from its profile and the texts that the user gave.

    Raises:
        SettingsError: an unknown name (the nearest valid one is named), or a value that does not fit.
    """
    for name in given:
        require(name in names(step), _stranger(step, name))
    called = profile_name(given.get("profile", DEFAULT_PROFILE))
    profile = load_profile(called)
    for name in profile[step]:
        where = f"setting '{name}' in section {step} of the profile belongs to the steps that {step} runs"
        require(name in own_names(step), f"{where}: put it into their sections, or into common")
    fields = {field.name for field in dataclasses.fields(STEPS[step])}
    common = _known(profile["common"], fields)
    # Each speaks of ε on its own scale, or on that of the one below it.
    below = _scale(common, "pixel")
    scale = _scale(profile[step], below)
    layers = [(common, below), (profile[step], scale)]  # of the profile
    section = {**common, **profile[step]}
    if step == "train":
        arm = {f.name: f.default for f in dataclasses.fields(TrainSettings)} | section | dict(given)
        for rule in profile["arms"]:
            if all(_same(name, arm.get(name), value) for name, value in rule["when"].items()):
                layers.append((rule["set"], _scale(rule["set"], scale)))
                section |= rule["set"]
                arm = {**arm, **rule["set"], **given}
    own = {name: text for name, text in given.items() if name in fields}
    # An L2 ball of radius 1 changes few pixels much: no radius is too large there.
    largest = math.inf if own.get("norm", section.get("norm")) == "l2" else 1.0
    values: dict[str, Any] = {}
    for layer, space in layers:
        try:
            values |= _parsed(layer, space, largest)
        except SettingsError as error:
            raise SettingsError(f"profile '{called}': {error}") from None
    mine = _parsed(own, _scale(own, section.get("eps_space", "pixel")), largest)
    try:
        return _validated(step, {**values, **mine, "profile": called})
    except SettingsError as error:
        if _fault(step, {**values, "profile": called}) == str(error):
            raise SettingsError(f"profile '{called}': {error}") from None
        raise


def _stranger(step: str, name: str) -> str:
    """What to say of a setting that the step does not have."""
    section, _, bare = name.rpartition(".")
    if section == step and bare in names(step):
        return f"unknown setting '{name}': {step} is the step itself, say '{bare}'"
    others = [other for other in STEPS if name in own_names(other)]
    of = f": it is one of {', '.join(others)}" if others else ""
    return f"unknown setting '{name}' of {step}{of}" if of else unknown("setting", name, names(step))


def _fault(step: str, values: dict[str, Any]) -> str:
    """What is wrong with a step's settings."""
    try:
        _validated(step, values)
    except SettingsError as error:
        return str(error)
    return ""


def nested(given: Mapping[str, str], step: str) -> dict[str, str]:
    """What a study's texts say to one of its steps: bare names first, step.name above them."""
    valid = set(names(step)) - DECIDED
    bare = {name: text for name, text in given.items() if name in valid}
    dotted = {name.split(".", 1)[1]: text for name, text in given.items() if name.startswith(f"{step}.")}
    return {**bare, **dotted}


def as_text(settings: Settings, given: Mapping[str, str]) -> dict[str, str]:
    """Every setting as a run's parameter; a value that the user gave stands as it was typed."""
    space = getattr(settings, "eps_space", "pixel")
    texts = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name in EPS_NAMES:
            radii = value if isinstance(value, tuple) else (value,)
            texts[field.name] = ",".join(eps_text(radius / PIXELS[space]) for radius in radii)
            texts[f"{field.name}_pixel"] = ",".join(eps_text(radius) for radius in radii)
        else:
            texts[field.name] = ",".join(_text(v) for v in value) if isinstance(value, tuple) else _text(value)
    return {name: without_password(text) for name, text in {**texts, **given}.items()}


def _text(value: Any) -> str:
    if isinstance(value, float) and float(short := f"{value:g}") == value:
        return short
    return str(value)


def _known(section: Mapping[str, Any], fields: set[str]) -> dict[str, Any]:
    return {name: value for name, value in section.items() if name in fields}


def _scale(section: Mapping[str, Any], default: str) -> str:
    """The scale of ε that the section speaks on."""
    space = section.get("eps_space", default)
    require(isinstance(space, str) and space in PIXELS, unknown("eps_space", space, PIXELS))
    return str(space)


def _same(name: str, value: Any, wanted: Any) -> bool:
    """Whether a training's setting, maybe still a text, has one of the wanted values."""
    options = wanted if isinstance(wanted, list) else [wanted]
    return _typed(name, value) in [_typed(name, option) for option in options]


def _typed(name: str, value: Any) -> Any:
    """A training's setting as it will be (yes, on and 1 are True); what does not fit stays, and is said later."""
    try:
        return kind_of(name).validate_python(value)
    except ValidationError:
        return str(value).lower()


def _parsed(values: Mapping[str, Any], space: str, largest: float) -> dict[str, Any]:
    """Texts of lists split, radii in pixels."""
    parsed: dict[str, Any] = {}
    for name, value in values.items():
        if name in EPS_NAMES:
            parts = value if isinstance(value, list) else str(value).split(",")
            parsed[name] = [parse_eps(name, part, space, largest) for part in parts]
        else:
            parsed[name] = value
    return parsed


def _validated(step: str, values: dict[str, Any]) -> Settings:
    for field in dataclasses.fields(STEPS[step]):
        value = values.get(field.name)
        truth = isinstance(value, bool) and "bool" not in str(field.type) and "str" not in str(field.type)
        require(not truth, f"{field.name} takes no truth value, which YAML makes of yes and no: {value}")
        listed = "tuple" in str(field.type)
        if listed and isinstance(value, str | int | float):
            values[field.name] = [part.strip() for part in str(value).split(",")]
        elif not listed and isinstance(value, list):
            require(len(value) == 1, f"{field.name} takes one value here, not {len(value)}")
            values[field.name] = value[0]
    try:
        settings = _adapter(step).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        name, given = ".".join(str(part) for part in first["loc"][:1]), first["input"]
        if first["type"] in ("missing", "too_long") and isinstance(given, list | tuple):
            kinds = {field.name: str(field.type) for field in dataclasses.fields(STEPS[step])}
            count = kinds[name].count(",") + 1
            raise SettingsError(f"{name} takes {count} values, as in {name}=1,2,…, not {len(given)}") from None
        raise SettingsError(f"{name}: {_say(first)}") from None
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        for number in value if isinstance(value, tuple) else (value,):
            finite = not isinstance(number, float) or math.isfinite(number)
            require(finite, f"{field.name} must be a finite number, not {number}")
    return settings


@cache
def _adapter(step: str) -> TypeAdapter[Settings]:
    return TypeAdapter(STEPS[step])


def _say(error: Any) -> str:
    if error["type"] == "literal_error":
        options = [option for option in re.findall(r"'([^']*)'", error["ctx"]["expected"]) if option]
        return unknown("value", error["input"], options)
    return f"{error['msg'][:1].lower()}{error['msg'][1:]}, not '{error['input']}'"
