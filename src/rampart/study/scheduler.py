"""Gives tasks to workers in an order that fits, and again where a worker or the tracking server was away."""

from __future__ import annotations

import heapq
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from graphlib import TopologicalSorter

from tqdm import tqdm

from rampart.study.graph import Done, Task
from rampart.study.workers import WorkerLost, Workers
from rampart.tracking.later import passing
from rampart.tracking.store import StoreAway

log = logging.getLogger(__name__)

# In this process, because UMAP takes one most of a minute to load and compile.
AT_HOME = "embed"
# Slowest first, so that no worker is left alone with a long one at the end.
STEPS = ("tune", "train", "verify", "evaluate", "embed")
METHODS = {"certified": 0, "adversarial": 1, "normal": 2}
# Seconds before a task is tried again.
PAUSES = (1.0, 10.0, 30.0)

Work = Callable[[Task, Mapping[str, Done]], Done]


class Scheduler:
    """Does the tasks of a graph.

    Args:
        needs: the tasks, each with those that must be done before it.
        work: does one, given what those have left, by their steps; it travels to the workers.
    """

    def __init__(self, needs: Mapping[Task, set[Task]], work: Work, workers: Workers) -> None:
        self.needs, self.work, self.workers = needs, work, workers
        self.done: dict[Task, Done] = {}
        # The reason for each arm that failed.
        self.failures: dict[str, str] = {}
        self._order = TopologicalSorter(needs)
        self._order.prepare()
        # When each may begin, and how soon it should.
        self._waiting: list[tuple[float, tuple[int, ...], Task]] = []
        self._running: dict[Future[Done], Task] = {}
        self._tries: Counter[Task] = Counter()
        self._left = Counter(arm_of(task) for task in needs if task.step != "tune")
        self._home = ThreadPoolExecutor(1, thread_name_prefix="rampart-home")

    def run(self) -> None:
        """Until nothing is left that can be done: what needs a task that failed cannot."""
        bar = tqdm(total=len(self.needs), desc="study", unit="step", disable=None)
        try:
            while self._begin():
                # A task that waits for its next try is looked at each second.
                finished, _ = wait(self._running, timeout=1.0, return_when=FIRST_COMPLETED)
                if not self._running:
                    time.sleep(1.0)
                for future in finished:
                    self._end(self._running.pop(future), future)
                bar.update(len(self.done) - bar.n)
        except BaseException:
            # Interrupted: nobody waits for what the workers have begun.
            self._home.shutdown(wait=False, cancel_futures=True)
            self.workers.stop()
            raise
        finally:
            bar.close()
        self._home.shutdown()

    def _begin(self) -> bool:
        """Begins what there is room for; whether anything is in work or will be."""
        for task in self._order.get_ready():
            self._put(task)
        away = sum(task.step != AT_HOME for task in self._running.values())
        full = []
        while self._waiting and self._waiting[0][0] <= time.monotonic():
            entry = heapq.heappop(self._waiting)
            task = entry[2]
            before = {need.step: self.done[need] for need in self.needs[task]}
            if task.step == AT_HOME:
                self._running[self._home.submit(self.work, task, before)] = task
            elif away < self.workers.count:
                self._running[self.workers.submit(self.work, task, before)] = task
                away += 1
            else:
                full.append(entry)
        for entry in full:
            heapq.heappush(self._waiting, entry)
        return bool(self._running or self._waiting)

    def _end(self, task: Task, future: Future[Done]) -> None:
        error, name = future.exception(), arm_of(task)
        if error is None:
            self.done[task] = future.result()
            self._order.done(task)
            self._left[name] -= task.step != "tune"
            if not self._left[name]:
                kept = all(result.reused for other, result in self.done.items() if arm_of(other) == name)
                log.info("%s %s", name, "was there already" if kept else "finished")
            return
        reason = self.workers.reason(error)
        said = " ".join(str(reason).split()) or type(reason).__name__
        if _passes(reason) and self._tries[task] < len(PAUSES):
            pause = PAUSES[self._tries[task]]
            self._tries[task] += 1
            log.warning("%s of %s: %s; again in %g s", task.step, name, said, pause)
            self._put(task, pause)
        else:
            # With an arm's tuning all its seeds fail, which need it.
            for arm in (name, *(arm_of(other) for other, needs in self.needs.items() if task in needs)):
                self.failures.setdefault(arm, said)
            log.error("%s failed: %s", name, said)

    def _put(self, task: Task, pause: float = 0.0) -> None:
        heapq.heappush(self._waiting, (time.monotonic() + pause if pause else 0.0, priority(task), task))


def priority(task: Task) -> tuple[int, ...]:
    """The smallest comes first of what could begin."""
    return STEPS.index(task.step), METHODS.get(task.arm.method, 0), task.seed


def arm_of(task: Task) -> str:
    return f"{task.arm.name} s{task.seed}"


def _passes(error: BaseException) -> bool:
    """Whether the same may well succeed a little later."""
    return isinstance(error, WorkerLost | StoreAway) or passing(error)
