"""CROWN for neurons of a convolution: coefficients kept in the neuron's receptive field alone.

A neuron three strided convolutions deep sees 15x15 pixels: carrying its coefficients as full maps, as dense CROWN does,
costs five to seven times the work and memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rampart.bounds.box import Box
from rampart.bounds.relaxation import relax
from rampart.models.chain import Conv, Link, ReLU, Scale


def convolutional(links: list[Link]) -> bool:
    """Whether every link keeps a map [C, H, W], so that neurons have receptive fields."""
    return all(isinstance(link, Conv | Scale | ReLU) and len(link_shape(link)) == 3 for link in links)


def link_shape(link: Link) -> tuple[int, ...]:
    return link.shape if isinstance(link, ReLU) else link.out_shape


def receptive_field(links: list[Link]) -> int:
    """Floats in the largest coefficient window of one output neuron."""
    height = width = 1
    largest = 1
    for link in reversed(links):
        if isinstance(link, Conv):
            kernel, stride, dilation = link.weight.shape[2:], link.stride, link.dilation
            height = (height - 1) * stride[0] + dilation[0] * (kernel[0] - 1) + 1
            width = (width - 1) * stride[1] + dilation[1] * (kernel[1] - 1) + 1
            largest = max(largest, link.in_shape[0] * height * width)
    return largest


def neuron_bounds(
    links: list[Link], boxes: dict[int, Box], box: Box, image: Tensor, neuron: Tensor
) -> tuple[Tensor, Tensor]:
    """CROWN's lower and upper bounds, both [R], of R single output neurons of a convolutional `links`.

    Args:
        boxes: bounds of each ReLU's input, by its place in `links`, for all images.
        image: [R] index of the image of each row.
        neuron: [R] index into the flattened output [C, H, W].
    """
    channels, height, width = link_shape(links[-1])
    rows = len(neuron)
    top, left = neuron // width % height, neuron % width
    a = F.one_hot(neuron // (height * width), channels).to(box.lower.dtype)
    # Rows 0..R bound the neuron from below, rows R..2R its negative.
    a = torch.cat([a, -a])[:, :, None, None]
    image, top, left = image.repeat(2), top.repeat(2), left.repeat(2)
    bound = a.new_zeros(2 * rows)
    inside = True  # whether a is zero on the zero padding around a map
    for place in range(len(links) - 1, -1, -1):
        link = links[place]
        if isinstance(link, ReLU):
            relaxed = relax(boxes[place])
            # Outside of the map all three are zero, which removes what a convolution put on its padding.
            lower_slope = _gather(relaxed.lower_slope, image, top, left, a)
            upper_slope = _gather(relaxed.upper_slope, image, top, left, a)
            negative = a.clamp(max=0)
            bound = bound + (negative * _gather(relaxed.intercept, image, top, left, a)).sum((1, 2, 3))
            a = a * lower_slope + negative * (upper_slope - lower_slope)
            inside = True
            continue
        if not inside:
            ones = torch.ones(1, *link_shape(link), device=a.device, dtype=a.dtype)
            a = a * _gather(ones, torch.zeros_like(image), top, left, a)
        assert isinstance(link, Conv | Scale)
        bound = bound + link.offset(a)
        if isinstance(link, Conv):
            a = F.conv_transpose2d(a, link.weight, None, link.stride, 0, 0, link.groups, link.dilation)
            top, left = top * link.stride[0] - link.padding[0], left * link.stride[1] - link.padding[1]
            inside = False
        else:
            a = link.pull(a)
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
