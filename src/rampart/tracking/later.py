"""Work for the tracking server that a training does not wait for."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from mlflow.exceptions import MlflowException

log = logging.getLogger(__name__)

# Seconds between two tries: a server that is started anew, or a disk that is cleaned up, is waited for.
PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)

# What a server that is away, overloaded or out of space is told by.
PASSING = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED")
# Pieces of work that may wait, some of them with a copy of a training's weights.
MOST = 8


class Later:
    """Does what it is given in order, in a thread of its own; what fails for want of a server or of space is tried
    again. An error that stays is raised by the next call, or at the end."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="rampart-tracking")
        self.waiting: list[Future[None]] = []

    def do(self, work: Callable[[], object]) -> None:
        while self.waiting and (self.waiting[0].done() or len(self.waiting) >= MOST):
            self.waiting.pop(0).result()
        self.waiting.append(self.pool.submit(_patiently, work))

    def __enter__(self) -> Later:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Waits for all of it."""
        self.pool.shutdown()
        for future in self.waiting:
            failure = future.exception()
            if failure is not None and error is None:
                raise failure
            if failure is not None:  # the first error is what ends the training
                log.error("the tracking server was not told all: %s", failure)


def _patiently(work: Callable[[], object]) -> None:
    for pause in PAUSES:
        try:
            work()
            return
        except (MlflowException, OSError) as error:
            if isinstance(error, MlflowException) and error.error_code not in PASSING:
                raise
            log.warning("%s: trying again in %g s", " ".join(str(error).split())[:200], pause)
            time.sleep(pause)
    work()
