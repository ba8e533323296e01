"""The exact smallest margins of a tiny dense network, by a linear program for every pattern of its ReLUs."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor, nn


def tiny_net(hidden: tuple[int, ...], inputs: int = 2, classes: int = 3) -> nn.Sequential:
    """Flatten, then dense layers with ReLUs between them; images are [1, 1, inputs].

    Every ReLU switches, and every class has its turn, somewhere among the images.
    """
    points = torch.rand(200, 1, 1, inputs)
    model = nn.Sequential(nn.Flatten())
    for before, after in pairwise((inputs, *hidden, classes)):
        linear = nn.Linear(before, after)
        with torch.no_grad():
            linear.weight.normal_()
            middle = linear(model(points)).mean(0) if after == classes else linear(model(points[:after])).diagonal()
            linear.bias -= middle
        model.extend([linear, nn.ReLU()])
    return model[:-1].eval()


def exact_margins(model: nn.Sequential, image: Tensor, label: int, eps: float) -> Tensor:
    """min of z_y - z_j over the ball cut to [0, 1], [K], +inf at j = y, in float64."""
    linears = [m for m in model if isinstance(m, nn.Linear)]
    maps = [(m.weight.detach().double().numpy(), m.bias.detach().double().numpy()) for m in linears]
    x = image.flatten().double().numpy()
    box = list(zip(np.clip(x - eps, 0, 1), np.clip(x + eps, 0, 1), strict=True))
    best = np.full(len(maps[-1][1]), np.inf)
    for pattern in product((0.0, 1.0), repeat=sum(len(bias) for _, bias in maps[:-1])):
        weight, bias, rows, limits = _linear_region(maps, np.array(pattern))
        for other in set(range(len(best))) - {label}:
            solved = linprog(weight[label] - weight[other], A_ub=rows, b_ub=limits, bounds=box)
            if solved.status == 0:
                best[other] = min(best[other], solved.fun + bias[label] - bias[other])
    return torch.from_numpy(best)


def _linear_region(
    maps: list[tuple[np.ndarray, np.ndarray]], pattern: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The network as one affine map (weight, bias) where rows @ x <= limits, for ReLUs that are on at pattern 1."""
    weight, bias = np.eye(maps[0][0].shape[1]), np.zeros(maps[0][0].shape[1])
    rows, limits = [], []
    for w, b in maps[:-1]:
        weight, bias = w @ weight, w @ bias + b
        active, pattern = pattern[: len(b)], pattern[len(b) :]
        sign = 1 - 2 * active  # the input of an active ReLU is at least 0, that of another at most 0
        rows.append(sign[:, None] * weight)
        limits.append(-sign * bias)
        weight, bias = active[:, None] * weight, active * bias
    w, b = maps[-1]
    return w @ weight, w @ bias + b, np.concatenate(rows), np.concatenate(limits)
