"""One MLflow run for one step, whatever becomes of it."""

from __future__ import annotations

import logging
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

import mlflow
import torch
from mlflow import MlflowClient
from mlflow.entities import RunTag
from mlflow.exceptions import MlflowException

from rampart import __version__
from rampart.errors import RampartError
from rampart.tracking.runs import MEASURED, Run
from rampart.tracking.store import asking, beating, experiment_id, initialise, process_tags, refusal, sweep, take_over

log = logging.getLogger(__name__)


@contextmanager
def open_run(step: str, parent: str | None = None, task: str | None = None) -> Iterator[Run]:
    """Starts a run (or goes on with the one that `mlflow run` has started) and ends it as what became of it.

    An error ends it FAILED, an interrupt KILLED; both leave their message in the tag rampart.error.

    Args:
        parent: the study that it belongs to.
        task: what tells the study's step from every other.
    """
    initialise()
    # How busy the machine was; with MLflow's own ten seconds a short training would have nothing of that.
    measured = step in MEASURED
    if measured:
        mlflow.set_system_metrics_sampling_interval(2)
    # Taken out: it is this run's alone, not that of runs nested in it or of child processes.
    resumed = os.environ.pop("MLFLOW_RUN_ID", None)
    if resumed:
        with asking(f"no run '{resumed}' in {mlflow.get_tracking_uri()}: unset MLFLOW_RUN_ID"):
            info = MlflowClient().get_run(resumed).info
        if info.lifecycle_stage != "active":
            raise RampartError(f"run '{resumed}' is deleted: restore it, or unset MLFLOW_RUN_ID")
        experiment = info.experiment_id
        active = mlflow.start_run(resumed, log_system_metrics=measured)
    else:
        # A comparison has nothing to look for in an experiment that it would have to create.
        experiment = experiment_id(create=step != "compare")
        # With the tags from its first moment: a server that dies then leaves no run that nobody knows the process of.
        tags = process_tags() | {f"rampart.{k}": v for k, v in (("study", parent), ("task", task)) if v}
        with asking():  # a store that can be read may not be written
            active = mlflow.start_run(
                experiment_id=experiment, run_name=step, nested=True, tags=tags, log_system_metrics=measured
            )
        if parent:  # MLflow would take the active run or none, but a trial's belongs to the run that began its study
            MlflowClient().set_tag(active.info.run_id, "mlflow.parentRunId", parent)
    run = Run(active.info.run_id, experiment, step, parent, bool(resumed), task)
    status = "FAILED"
    try:
        run.tags({"step": step, **versions(), **git()})
        if resumed:
            take_over(run.id)
        sweep(experiment)
        run.check_place(active.info.artifact_uri)
        with beating(run.open):
            yield run
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        run.tags({"error": "interrupted"})
        raise
    except BaseException as error:
        said = f"{'' if isinstance(error, RampartError) else type(error).__name__ + ': '}{error}"[:4000]
        # Names of files need not be text.
        run.tags({"error": said.encode("utf-8", "backslashreplace").decode()})
        refused = refusal(error) if isinstance(error, MlflowException) else None
        if refused is not None:
            raise refused from error
        raise
    finally:
        run.close()
        for _ in run.open:
            mlflow.end_run(status)


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    from importlib.metadata import version

    found = {name: version(name) for name in ("mlflow", "numpy", "torchvision")}
    found |= {"torch": torch.__version__, "python": platform.python_version(), "version": __version__}
    return {f"version.{name}": text for name, text in found.items()} | {"machine": _machine()}


def _machine() -> str:
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{os.cpu_count()} cores of {_processor()}{gpu}"


def _processor() -> str:
    with suppress(OSError):  # Linux alone has it
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@lru_cache(maxsize=1)
def git() -> dict[str, str]:
    """Commit and whether the working tree differs from it; empty outside of a checkout or without git."""

    def ask(*words: str) -> str:
        top = Path(__file__).parents[3]
        return subprocess.run(["git", *words], cwd=top, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"git.commit": ask("rev-parse", "HEAD"), "git.dirty": str(bool(ask("status", "--porcelain")))}
    except (OSError, subprocess.CalledProcessError):
        return {}


def exists(run_id: str) -> bool:
    """Whether the server has the run, and nobody has deleted it."""
    try:
        return MlflowClient().get_run(run_id).info.lifecycle_stage == "active"
    except MlflowException:
        return False


@contextmanager
def reopened(run: Run) -> Iterator[None]:
    """Shows a run that had ended as RUNNING, and ends it again; one that somebody has at work is left to them."""
    if run.client.get_run(run.id).info.status == "RUNNING":
        yield
        return
    run.client.update_run(run.id, "RUNNING")
    take_over(run.id)
    status = "FAILED"
    try:
        with beating(run.open):
            yield
        status = "FINISHED"
        with suppress(MlflowException):  # of the process that was killed
            run.client.delete_tag(run.id, "rampart.error")
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        run.client.set_terminated(run.id, status)


def fail_run(run_id: str, reason: str, tags: Mapping[str, str]) -> None:
    """Ends a run as FAILED whose process cannot do so any more."""
    client = MlflowClient()
    try:
        client.log_batch(run_id, tags=[RunTag(f"rampart.{k}", v) for k, v in {"error": reason, **tags}.items()])
        client.set_terminated(run_id, "FAILED")
    except MlflowException as error:  # deleted meanwhile
        log.warning("run %s could not be marked FAILED: %s", run_id, error)
