"""Whether runs belong into one table, and whether what they say of themselves is so."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import pandas as pd

from rampart.errors import Contradiction
from rampart.ledger import attack_rates, contradiction, corruption_rates, verdict_counts
from rampart.reports.repeating import UNKNOWN, alike, way
from rampart.tracking.queries import read_evidence
from rampart.tracking.runs import LEDGER

# Runs that a note names.
SHOWN = 6
# Settings that two evaluations, or two verifications, have to share for their rates to be of one kind.
SHARED = {
    "evaluate": (
        *("eps_space", "eps_pixel", "attack", "norm", "steps", "rel_step", "step_schedule", "restarts", "loss"),
        *("certify", "certify_images", "certify_eps_pixel", "certify_timeout", "trust_images", "corruptions"),
    ),
    "verify": (
        *("eps_space", "eps_pixel", "images", "selection", "survive_eps_pixel", "selection_seed"),
        *("attack_first", "timeout", "complete", "branching", "max_domains", "radius_pixel"),
    ),
}


class Note(NamedTuple):
    """What a reader of a table has to know; `step` is that of the table's runs, empty for all tables."""

    step: str
    text: str


def differences(runs: pd.DataFrame) -> list[Note]:
    """In what the compared runs differ that makes their numbers hard to compare."""
    notes = []
    for step, names in SHARED.items():
        part = runs[(runs["step"] == step) & (runs["engine"] == "native")]
        for name in names:
            if f"params.{name}" in part:
                notes += _kinds(part, part[f"params.{name}"].map(alike), name, step)
    notes += _kinds(runs, runs["tags.rampart.split"], "split (train/val/test by val_fraction, split_seed)", "")
    return notes + trained_otherwise(runs)


def trained_otherwise(runs: pd.DataFrame) -> list[Note]:
    """The seeds of an arm that were not trained as most of its seeds were: their mean is of different trainings."""
    notes = []
    known = runs[(runs["step"] == "train") & (runs["command"] != UNKNOWN)]
    for _, part in known.groupby("arm", sort=False):
        ways = part["command"].map(way)
        usual, *others = ways.value_counts().index
        for other in others:
            who = ", ".join(named(run) for run in part[ways == other].to_dict("records")[:SHOWN])
            has, most = (sorted(set(one) - set(rest)) for one, rest in ((other, usual), (usual, other)))
            what = f"{', '.join(has) or 'no such setting'} instead of {', '.join(most) or 'the defaults'}"
            notes.append(Note("", f"seeds of one arm were trained differently: {who} with {what}"))
    return notes


def _kinds(runs: pd.DataFrame, values: pd.Series, name: str, step: str) -> list[Note]:
    """A note where the values are not all the same: who has which, the rarer ones by run."""
    counts = values.dropna().value_counts()
    if len(counts) < 2:
        return []
    rarer = []
    for value in counts.index[1:]:
        who = [named(run) for run in runs[values == value].to_dict("records")]
        more = f" and {len(who) - SHOWN} more" if len(who) > SHOWN else ""
        rarer.append(f"{value} in {', '.join(who[:SHOWN])}{more}")
    return [Note(step, f"runs differ in {name}: {counts.index[0]} in most, {'; '.join(rarer)}")]


def unfinished(runs: pd.DataFrame, others: pd.DataFrame) -> list[Note]:
    """Runs of the compared arms that have not finished, where no later one has; `others` are all that have not."""
    notes = []
    keys = ["arm", "seed", "step", "engine"]
    newest = {
        size: runs.groupby(keys[:size])["start_time"].max().to_dict() if len(runs) else {} for size in (2, len(keys))
    }
    for run in others.to_dict("records"):
        step, arm, seed = (str(run.get(f"tags.rampart.{name}")) for name in ("step", "arm", "seed"))
        engine = str(run.get("params.engine")) if step == "verify" else "native"
        if arm in ("None", "nan") or step not in ("train", *SHARED, "embed"):
            continue
        # A training is repaired by whatever was done with its arm later.
        known = newest[2].get((arm, seed)) if step == "train" else newest[4].get((arm, seed, step, engine))
        if known is not None and known > run["start_time"]:
            continue
        left = "left out" if known is None else "the finished one before it is shown"
        notes.append(Note("", f"{step} {arm} s{seed}: run {run['run_id']} is {run['status']}: {left}"))
    return notes


def ledgers(runs: pd.DataFrame, notes: list[Note]) -> dict[str, pd.DataFrame]:
    """The ledgers of evaluations and verifications by run. Runs that lack one, or a part of it, are not among them.

    Raises:
        Contradiction: a ledger is not the one that its run has logged, or does not give its run's metrics, or two
            ledgers of one model say that an image was proved and broken.
    """
    found = {}
    for _, run in runs[runs["step"].isin(["evaluate", "verify"])].iterrows():
        kept = read_evidence(run["run_id"])
        missing = "it has no ledger" if kept is None else _incomplete(run, kept[0])
        if kept is None or missing:
            notes.append(
                Note(str(run["step"]), f"{named(run.to_dict())} is left out, for it is half finished: {missing}")
            )
            continue
        _agree(run, *kept)
        found[str(run["run_id"])] = kept[0]
    consistent(runs, found)
    return found


def consistent(runs: pd.DataFrame, found: Mapping[str, pd.DataFrame]) -> None:
    """Raises Contradiction where two of the ledgers (by run) of one model say that an image was proved and broken."""
    for (arm, _), part in runs.groupby(["arm", "weights"], sort=False):
        wrong = contradiction({run: found[run] for run in part["run_id"] if run in found})
        if wrong:
            raise Contradiction(f"{arm}: {wrong}: the bounds or the attack are wrong, nothing of this can be trusted")


def _incomplete(run: pd.Series, ledger: pd.DataFrame) -> str:
    """What a finished evaluation's ledger lacks; empty where nothing."""
    expected = str(run["tags.rampart.split"]).split(" ")[0].split("/")[-1]
    if run["step"] == "evaluate" and expected.isdigit() and len(ledger) != int(expected):
        return f"its ledger has {len(ledger)} of {expected} images"
    return ""


def _agree(run: pd.Series, ledger: pd.DataFrame, digest: str) -> None:
    logged = run.get("tags.rampart.ledger_digest")
    if isinstance(logged, str) and logged != digest:
        name = named(run.to_dict())
        raise Contradiction(f"{name}: {LEDGER} is not the ledger that the run has logged: it was changed or swapped")
    known = run[[str(name).startswith("metrics.") for name in run.index]].dropna()
    metrics = {str(name).removeprefix("metrics."): float(value) for name, value in known.items()}
    metrics_agree(run.to_dict(), metrics, given_by(ledger, run["step"]))


def metrics_agree(run: Mapping[Any, Any], metrics: Mapping[str, float], said: Mapping[str, float]) -> None:
    """Raises Contradiction where one of the run's metrics is not what its ledger gives (`given_by`)."""
    kinds = {"verdicts"} if run["step"] == "verify" else _RATES
    for metric, value in metrics.items():
        if metric.partition("/")[0] not in kinds:
            continue
        if metric not in said or not math.isclose(value, said[metric], rel_tol=1e-9, abs_tol=1e-9):
            truth = f"its ledger says {said[metric]:.6g}" if metric in said else "its ledger knows nothing of that"
            raise Contradiction(f"{named(run)}: metric {metric} is {value:.6g}, but {truth}: one of them was changed")


def given_by(ledger: pd.DataFrame, step: str) -> dict[str, float]:
    """The metrics that a run of that step has logged of its ledger."""
    return verdict_counts(ledger) if step == "verify" else {**attack_rates(ledger), **corruption_rates(ledger)}


_RATES = {
    *("accuracy", "asr", "afr", "robust_accuracy", "certified_accuracy", "attacked_accuracy"),
    *("corrupted", "corrupted_accuracy"),
}


def named(run: Mapping[Any, Any]) -> str:
    """What notes and errors call a run."""
    return f"{run['step']} {run['arm']} s{run['seed']} (run {run['run_id']})"
