"""The steps of a study that are done, and how long the others will take."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from rampart.arms import Arm
from rampart.settings import ARM_STEPS
from rampart.study.graph import Shared, Task
from rampart.study.identity import what
from rampart.tracking.queries import find_runs, seconds_at_work

DONE, OUTDATED, STALE, MISSING = "done", "outdated", "stale", "to do"


def plan(shared: Shared, jobs: Sequence[tuple[Arm, int]], tuned: bool = False) -> pd.DataFrame:
    """A row a step: arm, seed, step; state: `done`, `outdated` (done, but its code has changed since), `stale` (done
    with other settings or data) or `to do`; seconds that it will take, as long as it took before, for this arm or for
    one of its method; NaN where that is not known, 0 where it is done."""
    earlier = {step: _earlier(shared.experiment, step) for step in ARM_STEPS}
    rows = []
    for arm, seed in jobs:
        # The identities of what comes after a training that is missing are not known before it is done.
        model: str | None = ""
        for step in ARM_STEPS:
            before = earlier[step]
            unknown = model is None or (step == "train" and tuned)
            key = "" if unknown else shared.identity(Task(arm, seed, step), model or "")
            own = before[before["arm"] == arm.name]
            alike = before[before["identity"].map(what) == what(key)] if key else before[:0]
            done = alike if shared.keep else alike[alike["identity"] == key]
            state = (
                DONE
                if len(done)
                else OUTDATED
                if len(alike)
                else STALE
                if (own["seed"] == str(seed)).any()
                else MISSING
            )
            timed = own if len(own) else before[before["method"] == arm.method]
            seconds = 0.0 if len(done) else timed["seconds"].median()
            rows.append({"arm": arm.name, "seed": seed, "step": step, "state": state, "seconds": seconds})
            if step == "train":
                model = f"runs:/{done['run_id'].iloc[0]}/model" if len(done) else None
    return pd.DataFrame(rows)


def _earlier(experiment: str, step: str) -> pd.DataFrame:
    """The finished runs of a step: run_id, identity, arm, method, seed, seconds."""
    found = find_runs(experiment, {"step": step})
    tags = {name: found.get(f"tags.rampart.{name}", pd.Series("", found.index)).fillna("") for name in _TAGS}
    return pd.DataFrame({"run_id": found["run_id"], **tags, "seconds": seconds_at_work(found)})


_TAGS = ("identity", "arm", "method", "seed")


def said(steps: pd.DataFrame, workers: int) -> str:
    """The plan in one sentence."""
    left = steps[steps["state"] != DONE]
    if left.empty:
        return f"all {len(steps)} steps are done"
    known = left["seconds"].dropna()
    minutes = f"about {known.sum() / workers / 60:.0f} min" if len(known) else "nobody knows how long"
    others = f", {len(left) - len(known)} of them not timed so far" if 0 < len(known) < len(left) else ""
    stale = int(left["state"].isin([STALE, OUTDATED]).sum())
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
