"""CROWN: linear lower bounds propagated backwards (Zhang et al. 2018, theorem 3.2)."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from rampart.bounds import ibp, windows
from rampart.bounds.box import Box, lower_on
from rampart.bounds.relaxation import Relaxation, relax
from rampart.models.chain import Chain
from rampart.models.links import Add, Conv, Dense, ReLU

# Memory in MiB for the coefficients held at once: 32 suited a CPU's caches best of 2 to 128.
MEMORY = 32

# Lower slopes in [0, 1] by the ReLU's place, [B, K, *shape] or [B, 1, *shape].
Slopes = dict[int, Tensor]


def backward(
    chain: Chain,
    inputs: ibp.Intervals,
    box: Box,
    a: Tensor,
    value: int | None = None,
    slopes: Slopes | None = None,
) -> Tensor:
    """Lower bounds [B, K] of a · value for every x in `box`.

    Args:
        inputs: bounds of each ReLU's input, by its place (`relax`ed here).
        a: [B, K, *shape of the value].
        value: default the output.
        slopes: of the lower side where a ReLU is unstable; default 0 or 1, whichever leaves the smaller area.
    """
    relaxed = {place: relax(inputs[place]) for place in inputs}
    return backward_relaxed(chain, relaxed, box, a, value, slopes)


def backward_relaxed(
    chain: Chain,
    relaxed: dict[int, Relaxation],
    box: Box,
    a: Tensor,
    value: int | None = None,
    slopes: Slopes | None = None,
) -> Tensor:
    """As `backward`, on relaxations made before."""
    start = chain.last if value is None else value
    coefficients = {start: a}
    bound: Tensor | float = 0.0
    for place in range(start, -1, -1):
        if place not in coefficients:
            continue
        a, link = coefficients.pop(place), chain.links[place]
        if isinstance(link, ReLU):
            relaxation = relaxed[place]
            lower_slope = relaxation.lower_slope[:, None]
            if slopes is not None:
                lower_slope = torch.where(relaxation.unstable[:, None], slopes[place], lower_slope)
            negative = a.clamp(max=0)
            bound = bound + (negative.flatten(2) @ relaxation.intercept.flatten(1)[:, :, None]).squeeze(2)
            a = a * lower_slope + negative * (relaxation.upper_slope[:, None] - lower_slope)
        elif not isinstance(link, Add):
            batch, rows = a.shape[:2]
            flat = a.flatten(0, 1)
            bound = bound + link.offset(flat).view(batch, rows)
            a = link.pull(flat).view(batch, rows, *link.in_shape)
        for source in chain.sources[place]:
            coefficients[source] = coefficients[source] + a if source in coefficients else a
    return lower_on(box, coefficients[-1]) + bound


def lower_bounds(chain: Chain, inputs: ibp.Intervals, box: Box, spec: Tensor, memory: int = MEMORY) -> Tensor:
    """`backward` from the output on as many images at once as `memory` (MiB) allows, and one at least."""
    return in_parts(
        lambda part: backward(
            chain, {place: at(bounds, part) for place, bounds in inputs.items()}, at(box, part), spec[part]
        ),
        len(spec),
        rows_at_once(widest(chain), memory) // max(spec.shape[1], 1),
        spec.device,
    )


def in_parts(bound: Callable[[Tensor], Tensor], count: int, size: int, device: torch.device) -> Tensor:
    """`bound` of the indices 0 to count, `size` of them (at least one) at a time."""
    return torch.cat([bound(part) for part in torch.arange(count, device=device).split(max(size, 1))])


def rows_at_once(floats: int, memory: int) -> int:
    """Rows of so many coefficients that `memory` (MiB) holds: the ReLU step has about three tensors of their size."""
    return (memory << 20) // (4 * 3 * floats)


def widest(chain: Chain, value: int | None = None) -> int:
    """Coefficients in the largest value up to `value` (default the output)."""
    places = chain.before(chain.last if value is None else value)
    return max(max(prod(chain.links[place].out_shape), _inputs_of(chain.links[place])) for place in places)


def _inputs_of(link: object) -> int:
    return prod(getattr(link, "in_shape", (1,)))


def at(box: Box, images: Tensor) -> Box:
    """The boxes of some images."""
    return Box(box.lower[images], box.upper[images])


def preactivations(chain: Chain, box: Box, memory: int = MEMORY) -> ibp.Intervals:
    """CROWN bounds of every ReLU's input, by its place; a neuron that intervals show to be stable keeps those."""
    found: ibp.Intervals = {}
    inputs: ibp.Intervals = {}
    for place in chain.relus:
        value = chain.sources[place][0]
        # Forward from the bounds found so far: the tighter these intervals, the fewer neurons are left to CROWN.
        found = ibp.intervals(chain, box, value, found)
        before = [chain.links[earlier] for earlier in chain.before(value)]
        maps = sum(isinstance(link, Conv | Dense) for link in before)
        # One linear map of a box: intervals are exact.
        if maps > 1 or any(isinstance(link, Add) for link in before):
            found[value] = _tighten(chain, value, inputs, box, found[value], memory)
        inputs[place] = found[value]
    return inputs


def _tighten(chain: Chain, value: int, inputs: ibp.Intervals, box: Box, loose: Box, memory: int) -> Box:
    """Replaces the bounds of the unstable neurons of `loose` [B, *shape] by CROWN's."""
    lower, upper = loose.lower.flatten(1).clone(), loose.upper.flatten(1).clone()
    images, neurons = ((lower < 0) & (upper > 0)).nonzero(as_tuple=True)
    if not len(images):
        return loose
    needed = chain.before(value)
    relaxed = {place: relax(bounds) for place, bounds in inputs.items() if place in needed}
    field = windows.receptive_field(chain, value)
    # Each neuron has two rows.
    size = rows_at_once(field or widest(chain, value), memory) // 2
    for part in torch.arange(len(images), device=images.device).split(max(size, 1)):
        image, neuron = images[part], neurons[part]
        if field is not None:
            below, above = windows.neuron_bounds(chain, value, relaxed, box, image, neuron)
        else:
            below, above = _neuron_bounds(chain, value, relaxed, box, image, neuron)
        lower[image, neuron], upper[image, neuron] = below, above
    return Box(lower.view_as(loose.lower), upper.view_as(loose.upper))


def _neuron_bounds(
    chain: Chain, value: int, relaxed: dict[int, Relaxation], box: Box, image: Tensor, neuron: Tensor
) -> tuple[Tensor, Tensor]:
    """As windows.neuron_bounds, for any links: each neuron by two full rows of a backward pass."""
    shape = chain.links[value].out_shape
    rows = torch.zeros(len(image), 2, prod(shape), dtype=box.lower.dtype, device=box.lower.device)
    rows[:, 0].scatter_(1, neuron[:, None], 1.0)
    rows[:, 1].scatter_(1, neuron[:, None], -1.0)
    own = {place: Relaxation(*(tensor[image] for tensor in relaxation)) for place, relaxation in relaxed.items()}
    bounds = backward_relaxed(chain, own, at(box, image), rows.view(len(image), 2, *shape), value)
    return bounds[:, 0], -bounds[:, 1]
