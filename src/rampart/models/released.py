"""Where the trained weights lie that come with a checkout, and their checksums: `load_model("rampart:<arm>")`."""

from __future__ import annotations

import hashlib
from pathlib import Path

from rampart.errors import ModelError, unknown

PREFIX, SUFFIX = "rampart:", ".safetensors"
FOLDER = Path(__file__).parents[3] / "results" / "models"
# What they tell apart: CIFAR-10's.
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# By this method were trained what the study calls its certified arms.
CERTIFIED = "mtl-ibp"
# Of each arm the model of this seed.
SEED = "0"
# Of the form that `sha256sum --check` reads.
SUMS = "SHA256SUMS"


def released(name: str) -> Path:
    """The file of a released model, its checksum being right; `certified…` stands for the released arm with proofs.

    Raises:
        ModelError: there is none of that name, or it is not the one that was released.
    """
    known = _sums(FOLDER)
    if not known:
        raise ModelError(f"no model '{PREFIX}{name}': none came with this installation, nor lies in {FOLDER}")
    name = meant(name)
    if name + SUFFIX not in known:
        raise ModelError(unknown("released model", name, [file.removesuffix(SUFFIX) for file in known]))
    file = FOLDER / (name + SUFFIX)
    if not file.is_file() or _sum(file) != known[file.name]:
        raise ModelError(f"'{file}' is not the file that was released (its SHA-256 differs): check it out anew")
    return file


def meant(name: str) -> str:
    """The released arm that a name stands for."""
    method, plus, rest = name.partition("+")
    return CERTIFIED + plus + rest if method == "certified" and name + SUFFIX not in _sums(FOLDER) else name


def enter(file: Path) -> None:
    """Keeps the checksum of a model beside it."""
    sums = _sums(file.parent) | {file.name: _sum(file)}
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
    (file.parent / SUMS).write_text(lines, encoding="utf-8")


def _sum(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _sums(folder: Path) -> dict[str, str]:
    """File -> SHA-256."""
    listed = folder / SUMS
    lines = listed.read_text(encoding="utf-8").splitlines() if listed.is_file() else []
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
