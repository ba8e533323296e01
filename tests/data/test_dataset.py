"""Splits and digests."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rampart.data import Dataset, batches, load_dataset
from rampart.data.dataset import _digest
from rampart.data.sources import digits as digit_pools
from rampart.errors import SettingsError


def test_digits_are_what_the_interface_says(digits: Dataset) -> None:
    for split in (digits.train, digits.val, digits.test):
        assert split.images.dtype == torch.uint8
        assert split.labels.dtype == torch.int64
        assert split.images.shape == (len(split), 3, 32, 32)
    assert len(digits.train) + len(digits.val) + len(digits.test) == 1797
    assert digits.classes == tuple("0123456789")
    assert int(digits.train.images.max()) == 255


def _rows(images: torch.Tensor) -> list[bytes]:
    return sorted(image.numpy().tobytes() for image in images)


def test_the_split_is_complete_disjoint_stratified_and_seeded(digits: Dataset) -> None:
    pools = digit_pools()
    whole = torch.from_numpy(pools.train_images)
    assert _rows(torch.cat([digits.train.images, digits.val.images])) == _rows(whole)
    for label in range(10):
        total = int((torch.from_numpy(pools.train_labels) == label).sum())
        assert int((digits.val.labels == label).sum()) == round(0.2 * total)
    assert torch.equal(load_dataset("digits").val.images, digits.val.images)
    other = load_dataset("digits", seed=1)
    assert not torch.equal(other.val.images, digits.val.images)
    assert torch.equal(other.test.images, digits.test.images)
    assert len(load_dataset("digits", val_fraction=0.5).val) > 2 * len(digits.val)


def test_the_digest_is_of_the_images_and_labels_not_of_the_split(digits: Dataset) -> None:
    assert load_dataset("digits", seed=7, val_fraction=0.3).digest == digits.digest
    pools = digit_pools()
    assert _digest(pools) == digits.digest
    pools.test_images[0, 0, 5, 5] ^= 1
    assert _digest(pools) != digits.digest
    pools.test_images[0, 0, 5, 5] ^= 1
    pools.train_labels[3] = (pools.train_labels[3] + 1) % 10
    assert _digest(pools) != digits.digest


@pytest.mark.parametrize("name", ["digit", "cifar", "folders:x"])
def test_an_unknown_dataset_names_the_valid_ones(name: str) -> None:
    with pytest.raises(SettingsError, match="digits"):
        load_dataset(name)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5])
def test_a_split_leaves_images_on_both_sides(fraction: float) -> None:
    with pytest.raises(SettingsError, match="val_fraction"):
        load_dataset("digits", val_fraction=fraction)


def test_batches_cover_a_split_once_in_a_seeded_order(digits: Dataset) -> None:
    split = digits.val[slice(0, 33)]
    plain = torch.cat([x for x, _ in batches(split, 8)])
    assert torch.equal((plain * 255).round().to(torch.uint8), split.images)
    orders = [torch.cat([y for _, y in batches(split, 8, torch.Generator().manual_seed(s))]) for s in (0, 0, 1)]
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])
    assert np.array_equal(np.sort(orders[2]), np.sort(split.labels))
    sizes = [len(y) for _, y in batches(split, 8, drop_single=True)]
    assert sizes == [8, 8, 8, 8]
