"""What Muon costs: python -m benchmarks.muon [--quick] [--json].

Orthogonalising the weights of paper-cnn in the Gram matrix of the shorter side, beside the iteration on the matrices
themselves; and training steps of 128 images with Muon (ours), beside Adam's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.common import BATCH, Row, in_turn, options, show, training_step
from rampart.memory import keep_freed_memory
from rampart.models import build_model
from rampart.training import Recipe
from rampart.training.muon import COEFFICIENTS, ROUNDS, orthogonalized

STEPS = 5  # a call


def by_rounds(matrix: Tensor) -> Tensor:
    """As Jordan et al. write it."""
    wide = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    wide = wide / (wide.norm() + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ROUNDS):
        gram = wide @ wide.T
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide if wide.shape == matrix.shape else wide.T


def main() -> None:
    given = options(__doc__, "one turn").parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    keep_freed_memory()
    turns = 1 if given.quick else 9
    matrices = [p.detach().flatten(1) for p in build_model().encoder.parameters() if p.dim() > 1]
    found = in_turn(
        {"ours": lambda: [orthogonalized(m) for m in matrices], "rounds": lambda: [by_rounds(m) for m in matrices]},
        turns,
    )
    rows = [
        Row("orthogonalised weights", "ms", 1e3 * found["ours"], 1e3 * found["rounds"], found["rounds"] / found["ours"])
    ]
    muon, adam = training_step(Recipe(optimizer="muon")), training_step(Recipe(optimizer="adam"))
    calls: dict[str, Callable[[], object]] = {
        "muon": lambda: [muon() for _ in range(STEPS)],
        "adam": lambda: [adam() for _ in range(STEPS)],
    }
    speed = {name: STEPS * BATCH / seconds for name, seconds in in_turn(calls, turns).items()}
    rows.append(Row("training step", "images/s", speed["muon"], speed["adam"], speed["muon"] / speed["adam"]))
    show(f"Muon on paper-cnn, {given.threads} threads, medians of {turns}", rows, given.json)


if __name__ == "__main__":
    main()
