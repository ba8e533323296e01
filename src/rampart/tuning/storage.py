"""Optuna's side of a tuning: the study in its storage, how points are drawn, and trials whose worker is gone."""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import optuna
import sqlalchemy.exc
from optuna.distributions import BaseDistribution
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from rampart.errors import RampartError, SettingsError
from rampart.settings import TuneSettings

log = logging.getLogger(__name__)

# Seconds between two signs of life of a trial, and without one after which its worker counts as dead.
HEARTBEAT, GRACE = 15, 60
DONE = (TrialState.COMPLETE, TrialState.PRUNED)
# User attributes of a study (WHAT, CODE, HOME) and of its trials.
WHAT, CODE, HOME, RUN, PROCESS, ERROR = "what", "code", "run", "run", "process", "error"


def open_study(
    settings: TuneSettings,
    name: str,
    what: Mapping[str, Any],
    code: str,
    home: str,
    start: Mapping[str, Any] | None,
    lost: Callable[[FrozenTrial], None],
) -> Study:
    """The study `name`, made or gone on with; `what` says what is tuned and must be the same each time.

    Args:
        code: the version of the code that trains, kept with a study that is made now.
        home: the MLflow run of a study that is made now.
        start: the point of its first trial.
        lost: is told of each trial whose worker is gone.

    Raises:
        SettingsError: the storage cannot be reached, or its study of that name is about something else.
    """
    directions = [optuna.study.StudyDirection.MAXIMIZE] * len(what["objective"])
    try:
        storage = _patiently(lambda: _connect(settings.storage, lost))
        try:
            study = optuna.create_study(storage=storage, study_name=name, directions=directions)
            study.set_user_attr(WHAT, dict(what))
            study.set_user_attr(CODE, code)
            if start is not None:
                study.enqueue_trial(dict(start))
            study.set_user_attr(HOME, home)  # last: the others wait for it
        except optuna.exceptions.DuplicatedStudyError:
            study = optuna.load_study(storage=storage, study_name=name)
    except _UNREACHABLE as error:
        reason = " ".join(str(error).split())[:160]
        raise SettingsError(
            f"the storage of Optuna studies cannot be reached ({reason}): give storage=sqlite:///FILE or "
            "postgresql://USER@HOST/DATABASE"
        ) from error
    _compare(name, what, _settled(study))
    study.sampler, study.pruner = Seeded(settings), _pruner(settings, what)
    return study


_UNREACHABLE = (
    sqlalchemy.exc.SQLAlchemyError,
    optuna.exceptions.StorageInternalError,
    ImportError,  # no driver for that kind of database
    ValueError,  # no URL
    RuntimeError,  # made by another version of Optuna
)


def _patiently(connect: Callable[[], optuna.storages.RDBStorage]) -> optuna.storages.RDBStorage:
    """Of two workers that make a storage's tables at the same moment one fails, and finds them a moment later."""
    for pause in (0.5, 1.0, 2.0):
        try:
            return connect()
        except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError):
            time.sleep(pause)
    return connect()


def _connect(url: str, lost: Callable[[FrozenTrial], None]) -> optuna.storages.RDBStorage:
    # Other workers hold SQLite's one lock for moments.
    waits = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.storages.RDBStorage(
            url,
            engine_kwargs=waits,
            heartbeat_interval=HEARTBEAT,
            grace_period=GRACE,
            heartbeat_stale_trial_callback=lambda _, trial: lost(trial),
        )


def _settled(study: Study) -> dict[str, Any]:
    """What the study is about, as soon as the worker that has just made it has said so."""
    for _ in range(100):
        if HOME in study.user_attrs:
            return dict(study.user_attrs[WHAT])
        time.sleep(0.1)
    raise SettingsError(f"Optuna's study '{study.study_name}' is none of Rampart's: give another study_name")


def _compare(name: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    ours = json.loads(json.dumps(ours))
    for part in ours:
        if ours[part] != theirs.get(part):
            before, now = theirs.get(part), ours[part]
            if isinstance(before, dict) and isinstance(now, dict):  # what differs alone
                keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
                before, now = ({key: side.get(key) for key in keys} for side in (before, now))
            raise SettingsError(
                f"study '{name}' is there already with another {part} ({_short(before)}, "
                f"now {_short(now)}): give another study_name, or the same {part}"
            )


def _short(value: Any) -> str:
    said = value if isinstance(value, str) else json.dumps(value)
    return said if len(said) <= 120 else said[:117] + "..."


class Seeded(optuna.samplers.BaseSampler):
    """Draws every trial from a generator of its own, seeded by the study's seed and the trial's number: the same trials
    whether a study paused between two of them or not, and never the same ones for two workers."""

    def __init__(self, settings: TuneSettings) -> None:
        self.settings = settings
        self.inner = self._made(0)

    def _made(self, number: int) -> optuna.samplers.BaseSampler:
        seed = (self.settings.seed * 100_003 + number) % 2**32
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            if self.settings.sampler == "tpe":
                return optuna.samplers.TPESampler(seed=seed)
            if self.settings.sampler == "nsga-ii":
                # A generation of the default 50 would be more than most studies have.
                return optuna.samplers.NSGAIISampler(population_size=max(self.settings.trials // 4, 4), seed=seed)
            if self.settings.sampler == "gp":
                return optuna.samplers.GPSampler(seed=seed)
            return optuna.samplers.RandomSampler(seed=seed)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self.inner = self._made(trial.number)
        self.inner.before_trial(study, trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self.inner.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self.inner.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self.inner.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        self.inner.after_trial(study, trial, state, values)


# Finished trials before the first is stopped.
STARTUP = 5


def grace(epochs: int) -> int:
    """Epochs of a trial before it may be stopped: those that rise late are often the best."""
    return max(epochs // 3, 1)


def _pruner(settings: TuneSettings, what: Mapping[str, Any]) -> optuna.pruners.BasePruner:
    """Optuna's, for one objective: it knows none for several (`trials.worse_in_all`)."""
    if settings.pruner == "none" or len(what["objective"]) > 1:
        return optuna.pruners.NopPruner()
    if settings.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=1, max_resource=what["epochs"], reduction_factor=3)
    warmup = grace(what["epochs"]) + 1  # steps count from 1
    return optuna.pruners.MedianPruner(n_startup_trials=STARTUP, n_warmup_steps=warmup)


def retire(study: Study, alive: Callable[[str], bool | None], lost: Callable[[FrozenTrial], None]) -> None:
    """Fails the trials of processes of this machine that are gone, and those that have no process and no heartbeat, for
    theirs ended in the moment of their beginning; of all others those whose heartbeat has stopped.

    Args:
        alive: of a process as in a trial's attribute; None where that is unknown.
    """
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        process = trial.user_attrs.get(PROCESS)
        begun = trial.datetime_start
        if process is None:
            gone = begun is not None and (datetime.now() - begun).total_seconds() > GRACE
        else:
            gone = alive(process) is False
        if not gone:
            continue
        try:
            study.tell(trial.number, state=TrialState.FAIL)
        except (optuna.exceptions.UpdateFinishedTrialError, ValueError):  # another worker was faster
            continue
        lost(trial)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        optuna.storages.fail_stale_trials(study)


def missing(study: Study, total: int, number: int | None = None) -> int:
    """How many trials a study still needs to begin; with `number`, as that trial sees it: those before it count."""
    trials = study.get_trials(deepcopy=False, states=(*DONE, TrialState.RUNNING))
    return total - sum(number is None or trial.number < number for trial in trials)


def finished(study: Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=DONE)


def keep_start(study: Study, start: Mapping[str, Any] | None) -> None:
    """Puts the starting point before the other trials once more where the worker that had it was lost."""
    if start is None:
        return
    of_it = [t for t in study.trials if {**t.system_attrs.get("fixed_params", {}), **t.params} == start]
    if of_it and all(t.state is TrialState.FAIL and ERROR not in t.user_attrs for t in of_it):
        study.enqueue_trial(dict(start))


def check_failures(study: Study, since: int) -> None:
    """Raises RampartError once the trials from number `since` on mostly fail: more would, too."""
    failed = [t for t in study.get_trials(deepcopy=False, states=(TrialState.FAIL,)) if ERROR in t.user_attrs]
    failed = [t for t in failed if t.number >= since]
    if len(failed) >= 3 + sum(t.number >= since for t in finished(study)):
        raise RampartError(f"{len(failed)} trials failed, the last with: {failed[-1].user_attrs[ERROR]}")
