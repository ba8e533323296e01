"""Work that a training does not wait for."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from rampart.errors import RampartError
from rampart.tracking import later
from rampart.tracking.later import Later
from tests.conftest import free_port


class Failing:
    """Fails so many times before it is done."""

    def __init__(self, times: int, error: Exception) -> None:
        self.times, self.error, self.calls = times, error, 0

    def __call__(self) -> None:
        self.calls += 1
        if self.calls <= self.times:
            raise self.error


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(later, "PAUSES", (0.0,) * len(later.PAUSES))


def test_it_is_done_in_order_by_another_thread_and_waited_for_at_the_end() -> None:
    done: list[tuple[int, int]] = []
    gate = threading.Event()
    with Later() as work:
        work.do(gate.wait)
        for number in range(5):
            work.do(lambda number=number: done.append((number, threading.get_ident())))
        assert done == []
        gate.set()
    assert [number for number, _ in done] == [0, 1, 2, 3, 4]
    assert threading.get_ident() not in {thread for _, thread in done}


@pytest.mark.parametrize("error", [MlflowException("the server is away"), OSError(28, "No space left on device")])
def test_what_passes_is_tried_again(error: Exception, no_pauses: None) -> None:
    failing = Failing(3, error)
    with Later() as work:
        work.do(failing)
    assert failing.calls == 4


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a bug"),
        FileNotFoundError("a bare disk"),
        MlflowException("a bad name", error_code=INVALID_PARAMETER_VALUE),
    ],
)
def test_what_stays_is_raised_at_once_at_the_end(error: Exception) -> None:
    failing = Failing(1, error)
    with pytest.raises(type(error), match="a b"), Later() as work:
        work.do(failing)
    assert failing.calls == 1


def test_after_a_server_that_stays_away_nothing_is_told(no_pauses: None) -> None:
    assert sum(later.PAUSES) == 0
    work, told = Later(), []
    failing = Failing(100, MlflowException("the server is away"))
    gate = threading.Event()
    work.do(gate.wait)
    work.do(failing)
    work.do(lambda: told.append(1))
    gate.set()
    work.waiting[-1].exception()
    with pytest.raises(RampartError, match=r"server is away.*same command"):
        work.do(lambda: told.append(2))
    assert told == []
    assert failing.calls == 1 + len(later.PAUSES)


def test_what_ends_the_training_is_not_hidden_and_does_not_wait(caplog: pytest.LogCaptureFixture) -> None:
    def training() -> None:
        with Later() as work:
            work.do(Failing(100, MlflowException("the server is away")))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training()
    assert "the server is away" in caplog.text


@pytest.mark.slow
def test_sixteen_workers_lose_no_metric_on_one_server_with_postgresql(store: Path, postgres: str) -> None:
    from benchmarks.tracking import crowd, server

    with server(postgres, store, free_port()) as address:
        _, kept = crowd(address, 16, 25)
    assert kept == 1
