"""Weights on disk: safetensors of our own, and the study's plain arrays. Never pickle."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import numpy as np
import torch
from torch import Tensor, nn

from rampart.errors import ModelError
from rampart.files import replacing
from rampart.models.classifier import Classifier, build_model
from rampart.models.released import PREFIX, released

log = logging.getLogger(__name__)

# The study's module names -> ours.
STUDY_NAMES = {"encoder.encoder.": "encoder.features.", "encoder.proj.": "encoder.projection.", "classifier.": ""}


# What a file holds beside a model, of whoever wrote it.
BESIDE = "beside/"


def save_model(
    model: Classifier,
    path: str | Path,
    tensors: Mapping[str, Tensor] | None = None,
    numbers: Mapping[str, Any] | None = None,
) -> None:
    """Writes weights and architecture as safetensors; the file appears whole or not at all, and has a checksum.

    Args:
        tensors: what else the file shall hold, and `numbers` (anything that JSON knows); `read_beside` reads both.

    Raises:
        OSError: it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    held = dict(model.state_dict()) | {f"{BESIDE}{name}": value for name, value in (tensors or {}).items()}
    held = {name: value.detach().cpu().contiguous() for name, value in held.items()}
    told = {"architecture": json.dumps(asdict(model.architecture)), "beside": json.dumps(dict(numbers or {}))}
    try:
        with replacing(path) as partial:
            save_file(held, partial, metadata={**told, "digest": _digest(held, told)})
    except SafetensorError as error:  # its word for a full disk, too
        raise OSError(f"cannot write '{path}': {error}") from error


def read_beside(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and numbers that `save_model` has written beside a model.

    Raises:
        ModelError: the file is missing, broken or of another kind.
    """
    try:
        held, told = _read_checked(Path(path))
        found = {name.removeprefix(BESIDE): value for name, value in held.items() if name.startswith(BESIDE)}
        return found, json.loads(told["beside"])
    except ModelError:
        raise
    except Exception as error:  # safetensors and json share no base class
        raise _foreign(path, error) from error


def weights_digest(model: nn.Module) -> str:
    """Tells networks of the same architecture apart, wherever their weights came from."""
    return _digest(model.state_dict(), {})[:12]


def _digest(tensors: Mapping[str, Tensor], told: Mapping[str, str]) -> str:
    sha = hashlib.sha256(json.dumps(dict(told), sort_keys=True).encode() if told else b"")
    for name, value in sorted(tensors.items()):
        # As bytes, because NumPy has no bfloat16.
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        sha.update(f"{name}{tuple(value.shape)}".encode() + content)
    return sha.hexdigest()


def _foreign(path: str | Path, error: Exception) -> ModelError:
    reason = " ".join(str(error).split())[:200]
    return ModelError(f"'{path}' does not hold the weights of a known model: {reason}")


def load_model(path: str | Path) -> Classifier:
    """Reads `.safetensors` (ours), `.npz` (the study's) or `rampart:<arm>` (what came with the checkout) into a
    Classifier in eval mode, in float32 (a warning says where that rounds).

    Raises:
        ModelError: the file is missing, of another kind, does not fit the architecture, or holds NaN.
    """
    name = str(path)
    file = released(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else Path(path).expanduser()
    if name.startswith(PREFIX) and file.stem != name.removeprefix(PREFIX):
        log.info("'%s' stands for '%s%s', the arm with proofs that was released", name, PREFIX, file.stem)
    if name.startswith(("runs:/", "models:/")):
        raise ModelError(f"load_model reads files, not '{path}': take rampart.tracking.fetch_model")
    if not file.is_file():
        raise ModelError(f"no model file '{path}': give a .safetensors or .npz file, runs:/<run id>/model or models:/…")
    try:
        if file.suffix == ".npz":
            model, state = _read_study(file)
        elif file.suffix == ".safetensors":
            model, state = _read_safetensors(file)
        else:
            raise ModelError(f"'{path}' is no model file: expected .safetensors or .npz")
        model.load_state_dict(state)
        taken = model.state_dict()
        if not all(bool(value.isfinite().all()) for value in taken.values()):
            # No attack breaks an image of a network that gives NaN, and argmax makes a class of it.
            raise ModelError(f"'{path}' holds weights that are NaN or infinite: train or export it anew")
        if any(not torch.equal(taken[name].to(value.dtype), value) for name, value in state.items()):
            log.warning("'%s' holds more than float32: figures and verdicts are of its weights as rounded", path)
    except ModelError:
        raise
    except Exception as error:  # torch, numpy and safetensors share no base class for a broken or foreign file
        raise _foreign(path, error) from error
    return model.eval()


def _read_safetensors(file: Path) -> tuple[Classifier, dict[str, Tensor]]:
    held, told = _read_checked(file)
    if "architecture" not in told:
        raise ModelError(f"'{file}' does not say its architecture: save models with rampart.models.save_model")
    known = json.loads(told["architecture"])
    model = build_model(known["name"], tuple(known["in_shape"]), known["classes"], known["width"])
    return model, {name: value for name, value in held.items() if not name.startswith(BESIDE)}


def _read_checked(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and texts; a file without a checksum, of an older version, is taken as it is."""
    from safetensors import safe_open

    with safe_open(file, "pt") as stored:
        told = stored.metadata() or {}
        # Copies: the file may be written anew while they are in use.
        held = {name: stored.get_tensor(name).clone() for name in stored.keys()}  # noqa: SIM118 (not a dict)
    digest = told.pop("digest", None)
    if digest is not None and digest != _digest(held, told):
        raise ModelError(f"'{file}' is broken: its checksum does not match what it holds")
    return held, told


def _read_study(file: Path) -> tuple[Classifier, dict[str, Tensor]]:
    """The study's arrays: same architecture, other module names, no normalisation (it normalised its data)."""
    if not is_zipfile(file):  # NumPy would advise to load pickled objects
        raise ModelError(f"'{file}' is no .npz file, or is damaged: fetch it again")
    with np.load(file) as arrays:
        state = {}
        for name in arrays.files:
            ours = name
            for theirs, prefix in STUDY_NAMES.items():
                if name.startswith(theirs):
                    ours = prefix + name.removeprefix(theirs)
                    break
            state[ours.replace("classifier.", "head.")] = torch.from_numpy(arrays[name])
    if "head.weight" not in state:
        raise ModelError(f"'{file}' has no array 'classifier.classifier.weight': not a model of the study")
    model = build_model("paper-cnn", classes=len(state["head.weight"]))
    # The study's files lack the counters of BatchNorm and the constants of the normalisation.
    return model, {**{k: v for k, v in model.state_dict().items() if _constant(k)}, **state}


def _constant(name: str) -> bool:
    return name.startswith("normalize.") or name.endswith("num_batches_tracked")
