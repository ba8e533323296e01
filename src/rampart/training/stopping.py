"""How a training is stopped: between two batches, not in the middle of one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Whether somebody has asked for the end."""

    asked = False

    def ask(self, number: int, frame: FrameType | None) -> None:
        """Ctrl-C for the second time does not wait. SIGTERM does: whoever has started this process (`mlflow run`, a
        study) sends one after a Ctrl-C of its own."""
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Catches Ctrl-C and SIGTERM meanwhile, where this is the process's main thread (others get no signals), and where
    it does not ignore them. Within another one it is that one: nobody asks in vain."""
    if threading.current_thread() is not threading.main_thread():
        yield Stop()
        return
    outer = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    if isinstance(outer, Stop):
        yield outer
        return
    stop = Stop()
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop.ask) for number in heard}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
