"""How to do again what a run did: the command line, as short as its profile allows."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import pandas as pd

from rampart.errors import RampartError
from rampart.settings import TrainSettings, as_text, names, profile_name, resolve

# What a command names although the profile may say the same, and what is the machine's business alone.
ALWAYS = ("profile", "method", "augment", "contrastive", "seed", "model")
MACHINE = ("device", "threads", "data_root", "images_at_once", "export", "part")
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
    stages = ("contrastive", "=", "double") in words
    idle = {*_ANY, *(("epochs",) if stages else ("encoder_epochs", "head_epochs"))}
    return tuple(f"{name}={alike(value)}" for name, equals, value in words if equals and name not in idle)


def trained_by(said: str) -> dict[str, Any]:
    """The settings that have a part in the training that a command repeats, but for what tells its arm and seed, and
    where its data lie; `epochs` are those of both stages. Empty where the command is none of this version's, or its
    profile is gone."""
    if said == UNKNOWN:
        return {}
    words = [word.partition("=") for word in shlex.split(said)]
    try:
        settings = resolve("train", {name: text for name, equals, text in words if equals and name not in _ANY})
    except RampartError:
        return {}
    assert isinstance(settings, TrainSettings)
    left = {*ALWAYS, *MACHINE, *_ANY, "eps_space", "compile"} | settings.idle()
    found = {name: value for name, value in asdict(settings).items() if name not in left}
    stages = [found.pop(name) for name in ("encoder_epochs", "head_epochs") if name in found]
    return ({"epochs": sum(stages)} if stages else {}) | found


def alike(text: Any) -> Any:
    """A parameter as others may have typed it: 5.0 is 5, and yes is True."""
    if pd.isna(text):
        return text
    try:
        return f"{float(str(text)):g}"
    except ValueError:
        return _SPELT.get(str(text).lower(), text)
