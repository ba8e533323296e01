"""Steps of training on a GPU: python -m benchmarks.gpu [--processes N] [--rows ROW …] [--quick] [--json].

Ours: the step as `train` takes it, recorded as a CUDA graph. Baseline: the same step, its kernels started one by one.
With --processes, so many processes share the GPU (side by side where `nvidia-cuda-mps-control -d` runs, else in turn),
and images a second are those of all.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from typing import Any

import torch

from benchmarks.common import BATCH, Row, options, show, training_step
from rampart.training import Recipe
from rampart.training import step as steps

FIRST = steps.BEFORE_RECORDING
RECIPES: dict[str, dict[str, Any]] = {
    "normal": {},
    "normal, bf16": {"precision": "bf16"},
    "adversarial": {"method": "adversarial", "eps": 4 / 255},
    "adversarial, bf16": {"method": "adversarial", "eps": 4 / 255, "precision": "bf16"},
    "adversarial, supcon": {"method": "adversarial", "eps": 4 / 255, "contrastive": "double"},
    "mtl-ibp": {"method": "mtl-ibp", "eps": 1 / 255, "attack_steps": 1, "grad_clip": 10.0},
    "certified": {"method": "certified", "eps": 1 / 255},
    "certified, fused": {"method": "certified", "eps": 1 / 255, "certified_loss": "fused"},
    "certified, study": {"method": "certified", "eps": 1 / 255, "certified_loss": "logit-lower"},
    "certified, supcon": {"method": "certified", "eps": 1 / 255, "contrastive": "double"},
}


def stepping(name: str, recorded: bool) -> Callable[[], object]:
    """Steps on one batch, the first of them done; one kind at a time."""
    steps.BEFORE_RECORDING = FIRST if recorded else sys.maxsize
    torch.backends.cudnn.deterministic = True
    call = training_step(Recipe(**RECIPES[name]), "cuda")
    for _ in range(2 * FIRST):
        call()
    torch.cuda.synchronize()
    return call


def images_a_second(call: Callable[[], object], seconds: float) -> float:
    """The median of five times."""
    found = []
    for _ in range(5):
        started, count = time.perf_counter(), 0
        while time.perf_counter() - started < seconds / 5:
            for _ in range(10):
                call()
            torch.cuda.synchronize()
            count += 10
        found.append(count * BATCH / (time.perf_counter() - started))
    return statistics.median(found)


def _share(results: multiprocessing.Queue[float], begin: Barrier, name: str, recorded: bool, seconds: float) -> None:
    call = stepping(name, recorded)
    begin.wait()
    results.put(images_a_second(call, seconds))


def shared(name: str, recorded: bool, seconds: float, processes: int) -> float:
    """Images a second of all processes."""
    context = multiprocessing.get_context("spawn")
    results, begin = context.Queue(), context.Barrier(processes)
    workers = [context.Process(target=_share, args=(results, begin, name, recorded, seconds)) for _ in range(processes)]
    for worker in workers:
        worker.start()
    found = [results.get() for _ in workers]
    for worker in workers:
        worker.join()
    return sum(found)


def main() -> None:
    parser = options(__doc__, quick="a fifth of a second each")
    parser.add_argument("--processes", type=int, default=1, help="that share the GPU")
    parser.add_argument("--rows", nargs="+", choices=RECIPES, default=list(RECIPES))
    given = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("error: this machine has no GPU")
    torch.set_num_threads(given.threads)
    rows, seconds = [], 0.2 if given.quick else 1.0
    for name in given.rows:
        ours, baseline = (
            images_a_second(stepping(name, recorded), seconds)
            if given.processes == 1
            else shared(name, recorded, seconds, given.processes)
            for recorded in (True, False)
        )
        rows.append(Row(name, "images/s", ours, baseline, ours / baseline))
    show(
        f"steps of {BATCH} images, {given.processes} processes on one {torch.cuda.get_device_name()}", rows, given.json
    )


if __name__ == "__main__":
    main()
