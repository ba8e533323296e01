"""Batches cover a split once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rampart.data import Split, batches, to_pixels


def numbered(count: int) -> Split:
    """Image i is all i, and so is its label."""
    numbers = torch.arange(count)
    return Split(numbers.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2).contiguous(), numbers)


@settings(max_examples=40, deadline=None)
@given(count=st.integers(0, 60), size=st.integers(1, 70), shuffled=st.booleans())
def test_every_image_comes_once_with_its_label(count: int, size: int, shuffled: bool) -> None:
    seen = []
    for x, y in batches(numbered(count), size, torch.Generator().manual_seed(0) if shuffled else None):
        assert x.shape == (len(y), 3, 2, 2)
        assert x.dtype == torch.float32
        assert len(y) == size or len(seen) + len(y) == count
        assert torch.equal((x[:, 0, 0, 0] * 255).round().long(), y)
        seen += y.tolist()
    assert sorted(seen) == list(range(count))
    if not shuffled:
        assert seen == list(range(count))


def test_a_generator_shuffles_and_its_seed_decides() -> None:
    def order(seed: int) -> list[int]:
        return torch.cat([y for _, y in batches(numbered(40), 8, torch.Generator().manual_seed(seed))]).tolist()

    assert order(1) == order(1)
    assert len({tuple(order(1)), tuple(order(2)), tuple(range(40))}) == 3


def test_every_epoch_of_one_generator_has_another_order() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.cat([y for _, y in batches(numbered(40), 8, generator)]) for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("count", "sizes"), [(9, [4, 4]), (10, [4, 4, 2]), (8, [4, 4]), (1, [])])
def test_a_last_batch_of_one_can_be_left_out(count: int, sizes: list[int]) -> None:
    assert [len(y) for _, y in batches(numbered(count), 4, drop_single=True)] == sizes


def test_without_drop_single_a_last_batch_of_one_is_kept() -> None:
    assert [len(y) for _, y in batches(numbered(9), 4)] == [4, 4, 1]


def test_pixels_are_shares_of_255() -> None:
    images = torch.tensor([0, 51, 255], dtype=torch.uint8)
    assert torch.allclose(to_pixels(images), torch.tensor([0.0, 0.2, 1.0]))
    assert images.dtype == torch.uint8
