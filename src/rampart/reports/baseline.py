"""Another source's published figures, to be put beside ours."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pandas as pd

from rampart.arms import Arm
from rampart.errors import SettingsError, require, unknown
from rampart.ledger import PROVED, VERDICTS, eps_key
from rampart.reports.checks import Note
from rampart.settings import PIXELS, parse_eps
from rampart.training.recipe import MethodName

ENGINE = "published"
METHODS: tuple[MethodName, ...] = ("normal", "adversarial", "certified")
ARMS = {
    f"{'augmented' if augment else 'plain'}/{method}{'-contrastive' if contrastive == 'double' else ''}": Arm(
        method, augment, contrastive
    )
    for augment in (True, False)
    for method in METHODS
    for contrastive in ("none", "double")
}


def read_baseline(path: str) -> tuple[pd.DataFrame, list[Note]]:
    """(its numbers in the columns of `Evidence.values`, what a reader has to know) of a JSON file.

    It holds `models`, by arm (augmented/normal-contrastive, plain/certified, …), each with any of test_accuracy and
    pgd_asr (by ε) in percent and abcrown_<N>_images (images by verdict at ε 2/255); and eps_space, `pixel` or
    `normalized` (the default: that of the study's file).

    Raises:
        SettingsError: there is no such file, or it holds something else.
    """
    try:
        read = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(f"baseline '{path}' cannot be read: {' '.join(str(error).split())}") from error
    require(
        isinstance(read, dict) and isinstance(read.get("models"), dict),
        f"baseline '{path}' must be a JSON object with 'models' by arm, such as 'augmented/normal-contrastive'",
    )
    space = read.get("eps_space", "normalized")
    require(str(space) in PIXELS, unknown(f"eps_space in baseline {path}", space, PIXELS))
    rows: list[dict[str, Any]] = []
    for name, figures in read["models"].items():
        require(name in ARMS, unknown(f"arm in baseline {path}", name, ARMS))
        arm = ARMS[name]
        key = {"augment": arm.augment, "method": arm.method, "contrastive": arm.contrastive, "arm": arm.name}
        try:
            rows += [{**key, **row} for row in _numbers(figures, space)]
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            raise SettingsError(f"baseline '{path}', arm '{name}': {error} (format: CONTRIBUTING.md)") from error
    require(bool(rows), f"baseline '{path}' has no figures: see its format in CONTRIBUTING.md")
    frame = pd.DataFrame(rows).astype({"eps": float, "value": float})
    said = "normalised to [-1, 1], of which half is meant in pixels" if space == "normalized" else "in pixels"
    return frame.assign(seed="", run="", suspect=False), [Note("", f"{ENGINE}: {Path(path).name}, its ε {said}")]


# Other ways to train on bounds: an arm of theirs is what a published `certified` one is to be compared with.
ON_BOUNDS: tuple[MethodName, ...] = ("ibp", "sabr", "mtl-ibp")


def stands_in(methods: Collection[str]) -> str | None:
    """Where none of the methods is `certified` and one is another way to train on bounds, that one."""
    found = {*methods}
    instead = [method for method in ON_BOUNDS if method in found]
    return instead[0] if "certified" not in found and len(instead) == 1 else None


def put_beside(published: pd.DataFrame, methods: Collection[str]) -> tuple[pd.DataFrame, list[Note]]:
    """The published numbers for arms of these methods, those of `certified` beside what stands in for it; and what a
    reader has to know of that."""
    instead = stands_in(methods)
    certified = published["method"] == "certified"
    if instead is None or not certified.any():
        return published, []
    arms = published["arm"].mask(certified, published["arm"].str.replace("certified", instead, n=1))
    note = Note("", f"{ENGINE}: the figures of its certified arms stand beside those of {instead}")
    return published.assign(method=published["method"].mask(certified, instead), arm=arms), [note]


def _numbers(figures: dict[str, Any], space: str) -> list[dict[str, Any]]:
    rows = []

    def row(metric: str, value: float, eps: float = float("nan"), step: str = "published") -> None:
        engine = ENGINE if step == "verify" else "native"
        rows.append({"engine": engine, "step": step, "metric": metric, "eps": eps, "value": value})

    accuracy = figures.get("test_accuracy")
    if accuracy is not None:
        row("accuracy", _share(accuracy))
    for text, percent in figures.get("pgd_asr", {}).items():
        eps = float(eps_key(parse_eps("pgd_asr", text, space)))  # as our metrics' names have it
        row("asr", _share(percent), eps)
        if accuracy is not None:
            row("robust_accuracy", _share(accuracy) * (1 - _share(percent)), eps)
    for name, counts in figures.items():
        if not re.fullmatch(r"abcrown_\d+_images", name):
            continue
        if rows and any(row["step"] == "verify" for row in rows):
            raise ValueError("more than one set of verdicts")
        eps = float(eps_key(parse_eps(name, "2/255", space)))
        found = {verdict.replace("_", "-"): int(count) for verdict, count in counts.items()}
        if not found.keys() <= set(VERDICTS):
            raise ValueError(f"{name} has verdicts other than {', '.join(VERDICTS)}")
        total = sum(found.values())
        for verdict in VERDICTS:
            row(verdict, found.get(verdict, 0), eps, "verify")
        row("images", total, eps, "verify")
        row("misclassified", 0, eps, "verify")
        row(
            "certified_accuracy",
            sum(found.get(v, 0) for v in PROVED) / max(total, 1),
            eps,
            "verify",
        )
    return rows


def _share(percent: Any) -> float:
    value = float(percent) / 100
    if not 0 <= value <= 1:
        raise ValueError(f"{percent} is no percentage")
    return value
