"""What a study would do."""

from __future__ import annotations

import logging
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from mlflow import MlflowClient

from rampart.__main__ import main
from rampart.arms import Arm, grid
from rampart.errors import RampartError
from rampart.settings import ARM_STEPS
from rampart.study import run_step
from rampart.study.graph import Shared, Task
from rampart.study.identity import what
from rampart.study.plan import DONE, MISSING, OUTDATED, STALE, plan, said, table
from rampart.tracking import open_run
from rampart.tracking.queries import find_runs
from tests.conftest import TINY_STUDY, Study, as_words

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
    assert "at least" in said(steps, 1)
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


def test_code_that_has_changed_since_is_asked_about(
    study: Study,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    shutil.copy(study.folder / "mlflow.db", tmp_path / "copy.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/copy.db")
    client = MlflowClient()
    done = pd.concat([find_runs("0", {"step": step}) for step in ARM_STEPS])
    for run, key in zip(done["run_id"], done["tags.rampart.identity"], strict=True):
        client.set_tag(run, "rampart.identity", f"{what(key)}.of other code")
    assert set(plan(shared(keep=True), JOBS)["state"]) == {DONE}
    # What looks at a model waits for what becomes of its training.
    assert plan(shared(), JOBS).groupby("step")["state"].agg(set).to_dict() == {
        "train": {OUTDATED}, "evaluate": {STALE}, "verify": {STALE}, "embed": {STALE}
    }  # fmt: skip
    command = ["main", *as_words(TINY_STUDY)]
    assert main(command) == 2
    refused = capfd.readouterr().err
    assert "code has changed since 4 of this study's steps were done (train of normal, …)" in refused
    assert "force=redo" in refused
    with caplog.at_level(logging.INFO):
        assert main([*command, "--force", "keep"]) == 0
    assert caplog.text.count("was there already") == 4
    assert len(find_runs("0", {"step": "train"})) == 4


def test_an_arm_that_was_tuned_is_not_tuned_again(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its trials are two of one epoch; what follows is known from what they have found."""
    given = {"width": "0.125", "epochs": "1", "threads": "1", "tune.trials": "2"}
    arm = Arm("normal", False, "none")

    def planned(study: Shared) -> pd.Series:
        return plan(study, [(arm, 0), (arm, 1)], tuned=True).set_index(["seed", "step"])["state"]

    with open_run("main") as home:
        mine = Shared.here(given, "quick", 1, home.id, "0", False)
        assert set(planned(mine)) == {MISSING}
        tuned = mine.do(Task(arm, 0, "tune"), {})
        mine.do(Task(arm, 0, "train"), {"tune": tuned})
    states = planned(mine)
    assert states.loc[0, "tune"] == states.loc[0, "train"] == DONE
    assert set(states.drop([(0, "tune"), (0, "train")])) == {MISSING}
    assert mine.do(Task(arm, 0, "tune"), {}) == tuned._replace(reused=True)
    # Other trials may find something else: the training waits for them.
    other = planned(replace(mine, given={**given, "tune.trials": "3"}))
    assert other.loc[0, "tune"] == other.loc[0, "train"] == STALE
    # What was tuned with other code is not taken unasked; older versions did not say which code it was.
    key, kept = mine.identity(Task(arm, 0, "tune")), replace(mine, keep=True)
    for old in (f"{what(key)}.of other code", what(key)):
        MlflowClient().set_tag(tuned.run, "rampart.identity", old)
        states = planned(mine)
        assert (states.loc[0, "tune"], states.loc[0, "train"]) == (OUTDATED, STALE)
        assert mine.find(key) is None
        assert set(planned(kept).loc[0, ["tune", "train"]]) == {DONE}
        assert kept.do(Task(arm, 0, "tune"), {}) == tuned._replace(reused=True)
    run_step("main", {**given, "methods": "normal", "augment": "False", "tuned": "true", "dry_run": "true"})
    assert "| tune " in capsys.readouterr().out


def test_a_worker_with_other_code_or_without_the_store_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = shared()
    mine.settle()  # the study's own process is where it is
    changed = replace(mine, process="1:0@" + socket.gethostname(), code={**mine.code, "train": "another"})
    with pytest.raises(RampartError, match="code changed while the study ran"):
        changed.settle()
    with pytest.raises(RampartError, match="code is another one there"):
        replace(changed, process="1:0@elsewhere").settle()
    with pytest.raises(RampartError, match=r"is a file of elsewhere, .* give MLFLOW_TRACKING_URI=http"):
        replace(mine, process="1:0@elsewhere").settle()
