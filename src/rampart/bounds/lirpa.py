"""The second engine: auto_LiRPA (Xu et al. 2020), for architectures that the native one cannot express."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rampart.bounds.box import pixel_box
from rampart.bounds.compat import import_auto_lirpa, is_old
from rampart.errors import UnsupportedLayer, is_out_of_memory
from rampart.models.chain import Layout
from rampart.models.classifier import checked_logits, require_labels
from rampart.models.geometry import pair
from rampart.models.tracing import normalization

NAMES = {"ibp": "IBP", "crown-ibp": "CROWN-IBP", "crown": "CROWN", "alpha-crown": "CROWN-Optimized"}


@torch.inference_mode(False)  # where it is on there are no gradients
def lirpa_bounds(model: nn.Module, x: Tensor, eps: float | Tensor, method: str, y: Tensor) -> Tensor:
    """Lower bounds [B, K] of z_y - z_j over the ball cut to [0, 1]; arguments as in margin_bounds."""
    library = import_auto_lirpa()
    from rampart.bounds.margins import alike, margin_spec, noise

    x, y = x.detach().clone(), y.clone()
    box = pixel_box(x, eps)
    _check_pooling(model)
    norm = library.PerturbationLpNorm(norm=float("inf"), x_L=box.lower, x_U=box.upper)
    with torch.no_grad():
        logits = checked_logits(model, x)
        require_labels(y, len(x), logits.shape[1])
        spec = margin_spec(y, logits.shape[1]).to(x.dtype)

    def bounds(conv_mode: str) -> Tensor:
        options: dict[str, Any] = {
            "optimize_bound_args": {"iteration": 20, "lr_alpha": 0.1},
            "conv_mode": conv_mode,
        }
        if method == "alpha-crown" and is_old():  # it cannot optimise slopes of inner bounds that it keeps sparse
            options |= {f"sparse_{kind}": False for kind in ("intermediate_bounds", "features_alpha", "spec_alpha")}
        bounded = library.BoundedModule(plain(model), x, bound_opts=options, device=x.device)
        bounded.eval()
        for node in bounded.modules():
            if node is not bounded:
                _check(node, conv_mode)
        with torch.no_grad():
            # Of a black image, which a convolution maps to 0 whatever comes of it, nothing can be told.
            other = noise(x)
            if not (alike(bounded(other), model(other)) and alike(bounded(x), logits)):
                raise _Untrusted("its network gives another output")
        # Without a slope to optimise it is CROWN.
        optimised = method == "alpha-crown" and bool(bounded.optimizable_activations)
        name = NAMES["crown" if method == "alpha-crown" and not optimised else method]
        with torch.set_grad_enabled(optimised):
            lower, _ = bounded.compute_bounds(
                x=(library.BoundedTensor(x, norm),), C=spec, method=name, bound_upper=False
            )
        return lower.detach()

    failed: Exception | None = None
    # auto_LiRPA changes the module that it is given, and prints.
    with contextlib.redirect_stdout(io.StringIO()), _by_default(x.dtype):
        for mode in ("patches", "matrix"):  # the slow way where the fast one fails
            try:
                return bounds(mode)
            except Exception as error:  # it raises many kinds, NotImplementedError among them, here and there
                if is_out_of_memory(error):
                    raise
                failed = error
    raise _unsupported(model, x, failed) from failed


@contextlib.contextmanager
def _by_default(dtype: torch.dtype) -> Iterator[None]:
    """Some of its relaxations make tensors of PyTorch's default type, whatever the images'."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _unsupported(model: nn.Module, x: Tensor, error: Exception | None) -> UnsupportedLayer:
    """What to say where auto_LiRPA fails: it does not tell at which layer, but the native engine may."""
    path, kind, reason = "", type(model).__name__, ""
    try:
        Layout(model).resolve(x[:1])
    except UnsupportedLayer as missing:
        path, kind, reason = missing.path, missing.kind, f"{missing.reason}; " if missing.reason else ""
    said = " ".join(str(error).split())[:160] or type(error).__name__
    return UnsupportedLayer(path, kind, f"{reason}nor can auto_LiRPA ({said})")


class _Untrusted(Exception):
    """An operation of auto_LiRPA of which bounds are wrong, or have not been tested."""


# Those whose bounds the tests compare with points of the balls. Of others some are wrong: of padding that is not by
# zeros, of square roots.
TRUSTED = frozenset(
    (
        *("Conv", "ConvTranspose", "Linear", "MatMul", "MaxPool", "AveragePool", "BatchNormalization", "Dropout"),
        *("Relu", "LeakyRelu", "Tanh", "Sigmoid", "Abs", "Add", "Sub", "Neg", "Mul", "Div", "ReduceMean", "ReduceSum"),
        *("Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Concat", "Slice", "Split", "Gather", "Shape"),
        *("Identity", "Cast", "Constant", "PrimConstant", "ConstantOfShape", "Input", "Params", "Buffers"),
    )
)


# ONNX's numbers of float32 and float64.
FLOATS = (1, 11)


def _are_distinct(node: Any) -> bool:
    """Whether a node is a constant of numbers that are all different."""
    value = getattr(node, "value", None)
    return _is_constant(node) and isinstance(value, Tensor) and len(value.unique()) == value.numel()


def _is_constant(node: Any) -> bool:
    if type(node).__name__ == "BoundTranspose":
        return _is_constant(node.inputs[0])
    return type(node).__name__ in ("BoundParams", "BoundBuffers", "BoundConstant")


def _check(node: Any, conv_mode: str) -> None:
    """Raises _Untrusted where a node of a BoundedModule may be bounded wrongly."""
    kind = type(node).__name__.removeprefix("Bound")
    if kind == type(node).__name__:  # no node
        return
    if kind not in TRUSTED:
        raise _Untrusted(f"its bounds of {kind} are not tested")
    if kind == "LeakyRelu":
        slope = getattr(node, "leaky_alpha", None)  # of 0.7; in 0.3 it is called alpha
        slope = node.alpha if slope is None else slope
        if not 0 <= slope <= 1:
            raise _Untrusted(f"its bounds of LeakyReLU hold for slopes between 0 and 1, not {slope:g}")
    if kind in ("AveragePool", "MaxPool"):
        window, stride, padding = map(pair, (node.kernel_size, node.stride, node.padding))
        if window != stride or any(padding) or getattr(node, "ceil_mode", False):
            raise _Untrusted("it knows pooling in whole windows side by side alone")
    if kind == "Cast" and node.to not in FLOATS:
        raise _Untrusted("its bounds know nothing of rounding to whole numbers")
    if kind == "Gather" and not _are_distinct(node.inputs[1]):
        raise _Untrusted("its bounds of Gather hold for constant places alone, each taken once")
    if kind in ("Div", "MatMul") and not _is_constant(node.inputs[1]):
        raise _Untrusted(f"its bounds of {kind} are tested with constants alone")
    # Its patches (the fast way) know neither dilation, of which they give wrong bounds, nor groups, nor rectangles.
    if kind == "Conv" and conv_mode == "patches":
        kernel = node.inputs[1].output_shape[2:]
        square = all(len({*pair}) == 1 for pair in (kernel, node.stride, node.padding))
        if node.groups != 1 or {*node.dilation} != {1} or not square:
            raise _Untrusted("its patches know convolutions without groups, without dilation, and of squares alone")


def _check_pooling(model: nn.Module) -> None:
    """Its bounds of average pooling hold for windows side by side alone; for others they are wrong. `_check` would see
    that, too, but not at which path."""
    for path, module in model.named_modules():
        if isinstance(module, nn.AdaptiveAvgPool2d):
            raise UnsupportedLayer(path, type(module).__name__, "auto_LiRPA knows average pooling with a window alone")
        if isinstance(module, nn.AvgPool2d):
            window, stride, padding = map(pair, (module.kernel_size, module.stride, module.padding))
            if window != stride or padding != (0, 0) or module.divisor_override or module.ceil_mode:
                raise UnsupportedLayer(path, "AvgPool2d", "auto_LiRPA knows whole windows side by side alone")


def plain(model: nn.Module) -> nn.Module:
    """A copy whose normalisations are 1x1 convolutions: auto_LiRPA 0.3 cannot propagate patches through a division."""
    model = copy.deepcopy(model)
    kind = next((weight.dtype for weight in model.parameters()), torch.get_default_dtype())
    for name, module in list(model.named_modules()):
        normal = normalization(module)
        if normal:
            parent, _, last = name.rpartition(".")
            mean, std = (value.to(kind) for value in normal)
            setattr(model.get_submodule(parent), last, _as_convolution(mean, std))
    return model


def _as_convolution(mean: Tensor, std: Tensor) -> nn.Conv2d:
    channels = len(std)
    conv = nn.Conv2d(channels, channels, 1).to(std).requires_grad_(False)
    conv.weight.copy_(torch.diag(1 / std)[:, :, None, None])
    conv.bias.copy_(-mean / std)  # type: ignore[union-attr]
    return conv
