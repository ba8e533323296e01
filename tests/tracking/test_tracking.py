"""Runs end as what became of them; models come back as they went in."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from rampart.data import Dataset
from rampart.errors import ModelError, RampartError
from rampart.models import build_model, save_model
from rampart.tracking import fetch_model, initialise, open_run, source_of
from rampart.tracking.queries import find_runs, read_table, run_tags, seconds_at_work
from rampart.tracking.store import LOST, PULSE, experiment_id, sweep
from rampart.training import State

ROOT = Path(__file__).parents[2]


def test_a_run_carries_versions_commit_host_and_its_end() -> None:
    with open_run("train") as run:
        run.tags({"arm": "normal"})
        run.metrics({"val/accuracy": 0.5}, step=3)
    with pytest.raises(ValueError, match="boom"), open_run("train") as failed:
        raise ValueError("boom")
    with pytest.raises(KeyboardInterrupt), open_run("train") as killed:
        raise KeyboardInterrupt
    client = MlflowClient()
    done = client.get_run(run.id)
    assert done.info.status == "FINISHED"
    assert {"rampart.version.torch", "rampart.host", "rampart.process", "rampart.machine"} <= set(done.data.tags)
    assert done.data.tags["rampart.machine"].startswith(f"{os.cpu_count()} cores of ")
    assert client.get_run(failed.id).info.status == "FAILED"
    assert client.get_run(failed.id).data.tags["rampart.error"] == "ValueError: boom"
    assert client.get_run(killed.id).info.status == "KILLED"
    assert run_tags(run.id)["arm"] == "normal"
    found = find_runs(run.experiment, {"step": "train"})
    assert list(found["run_id"]) == [run.id]


def test_models_go_and_come_where_pickle_is_not_allowed(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    model = build_model(width=0.25).eval()
    x = torch.rand(2, 3, 32, 32)
    with open_run("train") as run:
        run.model(model, x)
    with torch.no_grad():
        assert torch.equal(fetch_model(f"runs:/{run.id}/model")(x), model(x))
    assert "Failed to validate" not in capfd.readouterr().err


def test_models_come_back_equal_by_run_and_by_registered_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(width=0.25).eval()
    x = torch.rand(4, 3, 32, 32)
    with open_run("train") as run:
        model_id = run.model(model, x[:2])
        last = run.checkpoint(model, State("train", 1, 0, 0, 1, 0.0, {"loss_sum": torch.zeros(())}))
    with torch.no_grad():
        expected = model(x)
        uri = f"runs:/{run.id}/model"
        for source in (uri, last):
            assert torch.equal(fetch_model(source)(x), expected)
        save_model(model, tmp_path / "file.safetensors")
        assert torch.equal(fetch_model(tmp_path / "file.safetensors")(x), expected)
    version = mlflow.register_model(uri, "arm")
    MlflowClient().set_registered_model_alias("arm", "best", version.version)
    left = tmp_path / "left"
    left.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(left))
    for source in ("models:/arm/1", "models:/arm@best", f"models:/{model_id}"):
        assert (source_of(source).run, source_of(source).model_id) == (run.id, model_id)
        with torch.no_grad():
            assert torch.equal(fetch_model(source)(x), expected)
    assert not list(left.iterdir())
    # MLflow's own flavour, an exported graph, gives the same numbers, for any batch size.
    exported = mlflow.pyfunc.load_model(uri).predict(x.numpy())
    assert np.allclose(exported, expected.numpy(), atol=1e-5)


def test_models_that_are_not_there_are_named() -> None:
    initialise()
    for uri in (
        "runs:/0123456789abcdef0123456789abcdef/model",
        "models:/nothing/3",
        "models:/nothing@best",
        "models:/m-0123456789abcdef0123456789abcdef",
    ):
        with pytest.raises(ModelError, match="no model at"):
            source_of(uri)
        with pytest.raises(ModelError, match="no model at") as error:
            fetch_model(uri)
        assert uri in str(error.value)
    with pytest.raises(RampartError, match="no run"):
        run_tags("0123456789abcdef0123456789abcdef")


def test_a_killed_processs_run_is_marked_on_the_next_start() -> None:
    code = """
import time
from rampart.tracking import open_run
with open_run("train") as run:
    print(run.id, flush=True)
    time.sleep(600)
"""
    victim = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert victim.stdout is not None
    run_id = victim.stdout.readline().strip()
    client = MlflowClient()
    assert sweep("0") == []
    assert client.get_run(run_id).info.status == "RUNNING"
    victim.kill()
    victim.wait()
    time.sleep(0.1)
    assert sweep("0") == [run_id]
    assert client.get_run(run_id).info.status == "KILLED"


def test_dataset_digest_sizes_and_split_are_inputs_of_the_run(digits: Dataset) -> None:
    with open_run("train") as run:
        run.dataset(digits, "digits", 0.2, 42)
    inputs = MlflowClient().get_run(run.id).inputs.dataset_inputs
    assert {tag.value for entry in inputs for tag in entry.tags} == {"train", "val", "test"}
    assert {entry.dataset.digest for entry in inputs} == {digits.digest}
    assert {entry.dataset.name for entry in inputs} == {"digits-train", "digits-val", "digits-test"}
    tags = run_tags(run.id)
    assert tags["split"] == f"{len(digits.train)}/{len(digits.val)}/{len(digits.test)} by 0.2, 42"


def test_tables_round_trip_and_missing_ones_are_none() -> None:
    import pandas as pd

    frame = pd.DataFrame({"image": [1, 2], "attacked/0.1": [True, False]})
    with open_run("evaluate") as run:
        run.table(frame, "ledger.parquet")
    table = read_table(run.id, "ledger.parquet")
    assert table is not None
    pd.testing.assert_frame_equal(table, frame)
    assert read_table(run.id, "other.parquet") is None


@pytest.mark.parametrize("folder", ["proc/nowhere", "proc"])
def test_a_store_that_cannot_be_reached_is_said_in_one_line(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:////{folder}/mlflow.db")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(RampartError, match="MLFLOW_TRACKING_URI") as error:
        initialise()
    assert "\n" not in str(error.value)


def test_a_deleted_experiment_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    number = MlflowClient().create_experiment("gone")
    MlflowClient().delete_experiment(number)
    for name, text in (("MLFLOW_EXPERIMENT_NAME", "gone"), ("MLFLOW_EXPERIMENT_ID", number)):
        with monkeypatch.context() as patched:
            patched.setenv(name, text)
            with pytest.raises(RampartError, match="experiment 'gone' was deleted: mlflow experiments restore"):
                experiment_id()


def test_a_store_that_cannot_be_written_is_said_in_one_line(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_run("train"):  # makes the store ready
        pass
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///file:{store}/mlflow.db?mode=ro&uri=true")
    with pytest.raises(RampartError, match="cannot be written") as error, open_run("train"):
        pass
    assert "\n" not in str(error.value)


def test_the_time_for_which_nobody_was_at_work_is_not_counted() -> None:
    client, now = MlflowClient(), time.time()
    stopped = client.create_run("0", start_time=int(1000 * (now - 300))).info.run_id
    client.set_terminated(stopped, "KILLED", end_time=int(1000 * (now - 200)))
    with open_run("train") as run:
        run.go_on_in(stopped)
    assert seconds_at_work(find_runs("0", {}))[0] == pytest.approx(100, abs=30)
    # Of a process that was lost, the last that was heard counts.
    client.set_terminated(stopped, "KILLED", end_time=int(1000 * now))
    client.set_tag(stopped, "rampart.error", LOST)
    client.set_tag(stopped, PULSE, str(int(now - 150)))
    with open_run("train") as run:
        run.go_on_in(stopped)
    assert seconds_at_work(find_runs("0", {}))[0] == pytest.approx(-50, abs=30)  # 300 less 200 and 150


def test_who_may_not_delete_a_run_goes_on_nevertheless(monkeypatch: pytest.MonkeyPatch) -> None:
    """As users with MLflow's permission EDIT, which does not include it."""
    client = MlflowClient()
    stopped = client.create_run("0").info.run_id
    client.set_terminated(stopped, "KILLED")

    def forbidden(self: MlflowClient, run_id: str) -> None:
        raise MlflowException("API request to endpoint /api/2.0/mlflow/runs/delete failed with error code 403 != 200.")

    monkeypatch.setattr(MlflowClient, "delete_run", forbidden)
    with open_run("train") as run:
        left = run.id
        run.go_on_in(stopped)
        assert run.id == stopped
    runs = {found.info.run_id: found for found in client.search_runs(["0"])}
    assert runs[stopped].info.status == "FINISHED"
    assert runs[left].info.status == "KILLED"
    assert runs[left].data.tags["rampart.goes_on_in"] == stopped
    assert runs[left].data.tags["rampart.step"] == "resume"


def test_what_a_user_may_not_do_is_said_in_one_line() -> None:
    with pytest.raises(RampartError, match=r"does not let you .*MLFLOW_TRACKING_USERNAME") as error, open_run("train"):
        raise MlflowException("API request to endpoint /api/2.0/mlflow/runs/log-inputs failed with error code 403")
    assert "\n" not in str(error.value)
    assert MlflowClient().search_runs(["0"])[0].info.status == "FAILED"


def test_the_work_of_the_runs_that_one_goes_on_from_is_counted() -> None:
    client, now = MlflowClient(), time.time()
    old = client.create_run("0", start_time=int(1000 * (now - 300))).info.run_id
    client.set_terminated(old, "KILLED", end_time=int(1000 * (now - 200)))
    with open_run("evaluate") as second:
        second.go_on_from(old)
    client.set_terminated(second.id, "KILLED", end_time=int(1000 * (time.time() + 50)))
    with open_run("evaluate") as third:
        third.go_on_from(second.id)
    worked = find_runs("0", {"resumed_from": "%"}).assign(seconds=seconds_at_work).set_index("run_id")["seconds"]
    assert worked[third.id] == pytest.approx(150, abs=30)
