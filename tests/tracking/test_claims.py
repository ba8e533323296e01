"""A step is done by one process at a time, whoever else wants to; and the signs by which others know that it lives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from rampart.errors import RampartError
from rampart.tracking import claims, open_run, store
from rampart.tracking.claims import bury, claimed
from rampart.tracking.queries import find_runs
from rampart.tracking.store import PULSE, sweep

TOP = Path(__file__).parents[2]

COUNT = """
import sys, time
from mlflow import MlflowClient
from rampart.tracking import open_run
from rampart.tracking.claims import claimed
counter, rounds = sys.argv[1], int(sys.argv[2])
client = MlflowClient()
with open_run("main") as run:
    for _ in range(rounds):
        with claimed(run.id, run.experiment, "key", "work"):
            # Two that did this side by side would lose a count.
            seen = int(client.get_run(counter).data.tags["count"])
            time.sleep(0.02)
            client.set_tag(counter, "count", str(seen + 1))
"""


def process(script: str, *words: str) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(TOP / "src")}
    return subprocess.Popen([sys.executable, "-c", script, *words], env=env, stdout=subprocess.PIPE, text=True)


def test_of_several_processes_one_at_a_time() -> None:
    with open_run("counter") as counter:
        counter.client.set_tag(counter.id, "count", "0")
        others = [process(COUNT, counter.id, "4") for _ in range(3)]
        assert [other.wait() for other in others] == [0, 0, 0]
        assert counter.client.get_run(counter.id).data.tags["count"] == "12"
    left = find_runs(counter.experiment, {"step": "main"})
    assert not any("claim" in column for column in left.dropna(axis=1).columns)


def test_a_claim_falls_with_its_process() -> None:
    hold = """
import time
from rampart.tracking import open_run
from rampart.tracking.claims import claimed
with open_run("main") as run, claimed(run.id, run.experiment, "key", "work"):
    print("held", flush=True)
    time.sleep(600)
"""
    with open_run("main") as run:
        holder = process(hold)
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with claimed(run.id, run.experiment, "another key", "work"):
            pass
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        with claimed(run.id, run.experiment, "key", "work"):
            assert set(find_runs(run.experiment, {}, status="RUNNING")["run_id"]) == {run.id}


def test_a_run_of_another_host_counts_as_dead_after_a_long_silence() -> None:
    client = MlflowClient()
    with open_run("main") as run:
        others = [client.create_run(run.experiment).info.run_id for _ in range(3)]
        now = time.time()
        for other, beat in zip(others, (now - 10, now - store.SILENCE - 10, None), strict=True):
            client.set_tag(other, "rampart.host", "elsewhere")
            client.set_tag(other, "rampart.process", "1:1.0")
            if beat:
                client.set_tag(other, PULSE, str(int(beat)))
        assert sweep(run.experiment) == []
        # The one that never had a pulse may be of an older version: nothing is known of it.
        assert sweep(run.experiment, everywhere=True) == [others[1]]
        assert client.get_run(others[1]).info.status == "KILLED"


def test_a_run_tells_that_it_is_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "BEAT", 0.1)
    with open_run("main") as run:
        run.client.set_tag(run.id, PULSE, "0")
        for _ in range(100):
            time.sleep(0.1)
            beat = int(run.client.get_run(run.id).data.tags[PULSE])
            if beat:
                break
    assert abs(beat - time.time()) < 60


def test_a_run_that_is_gone_on_in_has_the_pulse_and_the_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else another machine would take a long training for dead after its resumption."""
    monkeypatch.setattr(store, "BEAT", 0.1)
    client = MlflowClient()
    with open_run("main") as study, open_run("train", study.id, "a.b") as run:
        stopped = client.create_run(run.experiment).info.run_id
        client.set_terminated(stopped, "KILLED")
        run.go_on_in(stopped)
        client.set_tag(stopped, PULSE, "0")
        for _ in range(100):
            time.sleep(0.1)
            tags = client.get_run(stopped).data.tags
            if tags[PULSE] != "0":
                break
    assert abs(int(tags[PULSE]) - time.time()) < 60
    assert tags["rampart.task"] == "a.b"
    assert client.get_run(stopped).info.status == "FINISHED"


def test_what_a_lost_worker_left_running_is_ended_before_the_step_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "FAREWELL", 1)
    client = MlflowClient()
    with open_run("main") as run:
        left, foreign = (client.create_run(run.experiment).info.run_id for _ in range(2))
        for other, task in ((left, "a.b"), (foreign, "c.d")):
            for name, text in (("task", task), ("host", "elsewhere"), ("process", "1:1.0")):
                client.set_tag(other, f"rampart.{name}", text)
        bury(run.experiment, "a.b")
        assert client.get_run(left).info.status == "KILLED"
        assert client.get_run(foreign).info.status == "RUNNING"


def test_what_another_machine_still_works_at_may_end_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    client = MlflowClient()
    with open_run("main") as run:
        working, silent = (client.create_run(run.experiment).info.run_id for _ in range(2))
        for other, task, beat in ((working, "a.b", 0), (silent, "c.d", store.SILENCE + 10)):
            client.set_tag(other, PULSE, str(int(time.time() - beat)))
            for name, text in (("task", task), ("host", "elsewhere"), ("process", "1:1.0")):
                client.set_tag(other, f"rampart.{name}", text)
        waited: list[float] = []

        def leaves_a_checkpoint(seconds: float) -> None:
            waited.append(seconds)
            client.set_terminated(working, "FAILED")

        monkeypatch.setattr("rampart.tracking.claims.time.sleep", leaves_a_checkpoint)
        bury(run.experiment, "a.b")
        assert client.get_run(working).info.status == "FAILED"
        bury(run.experiment, "c.d")
        assert client.get_run(silent).info.status == "KILLED"
        assert waited == [1.0]


def test_a_folder_that_artifacts_cannot_be_written_to_is_said_before_any_work(store: Path) -> None:
    (store / "mlruns").write_text("a file where a folder should be")
    wanted = r"artifacts cannot be written to .*mlruns.*: make it writable"
    with pytest.raises(RampartError, match=wanted), open_run("train"):
        raise AssertionError("the work has begun")
    assert list(find_runs("0", {"step": "train"}, status=None)["status"]) == ["FAILED"]


def test_artifacts_behind_a_server_are_told_of_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """`mlflow ui` makes such a store."""
    experiment = MlflowClient().create_experiment("served", artifact_location="mlflow-artifacts:/1")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "served")
    with pytest.raises(RampartError, match="made by a server"), open_run("train"):
        raise AssertionError("the work has begun")
    assert list(find_runs(experiment, {"step": "train"}, status=None)["status"]) == ["FAILED"]
