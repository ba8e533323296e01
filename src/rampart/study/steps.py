"""The entry points: each runs one step of the core inside one MLflow run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from rampart.settings import Common, as_text, resolve
from rampart.study.opening import prepare
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
        _body(step)(run, settings, given)
        log.info("%s: done; open run %s (experiment %s) in the MLflow UI: make ui", step, run.id, run.experiment)
    return run.id


def _body(step: str) -> Callable[[Run, Any, Mapping[str, str]], None]:
    """The step's own code; that of the others is not imported, since figures and statistics take seconds."""
    match step:
        case "train":
            from rampart.study.training import run_training

            return run_training
        case "evaluate":
            from rampart.study.evaluating import run_evaluation

            return run_evaluation
        case "verify":
            from rampart.study.verifying import run_verification

            return run_verification
        case "embed":
            from rampart.study.embedding import run_embedding

            return run_embedding
        case "compare":
            from rampart.reports.compare import run_comparison

            return run_comparison
        case "tune":
            from rampart.tuning.driver import run_tuning

            return run_tuning
    from rampart.study.executor import run_study

    return run_study
