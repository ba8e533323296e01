"""supcon_loss is equation (1) of the study, averaged over the anchors that have a positive."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rampart.errors import SettingsError
from rampart.losses import supcon_loss


def by_loops(embeddings: Tensor, labels: Tensor, temperature: float) -> float:
    """The equation, term by term, in plain Python."""
    rows = [[float(v) for v in row] for row in embeddings]
    z = [[v / math.sqrt(sum(w * w for w in row)) for v in row] for row in rows]

    def similarity(i: int, j: int) -> float:
        return sum(a * b for a, b in zip(z[i], z[j], strict=True)) / temperature

    terms = []
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        positives = [p for p in others if labels[p] == labels[i]]
        if positives:
            total = sum(math.exp(similarity(i, a)) for a in others)
            terms.append(-sum(math.log(math.exp(similarity(i, p)) / total) for p in positives) / len(positives))
    return sum(terms) / len(terms) if terms else 0.0


def test_what_is_no_batch_of_labelled_embeddings_is_refused() -> None:
    z, y = torch.rand(4, 3), torch.tensor([0, 1, 0, 1])
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(SettingsError, match="temperature"):
            supcon_loss(z, y, temperature)
    for labels in (y[:, None], y[:3]):
        with pytest.raises(SettingsError, match=r"labels \[B\]"):
            supcon_loss(z, labels)


@settings(max_examples=50, deadline=None)
@given(
    size=st.integers(1, 8), dims=st.integers(1, 5), classes=st.integers(1, 4), seed=st.integers(0, 999),
    temperature=st.sampled_from([0.07, 0.1, 0.5, 2.0]),
)  # fmt: skip
def test_equals_the_equation(size: int, dims: int, classes: int, seed: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(size, dims, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (size,), generator=generator)
    expected = by_loops(embeddings, labels, temperature)
    assert float(supcon_loss(embeddings, labels, temperature)) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_anchors_without_a_positive_only_push_others_away() -> None:
    embeddings, labels = torch.randn(5, 3).double(), torch.tensor([0, 0, 1, 2, 2])
    alone = torch.tensor([0, 1, 3, 4])
    value = supcon_loss(embeddings, labels, 0.1)
    assert float(value) == pytest.approx(by_loops(embeddings, labels, 0.1))
    # The third image is no anchor, but it stands in the other anchors' denominators.
    assert value > supcon_loss(embeddings[alone], labels[alone], 0.1)


@pytest.mark.parametrize("labels", [[3], [0, 1, 2, 3]], ids=["batch-of-one", "all-classes-once"])
def test_without_any_positive_loss_and_gradient_are_0(labels: list[int]) -> None:
    embeddings = torch.randn(len(labels), 4, requires_grad=True)
    value = supcon_loss(embeddings, torch.tensor(labels))
    value.backward()
    assert value.item() == 0
    assert torch.equal(embeddings.grad, torch.zeros_like(embeddings))


def test_one_class_alone_has_its_least_loss_where_all_embeddings_agree() -> None:
    labels = torch.zeros(6, dtype=torch.int64)
    together = supcon_loss(torch.ones(6, 3), labels, 0.1)
    assert float(together) == pytest.approx(math.log(5), rel=1e-5)
    assert supcon_loss(torch.randn(6, 3), labels, 0.1) > together


def test_separated_classes_have_a_lower_loss_than_mixed_ones() -> None:
    embeddings = torch.eye(2).repeat_interleave(4, 0)
    apart = torch.arange(2).repeat_interleave(4)
    assert supcon_loss(embeddings, apart) < supcon_loss(embeddings, apart.flip(0).roll(2))


def test_the_length_of_embeddings_does_not_matter() -> None:
    embeddings, labels = torch.randn(8, 4).double(), torch.arange(8) % 3
    scaled = embeddings * torch.rand(8, 1).double().add(0.1)
    assert float(supcon_loss(scaled, labels)) == pytest.approx(float(supcon_loss(embeddings, labels)), rel=1e-9)


def test_the_order_of_images_does_not_matter() -> None:
    embeddings, labels, order = torch.randn(8, 4).double(), torch.arange(8) % 3, torch.randperm(8)
    shuffled = supcon_loss(embeddings[order], labels[order])
    assert float(shuffled) == pytest.approx(float(supcon_loss(embeddings, labels)), rel=1e-9)


@pytest.mark.parametrize("labels", [[0, 0, 1, 1, 1, 2], [0] * 6], ids=["three-classes", "one-class"])
def test_the_gradient_is_that_of_the_value(labels: list[int]) -> None:
    embeddings = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: supcon_loss(z, torch.tensor(labels), 0.5), embeddings)


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1.0, 1e20])
def test_the_gradient_is_finite_whatever_the_length(scale: float) -> None:
    embeddings = (torch.randn(6, 3) * scale).requires_grad_()
    supcon_loss(embeddings, torch.tensor([0, 0, 0, 1, 1, 2]), 0.07).backward()
    assert bool(embeddings.grad.isfinite().all())


def test_equal_embeddings_of_other_classes_do_not_overflow() -> None:
    embeddings = torch.ones(6, 3, requires_grad=True)
    value = supcon_loss(embeddings, torch.tensor([0, 0, 1, 1, 2, 2]), 0.01)
    value.backward()
    assert value.item() == pytest.approx(math.log(5), rel=1e-4)
    assert bool(embeddings.grad.isfinite().all())
