"""CROWN: linear lower bounds propagated backwards (Zhang et al. 2018, theorem 3.2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from rampart.bounds import ibp, rounding, windows
from rampart.bounds.box import Box, lower_on
from rampart.bounds.relaxation import Relaxation, relax, through_relu
from rampart.bounds.rounding import Single
from rampart.models.chain import Chain
from rampart.models.links import Add, Conv, Dense, ReLU

# Memory in MiB for the coefficients held at once: 16 suited a CPU's caches best of 4 to 64. A GPU has so much to do at
# once only with many of them.
MEMORY, MEMORY_OF_A_GPU = 16, 4096

# What a bound in float32 may lose at most, as a share of its distance from the value at the box's centre.
SHARE = 0.01

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
        slopes: of the lower side; default 0 or 1, whichever leaves the smaller area. Sound whatever they are in
            [0, 1]; at stable ReLUs the default is exact.
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
            a, constant = through_relu(a, relaxation, None if slopes is None else slopes[place])
            bound = bound + constant
        elif not isinstance(link, Add):
            batch, rows = a.shape[:2]
            flat = a.flatten(0, 1)
            bound = bound + link.offset(flat).view(batch, rows)
            a = link.pull(flat).view(batch, rows, *link.in_shape)
        for source in chain.sources[place]:
            coefficients[source] = coefficients[source] + a if source in coefficients else a
    return lower_on(box, coefficients[-1]) + bound


def lower_bounds(chain: Chain, inputs: ibp.Intervals, box: Box, spec: Tensor, memory: int = MEMORY) -> Tensor:
    """`backward` from the output on as many images at once as `memory` (MiB) allows, and one at least.

    For use without gradients: what autograd keeps is not capped, and cutting into parts makes it slow.
    """
    return in_parts(
        lambda part: backward(
            chain, {place: at(bounds, part) for place, bounds in inputs.items()}, at(box, part), spec[part]
        ),
        len(spec),
        rows_at_once(widest(chain), memory, spec.dtype) // max(spec.shape[1], 1),
    )


def in_parts(bound: Callable[[slice], Tensor], count: int, size: int) -> Tensor:
    """`bound` of the indices 0 to count, `size` of them (at least one) at a time."""
    size = max(size, 1)
    return torch.cat([bound(slice(start, start + size)) for start in range(0, count, size)])


def memory_on(device: torch.device, asked: int = 0) -> int:
    """MiB: what is asked for, or where that is 0 what suits the device."""
    return asked or (MEMORY if device.type == "cpu" else MEMORY_OF_A_GPU)


def rows_at_once(count: int, memory: int, dtype: torch.dtype) -> int:
    """Rows of `count` coefficients that `memory` (MiB) holds: the ReLU step has about three tensors of their size."""
    return (memory << 20) // (dtype.itemsize * 3 * count)


def widest(chain: Chain, value: int | None = None) -> int:
    """Coefficients in the largest value up to `value` (default the output)."""
    places = chain.before(chain.last if value is None else value)
    return max(max(prod(chain.links[place].out_shape), _inputs_of(chain.links[place])) for place in places)


def row(chain: Chain, value: int) -> tuple[int, bool]:
    """The most coefficients that a single neuron of a value has on the way back, and whether they are carried as a
    window."""
    whole = widest(chain, value)
    field = windows.receptive_field(chain, value) or whole
    # Of neurons deep in a network, windows are larger than the maps: they lie on padding for the greater part.
    return min(field, whole), field < whole


def _inputs_of(link: object) -> int:
    return prod(getattr(link, "in_shape", (1,)))


def at(box: Box, images: Tensor | slice) -> Box:
    """The boxes of some images."""
    return Box(box.lower[images], box.upper[images])


def preactivations(chain: Chain, box: Box, memory: int = MEMORY, single: bool = False) -> ibp.Intervals:
    """CROWN bounds of every ReLU's input, by its place.

    With `single` those of a chain in float64 are computed in float32, less what that may have rounded, where it is
    little (`rounding.py`).

    A neuron that intervals show to be stable keeps those. Of the others the bound on the side of the neuron's value at
    the box's centre comes first: where it shows that the neuron is stable, the other side keeps its interval, since the
    relaxation of a stable ReLU is exact.
    """
    found: ibp.Intervals = {}
    inputs: ibp.Intervals = {}
    relaxed: dict[int, Relaxation] = {}
    middle: ibp.Intervals = {}
    rounded = Single.of(chain) if single else None
    for place in chain.relus:
        value = chain.sources[place][0]
        # Forward from the bounds found so far: the tighter these intervals, the fewer neurons are left to CROWN.
        found = ibp.intervals(chain, box, value, found)
        before = [chain.links[earlier] for earlier in chain.before(value)]
        maps = sum(isinstance(link, Conv | Dense) for link in before)
        # One linear map of a box: intervals are exact.
        if maps > 1 or any(isinstance(link, Add) for link in before):
            middle = ibp.intervals(chain, Box(box.center, box.center), value, middle)
            if rounded:
                rounded.learn(value, chain, found)
            pass_back = _Pass(chain, value, relaxed, box, memory, rounded)
            found[value] = _tighten(pass_back, found[value], middle[value].center)
        inputs[place] = found[value]
        relaxed[place] = relax(found[value])
    return inputs


def _tighten(passes: _Pass, loose: Box, middle: Tensor) -> Box:
    """Replaces the bounds of the unstable neurons of `loose` [B, *shape] by CROWN's, as told above."""
    lower, upper = loose.lower.flatten(1).clone(), loose.upper.flatten(1).clone()
    images, neurons = ((lower < 0) & (upper > 0)).nonzero(as_tuple=True)
    if not len(images):
        return loose
    center = middle.flatten(1)[images, neurons]

    def improve(which: Tensor, sign: Tensor) -> Tensor:
        """Writes the bounds and returns them, [R], times the sign."""
        image, neuron = images[which], neurons[which]
        bounds = passes.bounds(image, neuron, sign, center[which])
        below = sign > 0
        lower[image[below], neuron[below]] = bounds[below]
        upper[image[~below], neuron[~below]] = -bounds[~below]
        return bounds

    sign = torch.where(center > 0, 1, -1)
    unsettled = improve(torch.arange(len(images), device=images.device), sign) <= 0
    if bool(unsettled.any()):
        improve(unsettled.nonzero().squeeze(1), -sign[unsettled])
    return Box(lower.view_as(loose.lower), upper.view_as(loose.upper))


@dataclass
class _Pass:
    """Backward passes from single neurons of a value."""

    chain: Chain
    value: int
    relaxed: dict[int, Relaxation]
    box: Box
    memory: int
    single: Single | None

    @cached_property
    def row(self) -> tuple[int, bool]:
        return row(self.chain, self.value)

    def bounds(self, image: Tensor, neuron: Tensor, sign: Tensor, center: Tensor) -> Tensor:
        """Lower bounds [R] of neurons times their signs, whose values at the box's centre are given; in float32 where
        little is lost by that."""
        if not self.single or not self.single.fits:
            return self._bounds(image, neuron, sign, None)[0]
        bounds, lost = self._bounds(image, neuron, sign, self.single)
        much = ~((lost <= SHARE * (sign * center - bounds)) & bounds.isfinite())  # or NaN
        if bool(much.any()):
            bounds[much] = self._bounds(image[much], neuron[much], sign[much], None)[0]
        return bounds

    def _bounds(self, image: Tensor, neuron: Tensor, sign: Tensor, single: Single | None) -> tuple[Tensor, Tensor]:
        """And what they have lost, [R]."""
        length, windowed = self.row
        dtype = torch.float32 if single else self.box.lower.dtype
        size = max(rows_at_once(length, self.memory, dtype), 1)
        bound_rows = windows.lower_bounds if windowed else _neuron_bounds
        lengths = size if windowed else _lengths(image, size)
        found = [
            bound_rows(self.chain, self.value, self.relaxed, self.box, *part, single)
            for part in zip(image.split(lengths), neuron.split(lengths), sign.split(lengths), strict=True)
        ]
        bounds, lost = zip(*found, strict=True)
        return torch.cat(bounds), torch.cat(lost)


def _lengths(image: Tensor, size: int) -> list[int]:
    """Cuts rows [R], sorted by image, into parts of whole images, at most `size` rows when each image is padded to as
    many as the one with the most; an image of more rows than that is cut itself."""
    lengths, images, most = [0], 0, 0
    for count in torch.unique_consecutive(image, return_counts=True)[1].tolist():
        images, most = images + 1, max(most, count)
        if images * most > size and lengths[-1]:
            lengths.append(0)
            images, most = 1, count
        lengths[-1] += count
    return [min(size, length - start) for length in lengths for start in range(0, length, size)]


def _neuron_bounds(
    chain: Chain,
    value: int,
    relaxed: dict[int, Relaxation],
    box: Box,
    image: Tensor,
    neuron: Tensor,
    sign: Tensor,
    single: Single | None = None,
) -> tuple[Tensor, Tensor]:
    """As windows.lower_bounds, for any links: each neuron by a full row of a backward pass."""
    shape = chain.links[value].out_shape
    # The rows of an image stand together and share its relaxations, unless that takes too many rows that are empty.
    chosen, turn = torch.unique(image, return_inverse=True)
    counts = torch.bincount(turn)
    if len(chosen) * int(counts.max()) > 2 * len(image):
        chosen, turn = image, torch.arange(len(image), device=image.device)
        counts = torch.ones_like(turn)
    place = torch.arange(len(image), device=image.device) - (counts.cumsum(0) - counts)[turn]
    dtype = torch.float32 if single else box.lower.dtype
    rows = torch.zeros(len(chosen), int(counts.max()), prod(shape), dtype=dtype, device=image.device)
    rows[turn, place, neuron] = sign.to(dtype)
    rows = rows.view(*rows.shape[:2], *shape)
    if single:
        bounds, lost = rounding.backward(single, at(box, chosen), chosen, rows, value)
        return bounds[turn, place], lost[turn, place]
    needed = set(chain.before(value))
    own = {
        relu: Relaxation(*(tensor[chosen] for tensor in relaxation))
        for relu, relaxation in relaxed.items()
        if relu in needed
    }
    bounds = backward_relaxed(chain, own, at(box, chosen), rows, value)[turn, place]
    return bounds, torch.zeros_like(bounds)
