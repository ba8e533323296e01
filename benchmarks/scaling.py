"""How a study scales: python -m benchmarks.scaling [--quick] [--json].

Runs the study of profile quick with one worker and with two, counts what an arm asks of a tracking server and how fast
one answers, and simulates 10, 100 and 1,000 workers from the step times that were measured: how long a study of 12 arms
and many seeds takes, how well the workers are used, and what the server is asked a second. --backend postgresql://… as
in benchmarks.tracking. With --runs results/quick/runs.csv nothing is measured: the step times are those of that study.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from graphlib import TopologicalSorter
from pathlib import Path
from unittest import mock

import pandas as pd
import requests
import torch

from benchmarks.common import options
from benchmarks.tracking import CURVES, crowd, server
from rampart.arms import grid
from rampart.console import configure_logging
from rampart.settings import ARM_STEPS, nested
from rampart.study import run_step
from rampart.study.graph import Task, graph
from rampart.study.scheduler import AT_HOME, priority
from rampart.tracking.queries import find_runs


def measured(workers: int, folder: Path, given: Mapping[str, str]) -> tuple[float, dict[tuple[str, str], float]]:
    """(seconds of the study, seconds of each arm's steps by arm and step)"""
    store = folder / f"{workers}"
    store.mkdir()
    os.chdir(store)
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{store}/mlflow.db"
    started = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):  # its tables are not what is looked for here
        run_step("main", {**given, "workers": str(workers), "threads": "1"})
    seconds = time.perf_counter() - started
    runs = pd.concat([find_runs("0", {"step": step}).assign(step=step) for step in ARM_STEPS], ignore_index=True)
    return seconds, step_times(runs.rename(columns={"tags.rampart.arm": "arm"}))


def step_times(runs: pd.DataFrame) -> dict[tuple[str, str], float]:
    """Seconds by arm and step; of the step that a study's own process does the median, whatever the arm: the first one
    loads UMAP, too, which a study with many seeds does once as well."""
    took = (pd.to_datetime(runs["end_time"]) - pd.to_datetime(runs["start_time"])).dt.total_seconds()
    at_home = statistics.median(took[runs["step"] == AT_HOME])
    rows = zip(runs["arm"], runs["step"], took, strict=True)
    return {(arm, step): at_home if step == AT_HOME else seconds for arm, step, seconds in rows}


def asked(address: str, given: Mapping[str, str]) -> dict[str, int]:
    """HTTP requests that each step of an arm makes."""
    os.environ["MLFLOW_TRACKING_URI"] = address
    counts, model = {}, ""
    for step in ARM_STEPS:
        texts = {"method": "normal"} if step == "train" else {"model": model}
        with mock.patch.object(requests.Session, "send", autospec=True, side_effect=requests.Session.send) as send:
            run = run_step(step, {**nested(given, step), **texts, "threads": "1"})
        counts[step] = send.call_count
        model = model or f"runs:/{run}/model"
    return counts


def simulate(times: Mapping[tuple[str, str], float], workers: int, seeds: int) -> float:
    """Seconds that the study takes, its tasks given out as `rampart.study.scheduler` does."""
    arms = sorted({arm for arm, _ in times})
    known = {arm.name: arm for arm in grid(("normal", "adversarial", "certified"), (False, True), ("none", "double"))}
    jobs = [(known[arm], seed) for seed in range(seeds) for arm in arms]
    needs = graph(jobs, False, 0, 1)
    order = TopologicalSorter(needs)
    order.prepare()
    # The workers' tasks, and those of the study's own process.
    waiting: dict[bool, list[tuple[tuple[int, ...], Task]]] = {False: [], True: []}
    room = {False: workers, True: 1}
    running: list[tuple[float, Task]] = []
    now = 0.0
    while order.is_active():
        for task in order.get_ready():
            heapq.heappush(waiting[task.step == AT_HOME], (priority(task), task))
        for home, tasks in waiting.items():
            while tasks and room[home]:
                _, task = heapq.heappop(tasks)
                heapq.heappush(running, (now + times[task.arm.name, task.step], task))
                room[home] -= 1
        now, task = heapq.heappop(running)
        order.done(task)
        room[task.step == AT_HOME] += 1
    return now


def simulated(times: Mapping[tuple[str, str], float], seeds: int) -> pd.DataFrame:
    """A row a number of workers."""
    work = seeds * sum(seconds for (_, step), seconds in times.items() if step != AT_HOME)
    rows = [(workers, simulate(times, workers, seeds)) for workers in (1, 2, 10, 100, 1000)]
    table = pd.DataFrame(rows, columns=["workers", "seconds"])
    return table.assign(**{"share of workers in use": work / table["seconds"] / table["workers"]})


def main() -> None:
    parser = options(__doc__, quick="two arms of few epochs", threads=1)
    parser.add_argument("--backend", default="", help="database of the server: postgresql://…")
    parser.add_argument("--seeds", type=int, default=100, help="of the simulated study")
    parser.add_argument("--runs", default="", help="runs.csv of a study's evidence, from whose step times to simulate")
    given = parser.parse_args()
    if given.runs:
        table = simulated(step_times(pd.read_csv(given.runs)), given.seeds)
        print(table.to_markdown(index=False, floatfmt=(",.0f", ",.0f", ".2f")))
        return
    configure_logging(quiet=True)
    torch.set_num_threads(given.threads)
    study: dict[str, str] = {}
    if given.quick:
        study = {"methods": "normal", "augment": "False", "epochs": "2", "encoder_epochs": "1", "head_epochs": "1"}
        study |= {"width": "0.125", "verify.images": "4", "points": "30"}
    with tempfile.TemporaryDirectory(prefix="rampart-") as folder:
        place = Path(folder)
        (alone, times), (together, _) = measured(1, place, study), measured(2, place, study)
        with server(given.backend or f"sqlite:///{folder}/server.db", place, 5712) as address:
            metrics, kept = crowd(address, 4 if given.quick else 16, 20 if given.quick else 100)
            requests_of = asked(address, study)
        os.chdir("/")
    capacity, each = metrics / CURVES, sum(requests_of.values())
    work = sum(times.values())
    arms = len({arm for arm, _ in times})
    longest = max(sum(times[arm, step] for step in ARM_STEPS) for arm in {arm for arm, _ in times})
    print(
        f"\nprofile quick, {arms} arms: {alone:.0f} s with one worker, {together:.0f} s with two, "
        f"ratio {alone / together:.2f}"
    )
    print(f"an arm: {work / arms:.1f} s of work, {each} requests ({requests_of}); the longest: {longest:.1f} s")
    print(f"the server takes {capacity:.0f} requests a second (an epoch's metrics each), and has {kept:.2%} of them")
    table = simulated(times, given.seeds)
    table["requests/s"] = each * arms * given.seeds / table["seconds"]
    table["share of the server"] = table["requests/s"] / capacity
    print(f"\nsimulated: {arms} arms x {given.seeds} seeds\n{table.to_markdown(index=False, floatfmt='.3g')}")
    if given.json:
        row = {"ours": together, "baseline": alone, "ratio": alone / together}
        print(json.dumps({"two workers (baseline: one)": row}))


if __name__ == "__main__":
    main()
