"""What a step tells of itself: parameters, metrics, tables, figures, models."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import mlflow
import numpy as np
import pandas as pd
import torch
from mlflow import MlflowClient
from mlflow.entities import LoggedModelInput, LoggedModelStatus, Metric, Param, RunTag
from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.uri import is_local_uri
from mlflow.utils.validation import MAX_METRICS_PER_BATCH

from rampart.data import Dataset
from rampart.errors import RampartError
from rampart.models import Classifier, save_model
from rampart.tracking.store import LOST, PULSE, take_over
from rampart.training import State

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The newest is in one of them while the other one is written.
CHECKPOINTS = ("checkpoints/even.safetensors", "checkpoints/odd.safetensors")
# Artifacts that one step leaves and another reads.
LEDGER = "ledger.parquet"
ADVERSARIAL = "adversarial.npz"
POINTS, PLACES = "umap.parquet", "geometry.parquet"
# Seconds between a run's end before its time and its going on.
PAUSED = "rampart.paused"
# Seconds at work of the runs that it has gone on from.
EARLIER = "rampart.earlier"
# Steps whose runs have system metrics.
MEASURED = ("train",)


# Metrics, their step, and when that was, in seconds since 1970.
Point = tuple[Mapping[str, float], int, float]


def _ended(run: MlflowRun) -> float:
    """When the last was at work on a run that has ended before its time, in seconds since 1970."""
    tags = run.data.tags
    # One whose process was gone has ended when that was noticed.
    noticed = run.info.end_time / 1000
    return float(tags.get(PULSE, noticed)) if tags.get("rampart.error") == LOST else noticed


def class_text(names: Sequence[str]) -> str:
    """The classes' names as a tag has them."""
    return json.dumps(list(names), ensure_ascii=False)


def class_names(text: str) -> tuple[str, ...]:
    """What `class_text` was made of, up to where a server has cut it."""
    if not text.startswith("["):  # older runs
        return tuple(text.split(","))
    return tuple(json.loads(name) for name in re.findall(r'"(?:[^"\\]|\\.)*"', text))


class Run:
    """The active run of a step.

    Args:
        parent: the run that it is nested in, if any.
        given: `mlflow run` has started it.
        task: of the study that it is.
    """

    def __init__(
        self,
        run_id: str,
        experiment: str,
        step: str,
        parent: str | None = None,
        given: bool = False,
        task: str | None = None,
    ) -> None:
        self.id, self.experiment, self.step, self.parent, self.given = run_id, experiment, step, parent, given
        self.task = task
        self.open = [run_id]  # whose end this one's end is
        self.client = MlflowClient()
        self.subject: dict[str, str] = {}
        self.splits: dict[str, dict[str, str]] = {}
        self.scratch = Path(tempfile.mkdtemp(prefix="rampart-"))

    def close(self) -> None:
        shutil.rmtree(self.scratch, ignore_errors=True)

    def go_on_from(self, run_id: str) -> None:
        """This run does what is left of the run `run_id`, which had ended before its time."""
        old = self.client.get_run(run_id)
        tags = old.data.tags
        worked = _ended(old) - old.info.start_time / 1000 - float(tags.get(PAUSED, 0)) + float(tags.get(EARLIER, 0))
        self.tags({"resumed_from": run_id})
        self.client.set_tag(self.id, EARLIER, f"{worked:.3f}")

    def go_on_in(self, run_id: str) -> None:
        """From now on this is the run `run_id`, which had ended before its time. The run that was open until now is
        taken away or, if `mlflow run` has started it and will ask for it, says where things go on, and ends alike; it
        says so, too, where the user may not delete it."""
        old = self.client.get_run(run_id)
        paused = float(old.data.tags.get(PAUSED, 0)) + time.time() - _ended(old)
        # Nobody else may find it in between: what the run that was open claims ends with that.
        take_over(run_id)
        self.client.update_run(run_id, "RUNNING")
        if not self.given:
            mlflow.end_run("KILLED")
            self.open.clear()
        if self.given or not self._deleted():
            self.name(f"{self.step}, goes on in {run_id[:8]}")
            self.tags({"step": "resume", "goes_on_in": run_id})
        self.open.append(run_id)
        self.id = run_id
        if self.parent:
            self.tags({"study": self.parent} | ({"task": self.task} if self.task else {}))
            self.client.set_tag(run_id, "mlflow.parentRunId", self.parent)
        mlflow.start_run(run_id, nested=True, log_system_metrics=self.step in MEASURED)
        self.client.set_tag(run_id, PAUSED, f"{paused:.3f}")
        with suppress(MlflowException):  # of the process that was stopped
            self.client.delete_tag(run_id, "rampart.error")

    def _deleted(self) -> bool:
        """Deletes the run; false where the user may not: a server's permission to edit does not include it."""
        try:
            self.client.delete_run(self.id)
        except MlflowException:
            return False
        return True

    def check_place(self, place: str) -> None:
        """Raises RampartError where the run's artifacts cannot be written: before the work, not after it."""
        uri = mlflow.get_tracking_uri()
        if place.startswith("mlflow-artifacts:") and not uri.startswith("http"):
            raise RampartError(
                "this store was made by a server, which alone can reach its artifacts: set MLFLOW_TRACKING_URI to that "
                "server's http://…, or MLFLOW_EXPERIMENT_NAME to an experiment of your own"
            )
        if not is_local_uri(place):
            return
        path = Path(local_file_uri_to_path(place))
        try:
            path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path).close()
        except OSError as error:
            raise RampartError(f"artifacts cannot be written to {path} ({error.strerror}): make it writable") from error

    def name(self, name: str) -> None:
        self.client.set_tag(self.id, "mlflow.runName", name)

    def params(self, texts: Mapping[str, str]) -> None:
        """Logs parameters; those that `mlflow run` has logged already stand."""
        known = self.client.get_run(self.id).data.params
        self.client.log_batch(self.id, params=[Param(k, v) for k, v in texts.items() if k not in known])

    def tags(self, values: Mapping[str, object]) -> None:
        self.client.log_batch(self.id, tags=[RunTag(f"rampart.{k}", str(v)) for k, v in values.items()])

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        self.curves([(values, step, time.time())])

    def curves(self, points: Sequence[Point]) -> None:
        """Metrics of several steps. Told again with the same moments, nothing is doubled."""
        found = [
            Metric(name, float(value), int(1000 * moment), step, **self.subject)
            for values, step, moment in points
            for name, value in values.items()
        ]
        for first in range(0, len(found), MAX_METRICS_PER_BATCH):
            self.client.log_batch(self.id, metrics=found[first : first + MAX_METRICS_PER_BATCH])

    def about(self, model_id: str | None, split: str) -> None:
        """From now on this run's metrics are those of a logged model (None: of one from a file) on a split of its
        dataset: MLflow ties them to both."""
        self.subject = self.splits[split] | ({"model_id": model_id} if model_id else {})

    def uses(self, model_ids: Iterable[str]) -> None:
        """Logged models as inputs of this run."""
        inputs = self.client.get_run(self.id).inputs
        known = {entry.model_id for entry in inputs.model_inputs} if inputs else set()
        models = [LoggedModelInput(model_id) for model_id in dict.fromkeys(model_ids) if model_id not in known]
        if models:
            self.client.log_inputs(self.id, models=models)

    def describe(self, text: str) -> None:
        """What the run's page says of it, in Markdown."""
        self.client.set_tag(self.id, "mlflow.note.content", text)

    def shown(self, name: str) -> str:
        """A picture among the run's artifacts, for `describe`."""
        return f"![{name}](get-artifact?path={name}&run_uuid={self.id})"

    def checkpoint(self, model: Classifier, state: State | None = None, place: int = 0) -> str:
        """Keeps the weights of a training on its way, with all that it needs to go on if it shall, at one of two
        places, and says where."""
        uri = self.checkpoint_uri(place)
        path = self.scratch / PurePosixPath(uri).name
        save_model(model, path, *((state.tensors, state.numbers()) if state else ()))
        self.client.log_artifact(self.id, str(path), PurePosixPath(uri).parent.name)
        path.unlink()
        return uri

    def checkpoint_uri(self, place: int) -> str:
        """Where `checkpoint` keeps it."""
        return f"runs:/{self.id}/{CHECKPOINTS[place]}"

    def file(self, path: Path, run_id: str | None = None) -> None:
        """A file as an artifact of this run, or of another."""
        self.client.log_artifact(run_id or self.id, str(path))

    def table(self, frame: pd.DataFrame, name: str, run_id: str | None = None) -> None:
        """A table as a Parquet artifact of this run, or of another."""
        path = self.scratch / name
        frame.to_parquet(path, index=False)
        self.client.log_artifact(run_id or self.id, str(path))

    def evidence(self, ledger: pd.DataFrame) -> None:
        """The finished ledger, which this run's metrics can be computed from: its digest is kept with them, so that one
        that takes its place is noticed."""
        self.table(ledger, LEDGER)
        self.tags({"ledger_digest": hashlib.sha256((self.scratch / LEDGER).read_bytes()).hexdigest()})

    def csv(self, frame: pd.DataFrame, name: str) -> None:
        """A table as a CSV artifact, for people."""
        self.text(frame.to_csv(index=False), name)

    def text(self, text: str, name: str) -> None:
        """A text artifact; `name` may have folders."""
        self.client.log_text(self.id, text, name)

    def arrays(self, arrays: Mapping[str, np.ndarray], name: str) -> None:
        """Arrays as an .npz artifact."""
        path = self.scratch / name
        np.savez(path, **arrays)  # type: ignore[arg-type]
        self.client.log_artifact(self.id, str(path))

    def figure(self, figure: Figure, name: str) -> None:
        self.client.log_figure(self.id, figure, name, save_kwargs={"dpi": 150, "bbox_inches": "tight"})

    def dataset(self, data: Dataset, source: str, val_fraction: float, split_seed: int) -> None:
        """The data as inputs of this run, one a split, with digest, sizes and how train was split."""
        from mlflow.data.code_dataset_source import CodeDatasetSource
        from mlflow.data.numpy_dataset import from_numpy

        for context in ("train", "val", "test"):
            split = getattr(data, context)
            if not len(split):  # taken away: a tuning must not see the test images
                continue
            # The arrays are described, not stored; `digest` is of the whole dataset, whatever its split.
            described = from_numpy(
                split.images.cpu().numpy(),
                source=CodeDatasetSource(tags={"rampart.dataset": source}),
                targets=split.labels.cpu().numpy(),
                name=f"{data.name}-{context}",  # MLflow keeps one dataset for each name and digest
                digest=data.digest,
            )
            self.splits[context] = {"dataset_name": described.name, "dataset_digest": described.digest}
            for attempt in (1, 2, 3):
                try:
                    mlflow.log_input(described, context=context)
                    break
                except MlflowException:
                    # Of two processes that log a new dataset at one moment one fails; asking again finds it.
                    if attempt == 3:
                        raise
        self.tags({"dataset": data.name, "dataset_digest": data.digest, "class_names": class_text(data.classes)})
        self.tags({"split": f"{len(data.train)}/{len(data.val)}/{len(data.test)} by {val_fraction:g}, {split_seed}"})

    def model(self, model: Classifier, example: torch.Tensor) -> str:
        """Logs the model, to be had at `runs:/<id>/model` (exported graph, signature, and safetensors among its extra
        files), and returns its model_id. Where a process has done so that was killed before the run's end, nothing is
        logged: the training that went on has the same weights."""
        from rampart.tracking.models import log_model

        outputs = self.client.get_run(self.id).outputs
        for known in outputs.model_outputs if outputs else ():
            if self.client.get_logged_model(known.model_id).status == LoggedModelStatus.READY:
                return str(known.model_id)
        return log_model(model, example, self.scratch)
