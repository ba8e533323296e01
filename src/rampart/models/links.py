"""The links of a chain: affine maps, ReLUs and additions."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from rampart.kernels import convolved
from rampart.models.geometry import Geometry

Shape = tuple[int, ...]
# Rows from which on a GPU goes back through a strided convolution by products of matrices; measured with 16,384.
MANY = 1024


class Affine:
    """y = L x + bias on single-sample shapes `in_shape` -> `out_shape`."""

    @property
    def in_shape(self) -> Shape:
        raise NotImplementedError

    @property
    def out_shape(self) -> Shape:
        raise NotImplementedError

    def apply(self, x: Tensor) -> Tensor:
        """[B, *in_shape] -> [B, *out_shape]."""
        raise NotImplementedError

    def radius(self, r: Tensor) -> Tensor:
        """|L| r: what the map makes of a box's half-widths r [B, *in_shape]."""
        raise NotImplementedError

    def pull(self, a: Tensor) -> Tensor:
        """a L: coefficients of the output, [R, *out_shape], as coefficients of the input, [R, *in_shape]."""
        raise NotImplementedError

    def products(self, a: Tensor) -> Tensor:
        """As `pull`, of a finite a, by products of matrices and sums alone: what these round can be told."""
        return self.pull(a)

    def offset(self, a: Tensor) -> Tensor:
        """a · bias, [R], for a [R, *out_shape]."""
        raise NotImplementedError

    def scaled(self, scale: Tensor, shift: Tensor) -> Affine:
        """This map followed by a scale and shift per channel (the first axis of out_shape)."""
        raise NotImplementedError


def _per_channel(value: Tensor, shape: Shape) -> Tensor:
    return value.view(-1, *(1,) * (len(shape) - 1))


@dataclass
class Conv(Affine):
    weight: Tensor  # [out, in / groups, kernel, kernel]
    bias: Tensor  # [out]
    geometry: Geometry
    groups: int = 1

    @property
    def in_shape(self) -> Shape:
        return (self.weight.shape[1] * self.groups, *self.geometry.in_size)

    @property
    def out_shape(self) -> Shape:
        return (len(self.weight), *self.geometry.out_size)

    def _conv(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        _, stride, padding, dilation, _ = self.geometry
        return F.conv2d(x, weight, bias, stride, padding, dilation, self.groups)

    def apply(self, x: Tensor) -> Tensor:
        return self._conv(x, self.weight, self.bias)

    def radius(self, r: Tensor) -> Tensor:
        return self._conv(r, self.weight.abs(), None)

    def spread(self, a: Tensor) -> Tensor:
        """a L with channels last, for coefficients of any stretch of places: [N, rows, columns, out] as those of what
        the kernel covers there, padding included, [N, reach, reach, in]."""
        count, *size, channels = a.shape
        kernel, stride, _, dilation, _ = self.geometry
        by_group = a.reshape(-1, self.groups, channels // self.groups).transpose(0, 1)
        weight = self.weight.permute(0, 2, 3, 1).reshape(self.groups, channels // self.groups, -1)
        covered = (by_group @ weight).view(self.groups, count, *size, *kernel, self.weight.shape[1])
        reach = [(n - 1) * s + span for n, s, span in zip(size, stride, self.geometry.spans, strict=True)]
        total = a.new_zeros(count, *reach, self.groups, covered.shape[-1])
        for i in range(kernel[0]):
            for j in range(kernel[1]):
                down, across = (
                    slice(start * d, start * d + (n - 1) * s + 1, s)
                    for start, d, n, s in zip((i, j), dilation, size, stride, strict=True)
                )
                total[:, down, across] += covered[:, :, :, :, i, j].movedim(0, 3)
        return total.flatten(3)

    def products(self, a: Tensor) -> Tensor:
        (above, left), (rows, columns) = self.geometry.padding, self.geometry.in_size
        total = self.spread(a.permute(0, 2, 3, 1))[:, above : above + rows, left : left + columns]
        return F.pad(total.permute(0, 3, 1, 2), (0, columns - total.shape[2], 0, rows - total.shape[1]))

    def pull(self, a: Tensor) -> Tensor:
        if a.dtype == torch.float64 and not a.is_cuda:  # PyTorch goes from map to map there, and slowly
            return self.products(a)
        _, stride, padding, dilation, _ = self.geometry
        skipped = self.geometry.skipped
        # These products take more memory, which is capped where no gradients are asked for.
        if a.is_cuda and len(a) >= MANY and max(stride) > 1 and self.groups == 1 and torch.is_grad_enabled():
            # Not above: Triton is not where PyTorch has been built for other devices.
            from rampart.models.pulling import pull

            return pull(a, self.weight, self.geometry)
        return F.conv_transpose2d(a, self.weight, None, stride, padding, skipped, self.groups, dilation)

    def offset(self, a: Tensor) -> Tensor:
        return a.sum((2, 3)) @ self.bias

    def scaled(self, scale: Tensor, shift: Tensor) -> Conv:
        return Conv(self.weight * scale.view(-1, 1, 1, 1), self.bias * scale + shift, self.geometry, self.groups)


@dataclass
class Dense(Affine):
    weight: Tensor  # [out, in]
    bias: Tensor  # [out]

    @property
    def in_shape(self) -> Shape:
        return (self.weight.shape[1],)

    @property
    def out_shape(self) -> Shape:
        return (self.weight.shape[0],)

    def apply(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def radius(self, r: Tensor) -> Tensor:
        return r @ self.weight.abs().T

    def pull(self, a: Tensor) -> Tensor:
        return a @ self.weight

    def offset(self, a: Tensor) -> Tensor:
        return a @ self.bias

    def scaled(self, scale: Tensor, shift: Tensor) -> Dense:
        return Dense(self.weight * scale[:, None], self.bias * scale + shift)


@dataclass
class Scale(Affine):
    """A scale and shift per channel that has no convolution or linear map before it to be folded into."""

    scale: Tensor  # [C]
    shift: Tensor  # [C]
    shape: Shape

    @property
    def in_shape(self) -> Shape:
        return self.shape

    @property
    def out_shape(self) -> Shape:
        return self.shape

    def apply(self, x: Tensor) -> Tensor:
        return x * _per_channel(self.scale, self.in_shape) + _per_channel(self.shift, self.in_shape)

    def radius(self, r: Tensor) -> Tensor:
        return r * _per_channel(self.scale.abs(), self.in_shape)

    def pull(self, a: Tensor) -> Tensor:
        return a * _per_channel(self.scale, self.in_shape)

    def offset(self, a: Tensor) -> Tensor:
        return a.flatten(2).sum(2) @ self.shift if a.dim() > 2 else a @ self.shift

    def scaled(self, scale: Tensor, shift: Tensor) -> Scale:
        return Scale(self.scale * scale, self.shift * scale + shift, self.in_shape)


@dataclass
class Flatten(Affine):
    shape: Shape

    @property
    def in_shape(self) -> Shape:
        return self.shape

    @property
    def out_shape(self) -> Shape:
        return (prod(self.shape),)

    def apply(self, x: Tensor) -> Tensor:
        return x.flatten(1)

    def radius(self, r: Tensor) -> Tensor:
        return r.flatten(1)

    def pull(self, a: Tensor) -> Tensor:
        a = a.view(len(a), *self.in_shape)
        return a.contiguous(memory_format=convolved(a)) if len(self.in_shape) == 3 else a

    def offset(self, a: Tensor) -> Tensor:
        return a.new_zeros(len(a))


@dataclass
class ReLU:
    out_shape: Shape


@dataclass
class Add:
    """The sum of two values of one shape: a residual connection."""

    out_shape: Shape


Link = Affine | ReLU | Add
