"""Datasets: what they hold, how they are split, and what is said of those that cannot be loaded."""

from __future__ import annotations

import urllib.request
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from rampart.data import Dataset, load_dataset
from rampart.data import dataset as module
from rampart.data.sources import Pools
from rampart.errors import DataError, SettingsError


def keys(images: Tensor) -> list[bytes]:
    return [image.numpy().tobytes() for image in images]


def test_digits_are_colour_images_of_ten_classes(digits: Dataset) -> None:
    assert (digits.name, digits.classes, digits.in_shape) == ("digits", tuple("0123456789"), (3, 32, 32))
    for split in (digits.train, digits.val, digits.test):
        assert split.images.dtype == torch.uint8
        assert split.images.shape[1:] == (3, 32, 32)
        assert split.labels.dtype == torch.int64
        assert len(split) == len(split.images) == len(split.labels)
        assert (int(split.images.min()), int(split.images.max())) == (0, 255)
        assert split.labels.unique().tolist() == list(range(10))


def test_digits_are_those_of_scikit_learn(digits: Dataset) -> None:
    """Each enlarged four times, in three equal channels, and all of them in one of the splits."""
    raw = load_digits()
    whole = torch.cat([split.images for split in (digits.train, digits.val, digits.test)])
    labels = torch.cat([split.labels for split in (digits.train, digits.val, digits.test)])
    assert bool((whole == whole[:, :1]).all())
    blocks = whole[:, 0].unfold(1, 4, 4).unfold(2, 4, 4).flatten(3)
    assert bool((blocks == blocks[..., :1]).all())
    ours = sorted(zip(keys(blocks[..., 0]), labels.tolist(), strict=True))
    theirs = np.round(raw.images * 255 / 16).astype(np.uint8)
    assert ours == sorted(zip(keys(torch.from_numpy(theirs)), raw.target.tolist(), strict=True))


def test_every_class_is_split_by_the_same_share(digits: Dataset) -> None:
    for label in range(10):
        train, val, test = (int((split.labels == label).sum()) for split in (digits.train, digits.val, digits.test))
        assert val == pytest.approx(0.2 * (train + val), abs=0.5)
        assert test == pytest.approx(0.25 * (train + val + test), abs=1)


def test_a_seed_below_0_is_refused() -> None:
    with pytest.raises(SettingsError, match="seed"):
        load_dataset("digits", seed=-1)


def test_validation_images_of_a_class_do_not_come_together(digits: Dataset) -> None:
    """SupCon of a batch of one class says nothing."""
    for first in range(0, len(digits.val) - 64, 64):
        assert len(digits.val.labels[first : first + 64].unique()) == 10
    data = load_dataset("digits", val_fraction=0.5)
    assert int((data.val.labels.diff() == 0).sum()) < 0.2 * len(data.val)


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.5, 0.999])
def test_the_share_of_validation_is_what_was_asked_for_and_neither_side_is_empty(fraction: float) -> None:
    data = load_dataset("digits", val_fraction=fraction)
    for label in range(10):
        train, val = (int((split.labels == label).sum()) for split in (data.train, data.val))
        assert val == min(max(round(fraction * (train + val)), 1), train + val - 1)
        assert train >= 1


def test_train_and_validation_are_disjoint_and_complete_whatever_the_seed(digits: Dataset) -> None:
    pool = sorted(keys(digits.train.images) + keys(digits.val.images))
    for seed in (0, 1):
        other = load_dataset("digits", seed=seed)
        assert sorted(keys(other.train.images) + keys(other.val.images)) == pool
        assert len(other.val) == len(digits.val)


def test_the_seed_moves_the_split_and_never_the_test_images(digits: Dataset) -> None:
    again, other = load_dataset("digits", seed=42), load_dataset("digits", seed=1)
    assert torch.equal(again.val.images, digits.val.images)
    assert torch.equal(again.train.labels, digits.train.labels)
    assert not torch.equal(other.val.images, digits.val.images)
    assert torch.equal(other.test.images, digits.test.images)
    assert torch.equal(other.test.labels, digits.test.labels)


def test_the_digest_is_the_same_on_reload_and_whatever_the_split(digits: Dataset) -> None:
    assert load_dataset("digits").digest == digits.digest
    assert load_dataset("digits", val_fraction=0.5, seed=7).digest == digits.digest


def pools(**change: np.ndarray | tuple[str, ...]) -> Pools:
    rng = np.random.default_rng(0)
    whole = Pools(
        rng.integers(256, size=(8, 3, 4, 4), dtype=np.uint8), np.arange(8) % 2,
        rng.integers(256, size=(4, 3, 4, 4), dtype=np.uint8), np.arange(4) % 2, ("cat", "dog"),
    )  # fmt: skip
    return replace(whole, **change)


def loaded(found: Pools, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    monkeypatch.setitem(module.SOURCES, "digits", lambda root: found)
    return load_dataset("digits")


def test_the_digest_changes_with_every_pixel_label_and_class(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pools()
    changed = [whole, pools(classes=("cat", "cow"))]
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        array = getattr(whole, name).copy()
        array.flat[-1] = 1 - array.flat[-1] if "labels" in name else array.flat[-1] ^ 1
        changed.append(pools(**{name: array}))
    digests = [loaded(found, monkeypatch).digest for found in changed]
    assert len(set(digests)) == len(digests)
    assert loaded(pools(), monkeypatch).digest == digests[0]


def test_a_class_of_one_training_image_cannot_be_split(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="'dog' has 1 training image"):
        loaded(pools(train_labels=np.array([0] * 7 + [1])), monkeypatch)


def test_one_class_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    one = pools(train_labels=np.zeros(8, int), test_labels=np.zeros(4, int), classes=("cat",))
    with pytest.raises(DataError, match="one class"):
        loaded(one, monkeypatch)


@pytest.mark.parametrize(("given", "near"), [("digit", "digits"), ("cifar", "cifar10"), ("CIFAR10", "cifar10")])
def test_an_unknown_name_names_the_nearest(given: str, near: str) -> None:
    with pytest.raises(SettingsError, match=f"'{near}'") as raised:
        load_dataset(given)
    assert given in str(raised.value)
    assert "folder:PATH" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 20.0, float("nan")])
def test_a_share_that_leaves_nothing_is_refused(fraction: float) -> None:
    with pytest.raises(SettingsError, match="val_fraction"):
        load_dataset("digits", val_fraction=fraction)


def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def urlopen(*args: object, **settings: object) -> None:
        raise URLError("[Errno -3] Temporary failure in name resolution")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)


@pytest.mark.parametrize("state", ["absent", "broken archive"])
def test_without_cifar10_and_without_a_network_the_alternatives_are_named(
    state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_network(monkeypatch)
    root = tmp_path / "images"
    if state == "broken archive":
        root.mkdir()
        (root / "cifar-10-python.tar.gz").write_bytes(b"half of it")
    with pytest.raises(DataError) as raised:
        load_dataset("cifar10", root=str(root))
    message = str(raised.value)
    assert "\n" not in message
    for mention in (
        str(root),
        "name resolution",
        "cifar-10-python.tar.gz",
        "data_root=",
        "folder:PATH",
        "profile=quick",
    ):
        assert mention in message


def test_cifar10_has_its_channels_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchvision gives them, the last axis is the colour."""
    import torchvision.datasets

    class Stored:
        classes = ("plane", "car")

        def __init__(self, root: str, train: bool, download: bool) -> None:
            assert not download, "it is there"
            rng = np.random.default_rng(train)
            self.data = rng.integers(256, size=(20 if train else 6, 32, 32, 3), dtype=np.uint8)
            self.targets = [i % 2 for i in range(len(self.data))]

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Stored)
    data = load_dataset("cifar10")
    assert torch.equal(data.test.images.permute(0, 2, 3, 1), torch.from_numpy(Stored("", False, False).data))
    assert data.test.labels.tolist() == [0, 1] * 3
    assert data.classes == ("plane", "car")
    assert len(data.train) + len(data.val) == 20
    assert not Path("data").exists(), "nothing is written beside images that may not be ours"


def test_a_split_can_be_indexed_by_numbers_and_by_a_range(digits: Dataset) -> None:
    chosen = digits.test[torch.tensor([5, 2])]
    assert torch.equal(chosen.images, digits.test.images[[5, 2]])
    assert chosen.labels.tolist() == digits.test.labels[[5, 2]].tolist()
    assert len(digits.test[3:7]) == 4
