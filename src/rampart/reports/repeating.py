"""How to do again what a run did: the command line, as short as its profile allows."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

import pandas as pd

from rampart.errors import RampartError
from rampart.settings import MACHINE, TrainSettings, as_text, names, profile_name, resolve

# What a command names although the profile may say the same.
ALWAYS = ("profile", "method", "augment", "contrastive", "seed", "model")
# Stands for the model that the training of an arm gave.
MODEL = "runs:/<run id>/model"
# Stands for the command of a run that is none of this version's, or whose profile is gone.
UNKNOWN = "-"
# What two commands may differ in and still do the same, and how else a truth value may be typed.
_ANY = ("seed", "dataset")
_SPELT = {"true": "True", "yes": "True", "on": "True", "false": "False", "no": "False", "off": "False"}


def command(step: str, params: Mapping[str, Any]) -> str:
    """The command that repeats a step with a run's parameters (of another model: its id is left open); UNKNOWN
    where they are none of this version's, or their profile is gone."""
    known = {name: str(params[name]) for name in names(step) if pd.notna(params.get(name))}
    given = {name: known[name] for name in ALWAYS if name in known}
    if "profile" in given:
        given["profile"] = known["profile"] = profile_name(given["profile"])
    try:
        usual = as_text(resolve(step, given), given)
    except RampartError:
        return UNKNOWN
    given |= {name: text for name, text in known.items() if name not in MACHINE and text != usual[name]}
    if given.get("model", "").startswith("runs:/"):
        given["model"] = MODEL
    return f"mlflow run . -e {step} " + " ".join(f"-P {shlex.quote(f'{name}={text}')}" for name, text in given.items())


def way(said: str) -> tuple[str, ...]:
    """What a command that repeats a run says, whatever its seed, wherever its data lie, however it is typed, and
    without what has no part in it."""
    words = [word.partition("=") for word in shlex.split(said)]
    given = {name: value for name, equals, value in words if equals and name not in _ANY}
    try:
        settings = resolve("train", given) if "-e train" in said else None
    except RampartError:  # its profile is gone
        settings = None
    idle = settings.idle() if isinstance(settings, TrainSettings) else set()
    return tuple(f"{name}={alike(value)}" for name, value in given.items() if name not in idle)


def trained_by(params: Mapping[str, Any]) -> dict[str, str]:
    """The settings that have a part in the training of a run with these parameters, but for what tells its arm and
    seed, and where its data lie; ε in pixels, `epochs` are those of both stages. Empty where they are none of this
    version's."""
    # All by itself: its profile may have changed, or be gone.
    known = {name: str(params[name]) for name in names("train") if name != "profile" and pd.notna(params.get(name))}
    try:
        settings = resolve("train", known)
    except RampartError:
        return {}
    assert isinstance(settings, TrainSettings)
    idle, texts = settings.idle(), as_text(settings, {})
    left = {*ALWAYS, *MACHINE, *_ANY, "eps_space", "compile", *idle}
    found = {name: texts.get(f"{name}_pixel", texts[name]) for name in names("train") if name not in left}
    stages = [int(found.pop(name)) for name in ("encoder_epochs", "head_epochs") if name in found]
    return ({"epochs": str(sum(stages))} if stages else {}) | found


def alike(text: Any) -> Any:
    """A parameter as others may have typed it: 5.0 is 5, and yes is True."""
    if pd.isna(text):
        return text
    try:
        return f"{float(str(text)):g}"
    except ValueError:
        return _SPELT.get(str(text).lower(), text)
