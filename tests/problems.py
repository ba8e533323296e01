"""Reduced problems of small networks."""

from __future__ import annotations

import torch
from torch import nn

from rampart.bounds import crown, reduced
from rampart.bounds.box import pixel_box
from rampart.bounds.reduced import Reduced
from rampart.models import Layout
from tests.nets import small_net


def problem(name: str, eps: float) -> tuple[Reduced, torch.Tensor, nn.Module, torch.Tensor]:
    """(the reduced problem of all outputs, CROWN's bounds of them, the network, its image)."""
    model, x, _ = small_net(name, count=1)
    with torch.no_grad():
        chain, box = Layout(model).resolve(x), pixel_box(x, eps)
        spec = torch.eye(chain.output.shape[1])[None]
        inputs = crown.preactivations(chain, box)
        bounds = crown.backward(chain, inputs, box, spec)[0]
        return reduced.reduce(chain, inputs, box, spec), bounds, model, x[0]
