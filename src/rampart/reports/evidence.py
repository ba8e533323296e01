"""Which runs a comparison rests on, and their numbers as one tidy table."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import PurePath
from typing import get_args

import pandas as pd

from rampart.errors import Contradiction, RampartError
from rampart.ledger import VERDICTS, contradiction
from rampart.settings import CompareSettings
from rampart.tracking.queries import find_runs, read_table, run_tags
from rampart.training.recipe import MethodName

log = logging.getLogger(__name__)

KEYS = ["augment", "method", "contrastive", "arm", "engine"]
METHOD_ORDER = get_args(MethodName)
CONTRASTIVE_ORDER = ["none", "single", "double"]


@dataclass(frozen=True)
class Evidence:
    """What a comparison rests on; a row's `engine` is that of a verification, `native` for all else.

    Args:
        values: one row a number (KEYS, seed, step, metric, eps, value, run, and whether it is suspect: it comes from an
            attack that has failed a check).
        radii: one row an image whose radius was looked for (KEYS, run, radius; NaN where it is misclassified).
        points: UMAP coordinates by arm.
        dataset: name, digest and split.
        notes: what was left out.
    """

    values: pd.DataFrame
    radii: pd.DataFrame
    points: dict[str, pd.DataFrame]
    classes: tuple[str, ...]
    dataset: str
    notes: list[str]


def collect(experiment: str, settings: CompareSettings) -> Evidence:
    """The newest finished run of each step for every arm and seed, or the members of one study.

    Raises:
        RampartError: there is no finished evaluation or verification to compare. Contradiction: an image of a model was
            proved and broken.
    """
    notes: list[str] = []
    parts = []
    members = _members(settings.study) if settings.study else None
    for step in ("evaluate", "verify", "embed"):
        found = _of_linf(find_runs(experiment, {"step": step, "profile": settings.profile}), step, notes)
        parts.append(_newest(found, members, step, notes))
    runs = pd.concat([part for part in parts if len(part)] or [pd.DataFrame()], ignore_index=True)
    if runs.empty or not runs["step"].isin(["evaluate", "verify"]).any():
        where = f"study {settings.study}" if settings.study else f"experiment {experiment}"
        raise RampartError(
            f"nothing to compare: {where} has no finished evaluation of profile '{settings.profile}'; "
            "run main, or train and evaluate, first"
        )
    runs = _one_dataset(runs, notes)
    _same_attack(runs, notes)
    ledgers = _ledgers(runs)
    values = pd.concat([_numbers(row) for _, row in runs.iterrows() if row["step"] != "embed"], ignore_index=True)
    points, classes = _points(runs[runs["step"] == "embed"])
    first = runs.iloc[0]
    dataset = f"{first['tags.rampart.dataset']} (digest {first['digest']}, split {first['tags.rampart.split']})"
    return Evidence(values, _found_radii(runs, ledgers), points, classes, dataset, notes)


def _of_linf(found: pd.DataFrame, step: str, notes: list[str]) -> pd.DataFrame:
    """Rates at radii of two norms do not belong into one table either: those of L∞ are kept."""
    other = found.get("params.norm", pd.Series("linf", index=found.index)).fillna("linf") != "linf"
    if other.any():
        notes.append(f"{step}: {int(other.sum())} run(s) in another norm than L∞ left out")
    return found[~other]


def _same_attack(runs: pd.DataFrame, notes: list[str]) -> None:
    """Says so where arms were attacked in different ways, which makes their rates hard to compare."""
    evaluations = runs[runs["step"] == "evaluate"]
    for name in ("attack", "steps", "restarts", "loss"):
        kinds = sorted(evaluations.get(f"params.{name}", pd.Series(dtype=str)).dropna().unique())
        if len(kinds) > 1:
            notes.append(f"the evaluations differ in {name}: {', '.join(kinds)}")


def _ledgers(runs: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The ledgers of evaluations and verifications by run, checked against each other model by model."""
    runs = runs[runs["step"] != "embed"]
    # Runs of older versions know the name of their model alone.
    model = runs.get("tags.rampart.weights", runs["tags.rampart.model"]).fillna(runs["tags.rampart.model"])
    found = {run: table for run in runs["run_id"] if (table := read_table(run, "ledger.parquet")) is not None}
    for (arm, _), part in runs.groupby(["arm", model], sort=False):
        wrong = contradiction({run: found[run] for run in part["run_id"] if run in found})
        if wrong:
            raise Contradiction(f"{arm}: {wrong}: the bounds or the attack are wrong, nothing of this can be trusted")
    return found


def _found_radii(runs: pd.DataFrame, ledgers: dict[str, pd.DataFrame]) -> pd.DataFrame:
    parts = [pd.DataFrame(columns=[*KEYS, "run", "radius"])]
    for _, run in _ordered(runs).iterrows():
        ledger = ledgers.get(run["run_id"])
        if ledger is not None and "radius" in ledger and ledger["radius"].notna().any():
            keys = {key: run[key] for key in KEYS}
            parts.append(pd.DataFrame({"radius": ledger["radius"].astype(float)}).assign(**keys, run=run["run_id"]))
    return pd.concat(parts[1:] or parts, ignore_index=True)


def _members(study: str) -> set[str]:
    run_tags(study)  # raises where there is no such run
    table = read_table(study, "members.parquet")
    if table is None:
        raise RampartError(f"run '{study}' is no study with finished arms: give the id of a run of main")
    return set(table["run"])


def _newest(found: pd.DataFrame, members: set[str] | None, step: str, notes: list[str]) -> pd.DataFrame:
    """One run an arm and seed, with its KEYS; `found` is newest first."""
    if members is not None and len(found):
        found = found[found["run_id"].isin(members)]
    if found.empty:
        return pd.DataFrame()
    tag = {name: found.get(f"tags.rampart.{name}", pd.Series(index=found.index, dtype=object)) for name in _TAGS}
    # A model from a file has no arm: it goes by its file's name.
    file = tag["model"].fillna("").map(lambda uri: PurePath(uri).stem)
    found = found.assign(
        step=step,
        arm=tag["arm"].fillna(file),
        seed=tag["seed"].fillna(""),
        method=tag["method"].fillna("other"),
        augment=tag["augment"].fillna("") == "True",
        contrastive=tag["contrastive"].fillna("none"),
        digest=tag["dataset_digest"],
        engine=_engines(found) if step == "verify" else "native",
    )
    kept = found.drop_duplicates(["arm", "seed", "engine"])
    if members is None and len(kept) < len(found):
        notes.append(f"{step}: {len(found) - len(kept)} older run(s) of the same arm and seed left out")
    return kept


def _engines(found: pd.DataFrame) -> pd.Series:
    """What verified; another tool goes by the file with its results."""
    return found.get("params.engine", pd.Series("native", index=found.index)).fillna("native")


_TAGS = ("arm", "seed", "method", "augment", "contrastive", "model", "dataset_digest")


def _one_dataset(runs: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    """Rates on different images do not belong into one table: the newest run's dataset is kept."""
    digest = runs.sort_values("start_time", ascending=False)["digest"].iloc[0]
    others = runs[runs["digest"] != digest]
    if len(others):
        notes.append(f"{len(others)} run(s) on another dataset than {digest} left out")
    return runs[runs["digest"] == digest]


def _numbers(run: pd.Series) -> pd.DataFrame:
    """The run's metrics in long form; eps is NaN where a metric has none."""
    rows = []
    suspect = str(run.get("tags.rampart.trust", "")).startswith("suspect")
    for column, value in run.items():
        name = str(column)
        if not name.startswith("metrics.") or pd.isna(value):
            continue
        metric, _, rest = name.removeprefix("metrics.").partition("/")
        eps = float("nan")
        if metric == "verdicts":
            metric = rest
        elif metric in _NAMED:
            metric = name.removeprefix("metrics.")
        elif metric in _METRICS and rest:
            eps = float(rest)
        if metric.partition("/")[0] in _METRICS:
            rows.append({**{key: run[key] for key in (*KEYS, "seed", "step")}, "metric": metric, "eps": eps})
            rows[-1] |= {"value": float(value), "run": run["run_id"], "suspect": metric in _ATTACKED and suspect}
    if run["step"] == "verify":
        for row in rows:
            row["eps"] = _verified_eps(run)
    return pd.DataFrame(rows)


# Metrics that an attack has a part in, those with a name behind the stroke instead of ε, and all that are compared.
_ATTACKED = {"asr", "afr", "robust_accuracy", "attacked_accuracy"}
_NAMED = {"trust", "corrupted"}
_METRICS = {
    *("accuracy", "certified_accuracy", "corrupted_accuracy", *_ATTACKED, *_NAMED),
    *(*VERDICTS, "misclassified", "images"),
}


def _verified_eps(run: pd.Series) -> float:
    from rampart.settings import parse_eps

    return parse_eps("eps_pixel", run["params.eps_pixel"], "pixel")


def _points(runs: pd.DataFrame) -> tuple[dict[str, pd.DataFrame], tuple[str, ...]]:
    """UMAP coordinates of each arm's first seed, from the run of its model."""
    points: dict[str, pd.DataFrame] = {}
    classes: tuple[str, ...] = ()
    for _, run in _ordered(runs).iterrows() if len(runs) else []:
        if run["arm"] in points:
            continue
        table = read_table(run.get("tags.rampart.model_run") or run["run_id"], "umap.parquet")
        if table is not None:
            points[run["arm"]] = table
            classes = tuple(str(run["tags.rampart.class_names"]).split(","))
    return points, classes


def _ordered(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows in the order of the study's tables: augmentation, method, contrastive, seed."""

    def rank(column: pd.Series) -> pd.Series:
        order = {"method": METHOD_ORDER, "contrastive": CONTRASTIVE_ORDER}.get(str(column.name))
        return column.map(lambda v: order.index(v) if v in order else len(order)) if order else column.astype(str)

    return frame.sort_values([*KEYS, *(c for c in ("seed", "eps") if c in frame)], key=rank)


def summarise(values: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation (over seeds, n - 1) of each number, with the runs that it came from."""
    grouped = values.groupby([*KEYS, "step", "metric", "eps"], dropna=False, sort=False)
    summary = grouped.agg(
        mean=("value", "mean"),
        std=("value", "std"),
        seeds=("value", "size"),
        suspect=("suspect", "any"),
        runs=("run", lambda r: " ".join(r)),
    ).reset_index()
    return _ordered(summary)
