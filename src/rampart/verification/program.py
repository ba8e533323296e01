"""The problem in which the sign of every neuron is known: a linear program."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from torch import Tensor

from rampart.bounds.reduced import Reduced, Rows

log = logging.getLogger(__name__)


def linear_program(net: Reduced, row: Rows, signs: Tensor) -> tuple[float, Tensor | None]:
    """(minimum of a row where every neuron has its sign, [I] the point); inf and None where there is no such point."""
    try:
        from scipy.optimize import linprog
    except ImportError:  # a machine that has PyTorch alone
        log.warning("scipy is not installed: a domain without unstable neurons stays unsolved")
        return float("-inf"), None
    exact = replace(net, neurons=net.neurons.double(), outputs=row.double(), lower=net.lower.double())
    neurons, output = exact.substituted(signs)
    ends = torch.stack([net.center - net.half, net.center + net.half], 1).double()
    found = linprog(
        output.of_input[0].numpy(force=True),
        (-signs.double()[:, None] * neurons.of_input).numpy(force=True) if len(signs) else None,
        (signs.double() * neurons.constant).numpy(force=True) if len(signs) else None,
        bounds=ends.numpy(force=True),
        method="highs",
    )
    if found.status == 2:  # infeasible
        return float("inf"), None
    if found.status != 0:
        return float("-inf"), None
    return float(found.fun + output.constant[0]), torch.from_numpy(found.x).to(net.center)
