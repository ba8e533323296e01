"""The problem in which the sign of every neuron is known: a linear program.

Its solver works with tolerances, and takes small coefficients for 0: what it finds is no proof. Its dual variables are
β-CROWN's multipliers (Wang et al. 2021, theorem 3.1), and the bound that these give is one.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from rampart.bounds.domains import Domains, Parts, back
from rampart.bounds.reduced import Reduced, Rows

log = logging.getLogger(__name__)

# By how much no point may meet all signs, of rows whose largest coefficient is 1: more than float64 rounds of them.
APART = 1e-9


def linear_program(net: Reduced, row: Rows, signs: Tensor) -> tuple[float, Tensor | None]:
    """(lower bound of a row where every neuron has its sign, which is the minimum as far as the solver finds it, [I]
    the point); inf and None where there is proved to be no such point, -inf and None where the solver finds neither, or
    is not installed."""
    try:
        from scipy.optimize import linprog
    except ImportError:  # a machine that has PyTorch alone
        log.warning("scipy is not installed: a domain without unstable neurons stays unsolved")
        return float("-inf"), None
    ends = {name: getattr(net, name).double() for name in ("lower", "upper", "center", "half")}
    exact, signs = replace(net, neurons=net.neurons.double(), outputs=row.double(), **ends), signs.double()
    neurons, output = exact.substituted(signs)
    # The solver's tolerances are absolute, so that numbers as small as they are would be nothing to it.
    scale, scales = _largest(output.of_input), _largest(neurons.of_input)
    matrix = (-signs[:, None] * neurons.of_input / scales[:, None]).numpy(force=True)
    most = (signs * neurons.constant / scales).numpy(force=True)
    ball = torch.stack([exact.center - exact.half, exact.center + exact.half], 1).numpy(force=True)

    def bound(rows: Rows, marginals: np.ndarray, factor: Tensor | float) -> float:
        """By the duals of the signs' constraints."""
        multipliers = torch.from_numpy(-marginals).to(signs).clamp(min=0) * factor / scales
        parts = Parts(signs[None], exact.lower[None], exact.upper[None])
        return float(back(exact, Domains(rows, parts, torch.zeros_like(signs)[None], multipliers[None])).bound)

    costs = (output.of_input[0] / scale).numpy(force=True)
    found = linprog(costs, matrix, most, bounds=ball, method="highs")
    if found.status == 0:
        return bound(exact.outputs, found.ineqlin.marginals, scale), torch.from_numpy(found.x).to(net.center)
    if found.status == 2:  # infeasible: by how much, at the point that misses the signs by least?
        count = len(costs)
        apart = linprog(
            np.eye(1, count + 1, count)[0],
            np.hstack([matrix, -np.ones((len(matrix), 1))]),
            most,
            bounds=[*ball, (0, None)],
            method="highs",
        )
        nothing = Rows(*(torch.zeros_like(tensor) for tensor in exact.outputs))
        if apart.status == 0 and bound(nothing, apart.ineqlin.marginals, 1.0) > APART:
            return float("inf"), None
    return float("-inf"), None


def _largest(rows: Tensor) -> Tensor:
    """Of each row [N, I] the largest coefficient's size; 1 of a row of zeros."""
    largest = rows.abs().amax(1) if rows.numel() else rows.new_zeros(len(rows))
    return torch.where(largest > 0, largest, 1.0)
