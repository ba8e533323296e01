"""A network seen as a chain of affine maps and ReLUs: what bound propagation works on.

`Layout` reads the structure of a module once; `Layout.resolve` gives a `Chain`, whose maps hold the weights of the
moment: BatchNorm folded by its running statistics in eval mode, by the batch's own in training mode (differentiable).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rampart.errors import ModelError, UnsupportedLayer
from rampart.models.classifier import Normalize

Shape = tuple[int, ...]


class Affine:
    """y = L x + bias on single-sample shapes `in_shape` -> `out_shape`."""

    in_shape: Shape
    out_shape: Shape

    def apply(self, x: Tensor) -> Tensor:
        """[B, *in_shape] -> [B, *out_shape]."""
        raise NotImplementedError

    def radius(self, r: Tensor) -> Tensor:
        """|L| r: what the map makes of a box's half-widths r [B, *in_shape]."""
        raise NotImplementedError

    def pull(self, a: Tensor) -> Tensor:
        """a L: coefficients of the output, [R, *out_shape], as coefficients of the input, [R, *in_shape]."""
        raise NotImplementedError

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
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    in_shape: Shape
    out_shape: Shape

    def _conv(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def apply(self, x: Tensor) -> Tensor:
        return self._conv(x, self.weight, self.bias)

    def radius(self, r: Tensor) -> Tensor:
        return self._conv(r, self.weight.abs(), None)

    def pull(self, a: Tensor) -> Tensor:
        # Rows and columns that a stride skips at the far edge get no gradient otherwise.
        missing = [
            size - ((out - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1)
            for size, out, stride, padding, dilation, kernel in zip(
                self.in_shape[1:],
                self.out_shape[1:],
                self.stride,
                self.padding,
                self.dilation,
                self.weight.shape[2:],
                strict=True,
            )
        ]
        return F.conv_transpose2d(a, self.weight, None, self.stride, self.padding, missing, self.groups, self.dilation)

    def offset(self, a: Tensor) -> Tensor:
        return a.sum((2, 3)) @ self.bias

    def scaled(self, scale: Tensor, shift: Tensor) -> Conv:
        weight = self.weight * scale.view(-1, 1, 1, 1)
        conv = (self.stride, self.padding, self.dilation, self.groups, self.in_shape, self.out_shape)
        return Conv(weight, self.bias * scale + shift, *conv)


@dataclass
class Dense(Affine):
    weight: Tensor  # [out, in]
    bias: Tensor  # [out]

    @property
    def in_shape(self) -> Shape:  # type: ignore[override]
        return (self.weight.shape[1],)

    @property
    def out_shape(self) -> Shape:  # type: ignore[override]
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
    in_shape: Shape

    @property
    def out_shape(self) -> Shape:  # type: ignore[override]
        return self.in_shape

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
    in_shape: Shape

    @property
    def out_shape(self) -> Shape:  # type: ignore[override]
        return (prod(self.in_shape),)

    def apply(self, x: Tensor) -> Tensor:
        return x.flatten(1)

    def radius(self, r: Tensor) -> Tensor:
        return r.flatten(1)

    def pull(self, a: Tensor) -> Tensor:
        return a.view(len(a), *self.in_shape)

    def offset(self, a: Tensor) -> Tensor:
        return a.new_zeros(len(a))


@dataclass
class ReLU:
    shape: Shape


Link = Affine | ReLU


@dataclass
class Chain:
    """The links from input to output, with the weights of one moment; `output` is the clean output [B, *out]."""

    links: list[Link]
    output: Tensor

    @property
    def relus(self) -> list[int]:
        """Places of the ReLUs in `links`."""
        return [i for i, link in enumerate(self.links) if isinstance(link, ReLU)]


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Normalize) or super().is_leaf_module(m, module_qualified_name)


class Layout:
    """The structure of a module that is a chain; made once, resolved as often as its weights change.

    Raises:
        UnsupportedLayer: the module holds something else than Conv2d, Linear, BatchNorm, Normalize, ReLU, Flatten,
            Identity and Dropout (in eval mode), or is no chain.
    """

    def __init__(self, model: nn.Module) -> None:
        self.steps: list[tuple[str, nn.Module]] = []
        try:
            graph = _Tracer().trace(model)
        except Exception as error:  # fx raises many kinds for control flow that depends on the input
            raise UnsupportedLayer("", type(model).__name__, "its forward pass cannot be traced") from error
        modules = dict(model.named_modules())
        last: fx.Node | None = None
        for node in graph.nodes:
            if node.op == "placeholder":
                if last is not None:
                    raise UnsupportedLayer("", type(model).__name__, "more than one input")
            elif node.op == "output":
                if node.args[0] is not last:
                    raise UnsupportedLayer("", type(model).__name__, "the output is not the last layer's")
            else:
                if node.all_input_nodes != [last]:
                    raise UnsupportedLayer(str(node.target), str(node.op), "it does not follow the layer before it")
                self._append(node, modules)
            last = node

    def _append(self, node: fx.Node, modules: dict[str, nn.Module]) -> None:
        if node.op == "call_module":
            module, path = modules[str(node.target)], str(node.target)
            _check(path, module)
            if not isinstance(module, nn.Identity | nn.Dropout):
                self.steps.append((path, module))
        elif node.target in (torch.relu, F.relu, "relu"):
            self.steps.append((node.name, nn.ReLU()))
        elif node.target in (torch.flatten, "flatten") and _flattened(node) == (1, -1):
            self.steps.append((node.name, nn.Flatten()))
        else:
            name = getattr(node.target, "__name__", str(node.target))
            joins = node.target in (operator.add, torch.add, "add")
            raise UnsupportedLayer(node.name, name, "no additions yet" if joins else "")

    def resolve(self, x: Tensor) -> Chain:
        """Runs x [B, *in_shape] through the module and returns the chain with the weights of this moment.

        In training mode BatchNorm normalises by the batch's statistics, updates its running ones (once a call, as a
        forward pass does) and is folded with the former, so that gradients flow through them.

        Raises:
            UnsupportedLayer: a linear map over the last of several axes.
        """
        links: list[Link] = []
        for path, module in self.steps:
            shape = tuple(x.shape[1:])
            if isinstance(module, nn.ReLU):
                x = module(x)
                links.append(ReLU(shape))
                continue
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                x, scale, shift = _batch_norm(path, module, x)
                _scale_last(links, scale, shift, shape)
                continue
            if isinstance(module, Normalize):
                std, mean = module.std.flatten(), module.mean.flatten()
                _scale_last(links, 1 / std, -mean / std, shape)
                x = module(x)
                continue
            if isinstance(module, nn.Linear) and len(shape) != 1:
                raise UnsupportedLayer(path, "Linear", f"it maps the last axis of {shape}: flatten before it")
            x = module(x)
            if isinstance(module, nn.Conv2d):
                links.append(_conv(module, shape, tuple(x.shape[1:])))
            elif isinstance(module, nn.Linear):
                links.append(Dense(module.weight, _bias(module)))
            else:
                links.append(Flatten(shape))
        return Chain(links, x)


def _flattened(node: fx.Node) -> tuple[Any, Any]:
    """(first, last) axis that a call of flatten joins."""
    given = dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False)) | dict(node.kwargs)
    return given.get("start_dim", 0), given.get("end_dim", -1)


def _check(path: str, module: nn.Module) -> None:
    kind = type(module).__name__
    if isinstance(module, nn.Conv2d):
        if module.padding_mode != "zeros" or isinstance(module.padding, str):
            raise UnsupportedLayer(path, kind, "padding must be zeros, given as numbers")
    elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        if not module.track_running_stats:
            raise UnsupportedLayer(path, kind, "it keeps no running statistics")
    elif isinstance(module, nn.Dropout):
        if module.training and module.p:
            raise UnsupportedLayer(path, kind, "dropout in training mode")
    elif isinstance(module, nn.Flatten):
        if module.start_dim != 1 or module.end_dim != -1:
            raise UnsupportedLayer(path, kind, "only a flatten of all but the batch")
    elif not isinstance(module, nn.Linear | nn.ReLU | nn.Identity | Normalize):
        raise UnsupportedLayer(path, kind)


def _bias(module: nn.Conv2d | nn.Linear) -> Tensor:
    return module.bias if module.bias is not None else module.weight.new_zeros(len(module.weight))


def _conv(module: nn.Conv2d, in_shape: Shape, out_shape: Shape) -> Conv:
    stride, dilation, padding = module.stride, module.dilation, module.padding
    assert not isinstance(padding, str)
    places = (stride[0], stride[1]), (padding[0], padding[1]), (dilation[0], dilation[1])
    return Conv(module.weight, _bias(module), *places, module.groups, in_shape, out_shape)


def _batch_norm(path: str, module: nn.BatchNorm1d | nn.BatchNorm2d, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The module's output and the (scale, shift) [C] that gave it."""
    if module.training:
        if x.numel() == x.shape[1]:
            raise ModelError(f"BatchNorm '{path}' cannot be trained on a batch of one: use a larger batch_size")
        dims = [0, *range(2, x.dim())]
        variance, mean = torch.var_mean(x, dims, correction=0)
    else:
        assert module.running_var is not None
        assert module.running_mean is not None
        variance, mean = module.running_var, module.running_mean
    scale = (variance + module.eps).rsqrt()
    if module.weight is not None:
        scale = scale * module.weight
    shift = -mean * scale
    if module.bias is not None:
        shift = shift + module.bias
    return module(x), scale, shift


def _scale_last(links: list[Link], scale: Tensor, shift: Tensor, shape: Shape) -> None:
    """Folds a scale per channel into the map before it, or appends it where there is none."""
    if links and isinstance(links[-1], Conv | Dense | Scale):
        links[-1] = links[-1].scaled(scale, shift)
    else:
        links.append(Scale(scale, shift, shape))
