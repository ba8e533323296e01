"""CROWN for neurons of a convolution: coefficients kept in the neuron's receptive field alone.

A neuron three strided convolutions deep sees 15x15 pixels: carrying its coefficients as full maps, as dense CROWN does,
costs five to seven times the work and memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rampart.bounds.box import Box
from rampart.bounds.relaxation import Relaxation
from rampart.models.chain import Chain
from rampart.models.links import Add, Conv, ReLU, Scale


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
                extent.through(link.stride[axis], link.padding[axis], _reach(link, axis))
                for axis, extent in enumerate((rows, columns))
            )
            largest = max(largest, link.in_shape[0] * rows.size * columns.size)
        for source in chain.sources[place]:
            other = extents.get(source, [rows, columns])
            if [o.stride for o in other] != [rows.stride, columns.stride]:
                return None  # branches that walk the map at different paces
            extents[source] = [rows.joined(other[0]), columns.joined(other[1])]
    return largest


def _reach(link: Conv, axis: int) -> int:
    return link.dilation[axis] * (link.weight.shape[2 + axis] - 1) + 1


class _Window(NamedTuple):
    """Coefficients a [R, C, h, w] of R rows, each with its corner at (top, left), [R], of its map.

    `inside`: whether a is zero on the zero padding around the map.
    """

    a: Tensor
    top: Tensor
    left: Tensor
    inside: bool

    def __add__(self, other: _Window) -> _Window:  # type: ignore[override]
        top, left = torch.minimum(self.top, other.top), torch.minimum(self.left, other.left)
        height, width = (
            max(
                int((mine - least)[0]) + self.a.shape[axis],
                int((theirs - least)[0]) + other.a.shape[axis],
            )
            for axis, mine, theirs, least in ((2, self.top, other.top, top), (3, self.left, other.left, left))
        )

        def placed(window: _Window) -> Tensor:
            above, before = int((window.top - top)[0]), int((window.left - left)[0])
            below, after = height - above - window.a.shape[2], width - before - window.a.shape[3]
            return F.pad(window.a, (before, after, above, below))

        return _Window(placed(self) + placed(other), top, left, self.inside and other.inside)


def neuron_bounds(
    chain: Chain, value: int, relaxed: dict[int, Relaxation], box: Box, image: Tensor, neuron: Tensor
) -> tuple[Tensor, Tensor]:
    """CROWN's lower and upper bounds, both [R], of R single neurons of `value`, which has a `receptive_field`.

    Args:
        relaxed: the relaxations of the ReLUs before it, by their places, for all images.
        image: [R] index of the image of each row.
        neuron: [R] index into the flattened value [C, H, W].
    """
    channels, height, width = chain.links[value].out_shape
    rows = len(neuron)
    top, left = neuron // width % height, neuron % width
    a = F.one_hot(neuron // (height * width), channels).to(box.lower.dtype)
    # Rows 0..R bound the neuron from below, rows R..2R its negative.
    a = torch.cat([a, -a])[:, :, None, None]
    image = image.repeat(2)
    windows = {value: _Window(a, top.repeat(2), left.repeat(2), True)}
    bound = a.new_zeros(2 * rows)
    for place in reversed(chain.before(value)):
        window, link = windows.pop(place), chain.links[place]
        a, top, left, _ = window
        if isinstance(link, ReLU):
            relaxation = relaxed[place]
            # Outside of the map all three are zero, which removes what a convolution put on its padding.
            lower_slope = _gather(relaxation.lower_slope, image, top, left, a)
            upper_slope = _gather(relaxation.upper_slope, image, top, left, a)
            negative = a.clamp(max=0)
            bound = bound + (negative * _gather(relaxation.intercept, image, top, left, a)).sum((1, 2, 3))
            window = window._replace(a=a * lower_slope + negative * (upper_slope - lower_slope), inside=True)
        elif not isinstance(link, Add):
            assert isinstance(link, Conv | Scale)
            if not window.inside:
                ones = torch.ones(1, *link.out_shape, device=a.device, dtype=a.dtype)
                a = a * _gather(ones, torch.zeros_like(image), top, left, a)
            bound = bound + link.offset(a)
            if isinstance(link, Conv):
                a = F.conv_transpose2d(a, link.weight, None, link.stride, 0, 0, link.groups, link.dilation)
                top, left = top * link.stride[0] - link.padding[0], left * link.stride[1] - link.padding[1]
                window = _Window(a, top, left, False)
            else:
                window = _Window(link.pull(a), top, left, True)
        for source in chain.sources[place]:
            windows[source] = windows[source] + window if source in windows else window
    a, top, left, _ = windows[-1]
    center, half = _gather(box.center, image, top, left, a), _gather(box.half, image, top, left, a)
    bound = bound + (a * center - a.abs() * half).sum((1, 2, 3))
    return bound[:rows], -bound[rows:]


def _gather(maps: Tensor, image: Tensor, top: Tensor, left: Tensor, like: Tensor) -> Tensor:
    """Windows [R, C, h, w] of maps [B, C, H, W] with their corners at (top, left); zero outside of the map."""
    height, width = like.shape[2:]
    if (height, width) == maps.shape[2:] == (1, 1):
        return maps[image]
    pad_top, pad_left = max(-int(top.min()), 0), max(-int(left.min()), 0)
    pad_bottom = max(int(top.max()) + height - maps.shape[2], 0)
    pad_right = max(int(left.max()) + width - maps.shape[3], 0)
    padded = F.pad(maps, (pad_left, pad_right, pad_top, pad_bottom)).permute(0, 2, 3, 1).contiguous()
    rows = (top + pad_top)[:, None] + torch.arange(height, device=top.device)
    columns = (left + pad_left)[:, None] + torch.arange(width, device=top.device)
    return padded[image[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
