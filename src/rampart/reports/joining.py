"""Evidence of several tracking stores as that of one comparison."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pandas as pd

from rampart.errors import require
from rampart.reports.checks import Note, consistent, trained_otherwise
from rampart.reports.evidence import Evidence, NothingToCompare, collect, newest_runs
from rampart.reports.numbers import ordered
from rampart.reports.record import read
from rampart.settings import ARM_STEPS, CompareSettings

T = TypeVar("T")


def gathered(experiment: str, settings: CompareSettings) -> tuple[Evidence, pd.DataFrame]:
    """What the tracking server has, together with what `export` has kept in folders (or those alone, where it has
    nothing of the profile), and the published numbers that were kept there; of runs of one step, arm and seed the
    newest counts, as within one store.

    Raises:
        NothingToCompare: there is nothing anywhere, or not of the study that was asked for. SettingsError: there is no
            evidence in a folder, or it is of another profile or of other images. Contradiction: a number is not what
            its ledger gives, or an image of a model was proved and broken.
    """
    kept = {folder: read(Path(folder)) for folder in settings.evidence}
    for folder, material in kept.items():
        theirs = material.evidence.profile
        whose = f"the evidence in '{folder}' is of profile '{theirs}', not of '{settings.profile}'"
        require(theirs == settings.profile, f"{whose}: give profile={theirs}")
    others = {folder: material.evidence for folder, material in kept.items()}
    try:
        evidence = collect(experiment, settings)
    except NothingToCompare as error:
        if settings.study or not others:
            raise
        evidence = others.pop(next(iter(others)))
        where = f"all this is from {', '.join(settings.evidence)}"
        whole = Note("", f"{where}: this store has nothing of profile '{settings.profile}' to compare")
        evidence.notes.extend([whole, *error.notes, *trained_otherwise(evidence.runs)])
    for folder, other in others.items():
        evidence = _joined(evidence, other, folder)
    published = [material.published for material in kept.values() if len(material.published)]
    return evidence, pd.concat(published).drop_duplicates() if published else evidence.values.head(0)


def _joined(evidence: Evidence, other: Evidence, folder: str) -> Evidence:
    require(
        other.dataset == evidence.dataset,
        f"the evidence in '{folder}' is of {other.dataset}, not of {evidence.dataset}: compare them by themselves",
    )
    notes = list(evidence.notes)
    more = other.runs[~other.runs["run_id"].isin(evidence.runs["run_id"])]
    runs = pd.concat([evidence.runs, more], ignore_index=True).sort_values("start_time", ascending=False)
    trained, *others = (runs[runs["step"] == step] for step in ARM_STEPS)
    steps = newest_runs(pd.concat(others, ignore_index=True), notes, said=True)
    trained = trained[trained["run_id"].isin(steps["model_run"])]
    runs = pd.concat([ordered(trained), ordered(steps)], ignore_index=True)
    kept = set(runs["run_id"])
    ledgers = {run: ledger for run, ledger in (other.ledgers | evidence.ledgers).items() if run in kept}
    consistent(steps, ledgers)
    notes += [note for note in trained_otherwise(runs) if note not in notes]
    joined = replace(evidence, runs=runs, ledgers=ledgers, notes=notes)

    def first_in(found: pd.DataFrame, step: str) -> set[str]:
        """The arms whose run of the first seed is among these: points, places and examples are of that seed."""
        first = joined.first(step)
        return set(first.loc[first["run_id"].isin(found["run_id"]), "arm"])

    embedded = first_in(evidence.runs, "embed")
    values = pd.concat([evidence.values, other.values[other.values["run"].isin(more["run_id"])]], ignore_index=True)
    return replace(
        joined,
        values=ordered(values[values["run"].isin(kept)]),
        curves=evidence.curves[evidence.curves["run"].isin(kept)],
        points=_of(embedded, evidence.points),
        classes=max(evidence.classes, other.classes, key=len),
        places=_of(embedded, evidence.places) | _of(first_in(more, "embed"), other.places),
        examples=_of(first_in(evidence.runs, "evaluate"), evidence.examples),
    )


def _of(arms: set[str], found: dict[str, T]) -> dict[str, T]:
    return {arm: one for arm, one in found.items() if arm in arms}
