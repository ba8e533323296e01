"""The exact smallest margins of small networks: by a linear program for every pattern of ReLUs, or as one program with
a binary variable for each."""

from __future__ import annotations

import copy
from itertools import pairwise, product

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
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


def smallest_margin(model: nn.Sequential, image: Tensor, label: int, eps: float) -> float:
    """The smallest margin of `label` over the ball cut to [0, 1], by a mixed-integer program for each other class.

    After Tjeng et al. 2019: v = W x + b, r >= v, r >= 0, r <= u a, r <= v - l (1 - a), a in {0, 1}.
    """
    maps = _affine_maps(model, image)
    x = image.flatten().double().numpy()
    low, high = np.clip(x - eps, 0, 1), np.clip(x + eps, 0, 1)
    sizes = [len(low), *(len(bias) for _, bias in maps)]
    # Variables: x, then r and a of each layer of ReLUs.
    starts = np.cumsum([0, sizes[0], *(2 * size for size in sizes[1:-1])])
    least, most, whole = [low], [high], [np.zeros(len(low))]
    constraints = []
    before, reads = (low, high), slice(0, sizes[0])
    for layer, (weight, bias) in enumerate(maps[:-1]):
        centre, half = (before[0] + before[1]) / 2, (before[1] - before[0]) / 2
        lower, upper = (weight @ centre + bias + sign * (np.abs(weight) @ half) for sign in (-1, 1))
        count = sizes[layer + 1]
        r, a = (slice(starts[layer + 1] + k * count, starts[layer + 1] + (k + 1) * count) for k in (0, 1))

        def rows(*parts: tuple[slice, np.ndarray], count: int = count) -> np.ndarray:
            matrix = np.zeros((count, starts[-1]))
            for place, part in parts:
                matrix[:, place] = part
            return matrix

        one = np.eye(count)
        off, on = np.minimum(lower, 0), np.maximum(upper, 0)
        constraints += [
            LinearConstraint(rows((r, one), (reads, -weight)), bias, np.inf),
            LinearConstraint(rows((r, one), (a, -one * on)), -np.inf, 0),
            LinearConstraint(rows((r, one), (reads, -weight), (a, -one * off)), -np.inf, bias - off),
        ]
        least += [np.zeros(2 * count)]
        most += [on, np.ones(count)]
        whole += [np.zeros(count), np.ones(count)]
        before, reads = (np.maximum(lower, 0), on), r
    weight, bias = maps[-1]
    best = np.inf
    for other in set(range(sizes[-1])) - {label}:
        cost = np.zeros(starts[-1])
        cost[reads] = weight[label] - weight[other]
        solved = milp(
            cost,
            constraints=constraints,
            integrality=np.concatenate(whole),
            bounds=Bounds(np.concatenate(least), np.concatenate(most)),
            options={"mip_rel_gap": 0},
        )
        assert solved.status == 0, solved.message
        best = min(best, solved.fun + bias[label] - bias[other])
    return float(best)


def _affine_maps(model: nn.Sequential, image: Tensor) -> list[tuple[np.ndarray, np.ndarray]]:
    """(W, b) in float64 of the layers between ReLUs, whatever they are, from their values at 0 and at unit vectors."""
    maps, shape = [], image.shape
    part: list[nn.Module] = []
    for module in [*copy.deepcopy(model).double(), nn.ReLU()]:
        if not isinstance(module, nn.ReLU):
            part.append(module)
            continue
        affine, size = nn.Sequential(*part), int(np.prod(shape))
        with torch.no_grad():
            at_zero = affine(torch.zeros(1, *shape, dtype=torch.float64))
            at_ones = affine(torch.eye(size, dtype=torch.float64).view(size, *shape))
        maps.append(((at_ones - at_zero).flatten(1).T.numpy(), at_zero.flatten().numpy()))
        part, shape = [], at_zero.shape[1:]
    return maps
