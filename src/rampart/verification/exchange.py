"""Questions and answers in the files of the verification competition VNN-COMP, which every verifier reads.

A folder holds onnx/<digest of the weights>.onnx, vnnlib/image_<i>_eps_<ε>_<digest of the question>.vnnlib for each
image, and instances.csv, whose lines are onnx, vnnlib and a time limit. A verifier answers with results.csv, whose
lines are category, onnx, vnnlib, seconds of preparation, answer (unsat, sat, timeout, unknown…) and seconds
(`rampart.verification.answers`).
"""

from __future__ import annotations

import copy
import csv
import hashlib
import io
import logging
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor, nn

from rampart.bounds.box import pixel_box
from rampart.data import Split, to_pixels
from rampart.errors import ModelError, RampartError
from rampart.files import replacing
from rampart.ledger import eps_key
from rampart.models import predict, weights_digest

log = logging.getLogger(__name__)

INSTANCES = "instances.csv"
# Largest difference to the model that the exported graph may show, as a share of the largest logit.
TOLERANCE = 1e-5


def export(model: nn.Module, split: Split, images: list[int], eps: float, timeout: float, folder: Path) -> None:
    """Writes the model and, for each of the images that it classifies correctly, whether the ball around it is robust.
    Questions that a folder holds already stay.

    The graph takes pixels [B, C, H, W] in [0, 1] (normalisation inside) and gives logits; it is compared with the model
    on the images before anything else is written.

    Raises:
        ModelError: the model cannot be exported, or its graph does not do the same. RampartError: the folder cannot be
            written to.
    """
    if not images:
        log.warning("no image was chosen: nothing is exported to %s", folder)
        return
    try:
        for kind in ("onnx", "vnnlib"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RampartError(f"problems cannot be exported to {folder} ({error.strerror}): make it writable") from error
    graph = f"onnx/{weights_digest(model)}.onnx"
    x = to_pixels(split.images[torch.tensor(images, device=split.images.device)])
    _export_model(model, x, folder / graph)
    lines = []
    for index, image in zip(images, x, strict=True):
        label = int(split.labels[index])
        if int(predict(model, image[None])) != label:
            continue
        with torch.no_grad():
            classes = model(image[None]).shape[1]
        place = f"vnnlib/{question(split, index, classes, eps)}.vnnlib"
        if not (folder / place).exists():
            with replacing(folder / place) as partial:
                partial.write_text(_property(index, image, label, classes, eps), encoding="utf-8")
        lines.append((graph, place, f"{timeout:g}"))
    _add(lines, folder / INSTANCES)
    log.info("wrote %d of %d images, those classified correctly, to %s", len(lines), len(images), folder / INSTANCES)


def _add(lines: list[tuple[str, str, str]], path: Path) -> None:
    """Puts questions to those that stand there already: of other models, of other images."""
    with FileLock(f"{path}.lock"):  # a study's arms may export at the same time
        before = list(csv.reader(path.read_text(encoding="utf-8").splitlines())) if path.exists() else []
        known = {tuple(line[:2]): line for line in [*before, *map(list, lines)] if line}
        with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(known.values())


def question(split: Split, index: int, classes: int, eps: float) -> str:
    """What the file about an image is called, less its ending: also by a digest of what it says, for in another dataset
    the index is another image's."""
    said = f"{int(split.labels[index])} {classes} {eps!r}".encode() + split.images[index].cpu().numpy().tobytes()
    return f"image_{index}_eps_{eps_key(eps)}_{hashlib.sha256(said).hexdigest()[:12]}"


def _export_model(model: nn.Module, x: Tensor, path: Path) -> None:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  torch's exporter needs it
    except ImportError as error:
        raise RampartError(f"export needs onnx, onnxscript and onnxruntime ({error}): pip install them") from error
    model, x = copy.deepcopy(model).cpu(), x.cpu()
    batch = torch.export.Dim("batch")
    with replacing(path) as partial:
        try:
            with redirect_stdout(io.StringIO()):
                # Of a batch of one the exporter would make a graph for batches of one.
                example = x[:1].repeat(2, 1, 1, 1)
                program = torch.onnx.export(model, (example,), dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
            assert program is not None
            program.save(str(partial))
        except Exception as error:  # the exporter raises many kinds
            reason = " ".join(str(error).split())[:160]
            raise ModelError(f"the model cannot be exported to ONNX ({reason})") from error
        session = onnxruntime.InferenceSession(str(partial), providers=["CPUExecutionProvider"])
        (given,) = session.get_inputs()
        with torch.no_grad():
            ours = torch.cat([model(part) for part in x.split(256)]).numpy()
        theirs = np.concatenate([session.run(None, {given.name: part.numpy()})[0] for part in x.split(256)])
        difference = float(np.abs(ours - theirs).max())
        if not difference <= TOLERANCE * max(1.0, float(np.abs(ours).max())):
            raise ModelError(f"the exported graph differs from the model by {difference:.3g}: nothing was exported")


def _property(index: int, image: Tensor, label: int, classes: int, eps: float) -> str:
    """The negation of robustness as VNN-LIB: a point of the ball cut to [0, 1] with another logit as large."""
    box = pixel_box(image[None], eps)
    text = [f"; image {index}, label {label}, radius {eps!r} in pixels"]
    text += [f"(declare-const X_{i} Real)" for i in range(image.numel())]
    text += [f"(declare-const Y_{j} Real)" for j in range(classes)]
    ends = zip(box.lower.flatten().tolist(), box.upper.flatten().tolist(), strict=True)
    for i, (low, high) in enumerate(ends):  # in full, and never as 1e-5, which some parsers do not read
        text += [
            f"(assert ({sign} X_{i} {np.format_float_positional(end, trim='0')}))"
            for sign, end in ((">=", low), ("<=", high))
        ]
    others = " ".join(f"(and (>= Y_{j} Y_{label}))" for j in range(classes) if j != label)
    return "\n".join([*text, f"(assert (or {others}))"]) + "\n"
