"""CROWN: linear lower bounds propagated backwards (Zhang et al. 2018, theorem 3.2), and α-CROWN (Xu et al. 2021)."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from rampart.bounds import ibp, windows
from rampart.bounds.box import Box, lower_on
from rampart.bounds.relaxation import relax
from rampart.models.chain import Conv, Dense, Link, ReLU

# Coefficients held at once, in floats: 2^23 are 32 MiB, which suited the caches best of 2^19 to 2^25.
MAX_COEFFICIENTS = 2**23

Slopes = dict[int, Tensor]


def backward(links: list[Link], boxes: dict[int, Box], box: Box, a: Tensor, alphas: Slopes | None = None) -> Tensor:
    """Lower bounds [B, K] of a · links(x) for every x in `box`.

    Args:
        boxes: bounds of each ReLU's input, by its place in `links`.
        a: [B, K, *out_shape].
        alphas: slopes of the lower side in [0, 1], [B, K, *shape], used where a ReLU is unstable.
    """
    bound: Tensor | float = 0.0
    for place in range(len(links) - 1, -1, -1):
        link = links[place]
        batch, rows = a.shape[:2]
        if isinstance(link, ReLU):
            relaxed = relax(boxes[place])
            lower_slope = relaxed.lower_slope[:, None]
            if alphas is not None:
                lower_slope = torch.where(relaxed.unstable[:, None], alphas[place], lower_slope)
            negative = a.clamp(max=0)
            bound = bound + (negative.flatten(2) @ relaxed.intercept.flatten(1)[:, :, None]).squeeze(2)
            a = a * lower_slope + negative * (relaxed.upper_slope[:, None] - lower_slope)
        else:
            flat = a.flatten(0, 1)
            bound = bound + link.offset(flat).view(batch, rows)
            a = link.pull(flat).view(batch, rows, *link.in_shape)
    return lower_on(box, a) + bound


def preactivations(links: list[Link], box: Box) -> dict[int, Box]:
    """CROWN bounds of every ReLU's input, by its place; a neuron that IBP shows to be stable keeps its IBP bounds."""
    boxes = ibp.preactivations(links, box)
    for place in sorted(boxes):
        before = links[:place]
        # One linear map of a box: IBP is already exact.
        if sum(isinstance(link, Conv | Dense) for link in before) > 1:
            boxes[place] = _tighten(before, boxes, box, boxes[place])
    return boxes


def _tighten(links: list[Link], boxes: dict[int, Box], box: Box, loose: Box) -> Box:
    """Replaces the bounds of the unstable neurons of `loose` [B, *shape] by CROWN's."""
    lower, upper = loose.lower.flatten(1).clone(), loose.upper.flatten(1).clone()
    images, neurons = ((lower < 0) & (upper > 0)).nonzero(as_tuple=True)
    if not len(images):
        return loose
    local = windows.convolutional(links)
    before = {place: b for place, b in boxes.items() if place < len(links)}
    sizes = [prod(b.lower.shape[1:]) for b in (*before.values(), loose)]
    widest = windows.receptive_field(links) if local else max(sizes)
    # Each neuron has two rows, and the ReLU step holds about three tensors of a row's size.
    for part in torch.arange(len(images), device=images.device).split(max(MAX_COEFFICIENTS // (6 * widest), 1)):
        image, neuron = images[part], neurons[part]
        if local:
            below, above = windows.neuron_bounds(links, before, box, image, neuron)
        else:
            below, above = _neuron_bounds(links, before, box, image, neuron, loose.lower.shape[1:])
        lower[image, neuron], upper[image, neuron] = below, above
    return Box(lower.view_as(loose.lower), upper.view_as(loose.upper))


def _neuron_bounds(
    links: list[Link], boxes: dict[int, Box], box: Box, image: Tensor, neuron: Tensor, shape: torch.Size
) -> tuple[Tensor, Tensor]:
    """As windows.neuron_bounds, for any links: each neuron by two full rows of a backward pass."""
    rows = torch.zeros(len(image), 2, shape.numel(), dtype=box.lower.dtype, device=box.lower.device)
    rows[:, 0].scatter_(1, neuron[:, None], 1.0)
    rows[:, 1].scatter_(1, neuron[:, None], -1.0)
    own = {place: Box(b.lower[image], b.upper[image]) for place, b in boxes.items()}
    bounds = backward(links, own, Box(box.lower[image], box.upper[image]), rows.view(len(image), 2, *shape))
    return bounds[:, 0], -bounds[:, 1]


def optimise(
    links: list[Link],
    boxes: dict[int, Box],
    box: Box,
    spec: Tensor,
    steps: int = 20,
    lr: float = 0.1,
    target: float = float("inf"),
) -> Tensor:
    """α-CROWN: the best lower bounds [B, K] of spec · output seen in `steps` of Adam on the lower slopes.

    Every row of every image has its own slopes; the bounds of the ReLUs' inputs stay as given. The first iterate uses
    CROWN's slopes, so the result is never looser than CROWN's. Stops early when every bound is above `target`.
    """
    if not boxes:
        return backward(links, boxes, box, spec)
    with torch.enable_grad():
        alphas = {}
        for place, inputs in boxes.items():
            start = relax(inputs).lower_slope[:, None]
            alphas[place] = start.expand(-1, spec.shape[1], *start.shape[2:]).detach().clone().requires_grad_()
        optimizer = torch.optim.Adam(alphas.values(), lr=lr)
        best = spec.new_full(spec.shape[:2], -torch.inf)
        for i in range(steps + 1):
            bounds = backward(links, boxes, box, spec, alphas)
            best = torch.maximum(best, bounds.detach())
            if i == steps or bool((best > target).all()):
                break
            optimizer.zero_grad()
            # To the slopes alone: the network's weights must not gather gradients.
            (-bounds.sum()).backward(inputs=list(alphas.values()))
            optimizer.step()
            with torch.no_grad():
                for alpha in alphas.values():
                    alpha.clamp_(0, 1)
            for group in optimizer.param_groups:
                group["lr"] *= 0.98
    return best
