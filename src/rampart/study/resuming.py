"""How a step that works through images goes on where an interrupted one has stopped."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

import pandas as pd

from rampart.errors import BrokenArtifact, ModelError
from rampart.tracking import Run
from rampart.tracking.claims import claimed
from rampart.tracking.queries import find_runs, read_checkpoint, read_table
from rampart.tracking.runs import CHECKPOINTS, LEDGER
from rampart.training import State

T = TypeVar("T")

log = logging.getLogger(__name__)

# Ended runs among which one is looked for that has left something.
TRIED = 20


def interrupted(run: Run, key: str) -> tuple[str, pd.DataFrame] | None:
    """(run, its ledger so far) of a step that ended before its time and was the same by `key`: settings, data, model
    and code. None where the newest of that key has finished, or has left nothing."""
    left = ((old, salvaged(read_table, old, LEDGER)) for old in _unfinished(run, key))
    old, ledger = next(((old, ledger) for old, ledger in left if ledger is not None), ("", None))
    run.tags({"begun": key})
    if ledger is None:
        return None
    log.info("going on after the %d images that run %s has finished", len(ledger), old)
    run.go_on_from(old)
    return old, ledger


def interrupted_training(run: Run, key: str) -> tuple[State | None, int]:
    """(where a training stood that ended before its time and was the same by `key`, None where there is none; the place
    of CHECKPOINTS to write to first, which does not hold that). `run` is that training's, then. Of several processes
    that ask at once one goes on with it."""
    with claimed(run.id, run.experiment, key, "an interrupted training"):
        for old in _unfinished(run, key):
            found = [(salvaged(read_checkpoint, old, name), 1 - place) for place, name in enumerate(CHECKPOINTS)]
            states = [(state, other) for state, other in found if state is not None]
            if states:
                state, other = max(states, key=lambda left: (left[0].epoch, left[0].batch))
                log.info("going on in run %s, epoch %d, after %d batches of it", old, state.epoch, state.batch)
                run.go_on_in(old)
                return state, other
        # Not before: a run that goes on in another one must not be found in its place.
        run.tags({"begun": key})
        return None, 0


def salvaged(read: Callable[[str, str], T | None], run_id: str, name: str) -> T | None:
    """What an ended run has left under this name; None, too, where it is broken, so that it is done again."""
    try:
        return read(run_id, name)
    except (BrokenArtifact, ModelError) as error:
        log.warning("%s: left out", error)
        return None


def _unfinished(run: Run, key: str) -> list[str]:
    """The runs that have begun the step of that key and ended before their time, newest first; none that is older than
    one that has not."""
    before = find_runs(run.experiment, {"begun": key}, status=None, max_results=TRIED)
    ended = before["status"].isin(["FAILED", "KILLED"]).cummin()
    return [str(run_id) for run_id in before["run_id"][ended]]


class Paced:
    """Calls `write`, with a second or as long as it took between: an upload must not outlast the work."""

    def __init__(self, write: Callable[..., None]) -> None:
        self.write, self.next = write, time.monotonic() + 1

    def __call__(self, *progress: object) -> None:
        started = time.monotonic()
        if started >= self.next:
            self.write(*progress)
            self.next = time.monotonic() + max(1.0, time.monotonic() - started)
