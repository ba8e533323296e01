"""Work that a training does not wait for."""

from __future__ import annotations

import threading

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from rampart.tracking import later
from rampart.tracking.later import Later


class Failing:
    """Fails so many times before it is done."""

    def __init__(self, times: int, error: Exception) -> None:
        self.times, self.error, self.calls = times, error, 0

    def __call__(self) -> None:
        self.calls += 1
        if self.calls <= self.times:
            raise self.error


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Those that were made; none takes time."""
    made: list[float] = []
    monkeypatch.setattr(later.time, "sleep", made.append)
    return made


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
def test_what_passes_is_tried_again(error: Exception, pauses: list[float]) -> None:
    failing = Failing(3, error)
    with Later() as work:
        work.do(failing)
    assert failing.calls == 4
    assert pauses == [1.0, 2.0, 4.0]


@pytest.mark.parametrize(
    "error", [ValueError("a bug"), MlflowException("a bad name", error_code=INVALID_PARAMETER_VALUE)]
)
def test_what_stays_is_raised_at_once_at_the_end(error: Exception, pauses: list[float]) -> None:
    failing = Failing(1, error)
    with pytest.raises(type(error), match="a b"), Later() as work:
        work.do(failing)
    assert failing.calls == 1
    assert pauses == []


def test_a_server_that_stays_away_ends_the_training(pauses: list[float]) -> None:
    work, told = Later(), []
    work.do(Failing(100, MlflowException("the server is away")))
    work.waiting[0].exception()
    with pytest.raises(MlflowException, match="away"):
        work.do(lambda: told.append(1))
    assert told == []
    assert sum(pauses) > 120


def test_what_ends_the_training_is_not_hidden(pauses: list[float], caplog: pytest.LogCaptureFixture) -> None:
    def training() -> None:
        with Later() as work:
            work.do(Failing(1, ValueError("a bug")))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training()
    assert "a bug" in caplog.text
