"""Another verifier's answers to the questions that `rampart.verification.exchange` writes, in the files of VNN-COMP.

A line of results.csv is category, onnx, vnnlib, seconds of preparation, answer and seconds. The counterexamples of its
`sat` lie beside it as <onnx>_<vnnlib>.counterexample, or .counterexample.gz, in lines such as (X_0 0.25).
"""

from __future__ import annotations

import csv
import gzip
import logging
import re
import zlib
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from rampart.data import Split, to_pixels
from rampart.errors import Contradiction, RampartError
from rampart.ledger import eps_key
from rampart.models import double_copy, logits_of, weights_digest
from rampart.verification.exchange import question
from rampart.verification.verdict import Verdict, confirmed

log = logging.getLogger(__name__)

ANSWERS = {
    "unsat": "safe",
    "holds": "safe",
    "sat": "unsafe",
    "violated": "unsafe",
    "unknown": "unknown",
    "timeout": "timeout",
    "run_instance_timeout": "timeout",
    "error": "error",
}
EXAMPLE = ".counterexample"
# An input's number and value in a counterexample.
INPUT = re.compile(r"\(\s*X_(\d+)\s+([^\s()]+)\s*\)")


def read_results(path: Path, model: nn.Module, split: Split, images: list[int], eps: float) -> dict[int, Verdict]:
    """What another verifier answered on each of the images for these weights; `stage` is its category.

    An image without a line, as those that the model misclassifies, is `unknown`, and so is one that is called unsafe
    without a counterexample that the model confirms.

    Raises:
        RampartError: the file cannot be read, or speaks of none of these images at this ε for this model.
        Contradiction: it has two answers on one image.
    """
    digest = weights_digest(model)
    first = to_pixels(split.images[:1])
    with torch.no_grad():
        classes = logits_of(model, first).shape[1]
    names = {index: question(split, index, classes, eps) for index in images}
    wanted = {name: index for index, name in names.items()}
    found: dict[int, Verdict] = {}
    strange: set[str] = set()
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for line in filter(None, csv.reader(file)):
                category, graph, place, _, said, seconds = line[:6]
                index = wanted.get(_stem(place, ".vnnlib"))
                if index is not None and _stem(graph, ".onnx") == digest:
                    word = said.strip().lower()
                    status = ANSWERS.get(word, "unknown")
                    strange |= {word} - ANSWERS.keys()
                    answer = Verdict(status, float("nan"), None, 0, _seconds(seconds), category.strip())
                    if found.setdefault(index, answer).status != status:
                        raise Contradiction(f"{path} says of image {index} both {found[index].status} and {status}")
    except (OSError, ValueError, csv.Error) as error:
        raise RampartError(
            f"{path} cannot be read as a results.csv ({error}): its lines are category, onnx, vnnlib, seconds, "
            "answer, seconds"
        ) from error
    if not found:
        raise RampartError(
            f"{path} has no answer for this model ({digest}) on these images at ε {eps_key(eps)}: "
            "give model, dataset, images, selection and eps of the export"
        )
    if strange:
        log.warning("%s has answers that are none of %s, taken as unknown: %s", path, [*ANSWERS], sorted(strange))
    double = double_copy(model, first) or model
    for index, answer in found.items():
        if answer.status == "unsafe":
            example = path.with_name(f"{digest}_{names[index]}{EXAMPLE}")
            found[index] = _confirmed(answer, example, double, split, index, eps)
    nothing = Verdict("unknown", float("nan"), None, 0, 0.0, "none")
    return {index: found.get(index, nothing) for index in images}


def _confirmed(answer: Verdict, place: Path, model: nn.Module, split: Split, index: int, eps: float) -> Verdict:
    """The answer with its counterexample, which lies at `place`; unknown where the model does not confirm it."""
    image = to_pixels(split.images[index])
    try:
        example = _example(place, image)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        why = f"{place} cannot be read ({getattr(error, 'strerror', None) or error})"
    else:
        point = confirmed(model, example, image, int(split.labels[index]), eps)
        if point is not None:
            return replace(answer, counterexample=point)
        distance = float((example - image).abs().max())
        why = f"the model does not confirm {place}, whose distance to the image is {distance:.6g}"
    log.warning("image %d is called unsafe, but taken as unknown: %s", index, why)
    return replace(answer, status="unknown")


def _example(place: Path, image: Tensor) -> Tensor:
    packed = place.with_name(f"{place.name}.gz")
    text = gzip.decompress(packed.read_bytes()) if packed.exists() and not place.exists() else place.read_bytes()
    values = sorted((int(number), float(value)) for number, value in INPUT.findall(text.decode()))
    if [number for number, _ in values] != list(range(image.numel())):
        raise ValueError(f"it gives {len(values)} values, not one of each of the inputs X_0 to X_{image.numel() - 1}")
    point = torch.tensor([value for _, value in values]).to(image)
    return point.clamp(0, 1).reshape(image.shape)


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"no time: {text}")
    return seconds


def _stem(place: str, ending: str) -> str:
    return Path(place.strip()).name.removesuffix(".gz").removesuffix(ending)
