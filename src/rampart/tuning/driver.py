"""Tunes one arm: a study of Optuna whose trials are nested MLflow runs, by one worker or by many."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import optuna
import torch
from optuna.distributions import distribution_to_json
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from rampart.arms import Arm
from rampart.console import configure_logging
from rampart.data import Dataset, Split
from rampart.errors import RampartError
from rampart.settings import MACHINE, Settings, TrainSettings, TuneSettings, names, resolve
from rampart.study.identity import asked, code_version
from rampart.study.opening import data_of, prepare
from rampart.study.workers import follow_parent, interrupt
from rampart.tracking import Run
from rampart.tracking.lifecycle import exists, fail_run, reopened
from rampart.tracking.store import alive
from rampart.training.methods import METHODS
from rampart.tuning.publish import DATA, FOUND, publish
from rampart.tuning.space import Space, read_space, starting_point
from rampart.tuning.storage import (
    CODE,
    HOME,
    RUN,
    check_failures,
    finished,
    grace,
    keep_start,
    missing,
    open_study,
    retire,
)
from rampart.tuning.trials import Surplus, Task, run_trial

log = logging.getLogger(__name__)

# Seconds between two looks at trials that other workers have still in work.
PAUSE = 2.0


def run_tuning(run: Run, settings: Settings, given: Mapping[str, str]) -> None:
    """Brings the Optuna study of an arm to `settings.trials` finished or pruned trials, and publishes what was found.

    The study's home is the run that began it: later commands go on there, under a run of their own.

    Raises:
        RampartError: bad input, before any training; most trials failed.
    """
    assert isinstance(settings, TuneSettings)
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # each trial is told of by us
    worker = Worker(settings, dict(given), run.experiment)
    arm = worker.arm
    run.name(f"tune {arm.name}")
    run.tags({"arm": arm.name, "method": arm.method, "seed": settings.seed})
    data = worker.data()
    run.dataset(data, settings.dataset, settings.val_fraction, settings.split_seed)
    study = worker.study(data, run.id)
    code = study.user_attrs.get(CODE, "unknown")
    if code != code_version("train"):  # trials are expensive
        more = "whose trials count, too: give another study_name to begin anew"
        log.warning("study '%s' was begun with other code, %s", study.study_name, more)
    home = _home(study, run)
    run.tags({"tuning": home.id})
    if home is not run:
        run.name(f"tune {arm.name}, goes on in {home.id[:8]}")
        log.info("study '%s' goes on in run %s: %d trials are done", study.study_name, home.id, len(finished(study)))
    with nullcontext() if home is run else reopened(home), _helpers(worker, home.id, settings.workers - 1):
        worker.work(study, data, home.id)
        found = publish(home, study, settings, worker.said, worker.objective)
    if found:  # the home's tags change with each command that goes on there
        run.tags({"identity": worker.identity(data, code), **{FOUND + name: text for name, text in found.items()}})
    if home is not run:
        home.close()


def tuning_identity(given: Mapping[str, str]) -> str:
    """The identity of a tuning that has found something, given these texts."""
    settings = resolve("tune", given)
    assert isinstance(settings, TuneSettings)
    worker = Worker(settings, dict(given), "")
    return worker.identity(worker.data(), code_version("train"))


def check(given: Mapping[str, str]) -> None:
    """Raises SettingsError where `tune` would, given these texts."""
    settings = resolve("tune", given)
    assert isinstance(settings, TuneSettings)
    read_space(settings.method, settings.space, Worker(settings, dict(given), "").train_texts)


@dataclass(frozen=True)
class Worker:
    """A process that takes trials of the study; travels to the processes beside it."""

    settings: TuneSettings
    given: dict[str, str]
    experiment: str

    @cached_property
    def arm(self) -> Arm:
        return Arm(self.settings.method, self.settings.augment, self.settings.contrastive)

    @cached_property
    def said(self) -> dict[str, str]:
        """What the user said of the training itself."""
        valid = set(names("train"))
        return {name: text for name, text in self.given.items() if name in valid} | self.arm.texts

    @cached_property
    def train_texts(self) -> dict[str, str]:
        """With the data that trials are trained on and scored with: a tuning may have a split of its own."""
        return {name: str(getattr(self.settings, name)) for name in DATA} | self.said

    @cached_property
    def training(self) -> TrainSettings:
        """The settings as they are without tuning."""
        settings = resolve("train", self.train_texts)
        assert isinstance(settings, TrainSettings)
        return settings

    @cached_property
    def objective(self) -> tuple[str, ...]:
        own = f"val_{METHODS[self.settings.method].score_name}"
        return tuple(dict.fromkeys(own if name == "own" else name for name in self.settings.objective))

    @cached_property
    def eps(self) -> float:
        return self.settings.objective_eps or self.training.eps

    @cached_property
    def space(self) -> Space:
        return read_space(self.settings.method, self.settings.space, self.train_texts)

    @cached_property
    def start(self) -> dict[str, Any] | None:
        return starting_point(self.space, self.train_texts)

    def data(self) -> Dataset:
        """The dataset without its test images: nothing here can look at them."""
        data = data_of(self.settings)
        nothing = torch.zeros((0, *data.in_shape), dtype=torch.uint8)
        return replace(data, test=Split(nothing, torch.zeros(0, dtype=torch.int64)))

    @property
    def epochs(self) -> int:
        """Of a whole trial."""
        training = self.training
        both = training.encoder_epochs + training.head_epochs
        return both if training.contrastive == "double" else training.epochs

    def about(self, data: Dataset) -> dict[str, Any]:
        """What is tuned."""
        return {
            "space": {name: json.loads(distribution_to_json(d)) for name, d in self.space.items()},
            "objective": self.objective,
            "objective_eps": self.eps,
            "settings": asked(self.training, {*self.space, *MACHINE}),
            "dataset": data.digest,
            "epochs": self.epochs,
        }

    def identity(self, data: Dataset, code: str) -> str:
        """A hash of what is tuned, and how, and in which Optuna study, and, behind a point, the version of the code by
        which its first trials were trained."""
        how = asked(self.settings, {*MACHINE, "dataset", "workers"})
        parts = json.dumps([self.about(data), how], sort_keys=True)
        return f"{hashlib.sha256(parts.encode()).hexdigest()[:32]}.{code}"

    def study(self, data: Dataset, home: str) -> Study:
        """The Optuna study, which must be about the very same thing as before."""
        settings, what = self.settings, self.about(data)
        if self.start is None:
            log.info("the settings as they are lie outside of the search space: no trial begins with them")
        name = settings.study_name or f"{settings.profile} {settings.dataset} {self.arm.name} s{settings.seed}"
        return open_study(settings, name, what, code_version("train"), home, self.start, _lost)

    def work(self, study: Study, data: Dataset, home: str) -> None:
        """Takes trials until the study has all that it should have."""
        os.environ["MLFLOW_EXPERIMENT_ID"] = self.experiment
        settings = self.settings
        patience = math.inf if settings.pruner == "none" else grace(self.epochs)
        device = prepare(settings)
        task = Task(
            self.train_texts, self.space, self.objective, self.eps, patience, data, device, settings.trials, home
        )
        begun: list[int] = []

        def objective(trial: optuna.Trial) -> tuple[float, ...]:
            begun.append(trial.number)
            return run_trial(trial, task)

        since = len(study.trials)
        while True:
            retire(study, alive, _lost)
            if len(finished(study)) >= settings.trials:
                return
            check_failures(study, since)
            keep_start(study, self.start)
            if missing(study, settings.trials) <= 0:  # the last ones are in other hands, and may come back
                time.sleep(PAUSE)
                continue
            try:
                study.optimize(objective, n_trials=1, catch=(RampartError, Surplus, torch.OutOfMemoryError))
            except (optuna.exceptions.UpdateFinishedTrialError, ValueError, AssertionError):
                # What Optuna raises where another worker, without a sign of life for too long, gave the trial up.
                if not begun or study.trials[begun[-1]].state is not TrialState.FAIL:
                    raise
                log.warning("trial %d was given up by another worker", begun[-1])


def _lost(trial: FrozenTrial) -> None:
    """Ends the MLflow run of a trial whose worker is gone."""
    if RUN in trial.user_attrs:
        reason = "its worker ended without a word; another trial takes its place"
        fail_run(trial.user_attrs[RUN], reason, {"trial_state": "failed"})


def _home(study: Study, run: Run) -> Run:
    """The run that trials are nested in: the one that began the study, if this server still has it."""
    known = study.user_attrs[HOME]
    if known == run.id:
        return run
    if exists(known):
        return Run(known, run.experiment, run.step)
    log.warning("run %s, which began study '%s', is gone: going on in this one", known, study.study_name)
    study.set_user_attr(HOME, run.id)
    return run


@contextmanager
def _helpers(worker: Worker, home: str, count: int) -> Iterator[None]:
    """Processes that work on the study beside this one."""
    context = multiprocessing.get_context("spawn")
    helpers = [context.Process(target=_help, args=(worker, home)) for _ in range(count)]
    for helper in helpers:
        helper.start()
    try:
        yield
    except BaseException:
        for helper in helpers:
            helper.terminate()
        raise
    finally:
        for helper in helpers:
            helper.join()


def _help(worker: Worker, home: str) -> None:
    os.environ["TQDM_DISABLE"] = "1"
    configure_logging()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # Its parent ends it, politely, or is gone itself: its trial's run is ended, then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, interrupt)
    follow_parent()
    data = worker.data()
    try:
        worker.work(worker.study(data, home), data, home)
    except RampartError as error:
        log.error("a worker stopped: %s", error)
    except KeyboardInterrupt:
        sys.exit(130)
