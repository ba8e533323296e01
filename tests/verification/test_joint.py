"""Neurons of a place bounded together: sound at sampled points of parts, and exact where branch and bound ends."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from rampart.bounds.domains import Domains, Parts, back, optimise
from rampart.bounds.reduced import Reduced
from rampart.verification import neurons
from rampart.verification.joint import charge, joint_gain
from rampart.verification.neurons import sites
from tests.problems import outputs, points, problem, values

NEVER = float("inf")


pytestmark = pytest.mark.usefixtures("everywhere")


def bounded(net: Reduced, signs: torch.Tensor, steps: int = 5) -> Domains:
    """The outputs over parts [D, U] of the ball, with slopes and multipliers of some steps."""
    rows = net.outputs.at(torch.arange(len(signs)) % len(net.outputs.constant))
    return optimise(net, Domains.over(rows, replace(Parts.whole(net, len(signs)), signs=signs)), steps).domains


@pytest.mark.parametrize("name", ["dense", "strided", "residual"])
def test_bounds_hold_at_every_point_of_a_part_and_some_rise(name: str) -> None:
    net, _, _, _ = problem(name, 0.1)
    count = 2 * len(net.outputs.constant)
    torch.manual_seed(0)
    signs = torch.zeros(count, len(net.lower))
    # The whole ball, then parts of it by one neuron before the sites and one of theirs.
    for part in range(count // 2, count):
        for start, stop in (net.layers[0], (net.layers[1][0], len(net.lower))):
            signs[part, int(torch.randint(start, stop, ()))] = 1 - 2 * (part % 2)
    domains = bounded(net, signs)
    domains.multipliers += 0.05 * torch.rand_like(domains.multipliers)
    before, relu, _ = back(net, domains)
    gain = joint_gain(net, domains, relu, sites(net), torch.full((count,), NEVER), NEVER)
    assert bool((gain >= 0).all())
    assert bool((gain[: count // 2] > 1e-3).any())
    x = points(net, 20_000)
    v, out = values(net, x), outputs(net, x)
    checked = 0
    for part in range(count):
        inside = (v * signs[part] >= 0).all(1)
        least = out[inside, part % out.shape[1]]
        assert bool((least >= (before + gain)[part] - 1e-4).all())
        checked += len(least) > 0
    assert checked > count // 2


def test_many_rounds_find_the_least_value_of_a_sites_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    net, _, _, _ = problem("strided", 0.1)
    few = [site for site in sites(net) if len(site.read) + len(site.which) <= 8]
    assert few
    domains = bounded(net, torch.zeros(len(net.outputs.constant), len(net.lower)))
    relu, (above, _) = back(net, domains).relu, domains.parts.above
    v = values(net, points(net, 50_000))
    monkeypatch.setattr(neurons, "ROUNDS", 60)
    monkeypatch.setattr(neurons, "DOMAIN_STEPS", 30)
    enough = torch.full((len(domains),), NEVER)
    for site in few:
        gain = joint_gain(net, domains, relu, [site], enough, NEVER)
        which = site.which
        r = relu[:, None, which]
        slope = torch.where(r < 0, above[:, None, which], domains.below[:, None, which])
        sampled = (r * (v[:, which].relu() - slope * v[:, which])).sum(2).amin(1)
        found = charge(relu, domains, [site])[:, 0] + gain
        assert bool((found <= sampled.clamp(max=0) + 1e-4).all())
        # Sampling comes near to the least value.
        assert bool((found >= sampled.clamp(max=0) - 0.1 * sampled.abs() - 1e-3).all())


def test_what_is_enough_or_late_is_not_gone_on_with() -> None:
    net, _, _, _ = problem("strided", 0.1)
    found = sites(net)
    domains = bounded(net, torch.zeros(len(net.outputs.constant), len(net.lower)))
    relu, none = back(net, domains).relu, torch.zeros(len(domains))
    whole = joint_gain(net, domains, relu, found, none + NEVER, NEVER)
    some = joint_gain(net, domains, relu, found, whole / 2, NEVER)
    assert bool((some <= whole + 1e-6).all())
    assert bool((some >= whole / 2 - 1e-6).all())
    assert bool((joint_gain(net, domains, relu, found, none - 1, NEVER) == 0).all())
    assert bool((joint_gain(net, domains, relu, found, none + NEVER, time.perf_counter()) == 0).all())
