"""The entry points: each runs one step of the core inside one MLflow run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from rampart.reports.compare import compare
from rampart.settings import Common, CompareSettings, Settings, StudySettings, TuneSettings, as_text, resolve
from rampart.study.embedding import run_embedding
from rampart.study.evaluating import run_evaluation
from rampart.study.opening import prepare
from rampart.study.training import run_training
from rampart.study.verifying import run_verification
from rampart.tracking import Run, open_run

log = logging.getLogger(__name__)


def run_step(step: str, given: Mapping[str, str], study: str | None = None, task: str | None = None) -> str:
    """Runs `step` with the settings that the user gave as texts, as a run of its own under `study`'s, of which it is
    `task`; returns its id.

    Raises:
        RampartError: bad input; the run is FAILED then.
    """
    with open_run(step, study, task) as run:
        settings = resolve(step, given)
        run.params(as_text(settings, given))
        run.tags({"profile": settings.profile})
        if isinstance(settings, Common):
            prepare(settings)
        BODIES[step](run, settings, given)
        log.info("%s: done; open run %s (experiment %s) in the MLflow UI: make ui", step, run.id, run.experiment)
    return run.id


def _compare(run: Run, settings: Settings, given: Mapping[str, str]) -> None:
    assert isinstance(settings, CompareSettings)
    run.name(f"compare {settings.profile}")
    compare(run, settings)


def _tune(run: Run, settings: Settings, given: Mapping[str, str]) -> None:
    assert isinstance(settings, TuneSettings)
    from rampart.tuning import tune

    tune(run, settings, given)


def _main(run: Run, settings: Settings, given: Mapping[str, str]) -> None:
    assert isinstance(settings, StudySettings)
    from rampart.study.executor import run_study

    run_study(run, settings, given)


BODIES: dict[str, Callable[[Run, Any, Mapping[str, str]], None]] = {
    "train": run_training,
    "evaluate": run_evaluation,
    "verify": run_verification,
    "embed": run_embedding,
    "compare": _compare,
    "tune": _tune,
    "main": _main,
}
