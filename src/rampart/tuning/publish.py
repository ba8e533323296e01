"""What a tuning leaves in its MLflow run: a tuned profile, the trials as a table, Optuna's plots, the best model."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import optuna
import yaml
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from rampart.arms import Arm
from rampart.errors import RampartError
from rampart.settings import (
    EPS_NAMES,
    MACHINE,
    PIXELS,
    SECTIONS,
    TrainSettings,
    TuneSettings,
    load_profile,
    parse_eps,
    resolve,
)
from rampart.tracking import Run
from rampart.tracking.lifecycle import exists
from rampart.tracking.models import register, registered_name
from rampart.tracking.queries import run_tags
from rampart.tuning.space import said, texts
from rampart.tuning.storage import RUN, finished

log = logging.getLogger(__name__)

PROFILE, ALIAS = "profile.yaml", "tuned"
# Before the names of what a command has found, as tags of its run.
FOUND = "found."


def publish(
    home: Run, study: Study, settings: TuneSettings, given: Mapping[str, str], objective: tuple[str, ...]
) -> dict[str, str]:
    """Writes all that into the study's run; with several objectives for every trial of the Pareto front, the profile
    and the alias being those of the one with the largest sum. Gives that trial's point, as a user would give it; none
    where no trial was finished."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    _table(home, study)
    home.metrics({f"trials/{s.name.lower()}": sum(t.state is s for t in study.trials) for s in TrialState})
    if not complete:
        log.warning("all trials were pruned or failed: there is nothing to choose from")
        return {}
    front = sorted(study.best_trials, key=lambda trial: -sum(trial.values))
    if len(objective) == 1:  # those that tie are no front
        front = front[:1]
    best = front[0]
    for place, trial in enumerate(front):
        # The first again without a number: that is the name to remember.
        for name in ([PROFILE] if place == 0 else []) + ([f"profile-{trial.number}.yaml"] if len(front) > 1 else []):
            home.text(yaml.safe_dump(tuned_profile(settings, given, trial), sort_keys=False, allow_unicode=True), name)
    values = dict(zip(objective, best.values, strict=True))
    home.metrics({f"best/{name}": value for name, value in values.items()})
    home.tags({"best_trial": best.number, "best_run": best.user_attrs[RUN]})
    point = texts(best.params)
    home.tags({f"best.{name}": text for name, text in point.items()})
    arm = Arm(settings.method, settings.augment, settings.contrastive)
    name = registered_name(arm)
    _plots(home, study, objective, len(complete))
    scores = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
    log.info("best of %d trials: %s (trial %d: %s)", len(finished(study)), scores, best.number, said(best.params))
    if len(front) > 1:
        log.info("Pareto front: trials %s", ", ".join(str(trial.number) for trial in front))
    log.info("tuned: profile=runs:/%s/%s", home.id, PROFILE)
    if not exists(best.user_attrs[RUN]):  # the storage has outlived the tracking server
        log.warning("run %s of the best trial is gone, and its model with it", best.user_attrs[RUN])
        return point
    try:
        register(best.user_attrs[RUN], name, ALIAS)
        log.info("its model: models:/%s@%s", name, ALIAS)
    except RampartError as error:  # the name is whoever's who took it first
        log.warning("the point stands, but its model has no name in the Model Registry: %s", error)
    return point


def tuned_texts(run_id: str) -> dict[str, str]:
    """The best trial's point, as a user would give it, when that run of `tune` ended.

    Raises:
        RampartError: none of its trials was finished.
    """
    tags = run_tags(run_id)
    found = {name.removeprefix(FOUND): text for name, text in tags.items() if name.startswith(FOUND)}
    if not found:
        raise RampartError(f"tuning {tags['tuning']} has no finished trial: see the runs nested in it")
    return found


def tuned_profile(settings: TuneSettings, given: Mapping[str, str], trial: FrozenTrial) -> dict[str, Any]:
    """The profile, with a rule more for the arm: what the user gave for the training, and the trial's point."""
    profile = dict(load_profile(settings.profile))
    common = profile["common"] | profile["train"]
    training = resolve("train", given)
    assert isinstance(training, TrainSettings)
    here, there = training.eps_space, common.get("eps_space", "pixel")

    def spoken(name: str, value: Any) -> Any:
        """ε on the profile's scale."""
        if name not in EPS_NAMES or here == there:
            return value
        return parse_eps(name, value, here) / PIXELS[there]

    arm = {"method": settings.method, "augment": settings.augment, "contrastive": settings.contrastive}
    own = {name: text for name, text in given.items() if name not in (*arm, *_ELSEWHERE)}
    tuned = {name: spoken(name, value) for name, value in {**own, **trial.params}.items()}
    rule = {"when": arm, "set": tuned}
    data = {name: text for name, text in given.items() if name in DATA}
    profile["common"] = profile["common"] | data
    profile["train"] = {name: value for name, value in profile["train"].items() if name not in data}
    # A rule would go above the common section.
    rules = [
        {**known, "set": {name: value for name, value in known["set"].items() if name not in data}}
        for known in profile["arms"]
    ]
    written = {section: profile[section] for section in SECTIONS if profile[section]}
    about = f"{profile['about']} Tuned: trial {trial.number} of run {trial.user_attrs[RUN]}.".strip()
    return written | {"about": about, "arms": [*rules, rule]}


# Of all arms, not of this one; and of the run, not of the training.
DATA = ("dataset", "val_fraction", "split_seed")
_ELSEWHERE = (*DATA, *MACHINE, "profile", "seed", "eps_space")


def _table(home: Run, study: Study) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        frame = study.trials_dataframe()
    frame["duration"] = frame["duration"].dt.total_seconds()
    home.csv(frame, "trials.csv")


def _plots(home: Run, study: Study, objective: tuple[str, ...], complete: int) -> None:
    """Optuna's plots, as HTML (plotly) and PNG (matplotlib); those that need more trials are left out."""
    import matplotlib  # which a study's workers, who import this, can do without

    matplotlib.use("Agg")  # whatever a notebook has set for the processes that it starts
    from matplotlib import pyplot

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # experimental
        for name, function, options in _chosen(objective, complete):
            page = getattr(optuna.visualization, function)(study, **options)
            home.text(page.to_html(include_plotlyjs=True), f"plots/{name}.html")
            drawn = getattr(optuna.visualization.matplotlib, function)(study, **options)
            axes = drawn.ravel()[0] if hasattr(drawn, "ravel") else drawn
            axes.figure.set_size_inches(9, 5)
            home.figure(axes.figure, f"plots/{name}.png")
            pyplot.close(axes.figure)


def _chosen(objective: tuple[str, ...], complete: int) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(file, Optuna's function, its options)."""
    several = len(objective) > 1
    for i, name in enumerate(objective):
        options: dict[str, Any] = {"target_name": name}
        if several:
            options["target"] = partial(_value, place=i)
        suffix = f"-{name}" if several else ""
        yield f"history{suffix}", "plot_optimization_history", options
        yield f"slice{suffix}", "plot_slice", options
        yield f"parallel_coordinates{suffix}", "plot_parallel_coordinate", options
        if complete > 1:
            yield f"importance{suffix}", "plot_param_importances", options
    if several:
        yield "pareto_front", "plot_pareto_front", {"target_names": list(objective)}
    else:
        yield "intermediate_values", "plot_intermediate_values", {}


def _value(trial: FrozenTrial, place: int) -> float:
    return trial.values[place]
