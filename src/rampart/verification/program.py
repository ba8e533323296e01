"""The problem in which the sign of every neuron is known: a linear program."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from torch import Tensor

from rampart.bounds.reduced import Reduced, Rows

log = logging.getLogger(__name__)


def linear_program(net: Reduced, row: Rows, signs: Tensor) -> tuple[float, Tensor | None]:
    """(minimum of a row where every neuron has its sign, [I] the point); inf and None where there is no such point,
    -inf and None where the solver finds neither, or is not installed."""
    try:
        from scipy.optimize import linprog
    except ImportError:  # a machine that has PyTorch alone
        log.warning("scipy is not installed: a domain without unstable neurons stays unsolved")
        return float("-inf"), None
    exact = replace(net, neurons=net.neurons.double(), outputs=row.double(), lower=net.lower.double())
    neurons, output = exact.substituted(signs)
    # The solver's tolerances are absolute, so that numbers as small as they are would be nothing to it.
    scale = _largest(output.of_input)
    scales = _largest(neurons.of_input)[:, None]
    ends = torch.stack([net.center - net.half, net.center + net.half], 1).double()
    found = linprog(
        (output.of_input[0] / scale).numpy(force=True),
        (-signs.double()[:, None] * neurons.of_input / scales).numpy(force=True) if len(signs) else None,
        (signs.double() * neurons.constant / scales[:, 0]).numpy(force=True) if len(signs) else None,
        bounds=ends.numpy(force=True),
        method="highs",
    )
    if found.status == 2:  # infeasible
        return float("inf"), None
    if found.status != 0:
        return float("-inf"), None
    return float(found.fun * scale[0] + output.constant[0]), torch.from_numpy(found.x).to(net.center)


def _largest(rows: Tensor) -> Tensor:
    """Of each row [N, I] the largest coefficient's size; 1 of a row of zeros."""
    largest = rows.abs().amax(1) if rows.numel() else rows.new_zeros(len(rows))
    return torch.where(largest > 0, largest, 1.0)
