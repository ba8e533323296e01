"""What a fresh clone relies on."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rampart.__main__ import ENTRIES
from rampart.settings import STEPS, names

ROOT = Path(__file__).parents[1]


def test_the_two_dependency_lists_are_equal_but_for_auto_lirpa() -> None:
    conda = yaml.safe_load((ROOT / "conda.yaml").read_text())["dependencies"]
    pip = next(entry["pip"] for entry in conda if isinstance(entry, dict))
    lirpa = [line for line in pip if line.startswith("auto_LiRPA")]
    assert len(lirpa) == 1
    assert "@ git+https://github.com/Verified-Intelligence/auto_LiRPA.git@" in lirpa[0]
    plain = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line]
    assert [line for line in pip if line not in lirpa] == plain


def test_mlproject_entry_points_are_steps_and_their_parameters_settings() -> None:
    project = yaml.safe_load((ROOT / "MLproject").read_text())
    assert set(project["entry_points"]) == {*STEPS, "contrastive"}
    for entry in project["entry_points"].values():
        word = entry["command"].split("python -m rampart ")[1].split()[0]
        step, _ = ENTRIES.get(word, (word, {}))
        for parameter in entry["parameters"]:
            assert parameter in names(step)
            assert f"--{parameter} {{{parameter}}}" in entry["command"]
        # The default of another one would stand above the profile.
        assert {name for name, kind in entry["parameters"].items() if "default" in kind} == {"profile"}


def test_only_gitkeep_is_tracked_in_mlruns() -> None:
    """A tracked meta.yaml there would flip MLflow to its file store."""
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    tracked = subprocess.run(["git", "ls-files", "mlruns"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert tracked.stdout.split() == ["mlruns/.gitkeep"]


@pytest.mark.parametrize(
    ("modules", "without"),
    [
        # The core must run on a bare GPU machine.
        (
            ["training", "evaluation", "verification", "bounds", "ledger"],
            ["mlflow", "optuna", "ray", "pydantic", "umap", "matplotlib", "sklearn"],
        ),
        # What takes seconds is for those that need it.
        (
            ["study.steps", "study.training", "study.evaluating", "study.verifying"],
            ["optuna", "ray", "umap", "matplotlib", "altair", "statsmodels", "sklearn"],
        ),
    ],
)
def test_what_a_package_imports(modules: list[str], without: list[str]) -> None:
    lines = ["import sys", *(f"sys.modules['{name}'] = None" for name in without)]
    code = "\n".join([*lines, *(f"import rampart.{name}" for name in modules)])
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT / "src")}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
