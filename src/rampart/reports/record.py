"""Evidence in plain files: whoever has them can compute the tables again, without a tracking server or a training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from rampart.errors import Contradiction, RampartError, SettingsError
from rampart.ledger import eps_key
from rampart.reports.checks import consistent, given_by, metrics_agree, named
from rampart.reports.evidence import CURVES, Evidence
from rampart.reports.numbers import KEYS, logged_name
from rampart.reports.sections import Material, material_of

RUNS, VALUES, PUBLISHED, ABOUT = "runs.csv", "values.csv", "published.csv", "about.json"
LEDGERS, PLACES = "ledgers", "places"
# What tables need of a run, beside how fast it trained; and who reads the files, to find it again.
COLUMNS = (
    *(*KEYS, "seed", "step", "run_id", "model_run", "weights", "command", "trained", "start_time", "end_time"),
    *("params.selection", "tags.rampart.git.commit", "tags.rampart.machine", "tags.rampart.version.torch"),
    *("tags.rampart.split", "tags.rampart.paused", "tags.rampart.earlier"),
)
SPEED = "/images_per_second"
# As a shell's word, quoted or not.
FOLDER = r"'dataset=folder:[^']*'|dataset=folder:\S*"
# Of a ledger, what is computed here already and takes most of its room.
LEFT_OUT = "withstood/"
# What a ledger gives, and tables do not.
SECONDS = "verdicts/seconds"
# To how many steps of 1 single-precision numbers, which are distances, are kept.
STEPS = 2**12
TEXTS = ("arm", "engine", "seed", "run", "run_id", "model_run", "weights", "command", "trained", "params.selection")
TYPES = dict.fromkeys(TEXTS, str) | {"augment": bool, "suspect": bool, "eps": float, "value": float}


def keep(material: Material, folder: Path) -> None:
    """Writes runs.csv, values.csv, published.csv, about.json (profile, dataset and classes), ledgers/<run>.parquet
    (less what images have withstood of corruptions) and places/<arm>.parquet (the distances of embeddings) into
    `folder`, instead of what an earlier `keep` has left there. Where the images lay on this machine is not told.

    Raises:
        RampartError: it cannot be written there.
    """
    evidence = material.evidence
    runs = evidence.runs
    # The server gives columns in an order of its own.
    speeds = sorted(name for name in map(str, runs.columns) if name.endswith(SPEED))
    runs = runs[[*(name for name in COLUMNS if name in runs.columns), *speeds]].dropna(axis=1, how="all")
    hidden = runs["command"].str.replace(FOLDER, "dataset=folder:PATH", regex=True)
    about = {"profile": evidence.profile, "dataset": evidence.dataset, "classes": evidence.classes}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        runs.assign(command=hidden).to_csv(folder / RUNS, index=False)
        evidence.values.to_csv(folder / VALUES, index=False)
        material.published.to_csv(folder / PUBLISHED, index=False)
        (folder / ABOUT).write_text(json.dumps(about) + "\n", encoding="utf-8")
        _keep_tables(evidence.ledgers, folder / LEDGERS)
        _keep_tables(evidence.places, folder / PLACES)
    except OSError as error:
        raise RampartError(f"evidence cannot be written to {folder} ({error.strerror}): make it writable") from error


def _keep_tables(tables: Mapping[str, pd.DataFrame], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob("*.parquet"):
        if file.stem not in tables:
            file.unlink()
    for name, table in tables.items():
        columns = [column for column in table.columns if not str(column).startswith(LEFT_OUT)]
        small = _small(table[columns])
        small.to_parquet(folder / f"{name}.parquet", index=False, compression="zstd", **_packed(small))


def _packed(table: pd.DataFrame) -> dict[str, Any]:
    """How columns are written that hardly ever hold a value twice; as others are, they take three times the room."""
    rough = dict.fromkeys(table.select_dtypes("float32"), "BYTE_STREAM_SPLIT")
    encoding = {"image": "DELTA_BINARY_PACKED"} | rough
    others = [name for name in table if name not in encoding]
    return {"column_encoding": encoding, "use_dictionary": others, "write_statistics": False}


def _small(table: pd.DataFrame) -> pd.DataFrame:
    whole, rough = (table.select_dtypes(kind).columns for kind in ("integer", "float32"))
    table = table.astype({name: pd.to_numeric(table[name], downcast="integer").dtype for name in whole})
    return table.assign(**{name: (table[name] * STEPS).round() / STEPS for name in rough})


def _table(path: Path) -> pd.DataFrame:
    # A model's name may be any word, "null" too.
    table = pd.read_csv(path, dtype=TYPES, float_precision="round_trip", keep_default_na=False, na_values=[""])
    return table.fillna({name: "" for name in TEXTS if name in table})


def read(folder: Path) -> Material:
    """What `keep` has written; without pictures of embeddings, adversarial examples and training curves.

    Raises:
        SettingsError: there is no such folder, or it lacks something. Contradiction: a number is not what the ledger of
            its run gives, or not of the arm, seed or ε of its run, or an image of a model was proved and broken.
    """
    try:
        runs, values, published = (_table(folder / name) for name in (RUNS, VALUES, PUBLISHED))
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        for name in ("start_time", "end_time"):
            runs[name] = pd.to_datetime(runs[name])
        runs["experiment_id"] = None  # they have no pages here
        tried = runs.loc[runs["step"].isin(["evaluate", "verify"]), "run_id"]
        ledgers = {run: pd.read_parquet(folder / LEDGERS / f"{run}.parquet") for run in tried}
        evidence = Evidence(
            runs=runs,
            ledgers=ledgers,
            values=values,
            points={},
            # Of those arms that were embedded: there need be none.
            places={file.stem: pd.read_parquet(file) for file in (folder / PLACES).glob("*.parquet")},
            examples={},
            curves=pd.DataFrame(columns=CURVES),
            classes=tuple(about["classes"]),
            profile=about["profile"],
            dataset=about["dataset"],
            notes=[],
        )
        _check(evidence)
    except Contradiction as error:
        raise Contradiction(f"evidence in '{folder}': {error}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        said = " ".join(str(error).split())
        raise SettingsError(f"no evidence in '{folder}' ({said}): let compare export it there") from error
    return material_of(evidence, published)


def _check(evidence: Evidence) -> None:
    """What images have withstood of corruptions is not kept, nor what checks of attacks have counted: those numbers
    alone, and marks of suspicion, are taken as they are."""
    known = {run["run_id"]: run for run in evidence.runs.to_dict("records")}
    strangers = set(evidence.values["run"]) - set(evidence.ledgers)
    if strangers:
        raise Contradiction(f"{VALUES} has numbers of run {min(strangers)}, which {RUNS} does not have")
    for run_id, ledger in evidence.ledgers.items():
        run, said = known[run_id], evidence.values[evidence.values["run"] == run_id]
        name = f"{VALUES}: the numbers of {named(run)}"
        if not ledger["image"].is_unique or said.duplicated(["metric", "eps"]).any():
            raise Contradiction(f"{name}, or its ledger's images, stand there twice")
        if any((said[key] != run[key]).any() for key in (*KEYS, "seed", "step")):
            raise Contradiction(f"{name} are said to be of another arm, seed or step than {RUNS} says")
        if run["step"] == "verify" and set(said["eps"]) != {float(eps_key(eps)) for eps in ledger["eps"]}:
            raise Contradiction(f"{name} are said to be at another ε than its ledger says")
        rates = said[~said["metric"].str.startswith("corrupted")].to_dict("records")
        metrics = {logged_name(row): float(row["value"]) for row in rates}
        given = given_by(ledger, run["step"])
        missing = given.keys() - metrics.keys() - {SECONDS}
        if missing:
            raise Contradiction(f"{name} lack {min(missing)}, which its ledger gives")
        metrics_agree(run, metrics, given)
    consistent(evidence.runs, evidence.ledgers)
