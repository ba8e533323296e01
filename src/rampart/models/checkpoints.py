"""Weights on disk: safetensors of our own, and the study's plain arrays. Never pickle."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from rampart.errors import ModelError
from rampart.models.classifier import Classifier, build_model

# The study's module names -> ours.
STUDY_NAMES = {"encoder.encoder.": "encoder.features.", "encoder.proj.": "encoder.projection.", "classifier.": ""}


def save_model(model: Classifier, path: str | Path) -> None:
    """Writes weights and architecture as safetensors; the file appears whole or not at all."""
    from safetensors.torch import save_file

    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    partial = f"{path}.partial"
    save_file(tensors, partial, metadata={"architecture": json.dumps(asdict(model.architecture))})
    os.replace(partial, path)


def weights_digest(model: nn.Module) -> str:
    """Tells networks of the same architecture apart, wherever their weights came from."""
    sha = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        sha.update(f"{name}{tuple(value.shape)}".encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()[:12]


def load_model(path: str | Path) -> Classifier:
    """Reads `.safetensors` (ours) or `.npz` (the study's) into a Classifier in eval mode.

    Raises:
        ModelError: the file is missing, of another kind, or does not fit the architecture.
    """
    file = Path(path)
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
    except ModelError:
        raise
    except Exception as error:  # torch, numpy and safetensors share no base class for a broken or foreign file
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"'{path}' does not hold the weights of a known model: {reason}") from error
    return model.eval()


def _read_safetensors(file: Path) -> tuple[Classifier, dict[str, Tensor]]:
    from safetensors import safe_open

    with safe_open(file, "pt") as stored:
        metadata = stored.metadata() or {}
        if "architecture" not in metadata:
            raise ModelError(f"'{file}' does not say its architecture: save models with rampart.models.save_model")
        known = json.loads(metadata["architecture"])
        model = build_model(known["name"], tuple(known["in_shape"]), known["classes"], known["width"])
        return model, {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a dict)


def _read_study(file: Path) -> tuple[Classifier, dict[str, Tensor]]:
    """The study's arrays: same architecture, other module names, no normalisation (it normalised its data)."""
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
