"""The steps of a study that are done, and how long the others will take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from rampart.arms import Arm
from rampart.settings import ARM_STEPS
from rampart.study.graph import Shared, Task
from rampart.study.identity import what
from rampart.tracking.queries import find_runs, seconds_at_work
from rampart.tuning import tuned_texts

DONE, OUTDATED, STALE, MISSING = "done", "outdated", "stale", "to do"


def plan(shared: Shared, jobs: Sequence[tuple[Arm, int]], tuned: bool = False) -> pd.DataFrame:
    """A row a step: arm, seed, step; state: `done`, `outdated` (done, but its code has changed since), `stale` (done
    with other settings or data) or `to do`; seconds that it will take, as long as it took before, for this arm or for
    one of its method; NaN where that is not known, 0 where it is done.

    Args:
        tuned: whether each arm is tuned, with its first seed, before it is trained.
    """
    earlier = {step: _earlier(shared.experiment, step) for step in (("tune", *ARM_STEPS) if tuned else ARM_STEPS)}
    rows = []

    def add(task: Task, key: str) -> str | None:
        """The run that has done it; what has no key is not done."""
        before = earlier[task.step]
        alike = before[before["identity"].map(what) == what(key)] if key else before[:0]
        known = alike if shared.keep else alike[alike["identity"] == key]
        own = before[before["arm"] == task.arm.name]
        old = (own["seed"] == str(task.seed)).any()
        state = DONE if len(known) else OUTDATED if len(alike) else STALE if old else MISSING
        timed = own if len(own) else before[before["method"] == task.arm.method]
        seconds = 0.0 if len(known) else timed["seconds"].median()
        rows.append({"arm": task.arm.name, "seed": task.seed, "step": task.step, "state": state, "seconds": seconds})
        return str(known["run_id"].iloc[0]) if len(known) else None

    found: dict[Arm, Mapping[str, str] | None] = {}
    for arm, seed in jobs:
        if tuned and arm not in found:
            task = Task(arm, seed, "tune")
            run = add(task, shared.identity(task))
            found[arm] = tuned_texts(run) if run else None
        # The identities of what comes after something that is missing are not known before that is done.
        texts = found[arm] if tuned else {}
        model: str | None = None if texts is None else ""
        for step in ARM_STEPS:
            task = Task(arm, seed, step)
            run = add(task, "" if model is None else shared.identity(task, model, texts if step == "train" else None))
            if step == "train":
                model = f"runs:/{run}/model" if run else None
    return pd.DataFrame(rows)


def _earlier(experiment: str, step: str) -> pd.DataFrame:
    """The finished runs of a step: run_id, identity, arm, method, seed, seconds."""
    found = find_runs(experiment, {"step": step})
    tags = {name: found.get(f"tags.rampart.{name}", pd.Series("", found.index)).fillna("") for name in _TAGS}
    return pd.DataFrame({"run_id": found["run_id"], **tags, "seconds": seconds_at_work(found)})


_TAGS = ("identity", "arm", "method", "seed")


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def said(steps: pd.DataFrame, workers: int) -> str:
    """The plan in one sentence."""
    left = steps[steps["state"] != DONE]
    if left.empty:
        return f"all {len(steps)} steps are done"
    known = left["seconds"].dropna()
    some = 0 < len(known) < len(left)
    about = "at least" if some else "about"
    minutes = f"{about} {known.sum() / workers / 60:.0f} min" if len(known) else "nobody knows how long"
    others = f", {len(left) - len(known)} of them not timed so far" if some else ""
    counts = left["state"].value_counts()
    again = ", ".join(f"{counts[state]} of them {state}" for state in (STALE, OUTDATED) if state in counts)
    count = f"{len(left)} of {len(steps)} steps to do{f' ({again})' if again else ''}"
    return f"{count}: {minutes} with {counted(workers, 'worker')}{others}"


def table(steps: pd.DataFrame) -> pd.DataFrame:
    """The plan with a row an arm and seed, and a column a step."""
    cells = steps.assign(
        text=[
            state if state == DONE or pd.isna(seconds) else f"{state}, {seconds:.0f} s"
            for state, seconds in zip(steps["state"], steps["seconds"], strict=True)
        ]
    )
    wide = cells.pivot(index=["arm", "seed"], columns="step", values="text")
    # An arm is tuned with its first seed.
    return wide[[step for step in ("tune", *ARM_STEPS) if step in wide]].fillna("").reset_index()
