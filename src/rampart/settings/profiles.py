"""Profiles: named, complete sets of settings, read from YAML."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from pydantic import ValidationError

from rampart.errors import SettingsError, require, unknown
from rampart.settings.kinds import STEPS, kind_of, names
from rampart.settings.mappings import read_yaml
from rampart.settings.scale import EPS_NAMES

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
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"profile '{name}' cannot be read: {' '.join(str(error).split())}") from error


@lru_cache(maxsize=64)  # a report asks for a profile once a run
def _sections(name: str, text: str) -> Mapping[str, Any]:
    read = read_yaml(text, f"profile '{name}'") or {}
    require(isinstance(read, dict), f"profile '{name}' must be a YAML mapping of sections: {', '.join(SECTIONS)}")
    for section in read:
        require(section in SECTIONS, unknown(f"section of profile {name}", section, SECTIONS))
    profile = {section: read.get(section) or {} for section in SECTIONS} | {"arms": read.get("arms") or []}
    for section in ("common", *STEPS):
        kind = "a YAML mapping of settings"
        require(isinstance(profile[section], dict), f"section {section} of profile '{name}' must be {kind}")
    require(isinstance(profile["arms"], list), f"section arms of profile '{name}' must be a YAML list of rules")
    for step in STEPS:
        for key in profile[step]:
            require(key in names(step), unknown(f"setting in section {step} of profile {name}", key, names(step)))
    every = {key for step in STEPS for key in names(step)}
    for key in profile["common"]:
        require(key in every, unknown(f"setting in section common of profile {name}", key, every))
        step, dot, bare = key.rpartition(".")
        require(not dot, f"setting '{key}' in section common of profile {name}: put {bare} into section {step}")
    for rule in profile["arms"]:
        parts = rule if isinstance(rule, dict) else {}
        wanted = set(parts) == {"when", "set"} and all(isinstance(part, dict) for part in parts.values())
        require(wanted, f"an arm's rule in profile {name} has 'when' and 'set', each of them a YAML mapping")
        for key in (*rule["when"], *rule["set"]):
            require(key in names("train"), unknown(f"setting in a rule of profile {name}", key, names("train")))
        for key, value in rule["when"].items():
            kind = get_type_hints(STEPS["train"])[key]
            single = key not in EPS_NAMES and get_origin(kind) is not tuple
            require(single, f"a rule of profile {name} cannot depend on '{key}': take a setting of one name or number")
            for one in value if isinstance(value, list) else [value]:
                _require_choice(f"{key} in a rule of profile {name}", key, one)
    return profile


def _require_choice(what: str, key: str, value: object) -> None:
    """Raises SettingsError where a training's setting never has this value: a rule for it would never hold."""
    kind = get_type_hints(STEPS["train"])[key]
    if get_origin(kind) is Literal:
        require(str(value).lower() in get_args(kind), unknown(what, value, get_args(kind)))
        return
    try:
        kind_of(key).validate_python(value)
    except ValidationError:
        raise SettingsError(f"{what} cannot be '{value}': take a value that the setting takes") from None


def profile_name(given: str) -> str:
    """What runs are tagged with: ./mine.yaml is mine.yaml."""
    return str(Path(given)) if _is_file(given) else given


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) and not name.startswith(tuple(PROFILE_READERS))


def _profile_text(name: str) -> str:
    for prefix, reader in PROFILE_READERS.items():
        if name.startswith(prefix):
            return reader(name)
    file = Path(name)
    if not _is_file(name):
        known = {path.stem: path for path in PROFILES.glob("*.yaml")}
        require(name in known, unknown("profile", name, known))
        file = known[name]
    return file.read_text(encoding="utf-8")
