"""Muon: steps of momentum made orthogonal (Jordan et al. 2024, "Muon: an optimizer for hidden layers")."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

# Five rounds of x -> ax + bx^3 + cx^5 bring every singular value above a five-hundredth of the norm to between 0.68 and
# 1.21: the coefficients of Jordan et al., steep at 0 rather than exact at 1.
COEFFICIENTS, ROUNDS = (3.4445, -4.7750, 2.0315), 5


class Muon(torch.optim.Optimizer):
    """For weights of two axes or more, each a matrix with a row for every output.

    A step is the orthogonal matrix nearest to Nesterov's momentum, so that no direction of a layer learns faster than
    the others. It is scaled to the root mean square that Adam's steps have: one learning rate suits both (Liu et al.
    2025, "Muon is scalable for LLM training", eq. 4).

    Args:
        lr: learning rate, Adam's.
        weight_decay: added to the gradient as a share of the weights, as by Adam.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float | Tensor, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # torch's may return a loss
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                gradient = weight.grad.add(weight, alpha=group["weight_decay"])
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                state["momentum"].mul_(group["momentum"]).add_(gradient)
                ahead = gradient.add(state["momentum"], alpha=group["momentum"]).flatten(1)
                size = 0.2 * math.sqrt(max(ahead.shape))
                weight.sub_(orthogonalized(ahead).view_as(weight) * (size * group["lr"]))


def orthogonalized(matrix: Tensor) -> Tensor:
    """U f(S) V^T of a matrix U S V^T [R, C], f(S) near 1 (`COEFFICIENTS`), by Newton and Schulz's iteration.

    The iteration is a polynomial in the Gram matrix of the shorter side and is worked out there: the matrix itself,
    often many times as long as wide, is multiplied twice, not twice in each round.
    """
    wide = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    wide = wide / (wide.norm() + 1e-7)
    gram = wide @ wide.T
    a, b, c = COEFFICIENTS
    unit = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    product = factor = a * unit + b * gram + c * gram @ gram
    for _ in range(ROUNDS - 1):
        gram = factor @ gram @ factor
        factor = a * unit + b * gram + c * gram @ gram
        product = factor @ product
    wide = product @ wide
    return wide if wide.shape == matrix.shape else wide.T
