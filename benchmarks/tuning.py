"""What pruning saves: python -m benchmarks.tuning [--quick] [--json].

For each seed a study of profile quick without pruning and one with, in turn, same sampler and same trials in number:
epochs trained, and the best accuracy on the validation images.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Sequence

import torch

from benchmarks.common import Row, options, show
from rampart.console import configure_logging
from rampart.study import run_step
from rampart.tracking.queries import find_runs


def tuned(seed: int, trials: int, pruner: str, method: str) -> tuple[float, float]:
    """(epochs of all trials, best value of the objective)."""
    given = {"method": method, "seed": str(seed), "trials": str(trials), "pruner": pruner, "threads": "1"}
    home = run_step("tune", {**given, "study_name": f"{method} {pruner} {seed}"})
    runs = find_runs("0", {"step": "trial", "study": home})
    complete = runs[runs["tags.rampart.trial_state"] == "complete"]
    (objective,) = (str(name) for name in runs if str(name).startswith("metrics.objective/"))
    return float(runs["metrics.trial/epochs"].sum()), float(complete[objective].max())


def rows_of(
    method: str, pruner: str, plain: Sequence[tuple[float, float]], ours: Sequence[tuple[float, float]]
) -> list[Row]:
    epochs, fewest = (statistics.median(found[0] for found in side) for side in (plain, ours))
    best, kept = (statistics.median(found[1] for found in side) for side in (plain, ours))
    return [
        Row(f"{method}: epochs with {pruner} pruning", "epochs", fewest, epochs, epochs / fewest),
        Row(f"{method}: best with {pruner} pruning", "share", kept, best, kept / best),
    ]


def main() -> None:
    parser = options(__doc__, quick="one seed, eight trials, one pruner", threads=1)
    parser.add_argument("--method", default="normal")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    configure_logging(quiet=True)
    seeds, trials = (1, 8) if given.quick else (3, 30)
    pruners = ["none", "median"] + ([] if given.quick else ["hyperband"])
    found: dict[str, list[tuple[float, float]]] = {pruner: [] for pruner in pruners}
    with tempfile.TemporaryDirectory(prefix="rampart-") as folder:
        os.chdir(folder)
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        for seed in range(seeds):
            for pruner in pruners:
                found[pruner].append(tuned(seed, trials, pruner, given.method))
                print(
                    f"seed {seed}, {pruner}: {found[pruner][-1][0]:.0f} epochs, best {found[pruner][-1][1]:.4f}",
                    flush=True,
                )
    rows = [row for pruner in pruners[1:] for row in rows_of(given.method, pruner, found["none"], found[pruner])]
    show(f"tuning, {trials} trials, {seeds} seed(s)", rows, given.json)


if __name__ == "__main__":
    main()
