"""All that is read from the tracking server: runs as a tidy frame, and the tables in their artifacts."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import mlflow
import numpy as np
import pandas as pd
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from rampart.errors import RampartError, SettingsError
from rampart.settings import PROFILE_READERS
from rampart.tracking import store

T = TypeVar("T")


def find_runs(
    experiment: str, tags: Mapping[str, str], status: str | None = "FINISHED", max_results: int = 100_000
) -> pd.DataFrame:
    """Runs of an experiment whose rampart tags have these values, newest first; columns as mlflow.search_runs names
    them (run_id, status, start_time, params.*, metrics.*, tags.*). Filtered on the server, paged by MLflow."""
    store.initialise()
    parts = [f"tags.`rampart.{name}` = '{value}'" for name, value in tags.items()]
    if status:
        parts.append(f"attributes.status = '{status}'")
    found = mlflow.search_runs(
        [experiment], " and ".join(parts), max_results=max_results, order_by=["attributes.start_time DESC"]
    )
    assert isinstance(found, pd.DataFrame)
    return found


def run_tags(run_id: str) -> dict[str, str]:
    """A run's rampart tags, without their prefix.

    Raises:
        RampartError: there is no such run.
    """
    store.initialise()
    try:
        tags = MlflowClient().get_run(run_id).data.tags
    except MlflowException as error:
        raise RampartError(f"no run '{run_id}' in {mlflow.get_tracking_uri()}: look it up in the MLflow UI") from error
    return {k.removeprefix("rampart."): v for k, v in tags.items() if k.startswith("rampart.")}


def read_table(run_id: str, name: str) -> pd.DataFrame | None:
    """A Parquet artifact of a run; None where it has none of that name."""
    return _read(run_id, name, pd.read_parquet)


def read_arrays(run_id: str, name: str) -> dict[str, np.ndarray] | None:
    """The arrays of an .npz artifact of a run; None where it has none of that name."""
    return _read(run_id, name, lambda path: dict(np.load(path, allow_pickle=False)))


def _read(run_id: str, name: str, read: Callable[[Path], T]) -> T | None:
    client = MlflowClient()
    if name not in {artifact.path for artifact in client.list_artifacts(run_id)}:
        return None
    with tempfile.TemporaryDirectory(prefix="rampart-") as folder:
        return read(Path(client.download_artifacts(run_id, name, folder)))


def read_text(run_id: str, name: str) -> str | None:
    """A text artifact of a run; None where it has none of that name."""
    return _read(run_id, name, lambda path: path.read_text(encoding="utf-8"))


def profile_text(uri: str) -> str:
    """The text of a profile that is an artifact: runs:/<run id>/profile.yaml.

    Raises:
        SettingsError: there is none.
    """
    run_id, _, name = uri.removeprefix("runs:/").partition("/")
    run_tags(run_id)  # raises where there is no such run
    found = read_text(run_id, name)
    if found is None:
        raise SettingsError(f"no profile at '{uri}': give profile=runs:/<id of a tune run>/profile.yaml")
    return found


PROFILE_READERS["runs:/"] = profile_text


def artifact_place(run_id: str, name: str) -> str:
    """Where an artifact lies: a path on this machine for a local store, else its URI."""
    uri = f"{MlflowClient().get_run(run_id).info.artifact_uri}/{name}"
    return uri.removeprefix("file://") if uri.startswith(("file://", "/")) else uri
