"""A network seen as affine maps, ReLUs and residual additions: what bound propagation works on.

`Layout` reads the structure of a module once; `Layout.resolve` gives a `Chain`, whose maps hold the weights of the
moment: BatchNorm folded by its running statistics in eval mode, by the batch's own in training mode (differentiable).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from rampart.errors import ModelError, UnsupportedLayer
from rampart.models.classifier import Normalize
from rampart.models.geometry import Geometry, pair
from rampart.models.links import Add, Affine, Conv, Dense, Flatten, Link, ReLU, Scale
from rampart.models.tracing import Constant, normalization, trace


@dataclass
class Chain:
    """The links in an order in which each follows those that it reads, with the weights of one moment.

    A value is called by the place of the link that makes it; -1 is the input.

    Args:
        links: the last one makes the output.
        sources: the values that each link reads: one, or the two of an `Add`.
        output: the clean output [B, *out].
    """

    links: list[Link]
    sources: list[tuple[int, ...]]
    output: Tensor

    @cached_property
    def relus(self) -> list[int]:
        """Places of the ReLUs."""
        return [place for place, link in enumerate(self.links) if isinstance(link, ReLU)]

    def readers(self, value: int) -> list[int]:
        """Places of the links that read `value`."""
        return [place for place, sources in enumerate(self.sources) if value in sources]

    @property
    def last(self) -> int:
        """The output, as a value."""
        return len(self.links) - 1

    def before(self, value: int) -> list[int]:
        """The links that `value` depends on, its own among them, in their order."""
        needed = {value}
        for place in range(value, -1, -1):
            if place in needed:
                needed.update(self.sources[place])
        return sorted(needed - {-1})

    def single(self) -> Chain:
        """The chain with the weights of its convolutions and linear maps rounded to float32."""
        links = [
            replace(link, weight=link.weight.float(), bias=link.bias.float())
            if isinstance(link, Conv | Dense)
            else link
            for link in self.links
        ]
        return Chain(links, self.sources, self.output.float())

    def then(self, link: Affine) -> Chain:
        """The chain with one more map after its output."""
        return Chain([*self.links, link], [*self.sources, (self.last,)], link.apply(self.output))


class Layout:
    """The structure of a module; made once, resolved as often as its weights change.

    Raises:
        UnsupportedLayer: the module holds something else than Conv2d, Linear, BatchNorm, average pooling, Normalize,
            ReLU, Flatten (by view or reshape, too), additions of two values, arithmetic with constants, Identity and
            Dropout (in eval mode).
    """

    def __init__(self, model: nn.Module) -> None:
        self.steps = trace(model)

    def double(self) -> Layout:
        """The same with a copy of the weights in float64."""
        twin = copy.deepcopy(self)
        for step in twin.steps:
            held = step.module.held if isinstance(step.module, Constant) else step.module
            module = held[0] if isinstance(held, tuple) else held
            if isinstance(module, nn.Module):
                module.double()
        return twin

    def resolve(self, x: Tensor) -> Chain:
        """Runs x [B, *in_shape] through the module and returns the chain with the weights of this moment.

        In training mode BatchNorm normalises by the batch's statistics, updates its running ones (once a call, as a
        forward pass does) and is folded with the former, so that gradients flow through them.

        Raises:
            UnsupportedLayer: a linear map over the last of several axes, a sum of unlike shapes, an uneven pooling.
            ModelError: BatchNorm in training mode on a batch of one.
        """
        chain = Chain([], [], x)
        values, places = {-1: x}, {-1: -1}  # by step: its clean value, and the link that makes it
        for number, step in enumerate(self.steps):
            x = values[step.sources[0]]
            sources = tuple(places[source] for source in step.sources)
            shape = tuple(x.shape[1:])
            link: Link
            if isinstance(step.module, nn.Module):
                for make_weight in step.module._forward_pre_hooks.values():  # `trace` lets no others through
                    make_weight(step.module, ())
            if step.module is None:
                if values[step.sources[1]].shape != x.shape:
                    raise UnsupportedLayer(step.path, "add", "its two values differ in shape")
                x, link = x + values[step.sources[1]], Add(shape)
            elif isinstance(step.module, nn.BatchNorm1d | nn.BatchNorm2d):
                x, link = _batch_norm(step.path, step.module, x)
            else:
                link = _link(step.path, step.module, x)
                x = link.apply(x) if isinstance(link, Affine) else x.relu()
            if isinstance(link, Scale):
                before = chain.links[sources[0]] if sources[0] >= 0 else None
                # In training a linear map's weights, and their gradients, are many more than the values to be scaled.
                trained = isinstance(step.module, nn.Module) and step.module.training
                folds = Conv | Scale if trained else Conv | Dense | Scale
                if step.alone and isinstance(before, folds):
                    chain.links[sources[0]] = before.scaled(link.scale, link.shift)
                    values[number], places[number] = x, sources[0]
                    continue
            chain.links.append(link)
            chain.sources.append(sources)
            values[number], places[number] = x, chain.last
        return replace(chain, output=x)


def _link(path: str, module: nn.Module | Constant, x: Tensor) -> Link:
    """The link of a layer on a value x."""
    shape = tuple(x.shape[1:])
    if isinstance(module, Constant):
        return _arithmetic(path, module, x)
    if isinstance(module, nn.ReLU):
        return ReLU(shape)
    if isinstance(module, Normalize):
        module.check(x)
    normal = normalization(module)
    if normal:
        mean, std = (value.to(x).expand(shape[0]) for value in normal)
        return Scale(1 / std, -mean / std, shape)
    if isinstance(module, nn.Flatten):
        return Flatten(shape)
    if isinstance(module, nn.Linear):
        if len(shape) != 1:
            raise UnsupportedLayer(path, "Linear", f"it maps the last axis of {shape}: flatten before it")
        return Dense(module.weight, _bias(module))
    if isinstance(module, nn.Conv2d):
        assert not isinstance(module.padding, str)
        places = pair(module.kernel_size), pair(module.stride), pair(module.padding), pair(module.dilation)
        return Conv(module.weight, _bias(module), Geometry(*places, pair(x.shape[2:])), module.groups)
    if len(shape) != 3:
        raise UnsupportedLayer(path, type(module).__name__, f"it averages over rows and columns, and is given {shape}")
    if isinstance(module, nn.AvgPool2d):
        stride = module.kernel_size if module.stride is None else module.stride
        return _average(pair(module.kernel_size), pair(stride), pair(module.padding), x)
    assert isinstance(module, nn.AdaptiveAvgPool2d)
    asked = pair(module.output_size)
    rows, columns = (asked[0] or shape[1]), (asked[1] or shape[2])
    if shape[1] % rows or shape[2] % columns:
        raise UnsupportedLayer(path, type(module).__name__, f"{shape[1:]} does not divide into {(rows, columns)}")
    kernel = shape[1] // rows, shape[2] // columns
    return _average(kernel, kernel, (0, 0), x)


def _arithmetic(path: str, constant: Constant, x: Tensor) -> Scale:
    """Arithmetic with a constant on a value x; numbers for each channel are [C], [C, 1, 1] or [1, C, 1, 1], as
    broadcasting has them."""
    shape, value = tuple(x.shape[1:]), constant.value(x)
    channels = value.reshape(*(1,) * (x.dim() - value.dim()), *value.shape)
    if channels.dim() != x.dim() or channels.numel() != channels.shape[1] or channels.numel() not in (1, shape[0]):
        reason = f"its constant has the shape {tuple(value.shape)}, and is no number a channel"
        raise UnsupportedLayer(path, constant.kind, reason)
    value = channels.flatten().expand(shape[0])
    one, nothing = torch.ones_like(value), torch.zeros_like(value)
    scale, shift = {
        "+": (one, value),
        "-": (one, -value),
        "from": (-one, value),
        "*": (value, nothing),
        "/": (1 / value, nothing),
    }[constant.kind]
    return Scale(scale, shift, shape)


def _average(kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], x: Tensor) -> Conv:
    """Average pooling as the convolution of each channel that it is."""
    channels = x.shape[1]
    weight = x.new_full((channels, 1, *kernel), 1 / (kernel[0] * kernel[1]))
    geometry = Geometry(kernel, stride, padding, (1, 1), pair(x.shape[2:]))
    return Conv(weight, x.new_zeros(channels), geometry, channels)


def _bias(module: nn.Conv2d | nn.Linear) -> Tensor:
    return module.bias if module.bias is not None else module.weight.new_zeros(len(module.weight))


def _batch_norm(path: str, module: nn.BatchNorm1d | nn.BatchNorm2d, x: Tensor) -> tuple[Tensor, Scale]:
    """The module's output, and the map that makes it of x; moves its running statistics in training."""
    mean, variance = module.running_mean, module.running_var
    assert mean is not None
    assert variance is not None
    if module.training:
        if x.numel() == x.shape[1]:
            raise ModelError(f"BatchNorm '{path}' cannot be trained on a batch of one: use a larger batch_size")
        assert module.num_batches_tracked is not None
        module.num_batches_tracked += 1
        momentum = 1 / int(module.num_batches_tracked) if module.momentum is None else module.momentum
        y, mean, inverse = _Normalised.apply(x, module.weight, module.bias, mean, variance, momentum, module.eps)
    else:
        y, inverse = None, (variance + module.eps).rsqrt()
    scale = inverse if module.weight is None else inverse * module.weight
    shift = -mean * scale if module.bias is None else module.bias - mean * scale
    link = Scale(scale, shift, tuple(x.shape[1:]))
    return link.apply(x) if y is None else y, link


class _Normalised(torch.autograd.Function):
    """BatchNorm by the batch's statistics, with these as outputs of their own: (y, mean [C], 1 / deviation [C]).

    A chain is folded with the statistics, so that they have gradients of their own; written out in single operations
    that costs twice the time of PyTorch's kernel.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        eps: float,
    ) -> tuple[Tensor, ...]:
        y, mean, inverse = torch.native_batch_norm(x, weight, bias, running_mean, running_var, True, momentum, eps)
        ctx.save_for_backward(x, weight, running_mean, running_var, mean, inverse)
        ctx.eps = eps
        return y, mean, inverse

    @staticmethod
    def backward(ctx: Any, of_y: Tensor, of_mean: Tensor, of_inverse: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, running_mean, running_var, mean, inverse = ctx.saved_tensors
        affine = weight is not None
        to_x, to_weight, to_bias = torch.ops.aten.native_batch_norm_backward(
            of_y, x, weight, running_mean, running_var, mean, inverse, True, ctx.eps, [True, affine, affine]
        )
        count = x.numel() // x.shape[1]
        # The mean moves by 1 / count with each x, the inverse deviation by -(x - mean) inverse³ / count.
        slope = -of_inverse * inverse**3 / count
        shape = (1, -1, *(1,) * (x.dim() - 2))
        to_x = to_x.addcmul_(x, slope.view(shape)).add_((of_mean / count - slope * mean).view(shape))
        return to_x, to_weight, to_bias, None, None, None, None
