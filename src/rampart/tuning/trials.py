"""One trial: an arm trained with a point of the space, scored on the validation images, as a nested MLflow run."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import optuna
import torch
from optuna.trial import Trial, TrialState
from torch import Tensor

from rampart.attacks import pgd
from rampart.bounds import margin_bounds
from rampart.data import Dataset, batches, to_pixels
from rampart.errors import RampartError
from rampart.models import Classifier
from rampart.settings import TrainSettings, as_text, resolve
from rampart.tracking import Run, open_run
from rampart.tracking.runs import class_text
from rampart.tracking.store import this_process
from rampart.training import State, train
from rampart.tuning.space import Space, said, suggest, texts
from rampart.tuning.storage import ERROR, PROCESS, RUN, STARTUP, missing

log = logging.getLogger(__name__)

# The attack behind val_robust_accuracy: the same for all trials, whatever they train with.
ATTACK_STEPS = 10


@dataclass(frozen=True)
class Task:
    """What all trials of a study share.

    Args:
        given: texts of the settings of the training.
        objective: what is maximised, one or several.
        eps: radius of robust and certified accuracy, in pixels.
        grace: epochs before a trial of several objectives may be stopped; infinite where none is to be.
        data: whose test images are gone.
        home: the study's run.
    """

    given: Mapping[str, str]
    space: Space
    objective: tuple[str, ...]
    eps: float
    grace: float
    data: Dataset
    device: torch.device
    trials: int
    home: str


class Surplus(Exception):
    """A trial that began at the same moment as the last one that was needed."""


def run_trial(trial: Trial, task: Task) -> tuple[float, ...]:
    """The objective's values at the epoch that was kept.

    Raises:
        TrialPruned: it was stopped. Surplus: it was not needed. RampartError: its training failed.
    """
    if missing(trial.study, task.trials, trial.number) <= 0:
        raise Surplus
    trial.set_user_attr(PROCESS, this_process())
    point = {name: suggest(trial, name, distribution) for name, distribution in task.space.items()}
    given = {**task.given, **texts(point)}
    pruned: optuna.TrialPruned | None = None
    values: tuple[float, ...] = ()
    started = time.monotonic()
    with open_run("trial", task.home) as run:
        trial.set_user_attr(RUN, run.id)
        run.name(f"trial {trial.number}")
        run.tags({"trial": trial.number, "trial_state": "running"})
        try:
            settings = resolve("train", given)
            assert isinstance(settings, TrainSettings)
            run.params(as_text(settings, given))
            run.tags({"method": settings.method, "seed": settings.seed, "profile": settings.profile})
            run.tags({"class_names": class_text(task.data.classes)})
            recorder = Recorder(run, trial, task, settings.eps)
            try:
                model = train(settings, task.data, recorder, settings, settings.seed, task.device)
                values = recorder.kept()
                run.model(model, to_pixels(task.data.val.images[:2]))
            except optuna.TrialPruned as error:
                pruned = error
            if trial.study.trials[trial.number].state is not TrialState.RUNNING:
                raise RampartError(
                    "another worker has given this trial up: it had no sign of life from it for too long"
                )
        except BaseException as error:
            run.tags({"trial_state": "failed"})
            if isinstance(error, Exception):  # not an interrupt, which is not the trial's fault
                kind = "" if isinstance(error, RampartError) else f"{type(error).__name__}: "
                with suppress(optuna.exceptions.UpdateFinishedTrialError):
                    trial.set_user_attr(ERROR, " ".join(f"{kind}{error}".split()))
            raise
        run.tags({"trial_state": "pruned" if pruned else "complete"})
        run.metrics({"trial/seconds": time.monotonic() - started, "trial/epochs": len(recorder.curve)})
    if pruned:
        log.info("trial %d: %s: pruned after %d epochs", trial.number, said(point), len(recorder.curve))
        raise pruned
    scores = ", ".join(f"{name} {value:.4f}" for name, value in zip(task.objective, values, strict=True))
    log.info("trial %d: %s: %s", trial.number, said(point), scores)
    return values


class Recorder:
    """Tells MLflow what training tells it, and Optuna the objective of each epoch that has a head to measure it by."""

    def __init__(self, run: Run, trial: Trial, task: Task, trained_eps: float) -> None:
        self.run, self.trial, self.task = run, trial, task
        self.trained_eps = trained_eps
        self.curve: dict[int, tuple[float, ...]] = {}
        self.told: dict[str, float] = {}
        self.epoch, self.best = 0, 0

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self.run.metrics(values, step)
        self.told, self.epoch = dict(values), step
        for name, value in values.items():
            if name.endswith("/best_epoch"):
                self.best = int(value)

    def checkpoint(self, model: Classifier, state: State) -> str:
        """Called at the start, and with the weights of an epoch that `metrics` has just told of."""
        kept = self.run.checkpoint(model)
        if "val/accuracy" in self.told:
            scores = {name: self.score(name, model) for name in self.task.objective}
            self.run.metrics({f"objective/{name}": value for name, value in scores.items()}, self.epoch)
            self.curve[self.epoch] = tuple(scores.values())
            self.told = {}
            self.report()
        return kept

    def score(self, name: str, model: Classifier) -> float:
        if name == "val_accuracy":
            return self.told["val/accuracy"]
        # The training's own number, where it is at the same radius; its attack, unlike its bounds, is a setting.
        if (
            name == "val_certified_accuracy"
            and self.trained_eps == self.task.eps
            and "val/certified_accuracy" in self.told
        ):
            return self.told["val/certified_accuracy"]
        data, eps = self.task.data.val.to(self.task.device), self.task.eps
        held = 0
        for x, y in batches(data, 256):
            held += int((_robust if name == "val_robust_accuracy" else _certified)(model, x, y, eps).sum())
        return held / len(data)

    def report(self) -> None:
        """Raises TrialPruned where the trial is not worth its other epochs."""
        values = self.curve[self.epoch]
        if len(values) == 1:
            self.trial.report(values[0], self.epoch)
            stop = self.trial.should_prune()
        else:
            self.trial.set_user_attr(f"epoch/{self.epoch}", values)
            stop = worse_in_all(self.trial, self.epoch, values, self.task.grace)
        if stop:
            raise optuna.TrialPruned

    def kept(self) -> tuple[float, ...]:
        """The values of the epoch whose weights the training has kept."""
        return self.curve[self.best]


def _robust(model: Classifier, x: Tensor, y: Tensor, eps: float) -> Tensor:
    return ~pgd(model, x, y, eps, ATTACK_STEPS, generator=torch.Generator(x.device).manual_seed(0)).success[0]


def _certified(model: Classifier, x: Tensor, y: Tensor, eps: float) -> Tensor:
    return (margin_bounds(model, x, y, eps, "crown-ibp") > 0).all(1)


def worse_in_all(trial: Trial, epoch: int, values: tuple[float, ...], grace: float) -> bool:
    """The rule for several objectives, of which Optuna has none: stop a trial that at this epoch lies below the median
    of the complete trials in every objective, having had its `grace`. One that is good at a single thing may belong to
    the front."""
    others = trial.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    curves = [attrs[f"epoch/{epoch}"] for t in others if f"epoch/{epoch}" in (attrs := t.user_attrs)]
    if len(curves) < STARTUP or epoch <= grace:
        return False
    return all(value < statistics.median(curve[i] for curve in curves) for i, value in enumerate(values))
