"""Typed settings of every entry point."""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_type_hints

from pydantic import TypeAdapter

from rampart.data import Augmentation
from rampart.errors import require
from rampart.evaluation import AttackPlan, CertificationPlan, CorruptionPlan, EmbeddingPlan, TrustPlan
from rampart.settings.scale import EpsSpace
from rampart.training.recipe import Contrastive, MethodName, Recipe
from rampart.verification import VerificationPlan

DEFAULT_PROFILE = "quick"
# Those that all random generators take.
SEEDS = 2**31
# No more than these, or the machine's cores: thousands bring a machine to a stop.
FEW_THREADS = 64
MOST_SEEDS = 1000


def _require_seeds(settings: object, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        require(0 <= value < SEEDS, f"{name} must lie between 0 and 2^31 - 1, not {value}")


@dataclass(frozen=True, kw_only=True)
class Common:
    """What every entry point knows.

    Args:
        profile: `quick`, `paper`, `best`, or a YAML file of the same form: its path, or runs:/<run id>/profile.yaml.
        dataset: `digits`, `cifar10` or `folder:PATH`.
        data_root: where `cifar10` lies or is put.
        val_fraction: share of the training images kept for validation.
        split_seed: of that split.
        seed: of everything random in the step.
        device: `auto` (a GPU where there is one), `cpu`, `cuda`, `cuda:1`…
        threads: CPU threads; 0 leaves the choice to PyTorch (in a study: the cores shared among its workers).
        eps_space: scale on which ε is given: `pixel` ([0, 1]) or `normalized` (the study's [-1, 1]: half in pixels).
    """

    profile: str = DEFAULT_PROFILE
    dataset: str = "digits"
    data_root: str = "data"
    val_fraction: float = 0.2
    split_seed: int = 42
    seed: int = 0
    device: str = "auto"
    threads: int = 0
    eps_space: EpsSpace = "pixel"

    def __post_init__(self) -> None:
        require(0 < self.val_fraction < 1, f"val_fraction must lie between 0 and 1, not {self.val_fraction}")
        _require_seeds(self, "seed", "split_seed")
        most = max(FEW_THREADS, os.cpu_count() or 1)
        require(0 <= self.threads <= most, f"threads must lie between 0 and {most} on this machine, not {self.threads}")
        require(
            re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device) is not None,
            f"device must be auto, cpu, cuda or cuda:N, not '{self.device}'",
        )


@dataclass(frozen=True, kw_only=True)
class TrainSettings(Common, Augmentation, Recipe):
    """Common settings, a Recipe, and the Augmentation that it uses."""

    def __post_init__(self) -> None:
        for part in (Common, Augmentation, Recipe):
            part.__post_init__(self)

    def idle(self) -> set[str]:
        unused = () if self.augment else dataclasses.fields(Augmentation)
        return super().idle() | {field.name for field in unused}


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Common):
    """Of entry points that need a model.

    Args:
        model: `runs:/<run id>/model`, `models:/<name>/<version>`, a .safetensors or .npz file, or `rampart:<arm>`, one
            that came with the checkout (results/models).
    """

    model: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.model), "model is missing: give model=runs:/<run id>/model, models:/… or a file")


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(ModelSettings, TrustPlan, CorruptionPlan, CertificationPlan, AttackPlan):
    """Settings of `evaluate`."""

    def __post_init__(self) -> None:
        for part in (ModelSettings, AttackPlan, CertificationPlan, CorruptionPlan, TrustPlan):
            part.__post_init__(self)
        require(
            self.norm == "linf" or self.certify == "none",
            "bounds and branch and bound prove L∞ balls: take norm=linf, or certify=none",
        )


@dataclass(frozen=True, kw_only=True)
class VerifySettings(ModelSettings, VerificationPlan):
    """Settings of `verify`.

    Args:
        part: `2/8` verifies every eighth of the images alone, from the second on; without a part those that parts have
            finished are gathered, and the others verified.
    """

    part: str = ""

    def __post_init__(self) -> None:
        ModelSettings.__post_init__(self)
        VerificationPlan.__post_init__(self)
        _require_seeds(self, "selection_seed")
        number, _, count = self.part.partition("/")
        fits = number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)
        require(not self.part or fits, f"part must be like 2/8 (the second of eight), not '{self.part}'")


@dataclass(frozen=True, kw_only=True)
class EmbedSettings(ModelSettings, EmbeddingPlan):
    """Settings of `embed`."""

    def __post_init__(self) -> None:
        ModelSettings.__post_init__(self)
        EmbeddingPlan.__post_init__(self)


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """What is compared.

    Args:
        profile: only runs of this profile.
        study: only the runs of this study (its run id); empty: the newest finished run of every arm and seed.
        evidence: folders that `export` has filled, from other stores perhaps, whose runs are compared, too.
        baseline: JSON file with published figures that are shown beside ours.
        export: folder that gets the evidence as CSV and Parquet files, from which the tables can be computed again, and
            the main figures.
    """

    profile: str = DEFAULT_PROFILE
    study: str = ""
    evidence: tuple[str, ...] = ()
    baseline: str = ""
    export: str = ""


@dataclass(frozen=True, kw_only=True)
class StudySettings(Common):
    """Which arms are run. `step.name=value` (train.lr=0.01) sets one step's setting, a bare name every step's.

    Args:
        methods: of the arms.
        augment: of the arms.
        contrastive: of the arms.
        seeds: how many seeds an arm: `seed`, `seed` + 1, …
        tuned: whether each arm is tuned first (tune.name=value sets how) and trained with what turned out best.
        dry_run: whether it is only said which steps are done, stale and to do, and how long they took before.
        force: what becomes of finished steps whose code has changed since: `redo` them, or `keep` them; empty: that is
            asked.
        executor: `local` (processes on this machine) or `ray` (a cluster).
        address: of the Ray cluster: `auto` (the one that this machine belongs to), HOST:PORT or ray://HOST:PORT; empty:
            one of its own on this machine.
        workers: steps in work at once; 0: as many as the GPUs take or, without, the cores.
        gpus: GPUs a step, or the share of one; 0: one where there are any.
        ram: GiB that a step is expected to need (executor=ray); 0: not said.
    """

    methods: tuple[MethodName, ...] = ("normal", "adversarial", "certified")
    augment: tuple[bool, ...] = (False, True)
    contrastive: tuple[Contrastive, ...] = ("none", "double")
    seeds: int = 1
    tuned: bool = False
    dry_run: bool = False
    force: Literal["", "redo", "keep"] = ""
    executor: Literal["local", "ray"] = "local"
    address: str = ""
    workers: int = 0
    gpus: float = 0.0
    ram: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("methods", "augment", "contrastive"):
            values = getattr(self, name)
            require(len(values) > 0 and len(set(values)) == len(values), f"{name} needs distinct values, not {values}")
        require(1 <= self.seeds <= MOST_SEEDS, f"seeds must lie between 1 and {MOST_SEEDS}, not {self.seeds}")
        for name in ("workers", "gpus", "ram"):
            require(getattr(self, name) >= 0, f"{name} must be 0 or more, not {getattr(self, name):g}")
        require(not self.address or self.executor == "ray", "address is that of a Ray cluster: give executor=ray, too")


Objective = Literal["own", "val_accuracy", "val_robust_accuracy", "val_certified_accuracy"]


@dataclass(frozen=True, kw_only=True)
class TuneSettings(Common):
    """What is searched. Every setting of `train` can be given, too, and holds for all trials.

    Args:
        method: of the arm.
        augment: of the arm.
        contrastive: of the arm.
        trials: how many finished or pruned trials the Optuna study shall have in all; started again it goes on.
        objective: what is maximised on the validation images: `val_accuracy`, `val_robust_accuracy` (PGD, 10 steps),
            `val_certified_accuracy` (CROWN-IBP), or `own`, that of the three which the method chooses its epochs by.
            Several: their Pareto front.
        objective_eps: radius in pixels of robust and certified accuracy; 0: the ε that the arm is trained at where none
            is searched.
        sampler: `tpe`, `nsga-ii`, `gp` or `random`.
        pruner: `median` (a trial worse than the median of those before it at the same epoch is stopped; of several
            objectives one that is worse in all of them), `hyperband` (one objective alone) or `none`.
        space: YAML file of the settings searched; default tuning/<method>.yaml.
        storage: of the Optuna study: an SQLAlchemy URL, sqlite:///FILE or postgresql://USER@HOST/DATABASE.
        study_name: of the Optuna study; default profile, dataset, arm and seed.
        workers: processes that share the trials. The same command on another machine helps, too.
    """

    method: MethodName = "normal"
    augment: bool = False
    contrastive: Contrastive = "none"
    trials: int = 20
    objective: tuple[Objective, ...] = ("own",)
    objective_eps: float = 0.0
    sampler: Literal["tpe", "nsga-ii", "gp", "random"] = "tpe"
    pruner: Literal["median", "hyperband", "none"] = "median"
    space: str = ""
    storage: str = "sqlite:///tuning.db"
    study_name: str = ""
    workers: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.trials >= 1, f"trials must be 1 or more, not {self.trials}")
        require(self.workers >= 1, f"workers must be 1 or more, not {self.workers}")
        require(
            len(self.objective) > 0 and len(set(self.objective)) == len(self.objective),
            f"objective needs distinct values, not {','.join(self.objective)}",
        )
        require(
            len(self.objective) == 1 or self.pruner != "hyperband",
            "pruner=hyperband knows one objective alone: take pruner=median for several",
        )


Settings = (
    TrainSettings | EvaluateSettings | VerifySettings | EmbedSettings | CompareSettings | TuneSettings | StudySettings
)
STEPS: dict[str, type[Settings]] = {
    "train": TrainSettings,
    "evaluate": EvaluateSettings,
    "verify": VerifySettings,
    "embed": EmbedSettings,
    "compare": CompareSettings,
    "tune": TuneSettings,
    "main": StudySettings,
}
# The steps that a study runs for each arm, and what it decides for them itself.
ARM_STEPS = ("train", "evaluate", "verify", "embed")
DECIDED = {"model", "method", "augment", "contrastive", "seed", "profile", "workers", "part"}
# Of all steps: where, and how fast, one runs, not what it finds. The one list of them.
MACHINE = {"device", "threads", "data_root", "images_at_once", "export", "part"}


def own_names(step: str) -> set[str]:
    """What a profile's section of a step can set: of `main` what it does by itself, or tells the steps that it runs."""
    own = {field.name for field in dataclasses.fields(STEPS[step])}
    theirs = {field.name for field in dataclasses.fields(Common)} - {"seed", "threads", "device"}
    return own - theirs if step == "main" else own


def names(step: str) -> list[str]:
    """The settings of a step; for `main` also those of the steps that it runs, as step.name and, bare, for all; for
    `tune` also those of `train`."""
    own = [field.name for field in dataclasses.fields(STEPS[step])]
    if step == "tune":
        return list(dict.fromkeys([*own, *names("train")]))
    if step != "main":
        return own
    nested = [f"{s}.{n}" for s in ("tune", *ARM_STEPS) for n in names(s) if n not in DECIDED]
    bare = [n.split(".", 1)[1] for n in nested]
    return list(dict.fromkeys([*own, *bare, *nested]))


@cache
def kind_of(name: str) -> TypeAdapter[Any]:
    """What tells whether a value fits a setting of `train`."""
    return TypeAdapter(get_type_hints(TrainSettings)[name])
