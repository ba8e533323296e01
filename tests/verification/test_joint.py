"""Neurons of a place bounded together: sound at sampled points of parts, and exact where branch and bound ends."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from torch import nn

from rampart.bounds.domains import Domains, Parts, back, optimise
from rampart.bounds.reduced import Reduced
from rampart.verification import neurons, verify
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


@pytest.mark.parametrize("scale", [1e-4, 1e-9])
def test_the_gain_is_on_the_scale_of_the_outputs(scale: float) -> None:
    """Small logits are no reason to give a charge back that nothing has shown to be too large."""
    net, _, _, _ = problem("strided", 0.1)
    domains = bounded(net, torch.zeros(len(net.outputs.constant), len(net.lower)))
    factor = torch.full((len(domains),), scale)
    small = replace(domains, rows=domains.rows.times(factor), multipliers=domains.multipliers * scale)
    usual, found = (
        joint_gain(net, d, back(net, d).relu, sites(net), torch.full((len(d),), NEVER), NEVER) for d in (domains, small)
    )
    torch.testing.assert_close(found / scale, usual, rtol=1e-3, atol=1e-4)


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


@pytest.mark.parametrize(("scale", "depth"), [(1e-8, 0.5), (1e-6, 0.9)])
def test_what_hides_in_the_ball_is_never_called_safe(scale: float, depth: float) -> None:
    """Class 1 where all four pixels are within a hundredth of 0.53, of whatever scale the logits are."""
    hidden, width = 0.53, 0.02
    away, near = nn.Conv2d(1, 2, 1), nn.Conv2d(2, 1, 1)
    count, last = nn.Linear(4, 1), nn.Linear(1, 2)
    with torch.no_grad():
        away.weight.copy_(torch.tensor([1.0, -1.0]).view(2, 1, 1, 1))
        away.bias.copy_(torch.tensor([-hidden, hidden]))
        near.weight.fill_(-1 / width)
        near.bias.fill_(1.0)
        count.weight.fill_(1.0)
        count.bias.fill_(-3.0)
        last.weight.copy_(torch.tensor([[-scale], [0.0]]))
        last.bias.copy_(torch.tensor([depth * scale, 0.0]))
    model = nn.Sequential(away, nn.ReLU(), near, nn.ReLU(), nn.Flatten(), count, nn.ReLU(), last).eval()
    assert int(model(torch.full((1, 1, 2, 2), hidden)).argmax()) == 1
    assert verify(model, torch.full((1, 2, 2), 0.5), 0, 0.1, 20.0).status != "safe"
