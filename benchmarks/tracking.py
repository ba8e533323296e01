"""What tracking costs a training, and what a tracking server takes: python -m benchmarks.tracking [--quick] [--json].

The first rows train arms of profile quick with every curve, checkpoint and system metric tracked, and with nothing
tracked, in turn. The last has processes that log to one server, epochs as a training does, as fast as they can: metrics
a second, and whether all of them arrived (ratio: of those sent, those found). Give it --backend postgresql://… to ask a
server with PostgreSQL; without, the server keeps an SQLite file.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from mlflow import MlflowClient

from benchmarks.common import Row, Silent, options, show
from rampart.console import configure_logging
from rampart.settings import TrainSettings, resolve
from rampart.study.opening import data_of
from rampart.study.training import Epochs
from rampart.tracking import open_run
from rampart.tracking.later import Later
from rampart.tracking.queries import metric_history, metric_names
from rampart.training import train

# Of one epoch of a training.
CURVES = 12


def overhead(method: str, turns: int, epochs: int) -> Row:
    """Training time with everything tracked, beside that with nothing tracked."""
    settings = resolve("train", {"method": method, "threads": "1"} | ({"epochs": str(epochs)} if epochs else {}))
    assert isinstance(settings, TrainSettings)
    data, cpu = data_of(settings), torch.device("cpu")
    seconds: dict[str, list[float]] = {"tracked": [], "bare": []}
    for turn in range(turns + 1):
        started = time.perf_counter()
        train(settings, data, Silent(), settings, 0, cpu)
        bare = time.perf_counter() - started
        with open_run("train") as run:
            started = time.perf_counter()
            with Later() as later, Epochs(run, later) as told:
                train(settings, data, told, settings, 0, cpu)
            tracked = time.perf_counter() - started
        if turn:  # the first one warms up
            seconds["tracked"].append(tracked)
            seconds["bare"].append(bare)
    ours, baseline = (statistics.median(seconds[name]) for name in ("tracked", "bare"))
    return Row(f"training of {method}, tracked (baseline: not tracked)", "s", ours, baseline, baseline / ours)


@contextmanager
def server(backend: str, folder: Path, port: int) -> Iterator[str]:
    """A tracking server that keeps artifacts in `folder`."""
    words = ["--backend-store-uri", backend, "--artifacts-destination", str(folder / "kept")]
    command = [sys.executable, "-m", "mlflow", "server", *words, "--port", str(port), "--workers", "2"]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        while process.poll() is None:
            try:
                urllib.request.urlopen(f"{address}/health")
                break
            except OSError:
                time.sleep(0.5)
        yield address
    finally:
        os.killpg(process.pid, 15)
        process.wait()


def log_epochs(address: str, epochs: int) -> str:
    """What a worker does: an epoch's metrics at a time, in the background."""
    os.environ["MLFLOW_TRACKING_URI"] = address
    with open_run("benchmark") as run, Later() as later:
        for epoch in range(epochs):
            values = {f"train/curve_{curve}": epoch + curve / 100 for curve in range(CURVES)}
            later.do(partial(run.curves, [(values, epoch, time.time())]))
    return run.id


def crowd(address: str, workers: int, epochs: int) -> tuple[float, float]:
    """(metrics a second, share of them that the server has in the end)"""
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.starmap(log_epochs, [(address, 1)] * workers)  # imports, and the store's tables
        started = time.perf_counter()
        runs = pool.starmap(log_epochs, [(address, epochs)] * workers, chunksize=1)
        seconds = time.perf_counter() - started
    os.environ["MLFLOW_TRACKING_URI"] = address
    kept = sum(len(metric_history(run, metric_names(run)).drop_duplicates()) for run in runs)
    sent = workers * epochs * CURVES
    assert all(MlflowClient().get_run(run).info.status == "FINISHED" for run in runs)
    return sent / seconds, kept / sent


def main() -> None:
    parser = options(__doc__, quick="one turn of five epochs, four workers", threads=1)
    parser.add_argument("--backend", default="", help="database of the server: postgresql://…")
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--methods", nargs="*", default=["normal", "adversarial", "certified"])
    given = parser.parse_args()
    configure_logging(quiet=True)
    torch.set_num_threads(given.threads)
    turns, epochs, workers = (1, 5, 4) if given.quick else (3, 0, given.workers)
    with tempfile.TemporaryDirectory(prefix="rampart-") as folder:
        os.chdir(folder)
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        rows = [overhead(method, turns, epochs) for method in given.methods]
        with server(given.backend or f"sqlite:///{folder}/server.db", Path(folder), 5711) as address:
            rate, kept = crowd(address, workers, 20 if given.quick else 100)
        kind = given.backend.partition(":")[0] or "sqlite"
        rows.append(Row(f"{workers} workers, one server with {kind}: metrics", "metrics/s", rate, rate, kept))
        os.chdir("/")
    show("tracking", rows, given.json)


if __name__ == "__main__":
    main()
