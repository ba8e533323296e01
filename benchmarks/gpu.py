"""Steps of training on a GPU: python -m benchmarks.gpu [--processes N] [--rows ROW …] [--quick] [--json].

Ours: the step as `train` takes it, recorded as a CUDA graph. Baseline: the same step, its kernels started one by one.
With --processes, so many processes share the GPU (side by side where `nvidia-cuda-mps-control -d` runs, else in turn),
and images a second are those of all.

Rows `back through …`: the linear bounds of a step of `certified, supcon` taken back through a layer, with gradients.
Ours: in as few passes over memory as can be. Baseline: by PyTorch's operations.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.common import BATCH, Row, options, show, training_step
from rampart.bounds.relaxation import Relaxation, through_relu
from rampart.models.geometry import Geometry
from rampart.models.links import Conv
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
# Behind the second convolution of `paper-cnn`: images, bounds of each, and the shape of a map.
MAPS = (BATCH, 128, 64, 8, 8)


def back_through_convolution(ours: bool) -> Callable[[], object]:
    torch.manual_seed(0)
    weight = torch.randn(MAPS[2], 32, 3, 3, device="cuda", requires_grad=True)
    a = torch.randn(MAPS[0] * MAPS[1], *MAPS[2:], device="cuda", requires_grad=True)
    link = Conv(weight, weight[:, 0, 0, 0], Geometry((3, 3), (2, 2), (1, 1), (1, 1), (16, 16)))

    def call() -> object:
        pulled = link.pull(a) if ours else F.conv_transpose2d(a, weight, None, 2, 1, 1)
        return torch.autograd.grad(pulled.sum(), (a, weight))

    return call


def back_through_relu(ours: bool) -> Callable[[], object]:
    torch.manual_seed(0)
    a = torch.randn(MAPS, device="cuda", requires_grad=True)
    slope, intercept = (torch.rand(MAPS[0], *MAPS[2:], device="cuda", requires_grad=True) for _ in range(2))
    relaxation = Relaxation(slope, intercept)

    def call() -> object:
        # Given lower slopes, if only its own, are what PyTorch's operations are for.
        moved, constant = through_relu(a, relaxation, None if ours else relaxation.lower_slope.unsqueeze(1))
        return torch.autograd.grad(moved.sum() + constant.sum(), (a, slope, intercept))

    return call


PASSES = {"back through a convolution": back_through_convolution, "back through a ReLU": back_through_relu}


def stepping(name: str, ours: bool) -> Callable[[], object]:
    """Steps on one batch, or passes over maps, the first of them done; one kind at a time."""
    steps.BEFORE_RECORDING = FIRST if ours else sys.maxsize
    torch.backends.cudnn.deterministic = True
    call = PASSES[name](ours) if name in PASSES else training_step(Recipe(**RECIPES[name]), "cuda")
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


def _share(pipe: Connection, name: str, ours: bool, seconds: float) -> None:
    call = stepping(name, ours)
    pipe.send(None)
    with suppress(EOFError):  # another one has failed
        pipe.recv()
        pipe.send(images_a_second(call, seconds))


def shared(name: str, ours: bool, seconds: float, processes: int) -> float:
    """Images a second of all processes."""
    context = multiprocessing.get_context("spawn")
    pipes, workers = [], []
    for _ in range(processes):
        here, there = context.Pipe()
        worker = context.Process(target=_share, args=(there, name, ours, seconds))
        worker.start()
        there.close()
        pipes.append(here)
        workers.append(worker)
    try:
        for pipe in pipes:  # all begin when the last of them can
            pipe.recv()
        for pipe in pipes:
            pipe.send(None)
        return sum(pipe.recv() for pipe in pipes)
    except (EOFError, OSError):
        raise SystemExit(f"{name} has failed: its process tells why above") from None
    finally:
        for pipe in pipes:
            pipe.close()
        for worker in workers:
            worker.join()


def main() -> None:
    parser = options(__doc__, quick="a fifth of a second each")
    parser.add_argument("--processes", type=int, default=1, help="that share the GPU")
    parser.add_argument("--rows", nargs="+", choices=[*RECIPES, *PASSES], default=[*RECIPES, *PASSES])
    given = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("error: this machine has no GPU")
    torch.set_num_threads(given.threads)
    rows, seconds = [], 0.2 if given.quick else 1.0
    for name in given.rows:
        mine, baseline = (
            images_a_second(stepping(name, ours), seconds)
            if given.processes == 1
            else shared(name, ours, seconds, given.processes)
            for ours in (True, False)
        )
        rows.append(Row(name, "images/s", mine, baseline, mine / baseline))
    show(
        f"steps of {BATCH} images, {given.processes} processes on one {torch.cuda.get_device_name()}", rows, given.json
    )


if __name__ == "__main__":
    main()
