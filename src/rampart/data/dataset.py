"""Datasets as uint8 tensors with a seeded, stratified validation split."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rampart.data.sources import Pools, cifar10, digits, folder
from rampart.errors import DataError, require, unknown

SOURCES: dict[str, Callable[[str | None], Pools]] = {"cifar10": cifar10, "digits": digits}


@dataclass(frozen=True)
class Split:
    """`images` uint8 [N, C, H, W], `labels` int64 [N]; both on one device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Split:
        return Split(self.images.to(device), self.labels.to(device))

    def __getitem__(self, index: Tensor | slice) -> Split:
        return Split(self.images[index], self.labels[index])


@dataclass(frozen=True)
class Dataset:
    """Train, validation and test splits; `digest` identifies the images and labels, whatever the split."""

    name: str
    train: Split
    val: Split
    test: Split
    classes: tuple[str, ...]
    digest: str

    def to(self, device: torch.device | str) -> Dataset:
        return replace(self, train=self.train.to(device), val=self.val.to(device), test=self.test.to(device))

    @property
    def in_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        channels, height, width = self.test.images.shape[1:]
        return channels, height, width


def load_dataset(name: str, root: str | None = None, val_fraction: float = 0.2, seed: int = 42) -> Dataset:
    """Loads `digits`, `cifar10` or `folder:PATH` and splits its training images into train and validation.

    Args:
        name: `digits` (scikit-learn's 1,797 digits as 3x32x32), `cifar10` (torchvision's; read from `root`, downloaded
            into it if absent) or `folder:PATH` (`PATH/train/<class>/*` and `PATH/test/<class>/*`).
        root: the folder of `cifar10` (default `data`).
        val_fraction: share of each class's training images that go to validation, in (0, 1).
        seed: of the split alone.

    Raises:
        DataError: the data are missing, unreadable, or inconsistent. SettingsError: unknown name, bad fraction
            or seed.
    """
    require(0 < val_fraction < 1, f"val_fraction must lie between 0 and 1, not {val_fraction}")
    require(seed >= 0, f"the split's seed must be 0 or more, not {seed}")
    kind, _, path = name.partition(":")
    if kind == "folder":
        require(bool(path), "dataset 'folder' needs a path: dataset=folder:PATH with PATH/train/<class>/* and test/")
        pools = folder(path)
    else:
        require(name in SOURCES, unknown("dataset", name, [*SOURCES, "folder:PATH"]))
        pools = SOURCES[name](root)
    if len(pools.classes) < 2:
        raise DataError(f"dataset {name} has one class only ({pools.classes[0]}): nothing to tell apart")
    train, val = _stratified(pools.train_labels, val_fraction, seed, pools.classes)
    images, labels = torch.from_numpy(pools.train_images), torch.from_numpy(pools.train_labels)
    return Dataset(
        name=kind,
        train=Split(images[train], labels[train]),
        val=Split(images[val], labels[val]),
        test=Split(torch.from_numpy(pools.test_images), torch.from_numpy(pools.test_labels)),
        classes=pools.classes,
        digest=_digest(pools),
    )


def _stratified(
    labels: np.ndarray, fraction: float, seed: int, classes: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the train images, sorted, and of the validation images, in random order, as SupCon's batches must not
    be of one class; every class is split by the same fraction."""
    rng = np.random.default_rng(seed)
    val = []
    for label, name in enumerate(classes):
        members = rng.permutation(np.flatnonzero(labels == label))
        if len(members) < 2:
            raise DataError(f"class '{name}' has {len(members)} training image(s); a split needs two or more")
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        val.append(members[:count])
    chosen = rng.permutation(np.concatenate(val))
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen


def _digest(pools: Pools) -> str:
    sha = hashlib.sha256("\n".join(pools.classes).encode())
    for array in (pools.train_images, pools.train_labels, pools.test_images, pools.test_labels):
        sha.update(str(array.shape).encode())
        sha.update(np.ascontiguousarray(array).data)
    return sha.hexdigest()[:16]


def stratified_order(split: Split, seed: int) -> list[int]:
    """All images of the split in a seeded order in which the classes take turns."""
    rng = np.random.default_rng(seed)
    labels = split.labels.cpu().numpy()
    turn = np.empty(len(labels))
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        turn[members] = np.arange(len(members))
    # Within a turn the classes are shuffled, too, so that the first images are not always of class 0.
    return [int(i) for i in np.lexsort((rng.random(len(labels)), turn))]
