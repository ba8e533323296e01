"""What a study would do."""

from __future__ import annotations

from pathlib import Path

import pytest

from rampart.arms import Arm, grid
from rampart.study import run_step
from rampart.study.graph import Shared
from rampart.study.plan import DONE, MISSING, STALE, plan, said, table
from rampart.tracking.queries import find_runs
from tests.conftest import TINY_STUDY, Study

JOBS = [(arm, 0) for arm in grid(("normal", "certified"), (False,), ("none", "double"))]


def shared(keep: bool = False, **given: str) -> Shared:
    return Shared.here({**TINY_STUDY, **given}, "quick", 1, "", "0", keep)


def test_all_of_a_finished_study_is_done(study: Study) -> None:
    steps = plan(shared(), JOBS)
    assert len(steps) == 16
    assert set(steps["state"]) == {DONE}
    assert said(steps, 2) == "all 16 steps are done"


def test_another_setting_makes_what_depends_on_it_stale(study: Study) -> None:
    evaluated = plan(shared(**{"evaluate.steps": "3"}), JOBS)
    assert evaluated.groupby("step")["state"].agg(set).to_dict() == {
        "train": {DONE}, "evaluate": {STALE}, "verify": {DONE}, "embed": {DONE}
    }  # fmt: skip
    # What looks at a model that is to be trained anew cannot be done.
    trained = plan(shared(lr="0.002"), JOBS)
    assert set(trained["state"]) == {STALE}
    assert "16 of 16 steps to do (16 of them stale): about" in said(trained, 2)


def test_missing_arms_take_as_long_as_their_like_if_there_is_one(study: Study) -> None:
    steps = plan(shared(), [(Arm("normal", True, "none"), 0), (Arm("adversarial", False, "none"), 0)])
    assert set(steps["state"]) == {MISSING}
    assert steps[steps["arm"] == "normal+aug"]["seconds"].gt(0).all()
    assert steps[steps["arm"] == "adversarial"]["seconds"].isna().all()
    assert "4 of them not timed so far" in said(steps, 1)
    shown = table(steps)
    assert list(shown.columns) == ["arm", "seed", "train", "evaluate", "verify", "embed"]
    assert shown.set_index("arm").loc["adversarial", "train"] == "to do"


def test_a_dry_run_does_nothing(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_step("main", {"methods": "normal", "dry_run": "True"})
    assert capsys.readouterr().out.count("| to do") == 16
    runs = find_runs("0", {}, status=None)
    assert list(runs["tags.rampart.step"]) == ["main"]
    assert list(runs["status"]) == ["FINISHED"]
