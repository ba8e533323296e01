"""The second engine: auto_LiRPA (Xu et al. 2020), for architectures that the native one cannot express."""

from __future__ import annotations

import contextlib
import copy
import io

import torch
from torch import Tensor, nn

from rampart.bounds.box import pixel_box
from rampart.bounds.compat import import_auto_lirpa
from rampart.errors import UnsupportedLayer
from rampart.models.classifier import Normalize

NAMES = {"ibp": "IBP", "crown-ibp": "CROWN-IBP", "crown": "CROWN", "alpha-crown": "CROWN-Optimized"}


def lirpa_bounds(model: nn.Module, x: Tensor, eps: float, method: str, y: Tensor) -> Tensor:
    """Lower bounds [B, K] of z_y - z_j over the ball cut to [0, 1]; arguments as in margin_bounds."""
    library = import_auto_lirpa()
    from rampart.bounds.margins import margin_spec

    box = pixel_box(x, eps)
    norm = library.PerturbationLpNorm(norm=float("inf"), x_L=box.lower, x_U=box.upper)
    # auto_LiRPA changes the module that it is given, and prints.
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            options = {"optimize_bound_args": {"iteration": 20, "lr_alpha": 0.1}}
            bounded = library.BoundedModule(_plain(model), x, bound_opts=options, device=x.device)
        except Exception as error:  # it raises many kinds, NotImplementedError among them
            reason = " ".join(str(error).split())[:160]
            raise UnsupportedLayer("", type(model).__name__, f"nor can auto_LiRPA ({reason})") from error
        bounded.eval()
        with torch.no_grad():
            classes = model(x[:1]).shape[1]
        spec = margin_spec(y, classes).to(x.dtype)
        bounded_x = library.BoundedTensor(x, norm)
        if method == "alpha-crown":
            lower, _ = bounded.compute_bounds(x=(bounded_x,), C=spec, method=NAMES[method], bound_upper=False)
        else:
            with torch.no_grad():
                lower, _ = bounded.compute_bounds(x=(bounded_x,), C=spec, method=NAMES[method], bound_upper=False)
    return lower.detach()


def _plain(model: nn.Module) -> nn.Module:
    """A copy whose normalisations are 1x1 convolutions: auto_LiRPA 0.3 cannot propagate patches through a division."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, Normalize):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, _as_convolution(module))
    return model


def _as_convolution(module: Normalize) -> nn.Conv2d:
    channels = module.std.numel()
    conv = nn.Conv2d(channels, channels, 1).to(module.std.device).requires_grad_(False)
    conv.weight.copy_(torch.diag(1 / module.std.flatten())[:, :, None, None])
    conv.bias.copy_((-module.mean / module.std).flatten())  # type: ignore[union-attr]
    return conv
