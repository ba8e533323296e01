"""How to do again what a run did: the command line, as short as its profile allows."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

import pandas as pd

from rampart.errors import RampartError
from rampart.settings import as_text, names, resolve

# What a command names although the profile may say the same, and what is the machine's business alone.
ALWAYS = ("profile", "method", "augment", "contrastive", "seed", "model", "dataset")
MACHINE = ("device", "threads", "data_root", "images_at_once", "export", "part")
# Stands for the model that the training of an arm gave.
MODEL = "runs:/<run id>/model"
# Stands for the command of a run that is none of this version's, or whose profile is gone.
UNKNOWN = "-"


def command(step: str, params: Mapping[str, Any]) -> str:
    """The command that repeats a step with a run's parameters (of another model: its id is left open); UNKNOWN
    where they are none of this version's, or their profile is gone."""
    known = {name: str(params[name]) for name in names(step) if pd.notna(params.get(name))}
    given = {name: known[name] for name in ALWAYS if name in known}
    try:
        usual = as_text(resolve(step, given), given)
    except RampartError:
        return UNKNOWN
    given |= {name: text for name, text in known.items() if name not in MACHINE and text != usual[name]}
    if given.get("model", "").startswith("runs:/"):
        given["model"] = MODEL
    return f"mlflow run . -e {step} " + " ".join(f"-P {shlex.quote(f'{name}={text}')}" for name, text in given.items())
