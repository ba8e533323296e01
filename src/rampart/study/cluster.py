"""A study's tasks as tasks of a Ray cluster: Ray places them, and does them again where a machine dies."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from rampart.console import hush
from rampart.errors import RampartError, require
from rampart.study.workers import PATIENCE, WorkerLost

T = TypeVar("T")

# Times that Ray does a task again whose worker or machine was lost.
RETRIES = 3
# Seconds after which a cluster counts as away.
ANSWERS = 10.0


class RayWorkers:
    """The machines of a Ray cluster."""

    def __init__(self, address: str, count: int, cpus: int, gpus: float, ram: float) -> None:
        """
        Args:
            address: of the cluster; empty: one of its own on this machine.
            count: of tasks in work at once; 0: as many as the cluster has room for now.
            cpus, gpus: that each takes; gpus=0: one where there are any.
            ram: GiB that each takes; 0: not said.

        Raises:
            RampartError: Ray is not installed, the cluster does not answer, or no machine of it has as much.
        """
        try:
            import ray
        except ImportError as error:
            raise RampartError("executor=ray needs Ray: pip install 'ray[default]', or pip install .[ray]") from error
        self.ray: Any = ray
        _reach(address)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody is told that we work
        try:
            ray.init(
                address=address or None,
                log_to_driver=False,
                logging_level=logging.WARNING,
                include_dashboard=None if address else False,
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise _unanswered(address, error) from error
        try:
            machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            options = _options(machines, cpus, gpus, ram)
        except BaseException:
            ray.shutdown()
            raise
        self.count = count or _room(machines, options)
        self.task = ray.remote(_quiet).options(max_retries=RETRIES, **options)
        self.refs: dict[Future[Any], Any] = {}  # of tasks in work

    def submit(self, work: Callable[..., T], *given: object) -> Future[T]:
        ref = self.task.remote(work, *given)
        future: Future[T] = ref.future()
        self.refs = {task: kept for task, kept in self.refs.items() if not task.done()} | {future: ref}
        return future

    def reason(self, error: BaseException) -> BaseException:
        lost = self.ray.exceptions
        if isinstance(error, lost.RayTaskError):
            return error.cause
        if isinstance(error, lost.RayError):
            return WorkerLost(f"a worker was lost ({type(error).__name__})")
        return error

    def stop(self) -> None:
        refs = list(self.refs.values())
        for ref in refs:
            self.ray.cancel(ref)
        if refs:
            self.ray.wait(refs, num_returns=len(refs), timeout=PATIENCE)

    def close(self) -> None:
        self.ray.shutdown()


def _quiet(work: Callable[..., T], *given: object) -> T:
    hush()
    return work(*given)


# What Ray calls a task's needs, what it calls a machine's, and what sets them.
NEEDS = {"num_cpus": ("CPU", "threads"), "num_gpus": ("GPU", "gpus"), "memory": ("memory", "ram")}


def _options(machines: Sequence[Mapping[str, float]], cpus: int, gpus: float, ram: float) -> dict[str, float]:
    """Of a task: what it needs.

    Raises:
        SettingsError: no machine has as much.
    """
    default = 1.0 if any(machine.get("GPU") for machine in machines) else 0.0
    needs = {"num_cpus": float(cpus), "num_gpus": gpus or default, "memory": ram * 2**30}
    for name, much in needs.items():
        kind, setting = NEEDS[name]
        most = max(machine.get(kind, 0.0) for machine in machines)
        unit = 2**30 if name == "memory" else 1
        has = f"{setting}={most / unit:.4g}"
        require(much <= most, f"{setting}={much / unit:g}: no machine of the cluster has more than {has}")
    return {name: much for name, much in needs.items() if much}


def _room(machines: Sequence[Mapping[str, float]], options: Mapping[str, float]) -> int:
    """Tasks that these machines can do at once."""
    rooms = [min(int(machine.get(NEEDS[name][0], 0) / much) for name, much in options.items()) for machine in machines]
    return max(sum(rooms), 1)


def _reach(address: str) -> None:
    """Ray itself waits for minutes, and ends the process then."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), ANSWERS).close()
        except OSError as error:
            raise _unanswered(address, error) from error


def _unanswered(address: str, error: Exception) -> RampartError:
    reason = " ".join(str(error).split())[:200]
    return RampartError(
        f"no Ray cluster answers at '{address}' ({reason}): start one with 'ray start --head', or leave address out"
    )
