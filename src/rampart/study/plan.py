"""What a study consists of: the steps of its arms, those that are done, and how long the others will take."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

import pandas as pd

from rampart.arms import Arm
from rampart.settings import ARM_STEPS, Common, nested, resolve
from rampart.study.identity import identity
from rampart.study.opening import data_of
from rampart.study.steps import run_step
from rampart.tracking.queries import find_runs
from rampart.tuning import tuned_texts


class Member(TypedDict):
    """A step of a study and the run that did it, in this study or (`reused`) before."""

    arm: str
    seed: int
    step: str
    run: str
    reused: bool


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
            tuned = self.tune(arm) if step == "train" and self.tuned else {}
            texts, key = self.step(step, arm, seed, model, tuned)
            known = find_runs(self.experiment, {"identity": key}, max_results=1)
            run_id = str(known["run_id"][0]) if len(known) else run_step(step, texts, self.study)
            members.append({"arm": arm.name, "seed": seed, "step": step, "run": run_id, "reused": bool(len(known))})
            if step == "train":
                trained = [run_id]
        return members

    def step(
        self, step: str, arm: Arm, seed: int, model: str, more: Mapping[str, str] | None = None
    ) -> tuple[dict[str, str], str]:
        """(texts of its settings, its identity)"""
        texts = {"threads": str(self.threads), **arm_texts(self.given, step, arm, seed, self.profile, model)}
        texts |= more or {}
        settings = resolve(step, texts)
        assert isinstance(settings, Common)
        return texts, identity(step, settings, data_of(settings).digest, model)

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


DONE, STALE, MISSING = "done", "stale", "to do"


def plan(arms: Arms, jobs: Sequence[tuple[Arm, int]]) -> pd.DataFrame:
    """A row a step: arm, seed, step; state: `done`, `stale` (done with other settings, data or code) or `to do`;
    seconds that it will take, as long as it took before, for this arm or for one of its method; NaN where that is not
    known, 0 where it is done."""
    earlier = {step: _earlier(arms.experiment, step) for step in ARM_STEPS}
    rows = []
    for arm, seed in jobs:
        # The identities of what comes after a training that is missing are not known before it is done.
        model: str | None = ""
        for step in ARM_STEPS:
            before = earlier[step]
            tuned = step == "train" and arms.tuned
            key = "" if model is None or tuned else arms.step(step, arm, seed, model)[1]
            done = before[before["identity"] == key]
            own = before[before["arm"] == arm.name]
            state = DONE if len(done) else STALE if (own["seed"] == str(seed)).any() else MISSING
            alike = own if len(own) else before[before["method"] == arm.method]
            seconds = 0.0 if len(done) else alike["seconds"].median()
            rows.append({"arm": arm.name, "seed": seed, "step": step, "state": state, "seconds": seconds})
            if step == "train":
                model = f"runs:/{done['run_id'].iloc[0]}/model" if len(done) else None
    return pd.DataFrame(rows)


def _earlier(experiment: str, step: str) -> pd.DataFrame:
    """The finished runs of a step: run_id, identity, arm, method, seed, seconds."""
    found = find_runs(experiment, {"step": step})
    tags = {name: found.get(f"tags.rampart.{name}", pd.Series("", found.index)) for name in _TAGS}
    start, end = (pd.to_datetime(found[name]) for name in ("start_time", "end_time"))
    return pd.DataFrame({"run_id": found["run_id"], **tags, "seconds": (end - start).dt.total_seconds()})


_TAGS = ("identity", "arm", "method", "seed")


def said(steps: pd.DataFrame, workers: int) -> str:
    """The plan in one sentence."""
    left = steps[steps["state"] != DONE]
    if left.empty:
        return f"all {len(steps)} steps are done"
    known = left["seconds"].dropna()
    minutes = f"about {known.sum() / workers / 60:.0f} min" if len(known) else "nobody knows how long"
    others = f", {len(left) - len(known)} of them not timed so far" if 0 < len(known) < len(left) else ""
    stale = int((left["state"] == STALE).sum())
    return f"{len(left)} of {len(steps)} steps to do ({stale} of them stale): {minutes} with {workers} workers{others}"


def table(steps: pd.DataFrame) -> pd.DataFrame:
    """The plan with a row an arm and seed, and a column a step."""
    cells = steps.assign(
        text=[
            state if state == DONE or pd.isna(seconds) else f"{state}, {seconds:.0f} s"
            for state, seconds in zip(steps["state"], steps["seconds"], strict=True)
        ]
    )
    wide = cells.pivot(index=["arm", "seed"], columns="step", values="text")
    return wide.reindex(columns=list(ARM_STEPS)).reset_index()
