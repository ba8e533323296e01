"""How a step that works through images goes on where an interrupted one has stopped."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import pandas as pd

from rampart.tracking import Run
from rampart.tracking.queries import find_runs, read_table
from rampart.tracking.runs import LEDGER

log = logging.getLogger(__name__)


def interrupted(run: Run, key: str) -> tuple[str, pd.DataFrame] | None:
    """(run, its ledger so far) of a step that ended before its time and was the same by `key`: settings, data, model
    and code. None where the newest of that key has finished, or has left nothing."""
    before = find_runs(run.experiment, {"begun": key}, status=None, max_results=1)
    run.tags({"begun": key})
    if before.empty or before["status"].iloc[0] not in ("FAILED", "KILLED"):
        return None
    old = str(before["run_id"].iloc[0])
    ledger = read_table(old, LEDGER)
    if ledger is None:
        return None
    log.info("going on after the %d images that run %s has finished", len(ledger), old)
    run.tags({"resumed_from": old})
    return old, ledger


class Paced:
    """Calls `write`, with a second or as long as it took between: an upload must not outlast the work."""

    def __init__(self, write: Callable[..., None]) -> None:
        self.write, self.next = write, time.monotonic() + 1

    def __call__(self, *progress: object) -> None:
        started = time.monotonic()
        if started >= self.next:
            self.write(*progress)
            self.next = time.monotonic() + max(1.0, time.monotonic() - started)
