"""worst_case_logits: their cross-entropy is above that of any logits with those margins."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rampart.bounds.box import Box
from rampart.losses import interval_regularizer, worst_case_logits


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 9999), classes=st.integers(2, 6), spread=st.sampled_from([0.1, 1.0, 20.0]))
def test_no_logits_with_these_margins_have_a_higher_loss(seed: int, classes: int, spread: float) -> None:
    torch.manual_seed(seed)
    logits, labels = torch.randn(8, classes).double() * spread, torch.randint(classes, (8,))
    margins = logits.gather(1, labels[:, None]) - logits
    below = margins - torch.rand(8, classes).double() * spread
    worst = F.cross_entropy(worst_case_logits(below, labels), labels, reduction="none")
    assert bool((worst >= F.cross_entropy(logits, labels, reduction="none") - 1e-12).all())


def test_exact_margins_give_the_exact_loss() -> None:
    logits, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    margins = logits.gather(1, labels[:, None]) - logits
    exact = F.cross_entropy(logits, labels, reduction="none")
    assert torch.allclose(F.cross_entropy(worst_case_logits(margins, labels), labels, reduction="none"), exact)


def test_the_entry_of_the_label_is_ignored_whatever_stands_there() -> None:
    margins = torch.tensor([[torch.inf, 1.0, -2.0], [0.5, torch.nan, 3.0]], requires_grad=True)
    logits = worst_case_logits(margins, torch.tensor([0, 1]))
    assert logits.tolist() == [[0.0, -1.0, 2.0], [-0.5, 0.0, -3.0]]
    F.cross_entropy(logits, torch.tensor([0, 1])).backward()
    assert margins.grad[0, 0] == margins.grad[1, 1] == 0
    assert bool(margins.grad.isfinite().all())


def box(lower: list[float], upper: list[float]) -> Box:
    return Box(torch.tensor([lower]), torch.tensor([upper]))


def test_the_regularizer_is_zero_where_intervals_keep_their_width_and_relus_are_balanced() -> None:
    """One active and one inactive neuron whose centres lie as far from 0 and from their mean; widths of the input."""
    balanced = box([1.0, -2.0], [2.0, -1.0])
    assert interval_regularizer(balanced, [balanced, balanced]).item() == 0


def test_the_regularizer_grows_with_the_width_of_intervals() -> None:
    """Widths four times the input's: a ratio of 1/4 where 1/2 is tolerated."""
    wide = box([1.0, -5.0], [5.0, -1.0])
    assert interval_regularizer(box([0.0], [1.0]), [wide]).item() == pytest.approx((0.5 - 0.25) / 0.5)


def test_the_regularizer_grows_as_active_and_inactive_neurons_lose_their_balance() -> None:
    """Sums of the centres 1.5 to 6; of their squared distances from the mean (-1.5): 9 to 9."""
    uneven = box([1.0, -5.0, -2.0], [2.0, -4.0, -1.0])
    spread = [(c + 1.5) ** 2 for c in (1.5, -4.5, -1.5)]
    ratio = min(spread[0], spread[1] + spread[2]) / max(spread[0], spread[1] + spread[2])
    expected = (max(0.5 - 1.5 / 6, 0) + max(0.5 - ratio, 0)) / 0.5
    assert interval_regularizer(box([0.0], [1.0]), [uneven]).item() == pytest.approx(expected)


def test_the_regularizer_of_relus_that_are_all_on_is_finite_with_a_finite_gradient() -> None:
    lower = torch.tensor([[1.0, 2.0]], requires_grad=True)
    value = interval_regularizer(box([0.0], [1.0]), [Box(lower, lower + 3)])
    value.backward()
    assert value.isfinite()
    assert bool(lower.grad.isfinite().all())
