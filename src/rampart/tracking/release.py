"""`python -m rampart.tracking.release PROFILE [FOLDER]`: the models of a profile's arms, seed 0 each, as files that
come with a checkout; `load_model("rampart:<arm>")` finds those in results/models."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Hashable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from rampart.console import said_if_it_fails
from rampart.errors import ModelError, RampartError
from rampart.models import Classifier, load_model, save_model, weights_digest
from rampart.models.released import CLASSES, FOLDER, SEED, SUFFIX, enter
from rampart.settings import EPS_NAMES, MACHINE, TrainSettings, as_text, names, profile_name, resolve
from rampart.tracking.models import fetch_model
from rampart.tracking.queries import find_runs
from rampart.tracking.runs import class_names
from rampart.tracking.store import experiment_id


def release(model: Classifier, name: str, folder: Path = FOLDER) -> Path:
    """Writes a model with its maps' weights in half precision (float16: eleven significant bits) and all else as it is,
    and its checksum beside it. A file that holds just that stays as it is.

    Raises:
        OSError: it cannot be written.
    """
    halved = copy.deepcopy(model)
    for module in halved.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.half()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / (name + SUFFIX)
    # Written anew, the same weights may have another checksum: safetensors keeps no order among its texts.
    if not _holds(file, halved):
        save_model(halved, file)
    enter(file)
    return file


def _holds(file: Path, model: Classifier) -> bool:
    """Whether a file has the weights of this model."""
    try:
        return weights_digest(load_model(file)) == weights_digest(copy.deepcopy(model).float())
    except ModelError:
        return False


def release_all(profile: str, folder: Path) -> None:
    """The newest model of each arm of a profile that has been trained with seed 0, and as the profile says.

    Raises:
        RampartError: no arm has been trained so, or one on other classes than CIFAR-10's, which do not belong beside
            those that came with the checkout.
    """
    known = {"step": "train", "profile": profile_name(profile), "seed": SEED}
    chosen: dict[str, dict[Hashable, Any]] = {}
    runs = find_runs(experiment_id(create=False), known)
    for run in runs.to_dict("records"):
        arm = str(run["tags.rampart.arm"])
        if arm in chosen:
            continue
        if said := _beyond(run, profile):
            print(f"passed over: run {run['run_id']} ({arm}) was not trained as profile '{profile}' says: {said}")
        else:
            chosen[arm] = run
    if not chosen:
        which = "none that was trained as it says" if len(runs) else "train its arms first"
        raise RampartError(f"no finished training of profile '{profile}' with seed {SEED}: {which}")
    for run in chosen.values():
        # Of what `rampart:` finds it is said that it tells these apart.
        if folder.resolve() == FOLDER.resolve() and class_names(str(run["tags.rampart.class_names"])) != CLASSES:
            what = f"run {run['run_id']} ({run['tags.rampart.arm']}) was trained on {run['tags.rampart.dataset']}"
            raise RampartError(f"{what}, not on CIFAR-10's classes: give a folder of your own")
    for arm, run in chosen.items():
        file = release(fetch_model(f"runs:/{run['run_id']}/model"), arm, folder)
        print(f"{file}: run {run['run_id']}")


# What tells the models of a profile apart, and in what else they may differ from it: where and how fast they were
# trained, and on which scale ε was given.
_ARM = ("method", "augment", "contrastive", "seed", "dataset")
_FREE = MACHINE | {"compile", "precision", "eps_space"}


def _beyond(run: Mapping[Any, Any], profile: str) -> str:
    """What a training was given that the profile does not say of its arm, or why that cannot be told; nothing where it
    was trained as the profile says."""
    given = {name: str(run[key]) for name in names("train") if pd.notna(run.get(key := f"params.{name}"))}
    given["profile"] = profile
    arm = {name: given[name] for name in (*_ARM, "profile") if name in given}
    try:
        trained, usual = (resolve("train", texts) for texts in (given, arm))
    except RampartError as error:
        return str(error)
    assert isinstance(trained, TrainSettings)
    texts, others = as_text(trained, {}), as_text(usual, {})  # a run has its radii with as many digits, too
    left = {*EPS_NAMES, *_FREE, *(name for idle in trained.idle() for name in (idle, f"{idle}_pixel"))}
    return ", ".join(f"{name}={text}" for name, text in texts.items() if text != others[name] and name not in left)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m rampart.tracking.release", description=__doc__)
    parser.add_argument("profile")
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER)
    given = parser.parse_args()
    return said_if_it_fails(partial(release_all, given.profile, given.folder))


if __name__ == "__main__":
    raise SystemExit(main())
