"""A network seen as affine maps, ReLUs and residual additions: what bound propagation works on.

`Layout` reads the structure of a module once; `Layout.resolve` gives a `Chain`, whose maps hold the weights of the
moment: BatchNorm folded by its running statistics in eval mode, by the batch's own in training mode (differentiable).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rampart.errors import ModelError, UnsupportedLayer
from rampart.models.classifier import Normalize
from rampart.models.geometry import Geometry
from rampart.models.links import Add, Affine, Conv, Dense, Flatten, Link, ReLU, Scale


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

    def then(self, link: Affine) -> Chain:
        """The chain with one more map after its output."""
        return Chain([*self.links, link], [*self.sources, (self.last,)], link.apply(self.output))


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Normalize) or super().is_leaf_module(m, module_qualified_name)


@dataclass(frozen=True)
class _Step:
    """One layer as traced: `sources` are steps (-1: the input); `alone` says that nothing else reads its input."""

    path: str
    module: nn.Module | None  # None: an addition
    sources: tuple[int, ...]
    alone: bool


class Layout:
    """The structure of a module; made once, resolved as often as its weights change.

    Raises:
        UnsupportedLayer: the module holds something else than Conv2d, Linear, BatchNorm, average pooling, Normalize,
            ReLU, Flatten, additions of two values, Identity and Dropout (in eval mode).
    """

    def __init__(self, model: nn.Module) -> None:
        self.steps: list[_Step] = []
        kind = type(model).__name__
        try:
            graph = _Tracer().trace(model)
        except Exception as error:  # fx raises many kinds for control flow that depends on the input
            raise UnsupportedLayer("", kind, "its forward pass cannot be traced") from error
        modules = dict(model.named_modules())
        values: dict[fx.Node, int] = {}
        for node in graph.nodes:
            if node.op == "placeholder":
                if values:
                    raise UnsupportedLayer("", kind, "more than one input")
                values[node] = -1
            elif node.op == "output":
                if values.get(node.args[0]) != len(self.steps) - 1:
                    raise UnsupportedLayer("", kind, "the output is not the last layer's")
            else:
                self._append(node, modules, values)

    def _append(self, node: fx.Node, modules: dict[str, nn.Module], values: dict[fx.Node, int]) -> None:
        path = str(node.target) if node.op == "call_module" else node.name
        name = getattr(node.target, "__name__", str(node.target))
        inputs = node.all_input_nodes
        alone = all(len(source.users) == 1 for source in inputs)
        module: nn.Module | None
        in_place = False
        if node.target in ADDITIONS and node.op != "call_module":
            if not all(isinstance(arg, fx.Node) for arg in node.args) or len(node.args) != 2 or node.kwargs:
                raise UnsupportedLayer(path, name, "only the plain sum of two values of the network")
            module, in_place = None, node.target in (operator.iadd, "add_")
            inputs = [arg for arg in node.args if isinstance(arg, fx.Node)]
        else:
            found = modules[str(node.target)] if node.op == "call_module" else _functional(node)
            if found is None or len(inputs) != 1:
                raise UnsupportedLayer(path, name)
            _check(path, found)
            module, in_place = found, bool(getattr(found, "inplace", False))
        if in_place and not alone:
            raise UnsupportedLayer(path, name, "it overwrites a value that is read elsewhere, too")
        if isinstance(module, nn.Identity | nn.Dropout):
            values[node] = values[inputs[0]]
            return
        values[node] = len(self.steps)
        self.steps.append(_Step(path, module, tuple(values[source] for source in inputs), alone))

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
                folds = Conv | Scale if step.module is not None and step.module.training else Conv | Dense | Scale
                if step.alone and isinstance(before, folds):
                    chain.links[sources[0]] = before.scaled(link.scale, link.shift)
                    values[number], places[number] = x, sources[0]
                    continue
            chain.links.append(link)
            chain.sources.append(sources)
            values[number], places[number] = x, chain.last
        return replace(chain, output=x)


ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")


def _functional(node: fx.Node) -> nn.Module | None:
    """The module that does what a call of a function or method does."""
    if node.target in (torch.relu, F.relu, "relu"):
        return nn.ReLU(inplace=bool(node.kwargs.get("inplace", False)))
    if node.target in (torch.flatten, "flatten") and _flattened(node) == (1, -1):
        return nn.Flatten()
    if node.target is F.avg_pool2d:
        return nn.AvgPool2d(*node.args[1:], **node.kwargs)  # type: ignore[arg-type]
    if node.target is F.adaptive_avg_pool2d:
        return nn.AdaptiveAvgPool2d(*node.args[1:], **node.kwargs)  # type: ignore[arg-type]
    return None


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
    elif isinstance(module, nn.AvgPool2d):
        padded = module.padding not in (0, (0, 0)) and not module.count_include_pad
        if module.ceil_mode or module.divisor_override or padded:
            raise UnsupportedLayer(path, kind, "only averages over whole windows, padding counted")
    elif not isinstance(module, nn.Linear | nn.ReLU | nn.Identity | nn.AdaptiveAvgPool2d | Normalize):
        raise UnsupportedLayer(path, kind)


def _link(path: str, module: nn.Module, x: Tensor) -> Link:
    """The link of a layer on a value x."""
    shape = tuple(x.shape[1:])
    if isinstance(module, nn.ReLU):
        return ReLU(shape)
    if isinstance(module, Normalize):
        module.check(x)
        return Scale(1 / module.std.flatten(), -(module.mean / module.std).flatten(), shape)
    if isinstance(module, nn.Flatten):
        return Flatten(shape)
    if isinstance(module, nn.Linear):
        if len(shape) != 1:
            raise UnsupportedLayer(path, "Linear", f"it maps the last axis of {shape}: flatten before it")
        return Dense(module.weight, _bias(module))
    if isinstance(module, nn.Conv2d):
        assert not isinstance(module.padding, str)
        places = _pair(module.kernel_size), _pair(module.stride), _pair(module.padding), _pair(module.dilation)
        return Conv(module.weight, _bias(module), Geometry(*places, _pair(x.shape[2:])), module.groups)
    if isinstance(module, nn.AvgPool2d):
        stride = module.kernel_size if module.stride is None else module.stride
        return _average(_pair(module.kernel_size), _pair(stride), _pair(module.padding), x)
    assert isinstance(module, nn.AdaptiveAvgPool2d)
    asked = _pair(module.output_size)
    rows, columns = (asked[0] or shape[1]), (asked[1] or shape[2])
    if shape[1] % rows or shape[2] % columns:
        raise UnsupportedLayer(path, type(module).__name__, f"{shape[1:]} does not divide into {(rows, columns)}")
    kernel = shape[1] // rows, shape[2] // columns
    return _average(kernel, kernel, (0, 0), x)


def _average(kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], x: Tensor) -> Conv:
    """Average pooling as the convolution of each channel that it is."""
    channels = x.shape[1]
    weight = x.new_full((channels, 1, *kernel), 1 / (kernel[0] * kernel[1]))
    geometry = Geometry(kernel, stride, padding, (1, 1), _pair(x.shape[2:]))
    return Conv(weight, x.new_zeros(channels), geometry, channels)


def _pair(value: Any) -> tuple[Any, Any]:
    return (value, value) if not isinstance(value, tuple) else (value[0], value[1])


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
