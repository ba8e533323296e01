"""Neurons of a convolution on the way back, in CROWN and in a problem of unstable neurons: coefficients kept in the
neuron's receptive field alone.

A neuron three strided convolutions deep sees 15x15 pixels: carrying its coefficients as full maps, as dense CROWN does,
costs five to seven times the work and memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rampart.bounds.box import Box
from rampart.bounds.relaxation import Relaxation, lower_side
from rampart.bounds.rounding import SMALL, Single
from rampart.models.chain import Chain
from rampart.models.links import Add, Conv, Link, ReLU, Scale


class _Extent(NamedTuple):
    """Along one axis, a neuron at t sees `size` places from t * stride - before."""

    stride: int
    before: int
    size: int

    def through(self, stride: int, padding: int, reach: int) -> _Extent:
        """As seen through a convolution whose kernel reaches over `reach` places."""
        return _Extent(self.stride * stride, self.before * stride + padding, (self.size - 1) * stride + reach)

    def joined(self, other: _Extent) -> _Extent:
        before = max(self.before, other.before)
        after = max(self.size - self.before, other.size - other.before)
        return _Extent(self.stride, before, before + after)


def receptive_field(chain: Chain, value: int) -> int | None:
    """Coefficients in the largest window of one neuron of `value`; None where its neurons have no windows."""
    if value < 0:
        return None
    extents = {value: [_Extent(1, 0, 1)] * 2}
    largest = 1
    for place in reversed(chain.before(value)):
        link, (rows, columns) = chain.links[place], extents.pop(place)
        if not isinstance(link, Conv | Scale | ReLU | Add) or len(link.out_shape) != 3:
            return None
        largest = max(largest, link.out_shape[0] * rows.size * columns.size)
        if isinstance(link, Conv):
            rows, columns = (
                extent.through(stride, padding, span)
                for extent, stride, padding, span in zip(
                    (rows, columns), link.geometry.stride, link.geometry.padding, link.geometry.spans, strict=True
                )
            )
            largest = max(largest, link.in_shape[0] * rows.size * columns.size)
        for source in chain.sources[place]:
            other = extents.get(source, [rows, columns])
            if [o.stride for o in other] != [rows.stride, columns.stride]:
                return None  # branches that walk the map at different paces
            extents[source] = [rows.joined(other[0]), columns.joined(other[1])]
    return largest


class _Window(NamedTuple):
    """Coefficients a [R, h, w, C] of R rows, and the corners (top, left), [G], of the G windows that they share.

    Channels last: small maps of many channels are then one matrix product, and cut out in whole rows.
    `inside`: whether a is zero on the zero padding around the map.
    """

    a: Tensor
    top: Tensor
    left: Tensor
    inside: bool

    def joined(self, other: _Window) -> _Window:
        """The sum, in windows that hold both."""
        top, left = torch.minimum(self.top, other.top), torch.minimum(self.left, other.left)
        # Corners differ by as much in every window: branches walk the map at one pace.
        above, before = [int((w.top - top)[0]) for w in (self, other)], [int((w.left - left)[0]) for w in (self, other)]
        height = max(space + w.a.shape[1] for space, w in zip(above, (self, other), strict=True))
        width = max(space + w.a.shape[2] for space, w in zip(before, (self, other), strict=True))
        total = self.a.new_zeros(len(self.a), height, width, self.a.shape[3])
        for window, row, column in zip((self, other), above, before, strict=True):
            total[:, row : row + window.a.shape[1], column : column + window.a.shape[2]] += window.a
        return _Window(total, top, left, self.inside and other.inside)

    def through(self, link: Conv | Scale) -> _Window:
        """As coefficients of the link's input."""
        if isinstance(link, Scale):
            return self._replace(a=self.a * link.scale)
        _, stride, padding, _, _ = link.geometry
        top, left = self.top * stride[0] - padding[0], self.left * stride[1] - padding[1]
        return _Window(link.spread(self.a), top, left, False)


def lower_bounds(
    chain: Chain,
    value: int,
    relaxed: dict[int, Relaxation],
    box: Box,
    image: Tensor,
    neuron: Tensor,
    sign: Tensor,
    single: Single | None = None,
) -> tuple[Tensor, Tensor]:
    """CROWN's lower bounds, [R], of R single neurons of `value`, each times its sign, and what they allow for rounding.

    The value has a `receptive_field`.

    Args:
        relaxed: the relaxations of the ReLUs before it, by their places, for all images.
        image: [R] index of the image of each row.
        neuron: [R] index into the flattened value [C, H, W].
        sign: [R] of 1 (bounds the neuron from below) and -1 (minus the bound bounds it from above).
        single: the pass is in float32, and what it may round is taken off; else it is in the chain's type, of which
            nothing is taken off.
    """
    if single:
        chain, relaxed = single.chain, single.relaxed
    spots, start = _start(chain, value, image, neuron, sign)
    bound, lost = box.lower.new_zeros(len(neuron)), box.lower.new_zeros(len(neuron))

    def through(place: int, link: Link, window: _Window) -> _Window:
        nonlocal bound, lost
        a = window.a
        if isinstance(link, ReLU):
            relaxation = relaxed[place]
            # Outside of the map both are zero, which removes what a convolution put on its padding.
            negative, upper_slope = a.clamp(max=0), spots.cut(relaxation.upper_slope, window)
            constant = spots.cut(relaxation.intercept, window).mul_(negative).sum((1, 2, 3))
            bound += constant
            if single:
                lost += single.share[place] * constant.abs()
            kept = lower_side(a - negative, upper_slope)
            return window._replace(a=kept.addcmul_(negative, upper_slope), inside=True)
        assert isinstance(link, Conv | Scale)
        window = spots.inside(window, link)
        if single and isinstance(link, Conv):
            of_each = single.of_unit(place, value).amax((2, 3)).to(a.dtype)
            lost += (window.a.abs().sum((1, 2)) * of_each[image]).sum(1) + SMALL
        elif single:  # of the input, in float64
            window = window._replace(a=window.a.double())
        bound += _offset(window, link)
        return window.through(link)

    window = _walked(chain, value, start, through)
    a = window.a.to(box.lower.dtype)
    window = window._replace(a=a)
    bound += (a * spots.cut(box.center, window) - a.abs() * spots.cut(box.half, window)).sum((1, 2, 3))
    return bound - lost, lost


def pulled(
    chain: Chain, value: int, neuron: Tensor, passing: dict[int, Tensor], numbers: dict[int, Tensor], count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """One image's neurons of `value` as affine forms in the input and in some ReLUs: coefficients [R, I] and
    [R, count], and constants [R].

    The value has a `receptive_field`.

    Args:
        neuron: [R] index into the flattened value [C, H, W].
        passing: the ReLUs before it, by their places: maps [1, C, H, W] of 1 where a neuron passes on, 0 elsewhere.
        numbers: maps [1, C, H, W] of the numbers of columns, from 1: those of the ReLUs, by their places, 0 where a
            neuron has none, and at -1 those of the input.
        count: of the ReLUs' columns.
    """
    spots, start = _start(chain, value, torch.zeros_like(neuron), neuron, torch.ones_like(neuron))
    like = start.a
    # A column more, in which what has none is written.
    of_input, of_relu = (like.new_zeros(len(neuron), 1 + width) for width in (numbers[-1].numel(), count))
    constant = like.new_zeros(len(neuron))

    def write(rows: Tensor, place: int, window: _Window) -> None:
        rows.scatter_(1, spots.cut(numbers[place], window).flatten(1), window.a.flatten(1))

    def through(place: int, link: Link, window: _Window) -> _Window:
        nonlocal constant
        if isinstance(link, ReLU):
            if place in numbers:
                write(of_relu, place, window)
            return window._replace(a=window.a * spots.cut(passing[place], window), inside=True)
        assert isinstance(link, Conv | Scale)
        window = spots.inside(window, link)
        constant += _offset(window, link)
        return window.through(link)

    write(of_input, -1, _walked(chain, value, start, through))
    return of_input[:, 1:], of_relu[:, 1:], constant


class _Spots(NamedTuple):
    """Where R rows begin: all channels of a place of an image look through the same window, which is cut out once.

    Args:
        image: [G] index of the image of each place.
        shared: [R] index of each row's place.
    """

    image: Tensor
    shared: Tensor

    def cut(self, maps: Tensor, window: _Window) -> Tensor:
        """What maps [B, C, H, W] hold in each row's window, [R, h, w, C]; 0 outside of the map."""
        return _gather(maps, self.image, window.top, window.left, window.a).index_select(0, self.shared)

    def inside(self, window: _Window, link: Conv | Scale) -> _Window:
        """Without what stands on the padding around the link's output."""
        if window.inside:
            return window
        ones, first = window.a.new_ones(1, *link.out_shape), torch.zeros_like(self.image)  # alike for all images
        return window._replace(a=window.a * self._replace(image=first).cut(ones, window), inside=True)


def _start(chain: Chain, value: int, image: Tensor, neuron: Tensor, sign: Tensor) -> tuple[_Spots, _Window]:
    """R rows of single neurons of a value, times their signs; arguments as `lower_bounds`."""
    channels, height, width = chain.links[value].out_shape
    top, left = neuron // width % height, neuron % width
    a = torch.zeros(len(neuron), 1, 1, channels, dtype=chain.output.dtype, device=neuron.device)
    a[torch.arange(len(neuron), device=a.device), 0, 0, neuron // (height * width)] = sign.to(a.dtype)
    spot, shared = torch.unique((image * height + top) * width + left, return_inverse=True)
    window = _Window(a, spot // width % height, spot % width, True)
    return _Spots(spot // (height * width), shared), window


def _walked(chain: Chain, value: int, start: _Window, through: Callable[[int, Link, _Window], _Window]) -> _Window:
    """The windows that rows of a value have become at the input, gone `through` each ReLU and affine map on the way."""
    windows = {value: start}
    for place in reversed(chain.before(value)):
        window, link = windows.pop(place), chain.links[place]
        if not isinstance(link, Add):
            window = through(place, link, window)
        for source in chain.sources[place]:
            windows[source] = windows[source].joined(window) if source in windows else window
    return windows[-1]


def _offset(window: _Window, link: Conv | Scale) -> Tensor:
    """a · bias, [R]."""
    return window.a.sum((1, 2)) @ (link.bias if isinstance(link, Conv) else link.shift)


def _gather(maps: Tensor, image: Tensor, top: Tensor, left: Tensor, like: Tensor) -> Tensor:
    """Windows [G, h, w, C] of maps [B, C, H, W] with their corners at (top, left), all [G]; zero outside of the map."""
    height, width = like.shape[1:3]
    pad_top, pad_left = max(-int(top.min()), 0), max(-int(left.min()), 0)
    pad_bottom = max(int(top.max()) + height - maps.shape[2], 0)
    pad_right = max(int(left.max()) + width - maps.shape[3], 0)
    padded = F.pad(maps, (pad_left, pad_right, pad_top, pad_bottom)).permute(0, 2, 3, 1).contiguous()
    rows = (top + pad_top)[:, None] + torch.arange(height, device=top.device)
    columns = (left + pad_left)[:, None] + torch.arange(width, device=top.device)
    return padded[image[:, None, None], rows[:, :, None], columns[:, None, :]]
