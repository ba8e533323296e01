"""Runs a study: every arm and seed through its steps, arms side by side in processes, then the comparison."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

import pandas as pd
import torch
from tqdm import tqdm

from rampart.arms import Arm, grid
from rampart.console import configure_logging
from rampart.errors import RampartError
from rampart.reports.tables import markdown
from rampart.settings import ARM_STEPS, StudySettings, resolve
from rampart.study.opening import open_data
from rampart.study.plan import Arms, Member, arm_texts, plan, said, table
from rampart.study.steps import run_step
from rampart.tracking import Run, sweep
from rampart.tuning import check

log = logging.getLogger(__name__)

# Slowest first, so that no worker is left alone with a long arm at the end.
COST = {"certified": 0, "adversarial": 1, "normal": 2}
WORKER_STEPS = ("train", "evaluate", "verify")
# Seconds that a worker has to leave a checkpoint of its training when the study is interrupted.
PATIENCE = 60.0


def run_study(run: Run, settings: StudySettings, given: Mapping[str, str]) -> None:
    """Runs what is missing of the study's arms, then compares them.

    Raises:
        RampartError: an arm failed; the others are finished and compared before that is said.
    """
    run.name(f"study {settings.profile}")
    jobs = [
        (arm, settings.seed + offset)
        for offset in range(settings.seeds)
        for arm in grid(settings.methods, settings.augment, settings.contrastive)
    ]
    # Every arm's settings are checked before the first is trained.
    for arm, seed in jobs:
        for step in ARM_STEPS:
            resolve(step, arm_texts(given, step, arm, seed, settings.profile, "checked"))
        if settings.tuned:
            check(arm_texts(given, "tune", arm, seed, settings.profile, ""))
    # Data that cannot be read, too; and a folder is decoded once, not in every worker.
    open_data(run, settings)
    workers = settings.workers or default_workers()
    threads = settings.threads or max((os.cpu_count() or 1) // workers, 1)
    log.info(
        "study %s: %d arms x %d seeds, %d at a time",
        settings.profile,
        len(jobs) // settings.seeds,
        settings.seeds,
        workers,
    )
    arms = Arms(dict(given), settings.profile, threads, run.id, run.experiment, settings.tuned, settings.seed)
    steps = plan(arms, jobs)
    log.info("%s", said(steps, workers))
    if settings.dry_run:
        print(f"\n{markdown(table(steps))}")
        return
    jobs.sort(key=lambda job: COST[job[0].method])
    # What each step says of itself would drown the count of arms.
    talking = [logging.getLogger(f"{__package__}.{name}") for name in ("steps", "embedding")]
    for logger in talking:
        logger.setLevel(logging.WARNING)
    members, failures = _run_side_by_side(arms, jobs, workers)
    for logger in talking:
        logger.setLevel(logging.NOTSET)
    sweep(run.experiment)
    if members:
        run.table(pd.DataFrame(members).sort_values(["arm", "seed", "step"]), "members.parquet")
        run_step("compare", {"profile": settings.profile, "study": run.id}, run.id)
    if failures:
        first, reason = next(iter(failures.items()))
        raise RampartError(
            f"{len(failures)} of {len(jobs)} arms failed, {first}: {reason}; what finished is kept, "
            "so the same command goes on from there"
        )


def _run_side_by_side(arms: Arms, jobs: list[tuple[Arm, int]], workers: int) -> tuple[list[Member], dict[str, str]]:
    """All arms and seeds in a pool of processes: (the steps that are done, the reason for each arm that failed)."""
    members: list[Member] = []
    failures: dict[str, str] = {}
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_worker)
    futures = {pool.submit(_work, arms, arm, seed): (arm, seed) for arm, seed in jobs}
    try:
        for future in tqdm(as_completed(futures), total=len(futures), desc="study", unit="arm", disable=None):
            arm, seed = futures[future]
            name = f"{arm.name} s{seed}"
            try:
                done = future.result()
                members += done
                # Here, because UMAP takes a process most of a minute to load and compile.
                members += arms.run(arm, seed, ("embed",), done)
                kept = all(row["reused"] for row in done)
                log.info("%s %s", name, "was there already" if kept else "finished")
            except Exception as error:  # whatever stops one arm must not stop the others
                killed = isinstance(error, BrokenProcessPool)
                failures[name] = "a worker was killed (out of memory?)" if killed else " ".join(str(error).split())
                log.error("%s failed: %s", name, failures[name])
    except BaseException:
        # Interrupted: nobody waits for what the workers have begun.
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in multiprocessing.active_children():
            worker.terminate()
        for worker in multiprocessing.active_children():
            worker.join(PATIENCE)
            worker.kill()
            worker.join()
        sweep(arms.experiment)
        raise
    pool.shutdown()
    return members, failures


def default_workers() -> int:
    """One on a GPU; on CPUs one for each core, for the study's networks are too small to share cores well."""
    return 1 if torch.cuda.is_available() else os.cpu_count() or 1


def _work(arms: Arms, arm: Arm, seed: int) -> list[Member]:
    """What a worker does of one arm."""
    try:
        return arms.run(arm, seed, WORKER_STEPS)
    except KeyboardInterrupt:
        # Told to stop, and its run is closed: the pool would give it the next arm.
        os._exit(130)


def _worker() -> None:
    """A worker's process: only its parent draws a progress bar."""
    os.environ["TQDM_DISABLE"] = "1"
    configure_logging(quiet=True)
