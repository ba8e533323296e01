"""How a step that works through images goes on where an interrupted one has stopped."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import pandas as pd

from rampart.errors import ModelError
from rampart.tracking import Run
from rampart.tracking.queries import find_runs, read_checkpoint, read_table
from rampart.tracking.runs import CHECKPOINTS, LEDGER
from rampart.training import State

log = logging.getLogger(__name__)


def interrupted(run: Run, key: str) -> tuple[str, pd.DataFrame] | None:
    """(run, its ledger so far) of a step that ended before its time and was the same by `key`: settings, data, model
    and code. None where the newest of that key has finished, or has left nothing."""
    old = _unfinished(run, key)
    ledger = read_table(old, LEDGER) if old else None
    if old is None or ledger is None:
        return None
    log.info("going on after the %d images that run %s has finished", len(ledger), old)
    run.tags({"resumed_from": old})
    return old, ledger


def interrupted_training(run: Run, key: str) -> State | None:
    """Where a training stood that ended before its time and was the same by `key`; `run` is that training's, then."""
    old = _unfinished(run, key)
    states = [] if old is None else [state for name in CHECKPOINTS if (state := _checkpoint(old, name)) is not None]
    if old is None or not states:
        return None
    state = max(states, key=lambda state: (state.epoch, state.batch))
    log.info("going on in run %s, epoch %d, after %d batches of it", old, state.epoch, state.batch)
    run.go_on_in(old)
    return state


def _checkpoint(run_id: str, name: str) -> State | None:
    try:
        return read_checkpoint(run_id, name)
    except ModelError as error:
        log.warning("%s: left out", error)
        return None


def _unfinished(run: Run, key: str) -> str | None:
    """The newest run that has begun the step of that key, if it has ended before its time; `run` is the next."""
    before = find_runs(run.experiment, {"begun": key}, status=None, max_results=1)
    run.tags({"begun": key})
    ended = not before.empty and before["status"].iloc[0] in ("FAILED", "KILLED")
    return str(before["run_id"].iloc[0]) if ended else None


class Paced:
    """Calls `write`, with a second or as long as it took between: an upload must not outlast the work."""

    def __init__(self, write: Callable[..., None]) -> None:
        self.write, self.next = write, time.monotonic() + 1

    def __call__(self, *progress: object) -> None:
        started = time.monotonic()
        if started >= self.next:
            self.write(*progress)
            self.next = time.monotonic() + max(1.0, time.monotonic() - started)
