"""A network as its attackers see it: the same outputs, and gradients by its input alone, in less time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rampart.kernels import convolved
from rampart.models.chain import Chain, Layout
from rampart.models.geometry import Geometry
from rampart.models.links import Add, Conv, Dense, Flatten, ReLU, Scale


class Folded(nn.Module):
    """A network in eval mode whose BatchNorm is folded into the maps before it, with constant weights that lie in
    memory as they are read; its outputs are the network's up to rounding.

    Args:
        layout: of the network; `x` [B, C, H, W]: images that it takes.

    Raises:
        UnsupportedLayer: as Layout.
    """

    def __init__(self, layout: Layout, x: Tensor) -> None:
        super().__init__()
        with torch.no_grad():
            chain = layout.resolve(x[:1])
            self.calls = [_call(chain, place) for place in range(len(chain.links))]
        self.sources = chain.sources
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        values = {-1: x}
        for place, (call, sources) in enumerate(zip(self.calls, self.sources, strict=True)):
            values[place] = call(*(values[source] for source in sources))
        return values[len(self.calls) - 1]


def _call(chain: Chain, place: int) -> Callable[..., Tensor]:
    """What makes the value of the link at `place` of those that it reads."""
    link = chain.links[place]
    (source, *_) = chain.sources[place]
    before = chain.links[source] if source >= 0 else None
    if isinstance(link, Conv):
        return _conv(link)
    if isinstance(link, Scale):
        # One value for every pixel: three that are broadcast over channels last take seven times as long.
        pixels = link.in_shape[1:]
        shift, scale = (
            value.detach().expand(*pixels, -1).contiguous().movedim(-1, 0) for value in (link.shift, link.scale)
        )
        if convolved(scale) != torch.channels_last:
            shift, scale = shift.contiguous(), scale.contiguous()
        return lambda x: torch.addcmul(shift, x, scale)
    if isinstance(link, Dense):
        weight = link.weight.detach()
        if isinstance(before, Flatten) and _pixels_first(chain, source):
            weight = weight.view(len(weight), *before.in_shape).movedim(1, -1).flatten(1).contiguous()
        return partial(F.linear, weight=weight, bias=link.bias.detach())
    if isinstance(link, Flatten):
        return (lambda x: x.movedim(1, -1).flatten(1)) if _pixels_first(chain, place) else (lambda x: x.flatten(1))
    if isinstance(link, ReLU):
        # A value that nobody else needs, not even a gradient, is overwritten.
        alone = len(chain.readers(source)) == 1 and isinstance(before, Conv | Dense | Scale)
        return torch.relu_ if alone else torch.relu
    assert isinstance(link, Add)
    return torch.add


def _pixels_first(chain: Chain, flatten: int) -> bool:
    """Whether a flattened map's channels lie last in memory, and all that reads it can take them so."""
    readers, last = chain.readers(flatten), convolved(chain.output) == torch.channels_last
    return last and bool(readers) and all(isinstance(chain.links[place], Dense) for place in readers)


def _conv(link: Conv) -> Callable[[Tensor], Tensor]:
    _, stride, around, dilation, _ = link.geometry
    # PyTorch 2.8 reads past the memory of some dilated kernels whose channels lie last.
    layout = convolved(link.weight) if dilation == (1, 1) else torch.contiguous_format
    weight = link.weight.detach().contiguous(memory_format=layout)
    given = (weight, link.bias.detach(), stride, around, dilation, link.groups)
    if weight.device.type == "cpu" and weight.shape[1] < FEW and link.groups == 1 and _sub_pixels(link.geometry):
        kernel, padding, first = _sub_pixel_kernel(weight, stride[0], around[0])
        return lambda x: _SubPixel.apply(x, given, kernel, padding, first)
    return lambda x: F.conv2d(x, *given)


# Channels of an input below which PyTorch's gradient of a strided convolution is slow on a CPU.
FEW = 8


def _sub_pixels(geometry: Geometry) -> bool:
    """Whether an input has `stride` times as many rows and columns as the output; no dilation."""
    stride = geometry.stride[0]
    square = all(len(set(pair)) == 1 for pair in (geometry.kernel, geometry.stride, geometry.padding))
    times = geometry.in_size == tuple(stride * size for size in geometry.out_size)
    return square and times and stride > 1 and geometry.dilation == (1, 1)


def _sub_pixel_kernel(weight: Tensor, stride: int, padding: int) -> tuple[Tensor, int, int]:
    """The gradient by the input of a strided convolution with `weight` [out, in, K, K], as a convolution of stride 1 of
    the gradient by its output: (kernel [stride² · in, out, D, D], its padding, the first row and column that count).

    Input row s·i + r meets tap k of output row i + d where k = r + p - s·d: the `stride` rows r of one i are as many
    channels of a convolution over d (Shi et al. 2016, sub-pixel convolution).
    """
    size = weight.shape[2]
    low, high = -((size - 1 - padding) // stride), (stride - 1 + padding) // stride
    row, offset = torch.meshgrid(torch.arange(stride), torch.arange(low, high + 1), indexing="ij")
    tap = row + padding - stride * offset
    tap = torch.where((tap >= 0) & (tap < size), tap, size)  # `size`: a tap of zeros
    taps = F.pad(weight, (0, 1, 0, 1))[:, :, tap][..., tap]  # [out, in, r, d, r', d']
    kernel = taps.permute(2, 4, 1, 0, 3, 5).flatten(0, 2).contiguous(memory_format=torch.channels_last)
    around = max(-low, high)
    return kernel, around, low + around


class _SubPixel(torch.autograd.Function):
    """A strided convolution with the gradient by its input that `_sub_pixel_kernel` describes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, given: tuple[Any, ...], kernel: Tensor, padding: int, first: int) -> Tensor:
        ctx.kernel, ctx.stride, ctx.padding, ctx.first = kernel, given[2][0], padding, first
        return F.conv2d(x, *given)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        rows, columns = gradient.shape[2:]
        found = F.conv2d(gradient, ctx.kernel.to(gradient.dtype), None, 1, ctx.padding)
        found = found[:, :, ctx.first : ctx.first + rows, ctx.first : ctx.first + columns]
        # Not pixel_shuffle, which takes twice as long on channels that lie last.
        parts = found.unflatten(1, (ctx.stride, ctx.stride, -1)).permute(0, 4, 1, 5, 2, 3)
        return parts.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2), None, None, None, None
