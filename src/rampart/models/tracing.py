"""Reads a module's forward pass, once, as a list of layers."""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rampart.errors import ModelError, UnsupportedLayer
from rampart.models.classifier import Normalize

ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
ARITHMETIC: dict[Any, str] = {
    **dict.fromkeys(ADDITIONS, "+"),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub, "sub", "sub_"), "-"),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, "mul", "mul_"), "*"),
    **dict.fromkeys((operator.truediv, operator.itruediv, torch.div, "div", "div_"), "/"),
}
IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv, "add_", "sub_", "mul_", "div_")


@dataclass(frozen=True)
class Constant:
    """Arithmetic of a value of the network and a constant: plus (`+`), minus (`-`), times (`*`) or divided by it (`/`),
    or taken `from` it."""

    kind: str
    held: float | Tensor | tuple[nn.Module, str]  # a number, a tensor, or where to read one

    def value(self, like: Tensor) -> Tensor:
        """The constant of this moment, in the precision and at the place of `like`."""
        held = getattr(*self.held) if isinstance(self.held, tuple) else self.held
        return torch.as_tensor(held, dtype=like.dtype, device=like.device)


@dataclass(frozen=True)
class Step:
    """One layer: `sources` are steps (-1: the input); `alone` says that nothing else reads its input."""

    path: str
    module: nn.Module | Constant | None  # None: an addition
    sources: tuple[int, ...]
    alone: bool


def trace(model: nn.Module) -> list[Step]:
    """The layers of a module; errors as `Layout`."""
    kind = type(model).__name__
    for path, module in model.named_modules():
        if _hooked(module):
            raise UnsupportedLayer(path, type(module).__name__, "a forward hook may change what it gives: remove it")
    attributes = set(vars(model))
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # fx raises many kinds for control flow that depends on the input
        raise UnsupportedLayer("", kind, "its forward pass cannot be traced") from error
    constants = {node: _held(model, str(node.target)) for node in graph.nodes if node.op == "get_attr"}
    for name in set(vars(model)) - attributes:  # tensors that the forward pass makes: fx has put them there
        delattr(model, name)
    reading = _Reading(dict(model.named_modules()), constants)
    for node in graph.nodes:
        if node.op == "placeholder":
            if reading.values:
                raise UnsupportedLayer("", kind, "more than one input")
            reading.values[node] = -1
        elif node.op == "output":
            if reading.values.get(node.args[0]) != len(reading.steps) - 1:
                raise UnsupportedLayer("", kind, "the output is not the last layer's")
        elif node.op != "get_attr" and not _asks_shape(node):
            reading.append(node)
    return reading.finished()


def _hooked(module: nn.Module) -> bool:
    """Whether there are forward hooks but those of PyTorch that make a module's weights."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(not type(hook).__module__.startswith("torch.nn.utils.") for hook in hooks)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return normalization(m) is not None or super().is_leaf_module(m, module_qualified_name)


class _Reading:
    """The steps so far, and which of them makes a node's value."""

    def __init__(self, modules: dict[str, nn.Module], constants: dict[fx.Node, Tensor | tuple[nn.Module, str]]) -> None:
        self.modules, self.constants = modules, constants
        self.steps: list[Step] = []
        self.values: dict[fx.Node, int] = {}
        self.overwriting: list[tuple[int, str]] = []  # steps that do that to what they read, and what they are

    def append(self, node: fx.Node) -> None:
        called = node.op != "call_module"
        path = _path(node) if called else str(node.target)
        name = getattr(node.target, "__name__", str(node.target))
        inputs = [arg for arg in node.args if isinstance(arg, fx.Node) and arg in self.values]
        modules: list[nn.Module | Constant | None]
        if called and node.target in ARITHMETIC and len(node.args) == 2 and not node.kwargs and len(inputs) == 1:
            modules = [self._constant(path, name, node)]
        elif called and node.target in ADDITIONS:
            if len(node.args) != 2 or node.kwargs or len(inputs) != 2:
                raise UnsupportedLayer(path, name, "only the plain sum of two values of the network")
            modules = [None]
        else:
            found = _functional(node) if called else [self.modules[str(node.target)]]
            if not found or len(inputs) != 1:
                raise UnsupportedLayer(path, name)
            for layer in found:
                _check(path, layer)
            modules = [*found]
        sources = tuple(self.values[source] for source in inputs)
        for module in modules:
            if isinstance(module, nn.Identity | nn.Dropout):
                continue
            if getattr(module, "inplace", False) or (called and node.target in IN_PLACE):
                self.overwriting.append((len(self.steps), name))
            self.steps.append(Step(path, module, sources, alone=False))
            sources = (len(self.steps) - 1,)
        (self.values[node],) = sources

    def finished(self) -> list[Step]:
        """The steps, now that all readers of every value are known, also those behind layers that do nothing."""
        readers = Counter(source for step in self.steps for source in step.sources)
        for place, name in self.overwriting:
            step = self.steps[place]
            value = step.sources[0]
            # What a Flatten makes is the same memory.
            while readers[value] == 1 and value >= 0 and isinstance(self.steps[value].module, nn.Flatten):
                (value,) = self.steps[value].sources
            if value < 0:
                raise ModelError(f"'{step.path}' overwrites the images that it is given: take it out of place")
            if readers[value] > 1:
                raise UnsupportedLayer(step.path, name, "it overwrites a value that is read elsewhere, too")
        return [replace(step, alone=all(readers[source] == 1 for source in step.sources)) for step in self.steps]

    def _constant(self, path: str, name: str, node: fx.Node) -> Constant:
        """Arithmetic of a value of the network and a constant."""
        of_value = node.args[0] in self.values  # otherwise the constant comes first
        other = node.args[1 if of_value else 0]
        held = self.constants.get(other) if isinstance(other, fx.Node) else other
        kind = ARITHMETIC[node.target]
        if not isinstance(held, int | float | Tensor | tuple) or (kind == "/" and not of_value):
            raise UnsupportedLayer(path, name, "only arithmetic of a value of the network and a constant")
        return Constant("from" if kind == "-" and not of_value else kind, held)


def normalization(module: object) -> tuple[Tensor, Tensor] | None:
    """(mean, std), [C], of a layer that normalises channels, ours or torchvision's."""
    if isinstance(module, Normalize):
        return module.mean.flatten(), module.std.flatten()
    kind = type(module)
    if kind.__name__ == "Normalize" and kind.__module__.startswith("torchvision."):
        return torch.as_tensor(module.mean), torch.as_tensor(module.std)  # type: ignore[attr-defined]
    return None


def _held(model: nn.Module, target: str) -> Tensor | tuple[nn.Module, str]:
    """Where a tensor that the forward pass reads is kept; the tensor, if that pass has made it."""
    parent, _, name = target.rpartition(".")
    owner = model.get_submodule(parent)
    return getattr(owner, name) if name.startswith("_tensor_constant") else (owner, name)


def _path(node: fx.Node) -> str:
    """Of a call: the path of the module whose forward pass it is in, and its name."""
    inside = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    return ".".join([*inside[-1:], node.name])


def _asks_shape(node: fx.Node) -> bool:
    """Whether a call asks for the shape of a value, or for a part of such an answer."""
    if node.op == "call_method":
        return node.target == "size"
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.target is getattr:
        return node.args[1] == "shape"
    return node.target is operator.getitem and _asks_shape(node.args[0])


def _is_batch(size: object) -> bool:
    """Whether a size is the number of images: x.shape[0], x.size(0) or x.size()[0]."""
    if not isinstance(size, fx.Node):
        return False
    if size.target == "size":
        return [*size.args[1:], *size.kwargs.values()] == [0]
    return size.target is operator.getitem and size.args[1:] == (0,)


def _functional(node: fx.Node) -> list[nn.Module]:
    """The modules that do what a call of a function or method does; none where there are none."""
    given, named = node.args[1:], node.kwargs
    if node.target in (torch.relu, F.relu, "relu"):
        return [nn.ReLU(*_bound(node, inplace=False))]
    if node.target in (torch.relu_, "relu_"):
        return [nn.ReLU(inplace=True)]
    if node.target in (torch.flatten, "flatten") and _bound(node, start_dim=0, end_dim=-1) == [1, -1]:
        return [nn.Flatten()]
    if node.target in (torch.reshape, "view", "reshape"):
        sizes = given[0] if len(given) == 1 and isinstance(given[0], tuple | list) else given
        return [nn.Flatten()] if len(sizes) == 2 and _is_batch(sizes[0]) and sizes[1] == -1 else []
    if node.target in (torch.mean, "mean"):
        axes, keep = _bound(node, dim=None, keepdim=False)
        if not isinstance(axes, tuple | list) or sorted(axes) not in ([2, 3], [-2, -1]) or "dtype" in named:
            return []
        return [nn.AdaptiveAvgPool2d(1)] if keep else [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    if node.target is F.avg_pool2d:
        return [nn.AvgPool2d(*given, **named)]  # type: ignore[arg-type]
    if node.target is F.adaptive_avg_pool2d:
        return [nn.AdaptiveAvgPool2d(*given, **named)]  # type: ignore[arg-type]
    return []


def _bound(node: fx.Node, **defaults: Any) -> list[Any]:
    """What a call gives for arguments of these names, which follow its first."""
    given = dict(zip(defaults, node.args[1:], strict=False)) | dict(node.kwargs)
    return [given.get(name, default) for name, default in defaults.items()]


def _check(path: str, module: nn.Module) -> None:
    kind = type(module).__name__
    if type(module).__module__.startswith("torch.ao."):
        raise UnsupportedLayer(path, kind, "it is quantised")
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
    elif not isinstance(module, nn.Linear | nn.ReLU | nn.Identity | nn.AdaptiveAvgPool2d) and not normalization(module):
        raise UnsupportedLayer(path, kind)
