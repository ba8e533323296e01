"""What makes two executions of a step the same: settings, data, the model that goes in, and the code that runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from rampart.settings import MACHINE, Settings
from rampart.verification.answers import EXAMPLE

# They do not change what a step computes. Images may lie anywhere: their digest tells them; ε is known in pixels.
IRRELEVANT = MACHINE | {"dataset", "eps_space"}
# The value by which a setting that came later leaves everything as it was before: studies finished then stay finished.
IDLE = {"dropout": 0.0}
_CORE = ("data", "models", "attacks", "bounds", "kernels.py")
CODE = {
    "train": (*_CORE, "losses", "training"),
    "evaluate": (*_CORE, "verification", "evaluation", "ledger.py"),
    "verify": (*_CORE, "verification", "ledger.py"),
    "embed": ("data", "models", "evaluation"),
}


def identity(step: str, settings: Settings, digest: str, model: str = "") -> str:
    """Hashes of what the step does (its settings, the dataset's digest, the identity of its model) and, behind a point,
    of the code behind it; before both, which part of it that is."""
    relevant = asked(settings, IRRELEVANT | {"model"})
    answers = Path(getattr(settings, "engine", ""))
    if answers.is_file():  # of another tool, and its counterexamples
        examples = sorted(file for file in answers.parent.glob(f"*{EXAMPLE}*") if file.is_file())
        found = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in (answers, *examples)}
        relevant["engine"] = [relevant["engine"], found]
    parts = "\n".join([step, json.dumps(relevant, sort_keys=True), digest, model])
    part = getattr(settings, "part", "")
    return f"{part} {hashlib.sha256(parts.encode()).hexdigest()[:32]}.{code_version(step)}".lstrip()


def asked(settings: Settings, without: Collection[str]) -> dict[str, Any]:
    """The settings by name, without the ones that are named and those that came later and change nothing."""
    left = {name: value for name, value in asdict(settings).items() if name not in without}
    return {name: value for name, value in left.items() if name not in IDLE or value != IDLE[name]}


def what(key: str) -> str:
    """Of an identity, what the step does, whatever the code."""
    return key.partition(".")[0]


@lru_cache
def code_version(step: str) -> str:
    """A hash of the source files that the step runs; reports can change without training anything again."""
    top = Path(__file__).parents[1]
    sha = hashlib.sha256()
    for part in CODE[step]:
        for file in sorted((top / part).rglob("*.py")) if (top / part).is_dir() else [top / part]:
            sha.update(str(file.relative_to(top)).encode() + file.read_bytes())
    return sha.hexdigest()[:16]


def code_versions() -> dict[str, str]:
    """Of all steps."""
    return {step: code_version(step) for step in CODE}
