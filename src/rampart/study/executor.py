"""Runs a study: every arm and seed through its steps, side by side, then the comparison."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypedDict

import pandas as pd

from rampart.arms import Arm, grid
from rampart.errors import RampartError, SettingsError, require
from rampart.reports.tables import markdown
from rampart.settings import ARM_STEPS, StudySettings, VerifySettings, resolve
from rampart.settings.kinds import own_names
from rampart.study.cluster import RayWorkers
from rampart.study.graph import Done, Shared, Task, graph
from rampart.study.opening import open_data
from rampart.study.plan import OUTDATED, counted, plan, said, table
from rampart.study.scheduler import Scheduler
from rampart.study.steps import run_step
from rampart.study.workers import LocalWorkers, Workers
from rampart.tracking import Run, sweep
from rampart.tuning import check

log = logging.getLogger(__name__)


def run_study(run: Run, settings: StudySettings, given: Mapping[str, str]) -> None:
    """Runs what is missing of the study's arms, then compares them.

    Raises:
        RampartError: an arm failed; the others are finished and compared before that is said.
    """
    run.name(f"study {settings.profile}")
    sweep(run.experiment, everywhere=True)
    jobs = [
        (arm, settings.seed + offset)
        for offset in range(settings.seeds)
        for arm in grid(settings.methods, settings.augment, settings.contrastive)
    ]
    workers = _workers(settings)
    try:
        own = (os.cpu_count() or 1) // workers.count if settings.executor == "local" else 1
        threads = settings.threads or max(own, 1)
        shared = Shared.here(given, settings.profile, threads, run.id, run.experiment, settings.force == "keep")
        _check(shared, settings, jobs)
        # Data that cannot be read, too; and a folder is decoded once, not in every worker.
        open_data(run, settings)
        arms = len(jobs) // settings.seeds
        size = f"{counted(arms, 'arm')} x {counted(settings.seeds, 'seed')}"
        log.info("study %s: %s, %d at a time", settings.profile, size, workers.count)
        steps = plan(shared, jobs, settings.tuned)
        log.info("%s", said(steps, workers.count))
        if settings.dry_run:
            print(f"\n{markdown(table(steps))}")
            return
        _ask(steps, settings)
        parts = _parts(shared, jobs, workers.count)
        scheduler = Scheduler(graph(jobs, settings.tuned, settings.seed, parts), shared.do, workers)
        with _hushed():
            scheduler.run()
    finally:
        workers.close()
        sweep(run.experiment)
    failures, members = scheduler.failures, _members(scheduler.done)
    if members:
        run.table(pd.DataFrame(members).sort_values(["arm", "seed", "step"]), "members.parquet")
    if any(member["step"] in ("evaluate", "verify") for member in members):
        run_step("compare", {"profile": settings.profile, "study": run.id}, run.id)
    if failures:
        first, reason = next(iter(failures.items()))
        raise RampartError(
            f"{len(failures)} of {len(jobs)} arms failed, {first}: {reason}; what finished is kept, "
            "so the same command goes on from there"
        )


def _workers(settings: StudySettings) -> Workers:
    if settings.executor == "ray":
        return RayWorkers(settings.address, settings.workers, settings.threads or 1, settings.gpus, settings.ram)
    return LocalWorkers(settings.workers, settings.gpus, settings.device)


def _check(shared: Shared, settings: StudySettings, jobs: list[tuple[Arm, int]]) -> None:
    """Every arm's settings, before the first is trained."""
    if not settings.tuned:
        others = {name for step in ("main", *ARM_STEPS) for name in own_names(step)}
        idle = [name for name in shared.given if name in set(own_names("tune")) - others or name.startswith("tune.")]
        require(not idle, f"{', '.join(idle)}: nothing is tuned in this study, give tuned=true, too")
    for arm, seed in jobs:
        for step in ARM_STEPS:
            try:
                resolve(step, shared.texts(Task(arm, seed, step), "checked"))
            except SettingsError as error:
                raise SettingsError(f"{step} of {arm.name}: {error}") from None
        if settings.tuned:
            check(shared.texts(Task(arm, seed, "tune")))


def _ask(steps: pd.DataFrame, settings: StudySettings) -> None:
    """Raises SettingsError where it is not said what becomes of steps whose code has changed."""
    outdated = steps[steps["state"] == OUTDATED]
    if len(outdated) and not settings.force:
        raise SettingsError(
            f"Rampart's code has changed since {len(outdated)} of this study's steps were done "
            f"({outdated['step'].iloc[0]} of {outdated['arm'].iloc[0]}, …): force=redo does them again, force=keep "
            "takes them as they are, another MLFLOW_EXPERIMENT_NAME begins another study"
        )


def _parts(shared: Shared, jobs: list[tuple[Arm, int]], workers: int) -> int:
    """In how many each arm's verification is split, so that workers without an arm help the others."""
    settings = resolve("verify", shared.texts(Task(*jobs[0], "verify"), "checked"))
    assert isinstance(settings, VerifySettings)
    return min(math.ceil(workers / len(jobs)), settings.images)


@contextmanager
def _hushed() -> Iterator[None]:
    """What each step says of itself would drown the count of arms."""
    talking = [logging.getLogger(f"{__package__}.{name}") for name in ("steps", "embedding")]
    for logger in talking:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger in talking:
            logger.setLevel(logging.NOTSET)


class Member(TypedDict):
    """A step of a study and the run that did it, in this study or (`reused`) before."""

    arm: str
    seed: int
    step: str
    run: str
    reused: bool


def _members(done: Mapping[Task, Done]) -> list[Member]:
    return [
        {"arm": task.arm.name, "seed": task.seed, "step": task.step, "run": result.run, "reused": result.reused}
        for task, result in done.items()
        if task.step != "tune" and not task.part
    ]
