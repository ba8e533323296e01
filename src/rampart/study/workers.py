"""Where a study's tasks are done: processes of this machine. `cluster.py` has the machines of a Ray cluster."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from types import FrameType
from typing import Any, Protocol, TypeVar

import torch

from rampart.console import hush
from rampart.errors import require

T = TypeVar("T")

# Seconds that a worker has to leave a checkpoint of its training when the study is interrupted.
PATIENCE = 60.0


class WorkerLost(Exception):
    """A worker's process ended before its task did."""


class Workers(Protocol):
    """Who does tasks.

    Args:
        count: of tasks in work at once.
    """

    count: int

    def submit(self, work: Callable[..., T], *given: object) -> Future[T]:
        """Begins a task. Not more than `count` may be in work."""

    def reason(self, error: BaseException) -> BaseException:
        """What has gone wrong where a task's future holds that error: `WorkerLost`, or what the task has raised."""

    def stop(self) -> None:
        """Interrupts what is in work; returns when it is over."""

    def close(self) -> None:
        """Lets the workers go; nothing is in work."""


class LocalWorkers:
    """Processes of this machine, each of which does one task at a time, with GPUs of its own where there are any.

    A worker that is lost takes no other with it, and another takes its place.
    """

    def __init__(self, count: int, gpus: float, device: str = "auto") -> None:
        """
        Args:
            count: of processes; 0: as many as the GPUs take or, without, the cores.
            gpus: that each has, or the share of one; 0: one where there are any.
            device: that the tasks are told to use; with cpu or cuda:N no GPUs are given out.

        Raises:
            SettingsError: there are fewer.
        """
        there = torch.cuda.device_count()
        require(gpus <= there, f"gpus={gpus:g}: this machine has {there}")
        self.devices = _visible(there) if device in ("auto", "cuda") else []
        self.gpus = gpus or 1.0
        # The study's networks are too small to share cores well.
        cores = 1 if device.startswith("cuda") else os.cpu_count() or 1
        self.count = count or (_together(self.gpus, len(self.devices)) if self.devices else cores)
        self.pools = [self._pool(slot) for slot in range(self.count)]
        self.tasks: list[Future[Any] | None] = [None] * self.count

    def _pool(self, slot: int) -> ProcessPoolExecutor:
        own = gpus_of(slot, self.gpus, self.devices)
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(1, mp_context=context, initializer=_begin, initargs=(",".join(own),))

    def submit(self, work: Callable[..., T], *given: object) -> Future[T]:
        slot = next(slot for slot, task in enumerate(self.tasks) if task is None or task.done())
        try:
            future = self.pools[slot].submit(_interruptible, work, *given)
        except BrokenProcessPool:  # died since its last task, or in it
            self.pools[slot] = self._pool(slot)
            future = self.pools[slot].submit(_interruptible, work, *given)
        self.tasks[slot] = future
        return future

    def reason(self, error: BaseException) -> BaseException:
        return WorkerLost("a worker was killed (out of memory?)") if isinstance(error, BrokenProcessPool) else error

    def stop(self) -> None:
        for pool in self.pools:
            pool.shutdown(wait=False, cancel_futures=True)
        workers = multiprocessing.active_children()
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join(PATIENCE)
            worker.kill()
            worker.join()

    def close(self) -> None:
        for pool in self.pools:
            pool.shutdown()


def gpus_of(slot: int, gpus: float, devices: Sequence[str]) -> list[str]:
    """The GPUs of a worker: whole ones, or the one that it shares."""
    if not devices:
        return []
    if gpus < 1:
        return [devices[slot // _together(gpus, 1) % len(devices)]]
    return [devices[(int(slot * gpus) + i) % len(devices)] for i in range(int(gpus))]


def _together(gpus: float, there: int) -> int:
    """How many workers those GPUs take. No GPU is shared by more than it has shares for."""
    return int(1 / gpus + 1e-9) * there if gpus < 1 else int(there / gpus)


def _visible(there: int) -> list[str]:
    """What the GPUs of this process are called."""
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named[:there] or [str(number) for number in range(there)]


def _interruptible(work: Callable[..., T], *given: object) -> T:
    try:
        signal.signal(signal.SIGTERM, interrupt)
        try:
            return work(*given)
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
    except KeyboardInterrupt:
        # Told to stop, and its run is closed: the pool would wait for another task.
        os._exit(130)


def interrupt(number: int, frame: FrameType | None) -> None:
    """Of a signal the first one ends what is in work; those that follow, where a whole group was told, do not keep it
    from being cleaned up."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _begin(devices: str) -> None:
    """A worker's process, which does not outlive its parent."""
    if devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices
    hush()
    # A terminal's Ctrl-C is for the parent, which tells its workers by SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    follow_parent()


def follow_parent() -> None:
    """From now on this process is told to stop when its parent is gone."""
    threading.Thread(target=_follow, name="rampart-parent", daemon=True).start()


def _follow() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)  # a training leaves a checkpoint
    threading.Event().wait(PATIENCE)
    os._exit(1)
