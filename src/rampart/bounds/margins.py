"""Lower bounds of the margins z_y - z_j: the one call that training, evaluation and verification share."""

from __future__ import annotations

import logging
from typing import Literal

import torch
from torch import Tensor, nn

from rampart.bounds import crown, ibp
from rampart.bounds.box import Box, pixel_box
from rampart.errors import ModelError, UnsupportedLayer, require, unknown
from rampart.models.chain import Chain, Layout

Method = Literal["ibp", "crown-ibp", "crown", "alpha-crown"]
Engine = Literal["native", "auto_lirpa"]
METHODS: tuple[Method, ...] = ("ibp", "crown-ibp", "crown", "alpha-crown")
ENGINES: tuple[Engine, ...] = ("native", "auto_lirpa")

log = logging.getLogger(__name__)


def margin_spec(labels: Tensor, classes: int) -> Tensor:
    """[B, K, K]: row j of image i is e_y - e_j, so that spec @ logits are the margins (row y is 0)."""
    eye = torch.eye(classes, device=labels.device)
    return eye[labels][:, None, :] - eye


def margin_bounds(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, method: Method = "crown", engine: Engine = "native"
) -> Tensor:
    """Lower bounds of z_y - z_j, [B, K], over the L∞ ball of radius eps cut to [0, 1]; +inf at j = y.

    Args:
        model: pixels -> logits, in eval mode.
        x: images [B, C, H, W] in [0, 1].
        y: labels [B].
        eps: radius in pixels, 0 or more.
        method: `ibp` (Gowal et al. 2018), `crown-ibp` (Zhang et al. 2020: CROWN over IBP's inner bounds), `crown`
            (Zhang et al. 2018) or `alpha-crown` (Xu et al. 2021, slopes of the last bound optimised).
        engine: `native`, or `auto_lirpa`, which also takes over where the native one cannot express the model.

    Raises:
        UnsupportedLayer: neither engine can bound the model. SettingsError: bad method, engine, ε.
    """
    require(method in METHODS, unknown("bound method", method, METHODS))
    require(engine in ENGINES, unknown("engine", engine, ENGINES))
    if model.training:
        raise ModelError("bounds hold for one network: call model.eval() first")
    if engine == "native":
        try:
            with torch.no_grad():
                chain = Layout(model).resolve(x)
        except UnsupportedLayer as missing:
            log.warning("%s; using auto_LiRPA instead", missing)
            engine = "auto_lirpa"
    if engine == "auto_lirpa":
        from rampart.bounds.lirpa import lirpa_bounds

        pixel_box(x, eps)  # the same check of ε
        bounds = lirpa_bounds(model, x, eps, method, y)
    else:
        with torch.no_grad():
            spec = margin_spec(y, chain.output.shape[1]).to(x.dtype)
            bounds = chain_bounds(chain, pixel_box(x, eps), spec, method)
    return bounds.scatter(1, y[:, None], torch.inf)


def chain_bounds(chain: Chain, box: Box, spec: Tensor, method: Method) -> Tensor:
    """Lower bounds [B, K] of spec [B, K, out] @ output over the box; differentiable for `ibp` and `crown-ibp`."""
    links = chain.links
    if method == "ibp":
        return ibp.lower_bounds(links, box, spec)
    if method == "crown-ibp":
        return crown.backward(links, ibp.preactivations(links, box), box, spec)
    boxes = crown.preactivations(links, box)
    if method == "crown":
        return crown.backward(links, boxes, box, spec)
    return crown.optimise(links, boxes, box, spec)
