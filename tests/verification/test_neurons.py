"""Bounds of neurons in the whole ball: sound at sampled points, and, where branch and bound ends, exact."""

from __future__ import annotations

import time
from itertools import product

import pytest
import torch

from rampart.bounds.domains import Domains, Parts, optimise
from rampart.bounds.narrowing import narrowed
from rampart.bounds.reduced import Reduced, Rows
from rampart.verification import neurons
from rampart.verification.neurons import Site, branched_bounds, sites, sites_of, tightened
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


@pytest.mark.usefixtures("everywhere")
def test_branch_and_bound_makes_the_neurons_of_a_map_tighter_than_slopes_alone() -> None:
    net, _, _, _ = problem("strided", 0.1)
    start, stop = net.layers[1]
    slopes = narrowed(net, Parts.whole(net, 1), 1, 50, NEVER).parts
    tight = tightened(net, NEVER)
    assert len(tight.layers) == len(net.layers)
    # Those found stable are gone: their width counts as 0.
    before = (slopes.upper - slopes.lower)[0, start:stop][slopes.signs[0, start:stop] == 0].sum()
    after = (tight.upper - tight.lower)[slice(*tight.layers[1])].sum()
    assert float(after) < 0.95 * float(before)


def test_neurons_that_read_much_are_not_split_for() -> None:
    net, _, _, _ = problem("strided", 0.1)
    assert sites(net) == []


def exact(net: Reduced) -> torch.Tensor:
    """The outputs' smallest values, by a linear program for every pattern of signs."""
    rows = range(len(net.outputs.constant))
    patterns = [torch.tensor(signs) for signs in product((1.0, -1.0), repeat=len(net.lower))]
    programs = ([linear_program(net, net.outputs.at(slice(k, k + 1)), signs)[0] for signs in patterns] for k in rows)
    return torch.tensor([min(bounds) for bounds in programs])


def both_ends(net: Reduced, site: Site) -> Reduced:
    """The problem of a site's neurons and of their negatives."""
    rows = net.neurons.at(site.which)
    return site.problem(net, Rows.joined([rows, rows.times(-torch.ones(len(site.which)))]), with_own=False)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("name", ["dense", "strided"])
def test_branch_and_bound_of_a_neuron_ends_at_its_exact_bounds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, _, _, _ = problem(name, 0.1)
    tried = [site for site in sites(net) if len(site.read) <= 7]
    assert tried
    for site in tried:
        alone = both_ends(net, site)
        true = exact(alone).clamp(max=0)
        few = branched_bounds(alone, NEVER)
        assert bool((few <= true + 1e-5).all())
        ends = site.ends(net, NEVER)
        assert bool((ends.lower <= true[: len(site.which)] + 1e-5).all())
        assert bool((ends.upper >= -true[len(site.which) :] - 1e-5).all())
        with monkeypatch.context() as patched:
            patched.setattr(neurons, "ROUNDS", 50)
            patched.setattr(neurons, "DOMAIN_STEPS", 50)
            all_rounds = branched_bounds(alone, NEVER)
        assert all_rounds.tolist() == pytest.approx(true.tolist(), abs=2e-3)
        assert bool((all_rounds <= true + 1e-5).all())


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("name", ["dense", "strided", "residual"])
def test_the_problem_of_a_site_gives_its_neurons_values(name: str) -> None:
    net, _, _, _ = problem(name, 0.1)
    x = points(net, 200)
    v = values(net, x)
    for site in sites(net):
        got = outputs(both_ends(net, site), x[:, site.seen])
        assert torch.allclose(got, torch.cat([v[:, site.which], -v[:, site.which]], 1), rtol=1e-4, atol=1e-4)
        alone = site.problem(net, net.outputs, with_own=True)
        assert torch.allclose(values(alone, x[:, site.seen])[:, len(site.read) :], v[:, site.which], atol=1e-4)


@pytest.mark.usefixtures("everywhere")
def test_neurons_are_together_where_one_reads_all_that_the_others_read() -> None:
    net, _, _, _ = problem("strided", 0.1)
    for layer, (start, stop) in list(enumerate(net.layers))[1:]:
        found = sites_of(net, layer)
        assert sorted(torch.cat([site.which for site in found]).tolist()) == list(range(start, stop))
        read = [(net.neurons.of_relu[site.which] != 0) for site in found]
        assert all(bool((rows.sum(1) == rows.any(0).sum()).any()) for rows in read)
        # Nor could one of the sites be part of another.
        whole = [rows.any(0) for rows in read]
        assert not any(bool((a <= b).all()) for k, a in enumerate(whole) for b in whole[:k])


def test_neurons_that_read_no_other_are_left_as_they_are() -> None:
    net, _, _, _ = problem("strided", 0.1)
    start, stop = net.layers[1]
    net.neurons.of_relu[start:stop] = 0
    assert sites_of(net, 1) == []
    tight = tightened(net, NEVER)
    assert bool((values(tight, points(net)) >= tight.lower - 1e-4).all())
    net.neurons.of_relu[start, 0] = 1.0
    (site,) = sites_of(net, 1)
    assert site.which.tolist() == [start]
