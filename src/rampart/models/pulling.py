"""The transpose of a convolution as products of matrices, on a GPU.

cuDNN's kernels for the transpose of a strided convolution in float32, and for its gradient by the weights, are slow for
many maps: on an H200 they take 4 to 12 and 2 to 4 ms for the 16,384 of a step of CROWN on embeddings, where these
products take 0.4 to 1.3. What is left is to move numbers to their places and back, each in one pass over memory (in
Triton, which comes with PyTorch for GPUs).
"""

# Annotations are not postponed, and programs for the GPU have no others than Triton's: it reads them.
from math import gcd, prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rampart.models.geometry import Geometry

# Numbers that a program of the GPU writes.
BLOCK = 1024


def pull(a: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Coefficients a [N, out, *out_size] of a convolution's output as those of its input, [N, in, *in_size]; weight
    [out, in, *kernel], of one group. Channels lie last in memory."""
    pulled: Tensor = _Pull.apply(a, weight, geometry)
    return pulled


class _Pull(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(a, weight)
        ctx.geometry = geometry
        return fold(_last(a) @ _matrix(weight), geometry).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, of_image: Tensor) -> tuple[Tensor | None, ...]:
        a, weight = ctx.saved_tensors
        matrix = _matrix(weight)
        columns = unfold(of_image.permute(0, 2, 3, 1), ctx.geometry)
        to_a = to_weight = None
        if ctx.needs_input_grad[0]:
            to_a = (columns @ matrix.T).view(len(a), *a.shape[2:], -1).permute(0, 3, 1, 2)
        if ctx.needs_input_grad[1]:
            # In parts, as a product so small of sides so long leaves a GPU idle.
            parts = gcd(len(columns), 512)
            left, right = (side.view(parts, -1, side.shape[1]) for side in (_last(a), columns))
            summed = torch.bmm(left.transpose(1, 2), right).sum(0)
            out, channels, *kernel = weight.shape
            to_weight = summed.view(out, *kernel, channels).permute(0, 3, 1, 2)
        return to_a, to_weight, None


def _last(a: Tensor) -> Tensor:
    """[N, out, *out_size] -> [N * places, out]."""
    return a.permute(0, 2, 3, 1).reshape(-1, a.shape[1])


def _matrix(weight: Tensor) -> Tensor:
    """[out, in, *kernel] -> [out, kernel * in]."""
    return weight.permute(0, 2, 3, 1).reshape(len(weight), -1)


def fold(columns: Tensor, geometry: Geometry) -> Tensor:
    """The images [N, *in_size, C] whose pixels are the sums of what `columns` [N * places, kernel * C] hold of them."""
    channels = columns.shape[1] // prod(geometry.kernel)
    count = len(columns) // prod(geometry.out_size)
    image = columns.new_empty(count, *geometry.in_size, channels)
    grid = count, triton.cdiv(prod(image.shape[1:]), BLOCK)
    _fold[grid](columns.contiguous(), image, *_numbers(geometry), channels, BLOCK)
    return image


def unfold(image: Tensor, geometry: Geometry) -> Tensor:
    """What the kernel covers at each of its places, [N * places, kernel * C], of images [N, *in_size, C]: the transpose
    of `fold`."""
    count, channels = len(image), image.shape[3]
    columns = image.new_empty(count * prod(geometry.out_size), prod(geometry.kernel) * channels)
    grid = count, triton.cdiv(columns.numel() // count, BLOCK)
    _unfold[grid](image.contiguous(), columns, *_numbers(geometry), channels, BLOCK)
    return columns


def _numbers(geometry: Geometry) -> list[int]:
    """As the kernels take them."""
    kernel, stride, padding, dilation, in_size = geometry
    return [*kernel, *stride, *padding, *dilation, *in_size, *geometry.out_size]


@triton.jit
def _fold(
    columns,
    image,
    kernel_rows: tl.constexpr,
    kernel_columns: tl.constexpr,
    stride_down: tl.constexpr,
    stride_right: tl.constexpr,
    padding_above: tl.constexpr,
    padding_left: tl.constexpr,
    dilation_down: tl.constexpr,
    dilation_right: tl.constexpr,
    in_rows: tl.constexpr,
    in_columns: tl.constexpr,
    out_rows: tl.constexpr,
    out_columns: tl.constexpr,
    channels: tl.constexpr,
    block: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * block + tl.arange(0, block)
    inside = at < in_rows * in_columns * channels
    channel, pixel = at % channels, at // channels
    row, column = pixel // in_columns + padding_above, pixel % in_columns + padding_left
    columns += number * (out_rows * out_columns * kernel_rows * kernel_columns * channels)
    total = tl.full([block], 0, image.dtype.element_ty)
    for down in tl.static_range(kernel_rows):
        for right in tl.static_range(kernel_columns):
            # The place of the kernel at which this part of it lies over the pixel.
            top, left = row - down * dilation_down, column - right * dilation_right
            covered = (top >= 0) & (left >= 0) & (top % stride_down == 0) & (left % stride_right == 0)
            top, left = top // stride_down, left // stride_right
            covered = covered & (top < out_rows) & (left < out_columns) & inside
            part = (top * out_columns + left) * (kernel_rows * kernel_columns) + down * kernel_columns + right
            total += tl.load(columns + part * channels + channel, covered, other=0.0)
    tl.store(image + number * (in_rows * in_columns * channels) + at, total, inside)


@triton.jit
def _unfold(
    image,
    columns,
    kernel_rows: tl.constexpr,
    kernel_columns: tl.constexpr,
    stride_down: tl.constexpr,
    stride_right: tl.constexpr,
    padding_above: tl.constexpr,
    padding_left: tl.constexpr,
    dilation_down: tl.constexpr,
    dilation_right: tl.constexpr,
    in_rows: tl.constexpr,
    in_columns: tl.constexpr,
    out_rows: tl.constexpr,
    out_columns: tl.constexpr,
    channels: tl.constexpr,
    block: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * block + tl.arange(0, block)
    size: tl.constexpr = out_rows * out_columns * kernel_rows * kernel_columns * channels
    channel, part = at % channels, at // channels % (kernel_rows * kernel_columns)
    place = at // (channels * kernel_rows * kernel_columns)
    row = place // out_columns * stride_down + part // kernel_columns * dilation_down - padding_above
    column = place % out_columns * stride_right + part % kernel_columns * dilation_right - padding_left
    covered = (row >= 0) & (row < in_rows) & (column >= 0) & (column < in_columns) & (at < size)
    image += number * (in_rows * in_columns * channels)
    values = tl.load(image + (row * in_columns + column) * channels + channel, covered, other=0.0)
    tl.store(columns + number * size + at, values, at < size)
