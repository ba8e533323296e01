"""The train step: what a training that was stopped leaves, and how the same command goes on."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from rampart.models import Classifier, build_model
from rampart.study import run_step, training
from rampart.tracking import Run, fetch_model, open_run
from rampart.tracking.later import Later
from rampart.tracking.queries import artifact_place, find_runs, metric_history, metric_names, read_checkpoint
from rampart.tracking.runs import CHECKPOINTS
from rampart.training import State, loop
from tests.conftest import as_words, run_rampart

GIVEN = {"width": "0.125", "epochs": "4", "augment": "True", "threads": "1"}


@pytest.fixture
def stopped(store: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The run of a training that was interrupted in its third epoch, its process gone."""
    validate, calls = loop.validate, []

    def interrupted(*given: Any) -> object:
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return validate(*given)

    monkeypatch.setattr(loop, "validate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_step("train", GIVEN)
    monkeypatch.setattr(loop, "validate", validate)
    (run,) = find_runs("0", {"step": "train"}, status="KILLED")["run_id"]
    return str(run)


def started(store: Path, stderr: int) -> subprocess.Popen[str]:
    """The training as a process of its own."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    return subprocess.Popen(
        [sys.executable, "-m", "rampart", "train", *as_words(GIVEN)], cwd=store, env=env, stderr=stderr, text=True
    )


def weights(run: str) -> dict[str, torch.Tensor]:
    return fetch_model(f"runs:/{run}/model").state_dict()


def equal(one: str, other: str) -> bool:
    pairs = zip(weights(one).values(), weights(other).values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def require_whole_curves(run: str) -> None:
    history = metric_history(run, [name for name in metric_names(run) if name.startswith(("train/", "val/"))])
    for name, steps in history.groupby("metric")["step"]:
        assert sorted(steps) == ([4] if name == "train/best_epoch" else [1, 2, 3, 4]), name


def undisturbed() -> str:
    """The same training, which finds nothing to go on with: the newest one has finished."""
    run = run_step("train", GIVEN)
    assert len(find_runs("0", {"step": "train"})) == 2
    return run


def test_the_same_command_goes_on_in_the_same_run(stopped: str) -> None:
    run = run_step("train", GIVEN)
    assert run == stopped
    found = find_runs("0", {}, status=None)
    assert list(found["run_id"]) == [run]
    assert list(found["status"]) == ["FINISHED"]
    assert "tags.rampart.error" not in found or found["tags.rampart.error"].isna().all()
    require_whole_curves(run)
    assert equal(run, undisturbed())


def test_a_run_that_mlflow_started_says_where_it_goes_on(stopped: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = MlflowClient().create_run("0").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", given)
    assert run_step("train", GIVEN) == stopped
    info = MlflowClient().get_run(given)
    assert info.info.status == "FINISHED"
    assert info.data.tags["rampart.goes_on_in"] == stopped
    assert list(find_runs("0", {"step": "train"})["run_id"]) == [stopped]


def test_it_may_be_stopped_more_than_once(stopped: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`mlflow run` starts a run for each try: none of them may hide the one that has the checkpoints."""
    client, validate, given = MlflowClient(), loop.validate, []

    def interrupted(*_: object) -> object:
        raise KeyboardInterrupt

    for patched in (interrupted, interrupted, validate):
        monkeypatch.setattr(loop, "validate", patched)
        given.append(client.create_run("0").info.run_id)
        monkeypatch.setenv("MLFLOW_RUN_ID", given[-1])
        if patched is validate:
            assert run_step("train", GIVEN) == stopped
        else:
            with pytest.raises(KeyboardInterrupt):
                run_step("train", GIVEN)
    assert [client.get_run(run).info.status for run in given] == ["KILLED", "KILLED", "FINISHED"]
    assert client.get_run(stopped).info.status == "FINISHED"
    require_whole_curves(stopped)
    assert equal(stopped, undisturbed())


def test_other_settings_begin_anew(stopped: str) -> None:
    assert run_step("train", {**GIVEN, "lr": "0.002"}) != stopped
    assert MlflowClient().get_run(stopped).info.status == "KILLED"


def test_a_broken_checkpoint_is_said_and_the_one_before_it_used(stopped: str, caplog: pytest.LogCaptureFixture) -> None:
    states = {name: state for name in CHECKPOINTS if (state := read_checkpoint(stopped, name)) is not None}
    older, broken = sorted(states, key=lambda name: states[name].epoch)
    newest = Path(artifact_place(stopped, broken))
    content = bytearray(newest.read_bytes())
    content[-9] ^= 1
    newest.write_bytes(content)
    with caplog.at_level(logging.INFO):
        assert run_step("train", GIVEN) == stopped
    assert "checksum does not match" in caplog.text
    assert f"epoch {states[older].epoch}, after 0 batches" in caplog.text
    require_whole_curves(stopped)
    assert equal(stopped, undisturbed())


@pytest.mark.parametrize("place", [0, 1])
def test_the_state_that_is_gone_on_from_is_not_written_over_first(
    place: int, stopped: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    epochs = [read_checkpoint(stopped, name).epoch for name in CHECKPOINTS]
    even, odd = (Path(artifact_place(stopped, name)) for name in CHECKPOINTS)
    if epochs.index(max(epochs)) != place:
        even.rename(even.with_suffix(".moved"))
        odd.rename(even)
        even.with_suffix(".moved").rename(odd)
    written: list[int] = []
    write = Run.checkpoint

    def noted(run: Run, model: Classifier, state: State, at: int) -> str:
        written.append(at)
        return write(run, model, state, at)

    monkeypatch.setattr(Run, "checkpoint", noted)
    assert run_step("train", GIVEN) == stopped
    assert written[0] == 1 - place


def test_a_killed_process_is_gone_on_with(store: Path) -> None:
    process = started(store, subprocess.DEVNULL)
    with open_run("main"):  # makes the store ready
        pass

    def told() -> int:
        runs = find_runs("0", {"step": "train"}, status=None)
        names = [metric_names(run) for run in runs["run_id"]]
        return len(metric_history(runs["run_id"][0], ["train/loss"])) if names and "train/loss" in names[0] else 0

    while told() < 2:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = run_rampart("train", GIVEN, store)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "going on in run" in done.stderr
    (run,) = find_runs("0", {"step": "train"}, status=None)["run_id"]
    require_whole_curves(str(run))
    assert equal(str(run), undisturbed())


def test_a_training_killed_after_its_model_was_logged_logs_it_once(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*given: Any) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(training.describing, "training", killed)
        with pytest.raises(KeyboardInterrupt):
            run_step("train", GIVEN)
    run = run_step("train", GIVEN)
    outputs = MlflowClient().get_run(run).outputs
    assert len(outputs.model_outputs) == 1
    assert equal(run, undisturbed())


def test_the_server_is_told_of_the_newest_checkpoint_and_of_every_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Epochs shorter than the pace: few checkpoints are written, no metric is missed, the last state is kept."""
    monkeypatch.setattr(training, "PACE", 60.0)
    model = build_model(width=0.125)
    with open_run("train") as run:
        with Later() as later, training.Epochs(run, later) as epochs:
            for epoch in range(1, 8):
                epochs.metrics({"train/loss": 1 / epoch}, epoch)
                said = epochs.checkpoint(model, State("train", epoch, 0, 0, 1, 0.0, {"loss_sum": torch.zeros(())}))
        kept = [state.epoch for name in CHECKPOINTS if (state := read_checkpoint(run.id, name)) is not None]
        newest = read_checkpoint(run.id, said.removeprefix(f"runs:/{run.id}/"))
    assert max(kept) == 7
    assert newest is not None
    assert newest.epoch == 7
    assert list(metric_history(run.id, ["train/loss"])["step"]) == [1, 2, 3, 4, 5, 6, 7]


def test_a_checkpoint_that_cannot_be_written_does_not_cost_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full for two tries, each of which spoils the file that it was about to write."""
    monkeypatch.setattr(training, "PACE", 0.0)
    monkeypatch.setattr("rampart.tracking.later.PAUSES", (0.1, 0.1, 0.1))
    model = build_model(width=0.125)

    def state(epoch: int) -> State:
        return State("train", epoch, 0, 0, 1, 0.0, {"loss_sum": torch.zeros(())})

    with open_run("train") as run:
        written, spoilt = run.checkpoint, []

        def full(model: Any, at: State, place: int) -> str:
            if at.epoch > 1 and len(spoilt) < 2:
                spoilt.append(place)
                run.text("half a file", CHECKPOINTS[place])
                raise OSError(28, "no space left on device")
            return written(model, at, place)

        monkeypatch.setattr(run, "checkpoint", full)
        with Later() as later, training.Epochs(run, later) as epochs:
            epochs.checkpoint(model, state(1))
            time.sleep(0.5)
            for epoch in (2, 3, 4):
                said = epochs.checkpoint(model, state(epoch))
                time.sleep(0.05)
        # Both tries were at the place that does not hold the first.
        assert spoilt == [1, 1]
        kept = {state.epoch for name in CHECKPOINTS if (state := read_checkpoint(run.id, name)) is not None}
        assert 4 in kept
        newest = read_checkpoint(run.id, said.removeprefix(f"runs:/{run.id}/"))
        assert newest is not None
        assert newest.epoch == 4


@pytest.mark.slow
def test_of_two_processes_one_goes_on_and_the_other_begins_anew(stopped: str, store: Path) -> None:
    both = [started(store, subprocess.PIPE) for _ in range(2)]
    said = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sum(f"going on in run {stopped}" in text for text in said) == 1
    runs = list(find_runs("0", {"step": "train"})["run_id"])
    assert len(runs) == 2
    for run in runs:
        require_whole_curves(run)
    assert equal(*runs)


def test_a_run_is_taken_before_the_one_that_claims_it_ends(stopped: str, monkeypatch: pytest.MonkeyPatch) -> None:
    delete, seen = MlflowClient.delete_run, []

    def deleted(client: MlflowClient, run_id: str) -> None:
        seen.append(client.get_run(stopped).info.status)
        delete(client, run_id)

    monkeypatch.setattr(MlflowClient, "delete_run", deleted)
    assert run_step("train", GIVEN) == stopped
    assert seen == ["RUNNING"]
