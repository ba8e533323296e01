"""Models in MLflow: logged as an exported graph and as plain weights, fetched as our class without pickle."""

from __future__ import annotations

import contextlib
import copy
import logging
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import mlflow
import numpy as np
import torch
from mlflow import MlflowClient
from mlflow.environment_variables import MLFLOW_ALLOW_PICKLE_DESERIALIZATION, MLFLOW_DEFAULT_PREDICTION_DEVICE
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.models.model import MLMODEL_FILE_NAME
from mlflow.types import Schema, TensorSpec

from rampart.arms import Arm
from rampart.errors import ModelError
from rampart.models import Classifier, load_model, save_model
from rampart.tracking import store

WEIGHTS = "model.safetensors"
MODEL_ID = re.compile(r"models:/(m-[0-9a-f]+)/?")


def log_model(model: Classifier, example: torch.Tensor, scratch: Path) -> str:
    """Logs `model` to the active run under the name `model` and returns its model_id; `example` is float [2, C, H, W]
    in [0, 1]."""
    import mlflow.pytorch

    # A graph that MLflow exports on a GPU would run on none but a GPU.
    model = copy.deepcopy(model).cpu()
    weights = scratch / WEIGHTS
    save_model(model, weights)
    shape, classes = model.architecture.in_shape, model.architecture.classes
    # Unnamed: with named tensors MLflow's torch flavour is handed a dictionary, which it refuses.
    signature = ModelSignature(
        Schema([TensorSpec(np.dtype(np.float32), (-1, *shape))]),
        Schema([TensorSpec(np.dtype(np.float32), (-1, classes))]),
    )
    with warnings.catch_warnings(), _unvalidated():
        warnings.simplefilter("ignore")
        logged = mlflow.pytorch.log_model(
            model,
            name="model",
            signature=signature,
            input_example=example.cpu().numpy(),
            # Given, because to find them out takes MLflow seconds.
            pip_requirements=[f"torch=={version('torch')}", f"mlflow=={version('mlflow')}"],
            extra_files=[str(weights)],
        )
    return str(logged.model_id)


@contextlib.contextmanager
def _unvalidated() -> Iterator[None]:
    """Where pickle is not allowed, MLflow cannot read the graph that it has just written to try its example, unless
    PyTorch is 2.10 or newer, and says so with each model. Nothing of ours reads that graph. Where MLflow can, it shall
    try it on a CPU, for which it was written, and not on a GPU."""
    logger = logging.getLogger("mlflow.models.model")
    level = logger.level
    if not MLFLOW_ALLOW_PICKLE_DESERIALIZATION.get():
        logger.setLevel(logging.ERROR)
    chosen = MLFLOW_DEFAULT_PREDICTION_DEVICE.is_set()
    if not chosen:
        MLFLOW_DEFAULT_PREDICTION_DEVICE.set("cpu")
    try:
        yield
    finally:
        logger.setLevel(level)
        if not chosen:
            MLFLOW_DEFAULT_PREDICTION_DEVICE.unset()


def registered_name(arm: Arm) -> str:
    """What an arm's models are called in the Model Registry."""
    return f"rampart-{arm.slug}"


def register(run_id: str, name: str, alias: str, reasons: Mapping[str, str] | None = None) -> None:
    """The run's model as a version of the registered model `name`, which `alias` then points to; the `reasons` become
    the version's tags rampart.<alias>.<name>.

    Raises:
        RampartError: the registry does not answer, or does not let the user do this.
    """
    client = MlflowClient()
    with contextlib.suppress(MlflowException):  # it is there already
        client.create_registered_model(name)
    with store.asking():
        known = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
        version = known[0] if known else client.create_model_version(name, f"runs:/{run_id}/model", run_id)
        client.set_registered_model_alias(name, alias, str(version.version))
        for key, text in (reasons or {}).items():
            client.set_model_version_tag(name, str(version.version), f"rampart.{alias}.{key}", text)


def fetch_model(uri: str | Path) -> Classifier:
    """The model at `runs:/<run id>/model`, `models:/<name>/<version>`, `models:/<name>@<alias>`, `models:/<id>`, or
    in a file.

    Also takes a run's weights file: `runs:/<run id>/checkpoints/even.safetensors`.

    Raises:
        ModelError: there is none, or it is no model of ours.
    """
    uri = str(uri)
    if not uri.startswith(("runs:/", "models:/")):
        return load_model(uri)
    with _downloaded(uri, "" if _is_file(uri) else f"extra_files/{WEIGHTS}") as path:
        return load_model(path)


@dataclass(frozen=True)
class Source:
    """Where a model came from.

    Args:
        run: the run that trained it; None for a file.
        model_id: of the logged model; None for a file, or for the weights that a training left on its way.
    """

    run: str | None = None
    model_id: str | None = None


def source_of(uri: str) -> Source:
    """Where the model at `uri`, as fetch_model takes it, came from.

    Raises:
        ModelError: there is none.
    """
    if not uri.startswith(("runs:/", "models:/")):
        return Source()
    if _is_file(uri):
        return Source(run=uri.removeprefix("runs:/").split("/")[0])
    # Not by get_model_info, which leaves what it downloads.
    with _downloaded(uri, MLMODEL_FILE_NAME) as path:
        found = Model.load(path)
    return Source(found.run_id, found.model_id)


def _is_file(uri: str) -> bool:
    return uri.endswith((".safetensors", ".npz"))


@contextlib.contextmanager
def _downloaded(uri: str, inside: str) -> Iterator[str]:
    """A local copy, for as long as it is needed, of what lies `inside` of the artifact at `uri`."""
    store.initialise()
    with tempfile.TemporaryDirectory(prefix="rampart-") as folder:
        try:
            # MLflow takes no path below a model's own id.
            logged = MODEL_ID.fullmatch(uri)
            place = mlflow.get_logged_model(logged[1]).artifact_location if logged else uri.rstrip("/")
            path = mlflow.artifacts.download_artifacts(f"{place}/{inside}".rstrip("/"), dst_path=folder)
        except (MlflowException, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ModelError(
                f"no model at '{uri}' ({reason}): give model=runs:/<run id>/model of a finished train run"
            ) from error
        yield path
