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


def points(net: Reduced, count: int = 2000) -> torch.Tensor:
    """Of the ball, some of its corners among them."""
    torch.manual_seed(1)
    share = 2 * torch.rand(count, len(net.center)) - 1
    share[::2] = share[::2].sign()
    return net.center + share * net.half


def values(net: Reduced, x: torch.Tensor) -> torch.Tensor:
    """v [N, U] at points [N, I]."""
    v = torch.zeros(len(x), len(net.lower), dtype=x.dtype)
    for start, stop in net.layers:
        rows = net.neurons.at(slice(start, stop))
        v[:, start:stop] = x @ rows.of_input.T + v.relu() @ rows.of_relu.T + rows.constant
    return v


def outputs(net: Reduced, x: torch.Tensor) -> torch.Tensor:
    return x @ net.outputs.of_input.T + values(net, x).relu() @ net.outputs.of_relu.T + net.outputs.constant
