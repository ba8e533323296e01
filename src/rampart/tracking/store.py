"""The tracking store: made ready before its first use, cleaned of runs whose process is gone."""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote

import mlflow
import psutil
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Experiment, RunTag
from mlflow.exceptions import MlflowException

from rampart.errors import RampartError

log = logging.getLogger(__name__)

# A server that is down or answers 500 is asked again for a quarter of a minute; MLflow's own patience is minutes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "4")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
# Each step says where its run is by itself.
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")


def location() -> str:
    """Where the store is, for `connect` in another process."""
    return mlflow.get_tracking_uri()


def connect(uri: str) -> None:
    """From now on this process tracks in the store at `uri`."""
    mlflow.set_tracking_uri(uri)


def initialise() -> None:
    """Creates or migrates the store's database. A SQLite file's processes do so one after the other: side by side they
    would spoil it."""
    uri = mlflow.get_tracking_uri()
    # The rest of the address is quoted as a URL.
    file = unquote(uri.removeprefix("sqlite:///").partition("?")[0])
    lock = Path(f"{file}.lock") if uri.startswith("sqlite:///") else None
    try:
        if lock:  # a lock that cannot be made is waited for without end
            lock.parent.mkdir(parents=True, exist_ok=True)
            lock.touch()
        with FileLock(lock) if lock else nullcontext():
            _make_ready(uri)
    except OSError as error:
        raise _unanswered(uri, error) from error


class StoreAway(RampartError):
    """The tracking store does not answer."""


@lru_cache
def _make_ready(uri: str) -> None:
    last: Exception | None = None
    # A database that somebody has just started, too, may need a moment.
    for pause in (0.0,) if uri.startswith("http") else (0.0, 1.0, 3.0):
        time.sleep(pause)
        try:
            mlflow.search_experiments(max_results=1)
            return
        except Exception as error:  # SQLAlchemy's, alembic's and requests' errors share no base class
            last = error
    assert last is not None
    raise _unanswered(uri, last) from last


def refusal(error: Exception) -> RampartError | None:
    """What to say of an error by which the server tells that this user may not do this; None of any other."""
    if re.search("error code 40[13]", str(error)) is None:
        return None
    mend = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD to those of a user who may"
    return RampartError(f"the tracking store {mlflow.get_tracking_uri()} does not let you do this: {mend}")


def _unanswered(uri: str, error: Exception) -> RampartError:
    reason = " ".join(str(error).split())[:200]
    if (refused := refusal(error)) is not None:
        return refused
    if "readonly" in reason:
        return RampartError(f"the tracking store {uri} cannot be written ({reason}): make it writable")
    return StoreAway(
        f"the tracking store {uri} does not answer ({reason}): check MLFLOW_TRACKING_URI, which is an address as in "
        "http://host:5000 or sqlite:///mlflow.db"
    )


@contextmanager
def asking(missing: str = "") -> Iterator[None]:
    """Around calls of the server: its errors become ours.

    Raises:
        RampartError: `missing`, where there is no such thing as was asked for; else that the store does not answer.
    """
    try:
        yield
    except MlflowException as error:
        # An id of the wrong form is an invalid value.
        if missing and error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise RampartError(missing) from error
        raise _unanswered(mlflow.get_tracking_uri(), error) from error


def experiment_id(create: bool = True) -> str:
    """Of the experiment that runs go to: `mlflow run`'s, MLFLOW_EXPERIMENT_NAME's, or the default.

    Raises:
        RampartError: there is none of that id, or of that name and none is to be created.
    """
    given = os.environ.get("MLFLOW_EXPERIMENT_ID")
    if given:
        with asking(f"no experiment with id '{given}' in {mlflow.get_tracking_uri()}: check MLFLOW_EXPERIMENT_ID"):
            return _in_use(mlflow.get_experiment(given))
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "Default"
    found = mlflow.get_experiment_by_name(name)
    if found:
        return _in_use(found)
    if not create:
        raise RampartError(f"no experiment '{name}' in {mlflow.get_tracking_uri()}: check MLFLOW_EXPERIMENT_NAME")
    try:
        return mlflow.create_experiment(name)
    except MlflowException:  # another process was faster
        found = mlflow.get_experiment_by_name(name)
        if found is None:
            raise
        return _in_use(found)


def _in_use(experiment: Experiment) -> str:
    """Its id; raises RampartError where somebody has deleted it."""
    number = experiment.experiment_id
    if experiment.lifecycle_stage != "active":
        restore = f"mlflow experiments restore --experiment-id {number}"
        raise RampartError(f"experiment '{experiment.name}' was deleted: {restore}, or name another one")
    return str(number)


def process_tags() -> dict[str, str]:
    """What tells later whether the process behind a run still lives."""
    process, _, host = this_process().partition("@")
    return {"rampart.host": host, "rampart.process": process, PULSE: str(int(time.time()))}


def take_over(run_id: str) -> None:
    """From now on this process is the one behind a run."""
    MlflowClient().log_batch(run_id, tags=[RunTag(name, text) for name, text in process_tags().items()])


def this_process() -> str:
    """pid:start@host."""
    process = psutil.Process()
    return f"{process.pid}:{process.create_time():.2f}@{socket.gethostname()}"


def alive(process: str) -> bool | None:
    """Whether a process, as `this_process` calls it, still lives; None for one of another machine."""
    name, _, host = process.partition("@")
    pid, _, created = name.partition(":")
    return _alive(int(pid), created) if host == socket.gethostname() else None


# When a run has last been known to be at work, in seconds since 1970.
PULSE = "rampart.pulse"
# The error of a run whose process is gone.
LOST = "killed: its process ended without a word"
# Seconds between two beats, and those after which nobody waits for one any more: clocks differ, and servers are away.
BEAT, SILENCE = 60.0, 600.0


@contextmanager
def beating(runs: Sequence[str]) -> Iterator[None]:
    """Tells the server meanwhile that the runs in the list, as it is by then, are at work: no other machine could
    know."""
    over, client = threading.Event(), MlflowClient()

    def beat() -> None:
        while not over.wait(BEAT):
            for run_id in tuple(runs):
                try:
                    client.set_tag(run_id, PULSE, str(int(time.time())))
                except MlflowException as error:  # away, or the run was deleted: what works in it will hear of that
                    log.debug("no pulse of run %s: %s", run_id, error)

    # A beat under way may wait for a server; the end of a run does not wait for it.
    threading.Thread(target=beat, name="rampart-pulse", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def sweep(experiment: str, everywhere: bool = False) -> list[str]:
    """Marks RUNNING runs KILLED whose process on this host is gone or, `everywhere`, has been silent for long on
    another; returns their ids."""
    client = MlflowClient()
    swept = []
    here = "" if everywhere else f" and tags.`rampart.host` = '{socket.gethostname()}'"
    for run in client.search_runs([experiment], f"attributes.status = 'RUNNING'{here}", max_results=1000):
        if gone(run.data.tags):
            try:
                end_lost(run.info.run_id)
            except MlflowException as error:  # deleted or ended by somebody else meanwhile
                log.warning("run %s could not be marked KILLED: %s", run.info.run_id, error)
                continue
            swept.append(run.info.run_id)
    if swept:
        log.info("marked %d run(s) KILLED whose process is gone", len(swept))
    return swept


def end_lost(run_id: str) -> None:
    """Ends a run as KILLED whose process is gone."""
    client = MlflowClient()
    client.set_tag(run_id, "rampart.error", LOST)
    client.set_terminated(run_id, "KILLED")


def gone(tags: Mapping[str, str]) -> bool:
    """Whether the process of a run with these tags is gone, or has been silent for long on another host. Of a run that
    is not ours, or whose process said nothing, nothing is known."""
    pid, _, created = tags.get("rampart.process", "").partition(":")
    if not pid:
        return False
    if tags.get("rampart.host") == socket.gethostname():
        return not _alive(int(pid), created)
    return time.time() - float(tags.get(PULSE, "inf")) > SILENCE


def _alive(pid: int, created: str) -> bool:
    try:
        # The time of a process's start is counted from the machine's, which moves when its clock is set.
        return abs(psutil.Process(pid).create_time() - float(created)) < 5
    except psutil.Error:
        return False
