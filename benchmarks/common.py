"""What the benchmarks share: timing in turn, and a table of medians and ratios."""

from __future__ import annotations

import gc
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd


@dataclass(frozen=True)
class Row:
    """Medians of ours and of a baseline; `ratio` is how many times better ours is."""

    name: str
    unit: str
    ours: float
    baseline: float
    ratio: float


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


def peak_memory(target: Callable[..., Callable[[], object]], *given: object) -> float:
    """MiB by which a call of what `target(*given)` prepares raises the peak of a fresh process."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_measure, args=(results, target, given))
    process.start()
    found = results.get()
    process.join()
    return found


def _measure(results: multiprocessing.Queue, target: Callable[..., Callable[[], object]], given: tuple) -> None:
    call = target(*given)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call()
    results.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def show(title: str, rows: list[Row], as_json: bool) -> None:
    """Prints the table; with `as_json` one line of JSON after it."""
    table = pd.DataFrame(
        [[row.name, row.unit, f"{row.ours:.4g}", f"{row.baseline:.4g}", f"{row.ratio:.2f}"] for row in rows],
        columns=["row", "unit", "ours", "baseline", "ratio"],
    )
    print(f"\n{title}\n{table.to_markdown(index=False, disable_numparse=True)}")
    if as_json:
        print(json.dumps({row.name: {"ours": row.ours, "baseline": row.baseline, "ratio": row.ratio} for row in rows}))
