"""Bounds of neurons in the whole ball: sound at sampled points, and, where branch and bound ends, exact."""

from __future__ import annotations

import time
from itertools import product

import pytest
import torch

from rampart.bounds.domains import Domains, Parts, optimise
from rampart.bounds.narrowing import narrowed
from rampart.bounds.reduced import Reduced
from rampart.verification import neurons
from rampart.verification.neurons import branched_bounds, site, sites, tightened
from rampart.verification.program import linear_program
from tests.problems import outputs, points, problem, values

NEVER = float("inf")


@pytest.mark.parametrize("name", ["dense", "strided", "residual"])
def test_tightened_bounds_hold_and_the_network_stays_the_same(name: str) -> None:
    net, _, _, _ = problem(name, 0.1)
    tight = tightened(net, NEVER)
    x = points(net)
    v = values(tight, x)
    assert bool((v >= tight.lower - 1e-4).all())
    assert bool((v <= tight.upper + 1e-4).all())
    assert torch.allclose(outputs(tight, x), outputs(net, x), rtol=1e-4, atol=1e-4)
    before, after = (optimise(n, Domains.roots(n, n.outputs), 20).bound for n in (net, tight))
    assert bool((after > before + 1e-4).any())
    assert bool((after > before - 1e-2).all())
    assert bool((outputs(net, x) >= after - 1e-4).all())


def test_without_time_nothing_is_tightened() -> None:
    net, _, _, _ = problem("strided", 0.1)
    tight = tightened(net, until=time.perf_counter())
    assert torch.equal(tight.lower, net.lower)
    assert torch.equal(tight.upper, net.upper)


def test_branch_and_bound_makes_the_neurons_of_a_map_tighter_than_slopes_alone() -> None:
    net, _, _, _ = problem("strided", 0.1)
    assert len(sites(net, 1)) > 1
    start, stop = net.layers[1]
    slopes = narrowed(net, Parts.whole(net, 1), 1, 50, NEVER).parts
    tight = tightened(net, NEVER)
    assert len(tight.layers) == len(net.layers)
    # Those found stable are gone: their width counts as 0.
    before = (slopes.upper - slopes.lower)[0, start:stop][slopes.signs[0, start:stop] == 0].sum()
    after = (tight.upper - tight.lower)[slice(*tight.layers[1])].sum()
    assert float(after) < 0.95 * float(before)


def exact(net: Reduced) -> torch.Tensor:
    """The outputs' smallest values, by a linear program for every pattern of signs."""
    rows = range(len(net.outputs.constant))
    patterns = [torch.tensor(signs) for signs in product((1.0, -1.0), repeat=len(net.lower))]
    programs = ([linear_program(net, net.outputs.at(slice(k, k + 1)), signs)[0] for signs in patterns] for k in rows)
    return torch.tensor([min(bounds) for bounds in programs])


@pytest.mark.parametrize("name", ["dense", "strided"])
def test_branch_and_bound_of_a_neuron_ends_at_its_exact_bounds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, _, _, _ = problem(name, 0.1)
    tried = [place for layer in range(1, len(net.layers)) for place in sites(net, layer)]
    alone = [found for found in (site(net, place) for place in tried) if len(found.lower) <= 7]
    assert alone
    for found in alone:
        true = exact(found).clamp(max=0)
        few = branched_bounds(found, NEVER)
        assert bool((few <= true + 1e-5).all())
        with monkeypatch.context() as patched:
            patched.setattr(neurons, "ROUNDS", 50)
            patched.setattr(neurons, "DOMAIN_STEPS", 50)
            all_rounds = branched_bounds(found, NEVER)
        assert all_rounds.tolist() == pytest.approx(true.tolist(), abs=2e-3)
        assert bool((all_rounds <= true + 1e-5).all())


@pytest.mark.parametrize("name", ["dense", "strided", "residual"])
def test_the_problem_of_some_neurons_gives_their_values(name: str) -> None:
    net, _, _, _ = problem(name, 0.1)
    x = points(net, 200)
    v = values(net, x)
    for layer in range(1, len(net.layers)):
        for which in sites(net, layer):
            alone = site(net, which)
            seen = (net.center[:, None] == alone.center).any(1) if len(alone.center) < len(net.center) else slice(None)
            got = outputs(alone, x[:, seen])
            width = (net.upper - net.lower)[which]
            assert torch.allclose(got[:, : len(which)] * width, v[:, which], rtol=1e-4, atol=1e-4)
            assert torch.allclose(-got[:, len(which) :] * width, v[:, which], rtol=1e-4, atol=1e-4)


def test_neurons_are_together_where_they_read_the_same() -> None:
    net, _, _, _ = problem("strided", 0.1)
    for layer, (start, stop) in enumerate(net.layers):
        places = sites(net, layer)
        assert sorted(torch.cat(places).tolist()) == list(range(start, stop))
        patterns = [(net.neurons.of_relu[place] != 0).unique(dim=0) for place in places]
        assert all(len(pattern) == 1 for pattern in patterns)
        assert len(torch.cat(patterns).unique(dim=0)) == len(places)
