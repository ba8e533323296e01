"""Which runs a comparison rests on, and what they have left."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from rampart.errors import RampartError
from rampart.reports.checks import Note, differences, ledgers, named, unfinished
from rampart.reports.numbers import KEYS, numbers, ordered
from rampart.reports.repeating import command, trained_by
from rampart.settings import CompareSettings
from rampart.tracking.queries import find_runs, metric_history, read_arrays, read_table, run_tags, runs_by_id
from rampart.tracking.runs import ADVERSARIAL, PLACES, POINTS, class_names

T = TypeVar("T")

CURVES = [*KEYS, "seed", "run", "stage", "metric", "epoch", "value"]


class NothingToCompare(RampartError):
    """The tracking server has no finished evaluation or verification of the kind that was asked for; `notes` say what
    was left out."""

    def __init__(self, message: str, notes: list[Note]) -> None:
        super().__init__(message)
        self.notes = notes


@dataclass(frozen=True)
class Evidence:
    """What a comparison rests on; a row's `engine` is that of a verification, `native` for all else.

    Args:
        runs: one row a run (KEYS, seed, step, weights, command, trained, run_id, start_time, end_time, params.*,
            tags.*, metrics.*), also for those that trained the compared models.
        ledgers: of evaluations and verifications, by run.
        values: one row a number (KEYS, seed, step, metric, eps, value, run, and whether it is suspect: it comes from an
            attack that has failed a check).
        points: UMAP coordinates by arm.
        places: distances of the embeddings by arm.
        examples: adversarial examples by arm, as evaluations keep them.
        curves: of trainings (KEYS, seed, run, stage, metric, epoch, value).
        profile: whose runs they are.
        dataset: name and digest of all its images, however an arm splits those of training.
        notes: what was left out, and how runs differ.
    """

    runs: pd.DataFrame
    ledgers: dict[str, pd.DataFrame]
    values: pd.DataFrame
    points: dict[str, pd.DataFrame]
    places: dict[str, pd.DataFrame]
    examples: dict[str, dict[str, np.ndarray]]
    curves: pd.DataFrame
    classes: tuple[str, ...]
    profile: str
    dataset: str
    notes: list[Note]

    def of(self, *steps: str) -> pd.DataFrame:
        """The runs of these steps, in the order of the tables."""
        return self.runs[self.runs["step"].isin(steps)]

    @property
    def splits(self) -> list[str]:
        """How many images were for training, validation and test, and by which settings; of older exports unknown."""
        known = self.runs.get("tags.rampart.split", pd.Series(dtype=object)).dropna()
        return list(known.value_counts().index)

    def first(self, step: str) -> pd.DataFrame:
        """Of each arm the run of its first seed."""
        return self.of(step).drop_duplicates(["arm", "engine"])


def collect(experiment: str, settings: CompareSettings) -> Evidence:
    """The newest finished run of each step for every arm and seed, or the members of one study.

    Raises:
        NothingToCompare: there is no finished evaluation or verification. Contradiction: an image of a model was proved
            and broken, or a run's metrics are not those of its ledger.
    """
    notes: list[Note] = []
    members = _members(settings.study) if settings.study else None
    found = {
        step: find_runs(experiment, {"step": step, "profile": settings.profile})
        for step in ("evaluate", "verify", "embed")
    }
    runs = _one_dataset(_of_linf(_keyed(found, members), notes), notes)
    runs = newest_runs(runs, notes, said=members is None)
    of_study = {"study": settings.study} if settings.study else {}
    broken_off = find_runs(experiment, {"profile": settings.profile, **of_study}, status="!FINISHED")
    notes += unfinished(runs, broken_off)
    if runs.empty or not runs["step"].isin(["evaluate", "verify"]).any():
        raise _nothing(experiment, settings, notes)
    runs = ordered(runs)
    tables = ledgers(runs, notes)
    runs = runs[runs["run_id"].isin(tables) | (runs["step"] == "embed")]
    if not tables:
        raise _nothing(experiment, settings, notes)
    trained = _trained(experiment, runs)
    every = _with_commands(pd.concat([trained, runs], ignore_index=True))
    notes += differences(every)
    values = pd.concat([numbers(row) for _, row in runs.iterrows() if row["step"] != "embed"], ignore_index=True)
    first = runs.iloc[0]
    embedded, evaluated = (runs[runs["step"] == step].drop_duplicates("arm") for step in ("embed", "evaluate"))
    return Evidence(
        runs=every,
        ledgers=tables,
        values=values,
        points=_read(embedded, _points),
        places=_read(embedded, lambda run: read_table(run["run_id"], PLACES)),
        examples=_read(evaluated, lambda run: read_arrays(run["run_id"], ADVERSARIAL)),
        curves=_curves(trained),
        classes=_classes(str(first["tags.rampart.class_names"]), tables),
        profile=settings.profile,
        dataset=_data(first),
        notes=notes,
    )


def _classes(text: str, tables: Mapping[str, pd.DataFrame]) -> tuple[str, ...]:
    """Names of all classes that ledgers know; those that are not known are called by their number."""
    names = class_names(text)
    seen = [int(ledger[["label", "prediction"]].max().max()) for ledger in tables.values() if len(ledger)]
    count = 1 + max(seen, default=-1)
    return (*names, *map(str, range(len(names), count)))


def _read(runs: pd.DataFrame, read: Callable[[dict[Any, Any]], T | None]) -> dict[str, T]:
    """What each arm's run has of an artifact, by arm."""
    found = {run["arm"]: read(run) for run in runs.to_dict("records")}
    return {arm: artifact for arm, artifact in found.items() if artifact is not None}


def _points(run: dict[Any, Any]) -> pd.DataFrame | None:
    found = read_table(run["run_id"], POINTS)
    # Older versions have left them with the model alone.
    return read_table(run["model_run"], POINTS) if found is None and run["model_run"] else found


def _nothing(experiment: str, settings: CompareSettings, notes: list[Note]) -> NothingToCompare:
    where = f"study {settings.study}" if settings.study else f"experiment {experiment}"
    known = f" ({notes[0].text})" if notes else ""
    return NothingToCompare(
        f"nothing to compare: {where} has no finished evaluation of profile '{settings.profile}'{known}; "
        "run main, or train and evaluate, first",
        notes,
    )


def _of_linf(runs: pd.DataFrame, notes: list[Note]) -> pd.DataFrame:
    """Rates at radii of two norms do not belong into one table either: those of L∞ are kept."""
    other = runs.get("params.norm", pd.Series("linf", index=runs.index)).fillna("linf") != "linf"
    for step, count in runs.loc[other, "step"].value_counts().items():
        notes.append(Note(str(step), f"{count} run(s) in another norm than L∞ left out"))
    return runs[~other]


def _trained(experiment: str, runs: pd.DataFrame) -> pd.DataFrame:
    """The runs that trained the models, one an arm and seed, with their KEYS."""
    models = runs[runs["model_run"] != ""].drop_duplicates(["arm", "seed"])
    keys = models[[*KEYS, "seed", "digest", "model_run"]].assign(engine="native", step="train")
    return keys.merge(runs_by_id(experiment, models["model_run"]), left_on="model_run", right_on="run_id")


def _with_commands(runs: pd.DataFrame) -> pd.DataFrame:
    """How each is repeated, and of trainings what has a part in them."""
    steps = runs["step"].tolist()
    params = [{str(n).removeprefix("params."): value for n, value in run.items()} for run in runs.to_dict("records")]
    return runs.assign(
        command=[command(*known) for known in zip(steps, params, strict=True)],
        trained=[json.dumps(trained_by(p)) if step == "train" else "" for step, p in zip(steps, params, strict=True)],
    )


def _curves(trained: pd.DataFrame) -> pd.DataFrame:
    """Loss and validation metrics by epoch."""
    parts = [pd.DataFrame(columns=CURVES)]
    for _, run in trained.iterrows():
        names = [
            name.removeprefix("metrics.") for name in map(str, run.index[run.notna()]) if name.startswith("metrics.")
        ]
        history = metric_history(run["run_id"], [n for n in names if n.endswith("/loss") or n.startswith("val/")])
        split = history["metric"].str.split("/", n=1)
        found = {"stage": split.str[0], "metric": split.str[1], "epoch": history["step"], "value": history["value"]}
        parts.append(pd.DataFrame({**{key: run[key] for key in [*KEYS, "seed"]}, "run": run["run_id"], **found}))
    return pd.concat(parts[1:] or parts, ignore_index=True)


def _members(study: str) -> set[str]:
    run_tags(study)  # raises where there is no such run
    table = read_table(study, "members.parquet")
    if table is None:
        raise RampartError(f"run '{study}' is no study with finished arms: give the id of a run of main")
    return set(table["run"])


def _keyed(found: Mapping[str, pd.DataFrame], members: set[str] | None) -> pd.DataFrame:
    """The runs of all steps, newest first within each, with their KEYS, seed, step, digest and model."""
    parts = [runs.assign(step=step, engine=_engines(runs, step)) for step, runs in found.items()]
    runs = pd.concat([part for part in parts if len(part)] or parts[:1], ignore_index=True)
    if members is not None:
        runs = runs[runs["run_id"].isin(members)]
    tag = {name: runs.get(f"tags.rampart.{name}", pd.Series(index=runs.index, dtype=object)) for name in _TAGS}
    model = tag["model"].fillna("").astype(str)
    weights = tag["weights"].fillna(model).astype(str)  # runs of older versions know the name of their model alone
    # A model from a file, or one that was registered by hand, goes by its name; what training left on its way is not
    # the arm's model.
    known = tag["arm"].notna()
    checkpoint = known & model.str.endswith((".safetensors", ".npz"))
    stem = model.map(lambda uri: PurePath(uri).stem)
    shared = stem.isin(tag["arm"].dropna()) | (weights.groupby(stem).transform("nunique") > 1)
    name = stem.where(~shared, stem + " (" + weights.str[:8] + ")")
    arm = tag["arm"].astype(object).where(known, name)
    return runs.assign(
        arm=arm.where(~checkpoint, arm + " (checkpoint)"),
        seed=tag["seed"].fillna(""),
        method=tag["method"].astype(object).where(known & ~checkpoint, "other"),
        augment=tag["augment"].fillna("") == "True",
        contrastive=tag["contrastive"].fillna("none"),
        digest=tag["dataset_digest"],
        model_run=tag["model_run"].fillna(""),
        weights=weights,
    )


def newest_runs(runs: pd.DataFrame, notes: list[Note], said: bool) -> pd.DataFrame:
    """One run a step, arm and seed, all of one model: that of the newest evaluation of the arm and seed, or of their
    newest run where they have none."""
    one = ["arm", "seed"]
    order = runs.assign(late=runs["step"] != "evaluate").sort_values(["late", "start_time"], ascending=[True, False])
    model = order.drop_duplicates(one).set_index(one)["weights"]
    same = runs["weights"].to_numpy() == model.reindex(pd.MultiIndex.from_frame(runs[one])).to_numpy()
    strangers = [named(run) for run in runs[~same].drop_duplicates(["step", *one, "engine"]).to_dict("records")]
    if strangers:
        why = "left out, for they looked at other models than the newest evaluation of their arm and seed"
        notes.append(Note("", f"{why}: {', '.join(strangers)}"))
    kept = runs[same].drop_duplicates(["step", *one, "engine"])
    for step, part in runs[same].groupby("step", sort=False):
        older = len(part) - int((kept["step"] == step).sum())
        if said and older:
            notes.append(Note(str(step), f"{older} older run(s) of the same arm and seed left out"))
    return kept


def _engines(runs: pd.DataFrame, step: str) -> pd.Series:
    """What verified; another tool goes by the file with its results."""
    native = pd.Series("native", index=runs.index)
    return runs.get("params.engine", native).fillna("native") if step == "verify" else native


_TAGS = ("arm", "seed", "method", "augment", "contrastive", "model", "model_run", "weights", "dataset_digest")


def _one_dataset(runs: pd.DataFrame, notes: list[Note]) -> pd.DataFrame:
    """Rates on different images do not belong into one table: kept is the dataset of the newest run with rates, of a
    model that was trained here where there is one, lest a look at other images or at a released model hides a study."""
    if runs.empty:
        return runs
    order = runs.assign(rates=runs["step"] != "embed", ours=runs["model_run"] != "")
    newest = order.sort_values(["rates", "ours", "start_time"], ascending=False).iloc[0]
    same = runs["digest"] == newest["digest"]
    if not same.all():
        notes.append(Note("", f"{int((~same).sum())} run(s) on another dataset than {_data(newest)} left out"))
    return runs[same]


def _data(run: pd.Series) -> str:
    """The run's dataset, by name and digest."""
    return f"{run['tags.rampart.dataset']} (digest {run['digest']})"
