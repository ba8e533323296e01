"""Evidence in plain files: whoever has them can compute the tables again, without a tracking server or a training."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from rampart.errors import RampartError, SettingsError
from rampart.reports.evidence import KEYS, Evidence
from rampart.reports.sections import Material, material_of

RUNS, VALUES, PUBLISHED, ABOUT, LEDGERS = "runs.csv", "values.csv", "published.csv", "about.json", "ledgers"
# What tables need of a run, beside how fast it trained; and who reads the files, to find it again.
COLUMNS = (
    *(*KEYS, "seed", "step", "run_id", "model_run", "weights", "command", "start_time", "end_time"),
    *("params.selection", "tags.rampart.git.commit", "tags.rampart.machine", "tags.rampart.version.torch"),
)
SPEED = "/images_per_second"
# As a shell's word, quoted or not.
FOLDER = r"'dataset=folder:[^']*'|dataset=folder:\S*"
# Of a ledger, what is computed here already and takes most of its room.
LEFT_OUT = "withstood/"
TEXTS = ("seed", "run", "run_id", "model_run", "weights", "command", "params.selection")
TYPES = dict.fromkeys(TEXTS, str) | {"augment": bool, "suspect": bool, "eps": float, "value": float}


def keep(material: Material, folder: Path) -> None:
    """Writes runs.csv, values.csv, published.csv, about.json (the dataset and its classes) and ledgers/<run>.parquet
    (less what images have withstood of corruptions) into `folder`, instead of what an earlier `keep` has left there.
    Where the images lay on this machine is not told.

    Raises:
        RampartError: it cannot be written there.
    """
    evidence = material.evidence
    runs = evidence.runs
    kept = [name for name in runs.columns if name in COLUMNS or str(name).endswith(SPEED)]
    runs = runs[kept].dropna(axis=1, how="all")
    hidden = runs["command"].str.replace(FOLDER, "dataset=folder:PATH", regex=True)
    about = {"dataset": evidence.dataset, "classes": evidence.classes}
    try:
        (folder / LEDGERS).mkdir(parents=True, exist_ok=True)
        runs.assign(command=hidden).to_csv(folder / RUNS, index=False)
        evidence.values.to_csv(folder / VALUES, index=False)
        material.published.to_csv(folder / PUBLISHED, index=False)
        (folder / ABOUT).write_text(json.dumps(about) + "\n", encoding="utf-8")
        for file in (folder / LEDGERS).glob("*.parquet"):
            if file.stem not in evidence.ledgers:
                file.unlink()
        for run, ledger in evidence.ledgers.items():
            columns = [name for name in ledger.columns if not str(name).startswith(LEFT_OUT)]
            _small(ledger[columns]).to_parquet(folder / LEDGERS / f"{run}.parquet", index=False, compression="zstd")
    except OSError as error:
        raise RampartError(f"evidence cannot be written to {folder} ({error.strerror}): make it writable") from error


def _small(ledger: pd.DataFrame) -> pd.DataFrame:
    whole = ledger.select_dtypes("integer").columns
    return ledger.astype({name: pd.to_numeric(ledger[name], downcast="integer").dtype for name in whole})


def _table(path: Path) -> pd.DataFrame:
    table = pd.read_csv(path, dtype=TYPES, float_precision="round_trip")
    return table.fillna({name: "" for name in TEXTS if name in table})


def read(folder: Path) -> Material:
    """What `keep` has written; without embeddings, adversarial examples and training curves.

    Raises:
        SettingsError: there is no such folder, or it lacks a file.
    """
    try:
        runs, values, published = (_table(folder / name) for name in (RUNS, VALUES, PUBLISHED))
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        for name in ("start_time", "end_time"):
            runs[name] = pd.to_datetime(runs[name])
        tried = runs.loc[runs["step"].isin(["evaluate", "verify"]), "run_id"]
        ledgers = {run: pd.read_parquet(folder / LEDGERS / f"{run}.parquet") for run in tried}
    except (OSError, ValueError, KeyError) as error:
        said = " ".join(str(error).split())
        raise SettingsError(f"no evidence in '{folder}' ({said}): let compare export it there") from error
    evidence = Evidence(
        runs=runs,
        ledgers=ledgers,
        values=values,
        points={},
        places={},
        examples={},
        curves=pd.DataFrame(columns=[*KEYS, "seed", "stage", "metric", "epoch", "value"]),
        classes=tuple(about["classes"]),
        dataset=about["dataset"],
        notes=[],
    )
    return material_of(evidence, published)
