"""What a study consists of: its tasks, what each needs before it, and how one is done."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rampart.arms import Arm
from rampart.errors import RampartError
from rampart.settings import Common, nested, resolve
from rampart.study.identity import code_versions, identity, what
from rampart.study.opening import data_of
from rampart.study.steps import run_step
from rampart.tracking.claims import bury, claimed
from rampart.tracking.queries import find_runs
from rampart.tracking.store import connect, location, this_process
from rampart.tuning import tuned_texts, tuning_identity


class Task(NamedTuple):
    """A step of an arm, or (`part`, as 2/8) of what it does."""

    arm: Arm
    seed: int
    step: str
    part: str = ""


class Done(NamedTuple):
    """What has become of a task.

    Args:
        run: that did it, in this study or (`reused`) before.
        texts: of the settings that a tuning has found.
    """

    run: str = ""
    reused: bool = False
    texts: Mapping[str, str] = {}


def graph(jobs: Sequence[tuple[Arm, int]], tuned: bool, first_seed: int, parts: int) -> dict[Task, set[Task]]:
    """The tasks of a study, each with those that must be done before it.

    Args:
        parts: in which a verification is split.
    """
    needs: dict[Task, set[Task]] = {}
    for arm, seed in jobs:
        train = Task(arm, seed, "train")
        tunings = {Task(arm, first_seed, "tune")} if tuned else set()
        needs |= {task: set() for task in tunings}
        needs[train] = tunings
        split = {Task(arm, seed, "verify", f"{i + 1}/{parts}") for i in range(parts)} if parts > 1 else set()
        needs |= {task: {train} for task in split}
        needs |= {Task(arm, seed, step): {train} for step in ("evaluate", "embed")}
        needs[Task(arm, seed, "verify")] = {train, *split}
    return needs


@dataclass(frozen=True)
class Shared:
    """What all tasks of a study share; travels to the workers.

    Args:
        given: what the user gave, as texts.
        study: its run.
        keep: whether finished steps whose code has changed since are taken as they are.
        process: the study's own.
        store, folder: the tracking store, and where relative paths begin, there.
        code: that it runs.
    """

    given: Mapping[str, str]
    profile: str
    threads: int
    study: str
    experiment: str
    keep: bool
    process: str
    store: str
    folder: str
    code: Mapping[str, str]

    @classmethod
    def here(
        cls, given: Mapping[str, str], profile: str, threads: int, study: str, experiment: str, keep: bool
    ) -> Shared:
        """Of a study of this process."""
        where = this_process(), location(), os.getcwd()
        return cls(dict(given), profile, threads, study, experiment, keep, *where, code_versions())

    def settle(self) -> None:
        """Makes this process, maybe on another machine, a place where the study's tasks can be done.

        Raises:
            RampartError: it runs other code, or cannot reach the store.
        """
        if self.process == this_process():
            return
        host, here = self.process.partition("@")[2], socket.gethostname()
        if code_versions() != self.code:
            where = "changed while the study ran" if host == here else "is another one there"
            raise RampartError(f"Rampart's code {where} ({here}): start the study again with one code")
        if host != here and not self.store.startswith(("http", "postgresql", "mysql", "mssql")):
            raise RampartError(
                f"the tracking store {self.store} is a file of {host}, which {here} cannot write: "
                "give MLFLOW_TRACKING_URI=http://…, a tracking server"
            )
        if Path(self.folder).is_dir():
            os.chdir(self.folder)
        connect(self.store)
        os.environ["MLFLOW_EXPERIMENT_ID"] = self.experiment

    def do(self, task: Task, before: Mapping[str, Done]) -> Done:
        """Does a task in this process, `before` being what the steps that it needs have left.

        What was done with the same settings, data, model and code is not done again, and what another study does at
        this moment is waited for.
        """
        self.settle()
        if task.step == "tune":  # several may tune: they share the trials
            done = self.find(self.identity(task))
            run = done or run_step("tune", self.texts(task), self.study)
            return Done(run, done is not None, tuned_texts(run))
        model = f"runs:/{before['train'].run}/model" if "train" in before else ""
        more = before["tune"].texts if "tune" in before else {}
        key = self.identity(task, model, more)
        known = self.find(key)
        if known:
            return Done(known, reused=True)
        with claimed(self.study, self.experiment, key, f"{task.step} {task.arm.name} s{task.seed}"):
            known = self.find(key)
            if known:
                return Done(known, reused=True)
            bury(self.experiment, key)
            return Done(run_step(task.step, self.texts(task, model, more), self.study, key))

    def find(self, key: str) -> str | None:
        """The newest finished run of that identity, of whatever code if that is kept."""
        wanted = f"{what(key)}%" if self.keep else key  # older tunings say nothing of their code
        found = find_runs(self.experiment, {"identity": wanted}, max_results=1)
        return str(found["run_id"].iloc[0]) if len(found) else None

    def identity(self, task: Task, model: str = "", more: Mapping[str, str] | None = None) -> str:
        """A task's identity, given the model that goes in."""
        if task.step == "tune":
            return tuning_identity(self.texts(task))
        settings = resolve(task.step, self.texts(task, model, more))
        assert isinstance(settings, Common)
        return identity(task.step, settings, data_of(settings).digest, model)

    def texts(self, task: Task, model: str = "", more: Mapping[str, str] | None = None) -> dict[str, str]:
        """What the user would give to do the task alone."""
        texts = {"threads": str(self.threads), "profile": self.profile, "seed": str(task.seed)}
        texts |= nested(self.given, task.step)
        if task.step == "tune":
            texts = nested(self.given, "train") | texts
        if task.step in ("train", "tune"):
            texts |= task.arm.texts
        else:
            texts |= {"model": model} | ({"part": task.part} if task.part else {})
        return {**texts, **(more or {})}
