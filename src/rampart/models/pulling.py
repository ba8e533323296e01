"""The transpose of a convolution as products of matrices.

cuDNN's kernels for the transpose of a strided convolution in float32, and for its gradient by the weights, are slow for
many maps: on an H200 the former took twice as long as these products for the 16,384 of a step of CROWN on embeddings.
"""

from __future__ import annotations

from itertools import product
from math import gcd
from typing import Any, NamedTuple

import torch
from torch import Tensor

Pair = tuple[int, int]


class Geometry(NamedTuple):
    """Where the kernel of a convolution lies on images of `in_size` (rows, columns)."""

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    in_size: Pair

    @property
    def spans(self) -> list[int]:
        """Rows and columns that the kernel reaches over."""
        return [dilation * (kernel - 1) + 1 for kernel, dilation in zip(self.kernel, self.dilation, strict=True)]

    @property
    def out_size(self) -> list[int]:
        """Rows and columns of its places."""
        return [left // stride + 1 for left, stride in zip(self._left(), self.stride, strict=True)]

    @property
    def skipped(self) -> list[int]:
        """Rows and columns at the far edge that no place covers, since a stride ends before them."""
        return [left % stride for left, stride in zip(self._left(), self.stride, strict=True)]

    def _left(self) -> list[int]:
        """Rows and columns behind the first place."""
        return [
            size + 2 * padding - span
            for size, padding, span in zip(self.in_size, self.padding, self.spans, strict=True)
        ]

    def padded(self, like: Tensor, channels: int) -> tuple[Tensor, Tensor]:
        """Views of zeros: the image, [N, *in_size, channels], and what the kernel covers of it and its padding at each
        of its places, [N, *out_size, *kernel, channels]."""
        rows, columns = (size + 2 * padding for size, padding in zip(self.in_size, self.padding, strict=True))
        (top, left), (height, width) = self.padding, self.in_size
        whole = like.new_zeros(len(like), rows, columns, channels)
        covered = whole
        for axis, (span, stride) in enumerate(zip(self.spans, self.stride, strict=True), 1):
            covered = covered.unfold(axis, span, stride)
        covered = covered[..., :: self.dilation[0], :: self.dilation[1]].permute(0, 1, 2, 4, 5, 3)
        return whole[:, top : top + height, left : left + width], covered


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
        columns = _last(a) @ _matrix(weight)
        image, covered = geometry.padded(a, weight.shape[1])
        columns = columns.view(covered.shape)
        for row, column in product(*map(range, geometry.kernel)):
            covered[:, :, :, row, column] += columns[:, :, :, row, column]
        return image.permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, of_image: Tensor) -> tuple[Tensor | None, ...]:
        a, weight = ctx.saved_tensors
        image, covered = ctx.geometry.padded(a, weight.shape[1])
        image.copy_(of_image.permute(0, 2, 3, 1))
        matrix = _matrix(weight)
        columns = covered.reshape(-1, matrix.shape[1])
        to_a = to_weight = None
        if ctx.needs_input_grad[0]:
            to_a = (columns @ matrix.T).view(len(a), *a.shape[2:], -1).permute(0, 3, 1, 2)
        if ctx.needs_input_grad[1]:
            # In parts, as a product so small of sides so long leaves a GPU idle.
            parts = gcd(len(a), 128)
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
