"""Fixtures that several tests share. Small networks, few threads: the machine has two cores."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch import Tensor

from rampart.data import Dataset, Split, load_dataset

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def _threads() -> None:
    # Beside other workers of pytest-xdist each has a core to itself.
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def digits() -> Dataset:
    return load_dataset("digits")


@pytest.fixture(scope="session")
def few_digits(digits: Dataset) -> Dataset:
    """200 images to train on, 100 to validate on."""
    return replace(digits, train=digits.train[:200], val=digits.val[:100], test=digits.test[:10])


class Sealed:
    """Images whose shape may be asked for, and nothing else."""

    shape = (10, 3, 32, 32)

    def __getattr__(self, name: str) -> object:
        raise AssertionError(f"'{name}' of the test images was read")

    def __getitem__(self, index: object) -> object:
        raise AssertionError("test images were read")


class SealedSplit(Split):
    """A split that may be moved to a device, where nobody reads it either."""

    def to(self, device: torch.device | str) -> Split:
        return self

    def __len__(self) -> int:
        raise AssertionError("the test images were counted")

    def __getitem__(self, index: Tensor | slice) -> Split:
        raise AssertionError("test images were read")


@pytest.fixture
def sealed_digits(few_digits: Dataset) -> Dataset:
    """The same, whose test images nobody may read."""
    return replace(few_digits, test=SealedSplit(Sealed(), Sealed()))


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test works in a folder of its own, with a tracking store and a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture(scope="session")
def study_models() -> dict[str, Path]:
    """The six published models, by name."""
    folder = SHARED / "data" / "paper-models"
    if not folder.is_dir():
        pytest.skip("the study's published models are not beside this checkout (../shared/data/paper-models)")
    return {path.stem: path for path in sorted(folder.glob("*.npz"))}


# One small study serves all tests that look at what a study leaves behind.
TINY_STUDY = {
    "methods": "normal,certified",
    "augment": "False",
    "width": "0.125",
    "epochs": "2",
    "encoder_epochs": "1",
    "head_epochs": "1",
    "images": "6",
    "points": "30",
    "evaluate.eps": "4/255,16/255",
    "threads": "1",
}


def run_rampart(step: str, settings: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    """`python -m rampart step --name value …` as a user's process, its store in `folder`."""
    words = [word for name, value in settings.items() for word in (f"--{name}", value)]
    env = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    env |= {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    env |= {"PYTHONPATH": str(Path(__file__).parents[1] / "src")}
    command = [sys.executable, "-m", "rampart", step, *words]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


@dataclass(frozen=True)
class Study:
    """A finished study: its folder, and what it printed."""

    folder: Path
    output: str


@pytest.fixture(scope="session")
def finished_study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    base = tmp_path_factory.getbasetemp()
    # One study for all workers of pytest-xdist, whose folders lie side by side: the first makes it, the others wait.
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "study"
    output = folder / "output.txt"
    with FileLock(f"{folder}.lock"):
        if not output.exists():
            folder.mkdir(exist_ok=True)
            done = run_rampart("main", TINY_STUDY, folder)
            assert done.returncode == 0, done.stderr[-3000:]
            output.write_text(done.stdout)
    return Study(folder, output.read_text())


@pytest.fixture
def study(finished_study: Study, store: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """The finished study, its store being the one in use."""
    monkeypatch.chdir(finished_study.folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{finished_study.folder}/mlflow.db")
    return finished_study
