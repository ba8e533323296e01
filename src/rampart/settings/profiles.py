"""Profiles: named, complete sets of settings, read from YAML."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from rampart.errors import SettingsError, require, unknown
from rampart.settings.kinds import STEPS, names

PROFILES = Path(__file__).parents[3] / "configs"
SECTIONS = ("about", "common", *STEPS, "arms")
# What gives the text of a profile whose name begins like this; `tracking` adds runs:/, which needs MLflow.
PROFILE_READERS: dict[str, Callable[[str], str]] = {}


def load_profile(name: str) -> Mapping[str, Any]:
    """A profile's sections; `name` is that of one in configs/, the path of a file, or what a reader knows.

    Raises:
        SettingsError: there is none of that name, or it names an unknown section or setting.
    """
    try:
        return _sections(name, _profile_text(name))
    except (OSError, yaml.YAMLError) as error:
        raise SettingsError(f"profile '{name}' cannot be read: {' '.join(str(error).split())}") from error


@lru_cache(maxsize=64)  # a report asks for a profile once a run
def _sections(name: str, text: str) -> Mapping[str, Any]:
    read = yaml.safe_load(text) or {}
    require(isinstance(read, dict), f"profile '{name}' must be a YAML mapping of sections: {', '.join(SECTIONS)}")
    for section in read:
        require(section in SECTIONS, unknown(f"section of profile {name}", str(section), SECTIONS))
    profile = {section: read.get(section) or {} for section in SECTIONS} | {"arms": read.get("arms") or []}
    for step in STEPS:
        for key in profile[step]:
            require(key in names(step), unknown(f"setting in section {step} of profile {name}", key, names(step)))
    every = {key for step in STEPS for key in names(step)}
    for key in profile["common"]:
        require(key in every, unknown(f"setting in section common of profile {name}", key, every))
    for rule in profile["arms"]:
        require(set(rule) == {"when", "set"}, f"an arm's rule in profile {name} has 'when' and 'set'")
        for key in (*rule["when"], *rule["set"]):
            require(key in names("train"), unknown(f"setting in a rule of profile {name}", key, names("train")))
    return profile


def _profile_text(name: str) -> str:
    for prefix, reader in PROFILE_READERS.items():
        if name.startswith(prefix):
            return reader(name)
    file = Path(name)
    if file.suffix not in (".yaml", ".yml"):
        known = {path.stem: path for path in PROFILES.glob("*.yaml")}
        require(name in known, unknown("profile", name, known))
        file = known[name]
    return file.read_text()
