"""Tighter bounds of neurons: sound at sampled points, where the network may err, and against an exact solver."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from rampart.bounds.domains import Domains, Parts, back, optimise
from rampart.bounds.narrowing import Starts, mattering, narrowed
from rampart.bounds.reduced import Reduced
from tests.problems import outputs, points, problem, values

NEVER = float("inf")


def conditioned(net: Reduced, target: float) -> tuple[Reduced, Parts]:
    """The problem with its outputs as neurons, and for each the part of the ball in which it is at most `target`."""
    bounds = optimise(net, Domains.roots(net, net.outputs), 20).bound
    wide = net.followed_by_outputs(bounds, target)
    count = len(bounds)
    parts = Parts.whole(wide, count)
    parts.signs[torch.arange(count), len(net.lower) + torch.arange(count)] = -1
    return wide, parts


@pytest.mark.parametrize("name", ["dense", "strided", "residual"])
@pytest.mark.parametrize("quantile", [0.02, 0.5])
def test_narrowed_bounds_hold_where_an_output_is_no_more_than_the_target(name: str, quantile: float) -> None:
    net, _, _, _ = problem(name, 0.05)
    x = points(net, 20_000)
    out = outputs(net, x)
    target = float(out[:, 0].quantile(quantile))
    wide, parts = conditioned(net, target)
    layer, count = len(net.layers) - 1, len(net.lower)
    plain = replace(parts, signs=torch.zeros_like(parts.signs))
    narrow, empty, _ = narrowed(wide, parts, layer, 10, NEVER)
    wider = narrowed(wide, plain, layer, 10, NEVER).parts
    v = values(net, x)
    for row in range(out.shape[1]):
        left = v[out[:, row] <= target]
        assert not (len(left) and bool(empty[row]))
        assert bool((left >= narrow.lower[row, :count] - 1e-4).all())
        assert bool((left <= narrow.upper[row, :count] + 1e-4).all())
        known = narrow.signs[row, :count]
        assert bool((left * known >= -1e-4).all())
    assert bool((out[:, 0] <= target).any())
    if quantile < 0.1:
        size = [float((p.upper - p.lower)[:, :count].clamp(min=0).sum()) for p in (narrow, wider)]
        assert size[0] < size[1]


def test_a_part_in_which_the_network_cannot_err_turns_out_empty() -> None:
    net, _, _, _ = problem("dense", 0.02)
    bounds = optimise(net, Domains.roots(net, net.outputs), 20).bound
    # Below what is proved already, there is nothing.
    wide, parts = conditioned(net, float(bounds.min()) - 1.0)
    for _ in range(5):
        parts, empty, _ = narrowed(wide, parts, len(net.layers) - 1, 10, NEVER)
        if bool(empty.all()):
            return
    pytest.fail(f"not empty: {(~empty).nonzero().squeeze(1).tolist()}")


def test_split_neurons_narrow_others() -> None:
    net, _, _, _ = problem("dense", 0.1)
    start, stop = net.layers[-1]
    parts = Parts.whole(net, 2)
    parts.signs[0, :start] = 1
    parts.signs[1, :start] = -1
    narrow = narrowed(net, parts, len(net.layers) - 1, 10, NEVER).parts
    v = values(net, points(net, 20_000))
    for row, sign in enumerate((1, -1)):
        left = v[(sign * v[:, :start] >= 0).all(1)][:, start:stop]
        assert bool((left >= narrow.lower[row, start:stop] - 1e-4).all())
        assert bool((left <= narrow.upper[row, start:stop] + 1e-4).all())
    assert bool((narrow.upper - narrow.lower < parts.upper - parts.lower - 1e-4)[:, start:stop].any())


@pytest.mark.parametrize("name", ["dense", "strided", "residual"])
def test_only_neurons_that_an_output_reads_from_above_matter_to_it(name: str) -> None:
    net, _, _, _ = problem(name, 0.05)
    layer = len(net.layers) - 1
    start, stop = net.layers[layer]
    seen = set()
    for output in range(len(net.outputs.constant)):
        (which,) = mattering(net, torch.tensor([output]), layer)
        # The whole ball, with bounds as they are, and twice as wide of the others, or of these.
        whole, factor = Parts.whole(net, 3), torch.ones(3, len(net.lower), dtype=net.lower.dtype)
        factor[1, start:stop] += (~which).to(factor)
        factor[2, start:stop] += which.to(factor)
        rows = net.outputs.at(torch.tensor([output] * 3))
        slopes = torch.rand(len(net.lower), dtype=net.lower.dtype).expand(3, -1)
        parts = Parts(whole.signs, whole.lower * factor, whole.upper * factor)
        bounds = back(net, Domains(rows, parts, slopes, torch.zeros_like(slopes))).bound.tolist()
        assert bounds[1] == pytest.approx(bounds[0], abs=1e-6)
        assert bounds[2] < bounds[0] - 1e-4 or not bool(which.any())
        seen.update(which.tolist())
    assert seen == {True, False}


def test_a_smaller_part_begins_where_the_larger_one_ended() -> None:
    net, _, _, _ = problem("strided", 0.05)
    last = len(net.layers) - 1
    start, stop = net.layers[last]
    whole = Parts.whole(net, 2)
    which = net.neurons.constant[start:stop] < net.neurons.constant[start:stop].median()
    first, _, starts = narrowed(net, whole, last, 10, NEVER, which)
    assert starts is not None
    changed = (first.lower > whole.lower) | (first.upper < whole.upper)
    assert bool(changed[:, start:stop][:, which].any())
    assert not bool(changed[:, start:stop][:, ~which].any())
    smaller = replace(first, signs=first.signs.clone())
    # By a neuron before them, and so that one of theirs is known and has no start to look for.
    smaller.signs[:, 0] = torch.tensor([1.0, -1.0])
    smaller.signs[1, start + int(which.nonzero()[0])] = 1
    # Without a step: the bounds are those of the slopes that they begin with.
    warm, cold = (narrowed(net, smaller, last, 0, NEVER, which, begin).parts for begin in (starts, None))
    whole_again = narrowed(net, whole, last, 0, NEVER, which, starts).parts
    # In float16 a slope is not quite what it was.
    assert torch.allclose(whole_again.lower, first.lower, atol=1e-2)
    assert torch.allclose(whole_again.upper, first.upper, atol=1e-2)
    width = [float((parts.upper - parts.lower)[:, start:stop].sum()) for parts in (warm, cold, first)]
    assert width[0] < width[1] <= width[2]
    v = values(net, points(net, 20_000))
    for row in range(2):
        signs = smaller.signs[row]
        left = v[(v * signs >= 0).all(1)]
        assert len(left)
        assert bool((left >= warm.lower[row] - 1e-4).all())
        assert bool((left <= warm.upper[row] + 1e-4).all())


def test_parts_that_are_narrowed_together_come_out_as_each_alone() -> None:
    net, _, _, _ = problem("strided", 0.05)
    last = len(net.layers) - 1
    start, stop = net.layers[last]
    both = Parts.whole(net, 2)
    both.signs[:, 0] = torch.tensor([1.0, -1.0])
    torch.manual_seed(2)
    which = torch.rand(2, stop - start) < 0.6
    # One more of these is known in each.
    for part in range(2):
        both.signs[part, start + int(which[part].nonzero()[part])] = 1
    alone: list[Starts] = []
    for begun in (None, True):  # then on from where they ended
        joined = Starts.joined(alone, stop - start) if begun else None
        together = narrowed(net, both, last, 5, NEVER, which, joined)
        assert together.starts is not None
        ended = []
        for part in range(2):
            mine = slice(part, part + 1)
            found = narrowed(net, both.at(mine), last, 5, NEVER, which[mine], alone[part] if begun else None)
            assert found.starts is not None
            assert torch.allclose(found.parts.lower, together.parts.lower[mine], atol=1e-5)
            assert torch.allclose(found.parts.upper, together.parts.upper[mine], atol=1e-5)
            own = together.starts.of_part(part, stop - start)
            assert torch.equal(own.place, found.starts.place)
            assert torch.allclose(own.slopes, found.starts.slopes, atol=1e-2)
            assert torch.allclose(own.multipliers, found.starts.multipliers, atol=1e-2)
            ended.append(found.starts)
        alone = ended


def test_without_time_there_is_no_start_for_smaller_parts() -> None:
    net, _, _, _ = problem("strided", 0.05)
    assert narrowed(net, Parts.whole(net, 1), len(net.layers) - 1, 10, time.perf_counter()).starts is None
