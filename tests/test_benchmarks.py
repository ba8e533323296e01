"""The benchmarks run and report ratios; how large they are is for their reader."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch

from benchmarks.common import apart, peak_memory
from benchmarks.gpu import shared
from benchmarks.scaling import simulate
from benchmarks.verification import COLUMNS, rows_of

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("attacks", "bounds", "muon", "scaling", "tracking", "training", "tuning", "verification"),
        pytest.param("gpu", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
    ],
)
def test_a_quick_benchmark_ends_with_its_ratios(name: str) -> None:
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    assert rows
    for row in rows.values():
        assert set(row) == {"ours", "baseline", "ratio"}
        assert row["ratio"] >= 0


def results(model: str, *rows: tuple[int, str, float, int]) -> pd.DataFrame:
    return pd.DataFrame([(model, *row) for row in rows], columns=COLUMNS)


def test_verifiers_are_compared_on_the_images_that_both_settle() -> None:
    ours = results("m", (1, "safe", 2.0, 100), (2, "unsafe", 1.0, 0), (3, "timeout", 8.0, 900))
    theirs = results("m", (1, "safe", 8.0, 50), (2, "timeout", 7.0, 0), (3, "timeout", 9.0, 35))
    settled, median, domains = rows_of("m", ours, theirs)
    assert (settled.ours, settled.baseline, settled.ratio) == (2, 1, 2)
    assert (median.ours, median.baseline, median.ratio) == (2, 8, 4)
    assert (domains.ours, domains.baseline, domains.ratio) == (100, 5, 20)


def test_verdicts_that_contradict_each_other_stop_the_benchmark() -> None:
    with pytest.raises(SystemExit, match=r"images \[1\] of m"):
        rows_of("m", results("m", (1, "safe", 1.0, 2)), results("m", (1, "unsafe", 1.0, 2)))


def _told(file: Path) -> Callable[[], object]:
    prepared_in = os.getpid()

    def call() -> None:
        with file.open("a") as lines:
            lines.write(f"{prepared_in} {os.getpid()} {torch.get_num_threads()}\n")

    return call


def _failing() -> Callable[[], object]:
    return partial(int, "none")


def _never_prepared() -> Callable[[], object]:
    raise ValueError("no such contender")


def test_contenders_apart_have_a_process_each(tmp_path: Path) -> None:
    with apart({name: partial(_told, tmp_path / name) for name in ("ours", "theirs")}) as calls:
        for name in ("ours", "theirs", "ours"):
            calls[name]()
    ours, theirs = ((tmp_path / name).read_text().splitlines() for name in ("ours", "theirs"))
    assert len(ours) == 2
    assert len({*ours, *theirs}) == 2
    for line in (*ours, *theirs):
        prepared_in, called_in, threads = map(int, line.split())
        assert prepared_in == called_in != os.getpid()
        assert threads == torch.get_num_threads()


@pytest.mark.parametrize("prepare", [_failing, _never_prepared])
def test_a_contender_that_fails_ends_the_benchmark(prepare: Callable[[], Callable[[], object]]) -> None:
    with pytest.raises(SystemExit, match="theirs has failed"), apart({"theirs": prepare}) as calls:
        calls["theirs"]()


@pytest.mark.skipif(sys.platform != "linux", reason="what a process takes is asked of Linux")
def test_the_memory_of_a_call_that_fails_is_not_waited_for() -> None:
    assert peak_memory(_taking, 2**26) == pytest.approx(64, rel=0.2)
    for prepare in (_failing, _never_prepared):
        with pytest.raises(SystemExit, match="has failed"):
            peak_memory(prepare)


def _taking(many: int) -> Callable[[], object]:
    return partial(bytearray, many)


def test_processes_that_cannot_share_a_gpu_end_the_benchmark() -> None:
    with pytest.raises(SystemExit, match="nonesuch has failed"):
        shared("nonesuch", True, 0.1, 2)


def test_embeddings_are_simulated_one_at_a_time_beside_the_workers() -> None:
    seconds = {"train": 2.0, "evaluate": 1.0, "verify": 2.0, "embed": 0.5}
    times = {(arm, step): took for arm in ("normal", "adversarial") for step, took in seconds.items()}
    # 20 arms and seeds of 5 s by one worker; the last embedding is over long before.
    assert simulate(times, 1, 10) == 100
    assert simulate(times, 4, 10) == 25
    # A worker for each: the embeddings of all of them, when the trainings are over.
    assert simulate(times, 20, 10) == 2 + 20 * 0.5
