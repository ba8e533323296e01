"""Tasks and the workers that do them: in order, side by side, again where a worker was lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from mlflow.exceptions import MlflowException

from rampart.arms import Arm
from rampart.errors import ModelError, SettingsError, UnsupportedLayer
from rampart.study import scheduler
from rampart.study.graph import Done, Task, graph
from rampart.study.scheduler import Scheduler
from rampart.study.workers import LocalWorkers, WorkerLost, gpus_of
from rampart.tracking.store import StoreAway

NORMAL, CERTIFIED = Arm("normal", False, "none"), Arm("certified", False, "none")
JOBS = [(NORMAL, 0), (NORMAL, 1), (CERTIFIED, 0)]


class Threads:
    """Workers that are threads of this process, and remember what was asked of them."""

    def __init__(self, count: int) -> None:
        self.count, self.pool, self.given, self.stopped = count, ThreadPoolExecutor(8), [], False
        self.lock, self.busy, self.most = threading.Lock(), 0, 0

    def submit(self, work: Callable[..., Any], *given: Any) -> Future[Any]:
        self.given.append(given[0])

        def do() -> Any:
            with self.lock:
                self.busy += 1
                self.most = max(self.most, self.busy)
            try:
                return work(*given)
            finally:
                with self.lock:
                    self.busy -= 1

        return self.pool.submit(do)

    def reason(self, error: BaseException) -> BaseException:
        return error

    def stop(self) -> None:
        self.stopped = True

    def close(self) -> None:
        self.pool.shutdown()


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "PAUSES", (0.0, 0.0, 0.0))


def test_each_task_follows_those_that_it_needs_and_gets_what_they_left() -> None:
    needs = graph(JOBS, tuned=True, first_seed=0, parts=2)
    # Two seeds share a tuning; both have a training, an evaluation, a verification in two parts, and an embedding.
    assert Counter(task.step for task in needs) == {"tune": 2, "train": 3, "evaluate": 3, "verify": 9, "embed": 3}
    seen: dict[Task, Mapping[str, Done]] = {}

    def work(task: Task, before: Mapping[str, Done]) -> Done:
        assert all(need in seen for need in needs[task])
        seen[task] = before
        time.sleep(0.01)
        return Done(run=f"{task.arm.name} {task.seed} {task.step} {task.part}", texts={"lr": "1"})

    workers = Threads(2)
    study = Scheduler(needs, work, workers)
    study.run()
    assert set(study.done) == set(needs)
    assert not study.failures
    assert workers.most == 2
    assert not any(task.step == "embed" for task in workers.given)
    assert seen[Task(NORMAL, 1, "train")]["tune"].texts == {"lr": "1"}
    assert seen[Task(NORMAL, 1, "evaluate")]["train"].run == "normal 1 train "


def test_the_slowest_method_comes_first_and_trainings_before_what_looks_at_them() -> None:
    workers = Threads(1)
    Scheduler(graph(JOBS, False, 0, 1), lambda task, before: Done(), workers).run()
    assert workers.given[0] == Task(CERTIFIED, 0, "train")
    assert [task.step for task in workers.given[:3]] == ["train"] * 3


def failing(step: str, arm: Arm, said: str, tuned: bool) -> Scheduler:
    """A study that has run, whose arm fails at that step."""

    def work(task: Task, before: Mapping[str, Done]) -> Done:
        if (task.step, task.arm) == (step, arm):
            raise ModelError(said)
        return Done()

    study = Scheduler(graph(JOBS, tuned, 0, 1), work, Threads(3))
    study.run()
    return study


def test_what_fails_stops_only_what_needs_it() -> None:
    study = failing("train", CERTIFIED, "the loss became\nNaN", tuned=False)
    assert study.failures == {"certified s0": "the loss became NaN"}
    assert {(task.arm, task.seed) for task in study.done} == {(NORMAL, 0), (NORMAL, 1)}
    assert len(study.done) == 8


def test_where_an_arms_tuning_fails_all_its_seeds_have_failed() -> None:
    study = failing("tune", NORMAL, "no trial has finished", tuned=True)
    assert study.failures == {f"normal s{seed}": "no trial has finished" for seed in (0, 1)}
    assert {(task.arm, task.seed) for task in study.done} == {(CERTIFIED, 0)}


@pytest.mark.parametrize(
    ("error", "tried"),
    [
        (WorkerLost("killed"), 4),
        (StoreAway("away"), 4),
        (MlflowException("away"), 4),
        (OSError(28, "no space left on device"), 4),
        (SettingsError("no"), 1),
        (ValueError("no"), 1),
    ],
)
def test_what_may_pass_is_tried_again(error: Exception, tried: int) -> None:
    tries: Counter[Task] = Counter()

    def always(task: Task, before: Mapping[str, Done]) -> Done:
        tries[task] += 1
        raise error

    def once(task: Task, before: Mapping[str, Done]) -> Done:
        tries[task] += 1
        if tries[task] == 1:
            raise error
        return Done()

    needs = graph([(NORMAL, 0)], False, 0, 1)
    study = Scheduler(needs, always, Threads(1))
    study.run()
    assert tries == {Task(NORMAL, 0, "train"): tried}
    assert list(study.failures) == ["normal s0"]
    tries.clear()
    study = Scheduler(needs, once, Threads(1))
    study.run()
    assert (not study.failures) == (tried > 1)


def test_an_interrupt_stops_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = Threads(1)
    first = workers.submit

    def interrupted(work: Callable[..., Any], *given: Any) -> Future[Any]:
        if workers.given:
            raise KeyboardInterrupt
        return first(work, *given)

    monkeypatch.setattr(workers, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Scheduler(graph([(NORMAL, 0)], False, 0, 1), lambda task, before: Done(), workers).run()
    assert workers.stopped


# What processes do.


def pid_of(_: int) -> int:
    return os.getpid()


def sleep(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def die(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def cleaned_up(folder: Path) -> None:
    """Leaves a file when it has begun, and one when it has cleaned up behind itself."""
    try:
        (folder / "begun").write_text(str(os.getpid()))
        time.sleep(600)
    finally:
        time.sleep(1)
        (folder / "left").touch()


def unsupported(_: int) -> None:
    raise UnsupportedLayer("encoder.0", "GELU", "not yet")


def parent_of_workers(folder: Path, script: str, stderr: int | None = None) -> subprocess.Popen[str]:
    """A process that runs the script, with a group of its own."""
    (folder / "parent.py").write_text(script)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(["src", "."])}
    command, top = [sys.executable, str(folder / "parent.py")], Path(__file__).parents[2]
    return subprocess.Popen(
        command, cwd=top, env=env, stdout=subprocess.PIPE, stderr=stderr, text=True, start_new_session=True
    )


def test_a_worker_that_is_lost_takes_no_other_with_it() -> None:
    workers = LocalWorkers(2, 0)
    try:
        staying, dying = workers.submit(sleep, 3.0), workers.submit(die, 0)
        assert isinstance(workers.reason(dying.exception() or Exception()), WorkerLost)
        again = workers.submit(pid_of, 0)
        assert again.result() not in (os.getpid(), staying.result())
        failed = workers.submit(unsupported, 0).exception()
        assert failed is not None
        assert workers.reason(failed) is failed
        assert str(failed) == "no bounds for layer 'encoder.0' (GELU): not yet"
        # One that dies with nothing to do is replaced, too.
        os.kill(again.result(), signal.SIGKILL)
        psutil.wait_procs([psutil.Process(again.result())] if psutil.pid_exists(again.result()) else [], timeout=10)
        time.sleep(0.5)
        tasks = [workers.submit(sleep, 0.5) for _ in range(2)]
        assert len({task.result() for task in tasks} - {os.getpid()}) == 2
    finally:
        workers.close()


def test_a_task_that_is_told_to_stop_cleans_up_behind_itself(tmp_path: Path) -> None:
    workers = LocalWorkers(1, 0, "cpu")
    task = workers.submit(cleaned_up, tmp_path)
    while not (tmp_path / "begun").exists() or not (tmp_path / "begun").read_text():
        assert not task.done(), task.exception()
        time.sleep(0.05)
    # As where the study's whole group is told: the worker, too, and then again by its parent.
    os.kill(int((tmp_path / "begun").read_text()), signal.SIGTERM)
    time.sleep(0.5)
    workers.stop()
    workers.close()
    assert (tmp_path / "left").exists()


def test_ctrl_c_ends_workers_with_and_without_a_task_in_silence(tmp_path: Path) -> None:
    script = f"""
import time
from pathlib import Path
from rampart.study.workers import LocalWorkers
from tests.study.test_scheduler import cleaned_up, pid_of
if __name__ == "__main__":
    workers = LocalWorkers(2, 0, "cpu")
    busy = workers.submit(cleaned_up, Path({str(tmp_path)!r}))
    workers.submit(pid_of, 0).result()
    while not Path({str(tmp_path / "begun")!r}).exists():
        time.sleep(0.05)
    try:
        print("begun", flush=True)
        time.sleep(600)
    except KeyboardInterrupt:
        time.sleep(0.5)
        workers.stop()
        workers.close()
        print("stopped", flush=True)
"""
    parent = parent_of_workers(tmp_path, script, subprocess.PIPE)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "begun\n"
    os.killpg(parent.pid, signal.SIGINT)
    said, complaints = parent.communicate()
    assert said == "stopped\n"
    assert not complaints
    assert (tmp_path / "left").exists()


def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    script = """
import os, sys, time
from rampart.study.workers import LocalWorkers
from tests.study.test_scheduler import sleep
if __name__ == "__main__":
    workers = LocalWorkers(2, 0)
    print(*[workers.submit(sleep, 0.2).result() for _ in range(1)], flush=True)
    tasks = [workers.submit(sleep, 600.0) for _ in range(2)]
    time.sleep(5)
    print("begun", flush=True)
    time.sleep(600)
"""
    parent = parent_of_workers(tmp_path, script)
    assert parent.stdout is not None
    parent.stdout.readline()
    assert parent.stdout.readline() == "begun\n"
    family = psutil.Process(parent.pid).children(recursive=True)
    assert len(family) >= 2
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        (1.0, [["a"], ["b"], ["a"]]),
        (2.0, [["a", "b"], ["a", "b"], ["a", "b"]]),
        (0.5, [["a"], ["a"], ["b"]]),
        (0.25, [["a"], ["a"], ["a"]]),
        (0.4, [["a"], ["a"], ["b"]]),
    ],
)
def test_workers_share_gpus_out(gpus: float, expected: list[list[str]]) -> None:
    assert [gpus_of(slot, gpus, ["a", "b"]) for slot in range(3)] == expected
    assert gpus_of(0, gpus, []) == []


@pytest.mark.parametrize(("gpus", "count"), [(1.0, 2), (2.0, 1), (0.5, 4), (0.4, 4), (0.3, 6), (0.1, 20)])
def test_no_gpu_is_shared_by_more_than_it_has_shares_for(
    gpus: float, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    workers = LocalWorkers(0, gpus)
    workers.close()
    assert workers.count == count
    given = Counter(gpu for slot in range(count) for gpu in gpus_of(slot, gpus, workers.devices))
    assert max(given.values()) * min(gpus, 1.0) <= 1


def test_more_gpus_than_there_are() -> None:
    with pytest.raises(SettingsError, match=r"gpus=99: this machine has \d+"):
        LocalWorkers(1, 99)
