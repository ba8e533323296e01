"""A study on a Ray cluster."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from mlflow import MlflowClient

from rampart.__main__ import main
from rampart.errors import ModelError, RampartError, SettingsError
from rampart.study.cluster import RayWorkers
from rampart.study.workers import WorkerLost
from rampart.tracking.queries import find_runs
from tests.conftest import TINY_STUDY, Study, as_words, free_port

pytest.importorskip("ray", reason="Ray is not installed: pip install .[ray]")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A Ray cluster of two machines (two raylets), one core each."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patched:
        # Its workers import what they are given from here.
        patched.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        cluster.add_node(num_cpus=1)
        yield cluster
        cluster.shutdown()


def pid_of(_: int) -> int:
    return os.getpid()


def busy(seconds: float) -> str:
    import ray

    time.sleep(seconds)
    return str(ray.get_runtime_context().get_node_id())


def fail(_: int) -> None:
    raise ModelError("no such model")


def die(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_tasks_on_two_machines_and_what_becomes_of_their_errors(cluster: Any) -> None:
    workers = RayWorkers(cluster.address, 0, 1, 0, 0)
    try:
        assert workers.count == 2
        places = [workers.submit(busy, 3.0) for _ in range(2)]
        assert len({place.result() for place in places}) == 2
        error = workers.submit(fail, 0).exception()
        assert error is not None
        reason = workers.reason(error)
        assert isinstance(reason, ModelError)
        assert str(reason) == "no such model"
        lost = workers.submit(die, 0).exception()
        assert lost is not None
        assert isinstance(workers.reason(lost), WorkerLost)
    finally:
        workers.close()


@pytest.mark.parametrize(
    ("cpus", "gpus", "ram", "said"),
    [
        (1, 3.0, 0.0, "gpus=3: no machine of the cluster has more than gpus=0"),
        (64, 0.0, 0.0, "threads=64: no machine of the cluster has more than threads=1"),
        (1, 0.0, 1e5, r"ram=100000: no machine of the cluster has more than ram=\d+"),
    ],
)
def test_more_than_any_machine_has(cluster: Any, cpus: int, gpus: float, ram: float, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        RayWorkers(cluster.address, 0, cpus, gpus, ram)


def test_a_cluster_that_does_not_answer(capfd: pytest.CaptureFixture[str]) -> None:
    for address in (f"127.0.0.1:{free_port()}", f"ray://127.0.0.1:{free_port()}"):
        with pytest.raises(RampartError, match=f"no Ray cluster answers at '{address}' .* start one with 'ray start"):
            RayWorkers(address, 0, 1, 0, 0)
    assert main(["main", "--executor", "ray", "--address", f"127.0.0.1:{free_port()}"]) == 2
    assert capfd.readouterr().err.splitlines()[-1].startswith("error: no Ray cluster answers")
    assert list(find_runs("0", {"step": "main"}, status=None)["status"]) == ["FAILED"]
    assert main(["main", "--address", "auto"]) == 2
    assert "give executor=ray, too" in capfd.readouterr().err


@pytest.mark.slow
def test_a_study_on_a_cluster_gives_the_same_tables_though_a_machine_dies(
    cluster: Any, study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One machine dies while both train, and another one joins."""
    folder = tmp_path / "ray"
    folder.mkdir()
    store = f"sqlite:///{folder}/mlflow.db"
    settings = {**TINY_STUDY, "executor": "ray", "address": cluster.address}
    env = {**os.environ, "MLFLOW_TRACKING_URI": store, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    main = subprocess.Popen(
        [sys.executable, "-m", "rampart", "main", *as_words(settings)],
        cwd=folder,
        env=env,
        stderr=subprocess.PIPE,
        text=True,
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    while main.poll() is None and len(find_runs("0", {"step": "train"}, status="RUNNING")) < 2:
        time.sleep(0.5)
    cluster.remove_node(cluster.worker_nodes.copy().pop(), allow_graceful=False)
    time.sleep(5)
    cluster.add_node(num_cpus=1)
    _, said = main.communicate()
    assert main.returncode == 0, said
    for step in ("train", "evaluate", "verify", "embed"):
        assert find_runs("0", {"step": step})["tags.rampart.arm"].value_counts().to_dict() == dict.fromkeys(
            ("normal", "certified", "normal+supcon-double", "certified+supcon-double"), 1
        )
    assert find_runs("0", {}, status="RUNNING").empty
    theirs = values(find_runs("0", {"step": "compare"})["run_id"].iloc[0])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{study.folder}/mlflow.db")
    pd.testing.assert_frame_equal(theirs, values(find_runs("0", {"step": "compare"})["run_id"].iloc[-1]))


def values(compare: str) -> pd.DataFrame:
    """A comparison's numbers, but for those that say who did it and when, and what other arms were there before."""
    table = pd.read_csv(MlflowClient().download_artifacts(compare, "values.csv"))
    table = table[~table["metric"].str.startswith("trust/")]
    return table.drop(columns="run").reset_index(drop=True)
