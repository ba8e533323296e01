"""All that is read from the tracking server: runs, models and curves as tidy frames, and the tables in artifacts.

A notebook may use it as the reports do::

    from rampart.tracking.queries import find_runs, read_table

    runs = find_runs("0", {"step": "evaluate", "arm": "certified+aug"})
    runs[["run_id", "tags.rampart.seed", "metrics.accuracy"]]
    read_table(runs["run_id"][0], "ledger.parquet")
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote
from zipfile import BadZipFile

import mlflow
import numpy as np
import pandas as pd
from mlflow import MlflowClient
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.uri import is_local_uri

from rampart.errors import BrokenArtifact, RampartError, SettingsError
from rampart.models import read_beside
from rampart.settings import PROFILE_READERS
from rampart.tracking import store
from rampart.tracking.runs import EARLIER, LEDGER, PAUSED
from rampart.training import State

T = TypeVar("T")


def seconds_at_work(runs: pd.DataFrame) -> pd.Series:
    """How long each of some runs was at work, with the runs that it went on from."""
    start, end = (pd.to_datetime(runs[name]) for name in ("start_time", "end_time"))
    none = pd.Series(0.0, runs.index)
    paused, earlier = (runs.get(f"tags.{tag}", none).fillna(0).astype(float) for tag in (PAUSED, EARLIER))
    return (end - start).dt.total_seconds() - paused + earlier


def find_runs(
    experiment: str | None, tags: Mapping[str, str], status: str | None = "FINISHED", max_results: int = 100_000
) -> pd.DataFrame:
    """Runs whose rampart tags have these values, newest first; columns as mlflow.search_runs names them (run_id,
    experiment_id, status, start_time, params.*, metrics.*, tags.*). Filtered on the server, paged by MLflow.

    Args:
        tags: a value that ends with % is how a tag's begins.
        experiment: that they are in; None: any.
        status: that they have, or, behind an exclamation mark, have not; None: any.
    """
    parts = [
        f"tags.`rampart.{name}` {'LIKE' if value.endswith('%') else '='} {_quoted(value)}"
        for name, value in tags.items()
    ]
    if status:
        parts.append(f"attributes.status {'!=' if status.startswith('!') else '='} '{status.lstrip('!')}'")
    return _search(experiment, " and ".join(parts), max_results)


def runs_by_id(experiment: str, ids: Iterable[str]) -> pd.DataFrame:
    """Those runs of an experiment that it has, newest first; columns as `find_runs`."""
    wanted = sorted(set(ids))
    parts = [
        _search(experiment, "attributes.run_id IN ({})".format(", ".join(f"'{run}'" for run in some)), len(some))
        for some in (wanted[i : i + AT_ONCE] for i in range(0, len(wanted), AT_ONCE))
    ]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["run_id"])


def _quoted(value: str) -> str:
    """As a filter takes it, which knows no escapes."""
    return f'"{value}"' if "'" in value else f"'{value}'"


# Ids in one filter.
AT_ONCE = 200


def _search(experiment: str | None, filtered: str, max_results: int) -> pd.DataFrame:
    store.initialise()
    if experiment is not None and not experiment.isdigit():
        raise RampartError(f"no experiment has the id '{experiment}': an id is a number, such as 0, the default's")
    with store.asking():
        found = mlflow.search_runs(
            None if experiment is None else [experiment],
            filtered,
            max_results=max_results,
            order_by=["attributes.start_time DESC"],
            search_all_experiments=experiment is None,
        )
    assert isinstance(found, pd.DataFrame)
    if len(found):
        uri = mlflow.get_tracking_uri()
        _PLACES.update({(uri, run): place for run, place in zip(found["run_id"], found["artifact_uri"], strict=True)})
    return found


def find_models(experiment: str) -> pd.DataFrame:
    """Logged models of an experiment, newest first: model_id, run_id (of the run that trained it), created, and a
    column metrics.<name> for each number that is tied to one (the newest where there are several)."""
    store.initialise()
    client, rows, token = MlflowClient(), [], None
    while True:
        with store.asking():
            page = client.search_logged_models([experiment], page_token=token)
        for model in page:
            metrics = sorted(model.metrics or [], key=lambda metric: metric.timestamp)
            row = {"model_id": model.model_id, "run_id": model.source_run_id, "created": model.creation_timestamp}
            rows.append({**row, **{f"metrics.{metric.key}": metric.value for metric in metrics}})
        token = page.token
        if not token:
            break
    found = pd.DataFrame(rows, columns=None if rows else ["model_id", "run_id", "created"])
    return found.assign(created=pd.to_datetime(found["created"], unit="ms", utc=True))


def metric_history(run_id: str, metrics: Iterable[str]) -> pd.DataFrame:
    """Columns metric, step and value: the curves of a run."""
    client = MlflowClient()
    with store.asking():
        rows = [(name, one.step, one.value) for name in metrics for one in client.get_metric_history(run_id, name)]
    return pd.DataFrame(rows, columns=["metric", "step", "value"])


def metric_names(run_id: str) -> list[str]:
    """The metrics that a run has told of, but for the machine's."""
    with store.asking():
        return [name for name in MlflowClient().get_run(run_id).data.metrics if not name.startswith("system/")]


def run_tags(run_id: str) -> dict[str, str]:
    """A run's rampart tags, without their prefix.

    Raises:
        RampartError: there is no such run.
    """
    store.initialise()
    with store.asking(f"no run '{run_id}' in {mlflow.get_tracking_uri()}: look it up in the MLflow UI"):
        tags = MlflowClient().get_run(run_id).data.tags
    return {k.removeprefix("rampart."): v for k, v in tags.items() if k.startswith("rampart.")}


def read_table(run_id: str, name: str) -> pd.DataFrame | None:
    """A Parquet artifact of a run; None where it has none of that name."""
    return _read(run_id, name, pd.read_parquet)


def read_evidence(run_id: str) -> tuple[pd.DataFrame, str] | None:
    """A run's ledger with its digest, as `Run.evidence` has kept it; None where it has none."""

    def read(path: Path) -> tuple[pd.DataFrame, str]:
        content = path.read_bytes()
        return pd.read_parquet(io.BytesIO(content)), hashlib.sha256(content).hexdigest()

    return _read(run_id, LEDGER, read)


def read_arrays(run_id: str, name: str) -> dict[str, np.ndarray] | None:
    """The arrays of an .npz artifact of a run; None where it has none of that name."""
    return _read(run_id, name, lambda path: dict(np.load(path, allow_pickle=False)))


def read_checkpoint(run_id: str, name: str) -> State | None:
    """Where a training stood when it left this checkpoint; None where there is none of that name.

    Raises:
        ModelError: it is broken.
    """

    def read(path: Path) -> State:
        tensors, numbers = read_beside(path)
        return State(tensors=tensors, **numbers)

    return _read(run_id, name, read)


def _read(run_id: str, name: str, read: Callable[[Path], T]) -> T | None:
    with store.asking(f"no run '{run_id}' in {mlflow.get_tracking_uri()}: look it up in the MLflow UI"):
        place = _place(run_id)
        if is_local_uri(place):
            # As MLflow would find it there, ten times as fast.
            path = Path(local_file_uri_to_path(place)) / name
            return _parsed(run_id, path, read) if path.exists() else None
        client = MlflowClient()
        folder, _, _ = name.rpartition("/")
        if name not in {artifact.path for artifact in client.list_artifacts(run_id, folder or None)}:
            return None
        with tempfile.TemporaryDirectory(prefix="rampart-") as place:
            return _parsed(run_id, Path(client.download_artifacts(run_id, name, place)), read)


def _parsed(run_id: str, path: Path, read: Callable[[Path], T]) -> T:
    try:
        return read(path)
    except (ValueError, EOFError, BadZipFile, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's; Parquet's damaged pages have none
            raise
        said = " ".join(str(error).split())
        raise BrokenArtifact(f"{path.name} of run {run_id} cannot be read ({said}): delete the run") from error


def _place(run_id: str) -> str:
    """Where the run's artifacts are."""
    key = mlflow.get_tracking_uri(), run_id
    if key not in _PLACES:
        _PLACES[key] = str(MlflowClient().get_run(run_id).info.artifact_uri)
    return _PLACES[key]


# By store and run, which never move: what searches have told already is not asked for again.
_PLACES: dict[tuple[str, str], str] = {}


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
    uri = f"{_place(run_id)}/{name}"
    return uri.removeprefix("file://") if uri.startswith(("file://", "/")) else uri


def run_page(experiment: str, run_id: str) -> str:
    """The run's page in the MLflow UI: of the tracking server, or, for a local store, of `make ui`."""
    return f"{ui()}/#/experiments/{experiment}/runs/{run_id}"


def compare_page(experiment: str, run_ids: Iterable[str]) -> str:
    """The page of the MLflow UI that compares these runs."""
    runs, experiments = (quote(json.dumps(ids)) for ids in (list(run_ids), [experiment]))
    return f"{ui()}/#/compare-runs?runs={runs}&experiments={experiments}"


def ui() -> str:
    """Where the MLflow UI is to be had."""
    # A page that is passed on must not tell a password.
    uri = re.sub(r"(?<=://)[^/@]*@", "", mlflow.get_tracking_uri().rstrip("/"))
    return uri if uri.startswith("http") else f"http://127.0.0.1:{os.environ.get('PORT', '5000')}"
