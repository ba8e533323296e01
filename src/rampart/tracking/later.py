"""Work for the tracking server that a training does not wait for."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from mlflow.exceptions import MlflowException

from rampart.errors import RampartError

log = logging.getLogger(__name__)

# Seconds between two tries: a server that is started anew, or a disk that is cleaned up, is waited for.
PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)

# What a server that is away, overloaded or out of space is told by.
PASSING = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED")
# Pieces of work that may wait, some of them with a copy of a training's weights.
MOST = 8


class Later:
    """Does what it is given in order, in a thread of its own; what fails for want of a server or of space is tried
    again. After an error that stays nothing more is done, and the next call, or the end, raises it."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="rampart-tracking")
        self.waiting: list[Future[None]] = []
        self.failed = False
        self.hurry = threading.Event()

    def do(self, work: Callable[[], object]) -> None:
        while self.waiting and (self.waiting[0].done() or len(self.waiting) >= MOST):
            self.waiting.pop(0).result()
        self.waiting.append(self.pool.submit(self._do, work))

    def __enter__(self) -> Later:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Waits for all of it; where something else has ended the training, not for what has failed already."""
        if error is not None:
            self.hurry.set()
        self.pool.shutdown()
        for failure in filter(None, (future.exception() for future in self.waiting)):
            if error is None:
                raise failure
            log.error("the tracking server was not told all: %s", failure)

    def _do(self, work: Callable[[], object]) -> None:
        # A curve must not go on behind a gap.
        if self.failed:
            return
        try:
            self._patiently(work)
        except BaseException:
            self.failed = True
            raise

    def _patiently(self, work: Callable[[], object]) -> None:
        for pause in PAUSES:
            try:
                work()
                return
            except (MlflowException, OSError) as error:
                if not passing(error) or self.hurry.is_set():
                    raise
                log.warning("%s: trying again in %g s", " ".join(str(error).split())[:200], pause)
                self.hurry.wait(pause)
        try:
            work()
        except (MlflowException, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise RampartError(
                f"the tracking store has not taken what the training told it ({reason}): bring it back, or make room, "
                "and give the same command, which goes on from the last checkpoint"
            ) from error


def passing(error: BaseException) -> bool:
    """Whether a server that is away, or a full disk, may be behind it."""
    if isinstance(error, MlflowException):
        return error.error_code in PASSING
    return isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
