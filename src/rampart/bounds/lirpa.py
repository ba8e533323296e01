"""The second engine: auto_LiRPA (Xu et al. 2020), for architectures that the native one cannot express."""

from __future__ import annotations

import contextlib
import copy
import io
from typing import Any

import torch
from torch import Tensor, nn

from rampart.bounds.box import pixel_box
from rampart.bounds.compat import import_auto_lirpa, is_old
from rampart.errors import UnsupportedLayer
from rampart.models.classifier import Normalize

NAMES = {"ibp": "IBP", "crown-ibp": "CROWN-IBP", "crown": "CROWN", "alpha-crown": "CROWN-Optimized"}


def lirpa_bounds(model: nn.Module, x: Tensor, eps: float | Tensor, method: str, y: Tensor) -> Tensor:
    """Lower bounds [B, K] of z_y - z_j over the ball cut to [0, 1]; arguments as in margin_bounds."""
    library = import_auto_lirpa()
    from rampart.bounds.margins import margin_spec

    box = pixel_box(x, eps)
    _check_pooling(model)
    norm = library.PerturbationLpNorm(norm=float("inf"), x_L=box.lower, x_U=box.upper)
    # auto_LiRPA changes the module that it is given, and prints.
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            options: dict[str, Any] = {
                "optimize_bound_args": {"iteration": 20, "lr_alpha": 0.1},
                "conv_mode": _conv_mode(model),
            }
            if method == "alpha-crown" and is_old():  # it cannot optimise slopes of inner bounds that it keeps sparse
                options |= {f"sparse_{kind}": False for kind in ("intermediate_bounds", "features_alpha", "spec_alpha")}
            bounded = library.BoundedModule(plain(model), x, bound_opts=options, device=x.device)
            bounded.eval()
            with torch.no_grad():
                classes = model(x[:1]).shape[1]
            spec = margin_spec(y, classes).to(x.dtype)
            bounded_x = library.BoundedTensor(x, norm)
            if not bounded.optimizable_activations and method == "alpha-crown":
                method = "crown"  # no slope to optimise
            with torch.set_grad_enabled(method == "alpha-crown"):
                lower, _ = bounded.compute_bounds(x=(bounded_x,), C=spec, method=NAMES[method], bound_upper=False)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # it raises many kinds, NotImplementedError among them, here and there
            reason = " ".join(str(error).split())[:160]
            raise UnsupportedLayer("", type(model).__name__, f"nor can auto_LiRPA ({reason})") from error
    return lower.detach()


def _conv_mode(model: nn.Module) -> str:
    """Its patches (the fast way) know neither dilation, of which they give wrong bounds, nor groups, nor rectangles."""
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    regular = all(
        conv.groups == 1
        and len({*conv.dilation, 1}) == 1
        and all(len(set(pair)) == 1 for pair in (conv.kernel_size, conv.stride, conv.padding))
        for conv in convs
    )
    return "patches" if regular else "matrix"


def _check_pooling(model: nn.Module) -> None:
    """Its bounds of average pooling hold for windows side by side alone; for others they are wrong."""
    for path, module in model.named_modules():
        if isinstance(module, nn.AdaptiveAvgPool2d):
            raise UnsupportedLayer(path, type(module).__name__, "auto_LiRPA knows average pooling with a window alone")
        if isinstance(module, nn.AvgPool2d):
            pairs = [p if isinstance(p, tuple) else (p, p) for p in (module.kernel_size, module.stride, module.padding)]
            if pairs[0] != pairs[1] or pairs[2] != (0, 0):
                raise UnsupportedLayer(path, "AvgPool2d", "auto_LiRPA knows windows side by side alone")


def plain(model: nn.Module) -> nn.Module:
    """A copy whose normalisations are 1x1 convolutions: auto_LiRPA 0.3 cannot propagate patches through a division."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, Normalize):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, _as_convolution(module))
    return model


def _as_convolution(module: Normalize) -> nn.Conv2d:
    channels = module.std.numel()
    conv = nn.Conv2d(channels, channels, 1).to(module.std).requires_grad_(False)
    conv.weight.copy_(torch.diag(1 / module.std.flatten())[:, :, None, None])
    conv.bias.copy_((-module.mean / module.std).flatten())  # type: ignore[union-attr]
    return conv
