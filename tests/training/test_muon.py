"""Muon against the singular value decomposition that it approximates."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rampart.models import build_model
from rampart.training import Recipe
from rampart.training.muon import COEFFICIENTS, ROUNDS, Muon, orthogonalized
from rampart.training.recipe import Contrastive
from rampart.training.state import Streams
from rampart.training.step import Step
from rampart.training.train import stages

SHAPES = [(6, 6), (4, 40), (40, 4), (1, 9), (64, 288)]


def scalar(x: Tensor) -> Tensor:
    """The iteration on singular values."""
    a, b, c = COEFFICIENTS
    for _ in range(ROUNDS):
        x = a * x + b * x**3 + c * x**5
    return x


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_vectors_stay_and_singular_values_come_near_to_1(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonalized(matrix)
    torch.testing.assert_close(found, u @ torch.diag(scalar(s / s.norm())) @ v, rtol=0, atol=1e-4)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_small_singular_values_are_no_worse_for_the_gram_matrix() -> None:
    """Whose own are their squares, here down to 1e-10 of the largest."""
    generator = torch.Generator().manual_seed(1)
    u, v = (torch.linalg.qr(torch.randn(n, 32, generator=generator))[0] for n in (32, 200))
    s = torch.logspace(0, -5, 32)
    found = orthogonalized(u @ torch.diag(s) @ v.T)
    torch.testing.assert_close(found, u @ torch.diag(scalar(s / s.norm())) @ v.T, rtol=0, atol=2e-4)


def test_a_gradient_of_zeros_moves_nothing() -> None:
    weight = nn.Parameter(torch.ones(3, 4))
    weight.grad = torch.zeros(3, 4)
    Muon([weight], lr=0.1).step()
    assert torch.equal(weight, torch.ones(3, 4))


def test_two_steps_are_those_of_the_equations() -> None:
    start, first, second = torch.randn(3, 5, 2, 3, 3, generator=torch.Generator().manual_seed(2))
    weight = nn.Parameter(start.clone())
    optimizer = Muon([weight], lr=0.01, momentum=0.9, weight_decay=0.1)
    expected, momentum = start.clone(), torch.zeros_like(start)
    for gradient in (first, second):
        weight.grad = gradient.clone()
        optimizer.step()
        decayed = gradient + 0.1 * expected
        momentum = 0.9 * momentum + decayed
        step = orthogonalized((decayed + 0.9 * momentum).reshape(5, 18)).reshape(start.shape)
        expected = expected - 0.01 * 0.2 * 18**0.5 * step
    torch.testing.assert_close(weight.detach(), expected)


def test_a_step_is_as_long_as_adams() -> None:
    """By their root mean square: a fifth of the learning rate, whatever the matrix's shape."""
    weight = nn.Parameter(torch.zeros(64, 288))
    optimizer = Muon([weight], lr=0.01)
    weight.grad = torch.randn(64, 288, generator=torch.Generator().manual_seed(3))
    optimizer.step()
    assert float(weight.detach().pow(2).mean().sqrt()) / 0.01 == pytest.approx(0.2, rel=0.2)


@pytest.mark.parametrize("contrastive", ["none", "double"])
def test_every_weight_has_one_optimiser(contrastive: Contrastive) -> None:
    recipe = Recipe(optimizer="muon", width=0.125, contrastive=contrastive)
    model = build_model("paper-cnn", (3, 32, 32), 10, recipe.width)
    heads = {id(weight) for weight in model.head.parameters()}
    for stage in stages(recipe, model):
        streams = Streams(torch.Generator(), torch.Generator())
        step = Step(stage.trained, model, stage.method, stage.criterion, recipe, streams)
        groups = [[w for group in o.param_groups for w in group["params"]] for o in step.optimizers]
        held = [id(weight) for group in groups for weight in group]
        assert sorted(held) == sorted(id(weight) for weight in stage.trained.parameters())
        orthogonal = groups[1] if len(groups) > 1 else []
        assert all(weight.dim() > 1 and id(weight) not in heads for weight in orthogonal)
        assert len(orthogonal) == (0 if stage.name == "head" else 5)
