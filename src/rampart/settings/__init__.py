"""Typed settings of every entry point, profiles, and the one conversion of ε."""

from rampart.settings.kinds import (
    ARM_STEPS,
    MACHINE,
    STEPS,
    Common,
    CompareSettings,
    EmbedSettings,
    EvaluateSettings,
    ModelSettings,
    Settings,
    StudySettings,
    TrainSettings,
    TuneSettings,
    VerifySettings,
    names,
)
from rampart.settings.profiles import PROFILE_READERS, SECTIONS, load_profile, profile_name
from rampart.settings.resolving import as_text, nested, resolve
from rampart.settings.scale import EPS_NAMES, PIXELS, eps_text, parse_eps

__all__ = [
    "ARM_STEPS",
    "EPS_NAMES",
    "MACHINE",
    "PIXELS",
    "PROFILE_READERS",
    "SECTIONS",
    "STEPS",
    "Common",
    "CompareSettings",
    "EmbedSettings",
    "EvaluateSettings",
    "ModelSettings",
    "Settings",
    "StudySettings",
    "TrainSettings",
    "TuneSettings",
    "VerifySettings",
    "as_text",
    "eps_text",
    "load_profile",
    "names",
    "nested",
    "parse_eps",
    "profile_name",
    "resolve",
]
