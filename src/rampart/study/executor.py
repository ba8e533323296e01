"""Runs a study: every arm and seed through its steps, arms side by side in processes, then the comparison."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import TypedDict

import pandas as pd
import torch
from tqdm import tqdm

from rampart.arms import Arm, grid
from rampart.console import configure_logging
from rampart.errors import RampartError
from rampart.settings import ARM_STEPS, Common, StudySettings, nested, resolve
from rampart.study.identity import identity
from rampart.study.opening import data_of, open_data
from rampart.study.steps import run_step
from rampart.tracking import Run, sweep
from rampart.tracking.queries import find_runs
from rampart.tuning import check, tuned_texts

log = logging.getLogger(__name__)

# Slowest first, so that no worker is left alone with a long arm at the end.
COST = {"certified": 0, "adversarial": 1, "normal": 2}
WORKER_STEPS = ("train", "evaluate", "verify")
# Seconds that a worker has to leave a checkpoint of its training when the study is interrupted.
PATIENCE = 60.0


class Member(TypedDict):
    """A step of a study and the run that did it, in this study or (`reused`) before."""

    arm: str
    seed: int
    step: str
    run: str
    reused: bool


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
    jobs.sort(key=lambda job: COST[job[0].method])
    arms = Arms(dict(given), settings.profile, threads, run.id, run.experiment, settings.tuned, settings.seed)
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
        sweep(arms.experiment)
        raise
    pool.shutdown()
    return members, failures


def default_workers() -> int:
    """One on a GPU; on CPUs one for each core, for the study's networks are too small to share cores well."""
    return 1 if torch.cuda.is_available() else os.cpu_count() or 1


@dataclass(frozen=True)
class Arms:
    """What the steps of all arms of a study share; travels to the workers."""

    given: dict[str, str]
    profile: str
    threads: int
    study: str
    experiment: str
    tuned: bool
    first_seed: int

    def run(self, arm: Arm, seed: int, steps: tuple[str, ...], before: Sequence[Member] = ()) -> list[Member]:
        """Runs steps of one arm in this process, `before` being those that it has behind it.

        A step that was done with the same settings, data, model and code is not done again.
        """
        os.environ["MLFLOW_EXPERIMENT_ID"] = self.experiment
        members: list[Member] = []
        trained = [row["run"] for row in before if row["step"] == "train"]
        for step in steps:
            model = f"runs:/{trained[0]}/model" if trained else ""
            texts = arm_texts(self.given, step, arm, seed, self.profile, model)
            if step == "train" and self.tuned:
                texts |= self.tune(arm)
            texts.setdefault("threads", str(self.threads))
            settings = resolve(step, texts)
            assert isinstance(settings, Common)
            key = identity(step, settings, data_of(settings).digest, model)
            known = find_runs(self.experiment, {"identity": key}, max_results=1)
            run_id = str(known["run_id"][0]) if len(known) else run_step(step, texts, self.study)
            members.append({"arm": arm.name, "seed": seed, "step": step, "run": run_id, "reused": bool(len(known))})
            if step == "train":
                trained = [run_id]
        return members

    def tune(self, arm: Arm) -> dict[str, str]:
        """The settings that a tuning of the arm has found best. Its seeds share one, and a rerun finds it again."""
        texts = arm_texts(self.given, "tune", arm, self.first_seed, self.profile, "")
        return tuned_texts(run_step("tune", {"threads": str(self.threads), **texts}, self.study))


def arm_texts(given: Mapping[str, str], step: str, arm: Arm, seed: int, profile: str, model: str) -> dict[str, str]:
    """What the user would give to run one step of one arm alone."""
    texts = {"profile": profile, "seed": str(seed), **nested(given, step)}
    if step == "tune":
        texts = nested(given, "train") | texts
    if step in ("train", "tune"):
        return texts | {"method": arm.method, "augment": str(arm.augment), "contrastive": arm.contrastive}
    return texts | {"model": model}


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
