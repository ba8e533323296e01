"""worst_case_logits: their cross-entropy is above that of any logits with those margins."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rampart.losses import worst_case_logits


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
