"""Lower bounds of the margins z_y - z_j: the one call that training, evaluation and verification share."""

from __future__ import annotations

import logging
from typing import Literal

import torch
from torch import Tensor, nn

from rampart.bounds import alpha, crown, ibp
from rampart.bounds.box import Box, pixel_box
from rampart.errors import BoundError, UnsupportedLayer, require, unknown
from rampart.models.chain import Chain, Layout
from rampart.models.classifier import (
    checked_logits,
    logits_of,
    require_fixed,
    require_labels,
    require_pixels,
    require_tensors,
)

Method = Literal["ibp", "crown-ibp", "crown", "alpha-crown"]
Engine = Literal["native", "auto_lirpa"]
METHODS: tuple[Method, ...] = ("ibp", "crown-ibp", "crown", "alpha-crown")
ENGINES: tuple[Engine, ...] = ("native", "auto_lirpa")

# A margin counts as proved above this share of the image's largest logit, whatever the scale of the logits. Proofs are
# in float64, whose rounding is far below it unless some fifteen digits cancel; float32, of which alone some models are,
# is less exact.
PROVED = 2e-5
# By how much of the largest logit what has been read of a network may differ from it: GPUs round in tf32.
ALIKE = 1e-2

log = logging.getLogger(__name__)


def margin_spec(labels: Tensor, classes: int) -> Tensor:
    """[B, K, K]: row j of image i is e_y - e_j, so that spec @ logits are the margins (row y is 0)."""
    eye = torch.eye(classes, device=labels.device)
    return eye[labels][:, None, :] - eye


def proof_tolerance(logits: Tensor) -> Tensor:
    """[B]: what a lower bound of a margin must exceed to be a proof, where the images have logits [B, K]."""
    return PROVED * logits.abs().amax(1)


def overflowed(bounds: Tensor) -> bool:
    """Whether lower bounds say something that no network can have, or nothing at all."""
    return bool((bounds.isnan() | (bounds == torch.inf)).any())


def noise(x: Tensor) -> Tensor:
    """Random pixels in the shape of x, each time the same."""
    return torch.rand(x.shape, generator=torch.Generator().manual_seed(0)).to(x)


def identity_spec(size: int, like: Tensor) -> Tensor:
    """[B, size, size]: one row for each output."""
    return torch.eye(size, dtype=like.dtype, device=like.device).expand(len(like), -1, -1)


def find_layout(model: nn.Module, x: Tensor) -> Layout | None:
    """The model's structure, for as many calls as wanted; None where auto_LiRPA has to bound it, which is said.

    To read it takes milliseconds, and hooks into every module meanwhile: no other thread may run one then.

    Raises:
        ModelError: the model does not take images of this size, or overwrites them. SettingsError: they are not in
            [0, 1].
    """
    probes = (x[:1], noise(x[:1]))  # some models take one image at a time
    with torch.no_grad():
        logits = [checked_logits(model, probe) for probe in probes]
    try:
        layout = Layout(model)
        with torch.no_grad():
            found = [layout.resolve(probe).output for probe in probes]
        if not all(map(alike, found, logits)):
            raise UnsupportedLayer("", type(model).__name__, "its layers, one after the other, give another output")
    except UnsupportedLayer as missing:
        log.warning("%s; using auto_LiRPA instead, without branch and bound", missing)
        return None
    return layout


def alike(found: Tensor, logits: Tensor) -> bool:
    """Whether two networks' outputs may be those of one; of outputs that are not finite nothing can be told."""
    slack = ALIKE * logits.abs().max().item()
    return not bool(logits.isfinite().all()) or torch.allclose(found, logits, rtol=0, atol=slack)


def margin_bounds(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float | Tensor,
    method: Method = "crown",
    engine: Engine = "native",
    memory: int = crown.MEMORY,
    layout: Layout | None = None,
    single: bool = False,
) -> Tensor:
    """Lower bounds of z_y - z_j, [B, K], over the L∞ ball of radius eps cut to [0, 1]; +inf at j = y.

    They are computed in the images' type and do not allow for its rounding: where seven digits may cancel in the
    network, give model and images in float64, as `verify` and evaluations do by themselves.

    Args:
        model: pixels -> logits, in eval mode.
        x: images [B, C, H, W] in [0, 1].
        y: labels [B].
        eps: radius in pixels, 0 or more: one for all, or a tensor of one for each pixel that broadcasts to x.
        method: `ibp` (Gowal et al. 2018), `crown-ibp` (Zhang et al. 2020: CROWN over IBP's inner bounds), `crown`
            (Zhang et al. 2018) or `alpha-crown` (Xu et al. 2021, slopes of the last bound optimised).
        engine: `native`, or `auto_lirpa`, which also takes over where the native one cannot express the model.
        memory: MiB that the native engine's coefficients take at once: images and neurons are bounded in parts.
        layout: the model's (`find_layout`), where it is known already.
        single: whether inner bounds of `crown` and `alpha-crown` may be computed in float32 where the images are in
            float64, less what that may round: in half the time, and looser by less than 1 %.

    Raises:
        UnsupportedLayer: neither engine can bound the model. SettingsError: bad method, engine, ε, images or
            labels. ModelError: the model does not take the images, or overwrites them. BoundError: a bound is NaN,
            or the bounds of a neuron cross.
    """
    require(method in METHODS, unknown("bound method", method, METHODS))
    require(engine in ENGINES, unknown("engine", engine, ENGINES))
    require_fixed(model, "bounds hold for")
    require_tensors(images=x, labels=y)
    require_exact(x)
    if not len(x):  # nothing to bound, nothing to cut into parts
        classes = logits_of(model, x.new_zeros(1, *x.shape[1:])).shape[1]
        require_labels(y, 0, classes)
        return x.new_zeros(0, classes)
    require_pixels(x)
    if engine == "native":
        layout = layout or find_layout(model, x)
    if engine == "auto_lirpa" or layout is None:
        from rampart.bounds.lirpa import lirpa_bounds

        pixel_box(x, eps)  # the same check of ε
        bounds = lirpa_bounds(model, x, eps, method, y)
    else:
        with torch.no_grad():
            chain = layout.resolve(x)
            require_labels(y, len(x), chain.output.shape[1])
            spec = margin_spec(y, chain.output.shape[1]).to(x.dtype)
            bounds = chain_bounds(chain, pixel_box(x, eps), spec, method, memory, single)
    if overflowed(bounds):
        raise BoundError(f"{method} gave NaN or infinity: the network's weights or activations overflow")
    return bounds.scatter(1, y[:, None], torch.inf)


def require_exact(x: Tensor) -> None:
    """Raises SettingsError where what is computed of images is too coarse for a proof."""
    exact = x.dtype in (torch.float32, torch.float64)
    require(exact, f"bounds are computed in float32 or float64, not {x.dtype}: convert model and images")
    require(not torch.is_autocast_enabled(x.device.type), "bounds are computed in full precision: leave torch.autocast")


def chain_bounds(
    chain: Chain, box: Box, spec: Tensor, method: Method, memory: int = crown.MEMORY, single: bool = False
) -> Tensor:
    """Lower bounds [B, K] of spec [B, K, out] @ output over the box; differentiable for `ibp` and `crown-ibp`."""
    if method in ("ibp", "crown-ibp"):
        found = ibp.intervals(chain, box, ibp.merged(chain))
        if method == "ibp":
            return ibp.lower_bounds(chain, found, spec)
        inputs = ibp.inputs(chain, found)
        if not torch.is_grad_enabled():  # a training sees for itself that its loss is no number
            check(inputs)
        return crown.lower_bounds(chain, inputs, box, spec, memory)
    inputs = crown.preactivations(chain, box, memory, single)
    check(inputs)
    if method == "crown":
        return crown.lower_bounds(chain, inputs, box, spec, memory)
    return alpha.optimise(chain, inputs, box, spec, memory=memory)


def check(inputs: ibp.Intervals) -> None:
    """Raises BoundError where bounds are NaN or cross by more than rounding: nothing may be concluded from them."""
    for box in inputs.values():
        slack = 1e-5 * (1 + box.lower.abs() + box.upper.abs())
        sound = (box.lower <= box.upper + slack) & (box.upper - box.lower).isfinite()  # NaN compares as false
        if not bool(sound.all()):
            raise BoundError("bounds of a neuron are NaN or cross, or are infinitely far apart: the network overflows")
