"""The choice of a neuron to split: how fast trees grow, and that the one of least growth is taken."""

from __future__ import annotations

import math

import pytest
import torch

from rampart.bounds.box import Box
from rampart.bounds.domains import Domains, optimise
from rampart.verification import choosing
from rampart.verification.choosing import growth, least_growth
from rampart.verification.splitting import Domain, Search
from tests.problems import problem


def leaves(one: float, other: float, missing: float = 1.0) -> float:
    """Of a tree in which every split gains so much in its two children."""
    return 1.0 if missing <= 1e-9 else leaves(one, other, missing - one) + leaves(one, other, missing - other)


def test_trees_grow_as_their_leaves_are_counted() -> None:
    one, other = torch.tensor([1.0, 0.5, 0.2, 1e-3, 1.0]), torch.tensor([1.0, 0.5, 0.2, 1e-3, 1e-3])
    rate = growth(one, other)
    assert torch.allclose(torch.exp(-rate * one) + torch.exp(-rate * other), torch.ones(5), atol=1e-5)
    assert rate.exp().tolist()[:3] == pytest.approx([2.0, 4.0, 32.0], rel=1e-4)
    assert [leaves(g, g) for g in (1.0, 0.5, 0.2)] == [2, 4, 32]


def test_a_small_gain_beside_a_proof_may_beat_two_larger_ones() -> None:
    unequal, equal = (1.0, 0.06), (0.16, 0.14)
    assert min(equal) > min(unequal)
    assert leaves(*unequal) < leaves(*equal)
    assert growth(*torch.tensor([unequal]).T) < growth(*torch.tensor([equal]).T)


@pytest.mark.parametrize("name", ["dense", "strided", "residual"])
def test_of_the_free_neurons_one_is_split_by_which_the_tree_grows_least(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without what narrowing would add, which no test can foresee.
    monkeypatch.setattr(choosing, "LEVER", 1.0)
    monkeypatch.setattr(choosing, "TRIED", 10**6)
    net, _, _, _ = problem(name, 0.1)
    roots = optimise(net, Domains.roots(net, net.outputs), 20)
    target = float(roots.bound.min()) + 0.3
    search = Search(net, len(net.lower), lambda _: None, target, math.inf, "kfsb", 64, 6, 10**6)
    parents = search.examine(torch.arange(len(roots.bound)), roots, roots.bound)
    assert parents
    for parent in parents:
        # One of the candidates is known, and may not be split.
        parent.signs[parent.candidates[0]] = 1
    neurons = Box(net.lower.repeat(len(parents), 1), net.upper.repeat(len(parents), 1))
    signs, of = least_growth(search, parents, neurons, len(net.layers) - 1)
    assert of.tolist() == [place for place in range(len(parents)) for _ in range(2)]

    def bound(parent: Domain, signs: torch.Tensor) -> torch.Tensor:
        domains = search.domains_of(
            [parent], torch.zeros(len(signs), dtype=torch.long), signs, Box(net.lower, net.upper)
        )
        return optimise(net, domains, choosing.STEPS, choosing.LR).bound

    for parent, pair in zip(parents, signs.unflatten(0, (-1, 2)), strict=True):
        before = parent.signs.to(net.lower)
        changed = (pair != before).nonzero()
        (neuron,) = {int(place) for place in changed[:, 1]}
        assert before[neuron] == 0
        assert pair[:, neuron].tolist() == [1, -1]
        last = [neuron for neuron in range(*net.layers[-1]) if before[neuron] == 0]
        rates = {}
        for other in {*last, *parent.candidates.tolist()} - {int(parent.candidates[0])}:
            tried = before.repeat(2, 1)
            tried[:, other] = torch.tensor([1.0, -1.0])
            own = bound(parent, before[None])
            gains = ((bound(parent, tried) - own) / (target - own)).clamp(choosing.LEAST_GAIN, 1)
            rates[other] = float(growth(*gains))
        assert neuron in rates
        # Some gain more than the least; the choice is made in float32.
        assert len(set(rates.values())) > 2
        assert rates[neuron] <= min(rates.values()) * 1.01
