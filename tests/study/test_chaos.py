"""A study whose parts are killed at random is in the end what it would have been."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import psutil
import pytest
from mlflow import MlflowClient

from rampart.tracking.queries import find_runs, metric_history, metric_names
from tests.conftest import TINY_STUDY, Postgres, as_words, free_port, run_rampart, start_mlflow

KILLS = 20
# All twelve arms, and trainings long enough to be hit.
SETTINGS = {**TINY_STUDY, "methods": "normal,adversarial,certified", "augment": "False,True", "epochs": "6"}
SETTINGS |= {"encoder_epochs": "4", "head_epochs": "2", "evaluate.certify": "none", "evaluate.trust_images": "0"}
# By which processes of the study are told from all others, whoever their parent is by then.
MARK = "RAMPART_TEST_CHAOS"


class Victims:
    """The study's command, which is given again whenever it has ended before its time, and what it depends on."""

    def __init__(self, folder: Path, database: Postgres) -> None:
        self.folder, self.database, self.port = folder, database, free_port()
        self.words = ["server", "--backend-store-uri", database.url, "--artifacts-destination", str(folder / "kept")]
        self.server = start_mlflow(self.words, folder, self.port)
        self.address = f"http://127.0.0.1:{self.port}"
        self.log = (folder / "main.log").open("w")
        self.study = self.command()

    def command(self) -> subprocess.Popen[bytes]:
        env = {**os.environ, "MLFLOW_TRACKING_URI": self.address, MARK: self.folder.name}
        env |= {"PYTHONPATH": str(Path(__file__).parents[2] / "src")}
        return subprocess.Popen(
            [sys.executable, "-m", "rampart", "main", *as_words(SETTINGS)], cwd=self.folder, env=env, stderr=self.log
        )

    def processes(self) -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.folder.name:
                    yield process
            except psutil.Error:
                continue

    def kill_worker(self) -> None:
        workers = [p for p in self.processes() if "spawn_main" in " ".join(p.cmdline())]
        if workers:
            random.choice(workers).kill()

    def kill_parent(self) -> None:
        self.study.kill()

    def kill_server(self) -> None:
        os.killpg(self.server.pid, signal.SIGKILL)
        self.server.wait()
        self.server = start_mlflow(self.words, self.folder, self.port)

    def kill_database(self) -> None:
        self.database.crash()
        time.sleep(2)
        self.database.start()


@pytest.mark.slow
def test_twenty_kills(store: Path, postgres_server: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = store / "undisturbed"
    undisturbed.mkdir()
    calm = run_rampart("main", SETTINGS, undisturbed)
    assert calm.returncode == 0, calm.stderr[-3000:]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{undisturbed}/mlflow.db")
    expected = values()

    random.seed(0)
    victims = Victims(store, postgres_server)
    kills = [victims.kill_worker, victims.kill_parent, victims.kill_server, victims.kill_database]
    # Each of them, and the rest by chance.
    plan = kills + random.choices(kills, k=KILLS - len(kills))
    random.shuffle(plan)
    begun = time.monotonic()
    while plan or victims.study.poll() != 0:
        assert time.monotonic() - begun < 3600, (store / "main.log").read_text()[-3000:]
        pause = time.monotonic() + random.uniform(5, 25)
        while time.monotonic() < pause and victims.study.poll() is None:
            time.sleep(0.2)
        if victims.study.poll() not in (None, 0):
            victims.study = victims.command()
        elif plan and victims.study.poll() is None:
            plan.pop()()
        else:
            assert not plan, f"the study was over with {len(plan)} kills left"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", victims.address)
    _, left = psutil.wait_procs(list(victims.processes()), timeout=90)
    assert not left
    for step in ("train", "evaluate", "verify", "embed"):
        done = find_runs("0", {"step": step})["tags.rampart.arm"].value_counts()
        assert len(done) == 12
        assert set(done) == {1}, done
    assert find_runs("0", {}, status="RUNNING").empty
    pd.testing.assert_frame_equal(values(), expected)
    for run in find_runs("0", {"step": "train"})["run_id"]:
        curves = metric_history(run, [name for name in metric_names(run) if not name.startswith("kept/")])
        assert not curves.duplicated(["metric", "step"]).any()
    os.killpg(victims.server.pid, signal.SIGTERM)
    victims.server.wait()


def values() -> pd.DataFrame:
    """The numbers of the newest comparison."""
    newest = find_runs("0", {"step": "compare"})["run_id"].iloc[0]
    table = pd.read_csv(MlflowClient().download_artifacts(newest, "values.csv")).drop(columns="run")
    return table.sort_values(list(table.columns)).reset_index(drop=True)
