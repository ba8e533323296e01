"""What the benchmarks share: options, timing in turn, and a table of medians and ratios."""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import pandas as pd
import torch

from rampart.data import Dataset
from rampart.models import Classifier, build_model, load_model
from rampart.training import Recipe, State, train
from rampart.training.state import Streams
from rampart.training.step import Step
from rampart.training.train import stages

BATCH = 128
# Trained in seconds.
SMALL = Recipe(width=0.25, epochs=3, lr=0.01)


@dataclass(frozen=True)
class Row:
    """Medians of ours and of a baseline; `ratio` is how many times better ours is."""

    name: str
    unit: str
    ours: float
    baseline: float
    ratio: float


def options(description: str | None, quick: str, threads: int = 2) -> argparse.ArgumentParser:
    """What every benchmark takes; `quick` says how little its --quick does, `threads` is the default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"a look: {quick}")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    parser.add_argument("--threads", type=int, default=threads, help="CPU threads")
    return parser


def in_turn(contenders: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds a call of each, called A A B B C C A A B B C C …; the first call of each turn is not counted: it
    finds memory as the contender before has left it."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, call in contenders.items():
            gc.collect()
            call()
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(found) for name, found in seconds.items()}


@contextmanager
def apart(prepared: Mapping[str, Callable[[], Callable[[], object]]]) -> Iterator[dict[str, Callable[[], object]]]:
    """Contenders in processes of their own, where what one asks of its C library, and how it leaves memory, is not the
    other's: each is what its entry of `prepared`, which is pickled, returns there."""
    context = torch.multiprocessing.get_context("spawn")  # tensors are shared, not copied
    pipes: dict[str, Connection] = {}
    processes = []

    def done(name: str) -> None:
        try:
            pipes[name].recv()
        except (EOFError, OSError):
            raise SystemExit(f"{name} has failed: its process tells why above") from None

    def run(name: str) -> None:
        with suppress(OSError):  # of one that is gone `done` tells
            pipes[name].send(None)
        done(name)

    try:
        for name, prepare in prepared.items():
            pipes[name], there = context.Pipe()
            process = context.Process(target=_serve, args=(there, torch.get_num_threads(), prepare))
            process.start()
            there.close()
            processes.append(process)
            done(name)
        yield {name: partial(run, name) for name in prepared}
    finally:
        for pipe in pipes.values():
            pipe.close()
        for process in processes:
            process.join()


def _serve(pipe: Connection, threads: int, prepare: Callable[[], Callable[[], object]]) -> None:
    torch.set_num_threads(threads)
    call = prepare()
    with suppress(EOFError):  # nobody asks any more
        while True:
            pipe.send(None)
            pipe.recv()
            call()


def models_of(files: Sequence[str], data: Dataset, recipe: Recipe = SMALL) -> dict[str, Classifier]:
    """By name: those in the files, or where none is given one that is trained on the dataset by the recipe."""
    if files:
        return {Path(file).stem: load_model(file) for file in files}
    return {"fresh": train(recipe, data, Silent())}


class Silent:
    """A recorder that keeps nothing."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        pass

    def checkpoint(self, model: Classifier, state: State) -> str:
        return ""


def training_step(recipe: Recipe, device: str = "cpu") -> Callable[[], object]:
    """A step as `train` takes it (of an encoder, where there are two stages), on one batch of noise."""
    torch.manual_seed(0)
    model = build_model(recipe.architecture).to(device).train()
    stage, *_ = stages(recipe, model)
    streams = Streams(torch.Generator(), torch.Generator(device).manual_seed(0))
    step = Step(stage.trained, model, stage.method, stage.criterion, recipe, streams)
    x, y = torch.rand(BATCH, 3, 32, 32, device=device), torch.randint(10, (BATCH,), device=device)
    return lambda: step(x, y, recipe.eps, recipe.lr)


def peak_memory(target: Callable[..., Callable[[], object]], *given: object) -> float:
    """MiB that a call of what `target(*given)` prepares takes at its peak, in a fresh process (Linux alone)."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(there, target, given))
    process.start()
    there.close()
    try:
        found: float = here.recv()
    except EOFError:
        raise SystemExit("what was to be measured has failed: its process tells why above") from None
    finally:
        process.join()
    return found


def _measure(result: Connection, target: Callable[..., Callable[[], object]], given: tuple[object, ...]) -> None:
    call = target(*given)
    gc.collect()
    # Else the peak would be that of what was prepared, as often as that took more.
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak()
    call()
    result.send(_peak() - before)


def _peak() -> float:
    """The most memory, MiB, that this process has held since its peak was last forgotten."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def show(title: str, rows: list[Row], as_json: bool) -> None:
    """Prints the table; with `as_json` one line of JSON after it."""
    table = pd.DataFrame(
        [[row.name, row.unit, f"{row.ours:.4g}", f"{row.baseline:.4g}", f"{row.ratio:.2f}"] for row in rows],
        columns=["row", "unit", "ours", "baseline", "ratio"],
    )
    print(f"\n{title}\n{table.to_markdown(index=False, disable_numparse=True)}")
    if as_json:
        print(json.dumps({row.name: {"ours": row.ours, "baseline": row.baseline, "ratio": row.ratio} for row in rows}))
