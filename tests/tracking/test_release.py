"""Models that come with a checkout: half the size, the same answers, and nothing but what was released."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from mlflow import MlflowClient

from rampart.errors import ModelError
from rampart.models import build_model, load_model, released
from rampart.models.classifier import Classifier
from rampart.settings.profiles import PROFILES
from rampart.tracking import fetch_model, open_run
from rampart.tracking.queries import find_runs
from rampart.tracking.release import main, release
from tests.conftest import TINY_STUDY, Study
from tests.nets import randomised


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where released models are looked for."""
    monkeypatch.setattr(released, "FOLDER", tmp_path / "models")
    return tmp_path / "models"


@pytest.fixture
def tiny_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A profile `quick` that says what the finished study's models were trained with."""
    profile = yaml.safe_load((PROFILES / "quick.yaml").read_text())
    profile["train"] |= {name: TINY_STUDY[name] for name in ("width", "epochs", "encoder_epochs", "head_epochs")}
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quick.yaml").write_text(yaml.safe_dump(profile))
    monkeypatch.setattr("rampart.settings.profiles.PROFILES", tmp_path / "configs")


@pytest.fixture
def model() -> Classifier:
    return randomised(build_model())


def test_a_released_model_is_half_as_large_and_answers_alike(model: Classifier, folder: Path) -> None:
    file = release(model, "certified+aug", folder)
    assert file.stat().st_size < 0.55 * 4 * sum(p.numel() for p in model.parameters())
    loaded = load_model("rampart:certified+aug")
    assert not loaded.training
    assert all(value.dtype == torch.float32 for value in loaded.parameters())
    x = torch.rand(64, 3, 32, 32)
    difference = (loaded(x) - model(x)).abs().max()
    assert 0 < difference < 2e-3 * model(x).abs().max()
    assert all(value.dtype == torch.float32 for value in model.parameters()), "the model itself was changed"


def test_the_studys_word_for_an_arm_with_proofs_is_known(model: Classifier, folder: Path) -> None:
    release(model, "mtl-ibp+aug", folder)
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(load_model("rampart:certified+aug")(x), load_model("rampart:mtl-ibp+aug")(x))
    with pytest.raises(ModelError, match="unknown released model"):
        load_model("rampart:certified")
    other = randomised(build_model())
    release(other, "certified+aug", folder)
    assert not torch.equal(load_model("rampart:certified+aug")(x), load_model("rampart:mtl-ibp+aug")(x))


def test_checksums_are_those_that_sha256sum_knows(model: Classifier, folder: Path) -> None:
    for name in ("normal", "certified+aug", "normal"):
        release(model, name, folder)
    said = subprocess.run(
        ["sha256sum", "--check", "SHA256SUMS"], cwd=folder, capture_output=True, text=True, check=True
    )
    assert said.stdout.splitlines() == ["certified+aug.safetensors: OK", "normal.safetensors: OK"]


def test_a_model_that_is_released_already_keeps_its_file(model: Classifier, folder: Path) -> None:
    file = release(model, "normal", folder)
    written = file.stat()
    release(model, "normal", folder)
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (written.st_ino, written.st_mtime_ns)
    for changed in (file.read_bytes()[:-1] + b"x", b""):
        file.write_bytes(changed)
        release(model, "normal", folder)
        load_model("rampart:normal")
    other = randomised(build_model())
    release(other, "normal", folder)
    assert torch.equal(load_model("rampart:normal").head.weight, other.head.weight.half().float())


def test_a_file_that_is_not_the_released_one_is_refused(model: Classifier, folder: Path) -> None:
    with pytest.raises(ModelError, match="none came with this installation"):
        load_model("rampart:normal")
    file = release(model, "normal", folder)
    with pytest.raises(ModelError, match="did you mean 'normal'"):
        load_model("rampart:norml")
    with pytest.raises(ModelError, match="unknown released model"):
        load_model("rampart:../models/normal")
    other = release(model, "other", folder.parent / "elsewhere")
    file.write_bytes(other.read_bytes()[:-1] + b"x")
    with pytest.raises(ModelError, match="is not the file that was released"):
        load_model("rampart:normal")
    file.unlink()
    with pytest.raises(ModelError, match="is not the file that was released"):
        load_model("rampart:normal")


@pytest.mark.usefixtures("tiny_profile")
def test_the_arms_of_a_study_are_released(
    study: Study, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["release", "quick", str(folder)])
    assert main() == 0
    told = capsys.readouterr().out
    trained = find_runs("0", {"step": "train"})
    assert {path.stem for path in folder.glob("*.safetensors")} == set(trained["tags.rampart.arm"])
    for run in trained.to_dict("records"):
        assert run["run_id"] in told
        ours, theirs = fetch_model(f"rampart:{run['tags.rampart.arm']}"), fetch_model(f"runs:/{run['run_id']}/model")
        x = torch.rand(32, *ours.architecture.in_shape)
        assert (ours(x).argmax(1) == theirs(x).argmax(1)).float().mean() > 0.9
    monkeypatch.setattr("rampart.tracking.release.FOLDER", folder)
    assert main() == 2
    assert "was trained on digits, not on CIFAR-10's classes" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["release", "best", str(folder)])
    assert main() == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "error: no finished training of profile 'best' with seed 0: train its arms first"


def test_a_model_that_was_trained_otherwise_than_its_profile_says_is_not_released(
    study: Study, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["release", "quick", str(folder)])
    assert main() == 2
    told = capsys.readouterr()
    trained = find_runs("0", {"step": "train"}).to_dict("records")
    for run in trained:
        who = f"passed over: run {run['run_id']} ({run['tags.rampart.arm']})"
        given = "epochs=2" if run["params.contrastive"] == "none" else "encoder_epochs=1, head_epochs=1"
        assert f"{who} was not trained as profile 'quick' says: width=0.125, {given}\n" in told.out
    assert told.out.count("\n") == len(trained)
    said = "error: no finished training of profile 'quick' with seed 0: none that was trained as it says\n"
    assert told.err == said
    assert not folder.exists()


@pytest.mark.usefixtures("own", "tiny_profile")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architecture": "resnet"}, "architecture=resnet"),
        ({"eps": "8/255", "eps_space": "normalized", "lr": "1"}, "lr=1"),  # it is not attacked
        ({"attack_steps": "many"}, "attack_steps: "),
        # The same, typed and trained elsewhere.
        ({"lr": "5e-3", "eps": "32/255", "eps_space": "normalized", "head_epochs": "7"}, ""),
        ({"compile": "true", "precision": "bf16", "threads": "2", "device": "cuda"}, ""),
    ],
)
def test_the_newest_of_an_arm_that_was_trained_as_its_profile_says_is_released(
    change: dict[str, str],
    said: str,
    model: Classifier,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (before,) = find_runs("0", {"step": "train", "arm": "normal"})["run_id"]
    known = MlflowClient().get_run(before).data
    with open_run("train") as run:
        run.params(known.params | change)
        run.tags({name: known.tags[f"rampart.{name}"] for name in ("arm", "seed", "profile", "class_names")})
    fetched: list[str] = []
    monkeypatch.setattr("rampart.tracking.release.fetch_model", lambda uri: fetched.append(uri) or model)
    monkeypatch.setattr("sys.argv", ["release", "quick", str(folder)])
    assert main() == 0
    assert f"runs:/{before if said else run.id}/model" in fetched
    assert len(fetched) == 4
    told = [line for line in capsys.readouterr().out.splitlines() if run.id in line]
    wanted = f"passed over: run {run.id} (normal) was not trained as profile 'quick' says: {said}"
    assert told[0].startswith(wanted) if said else told == [f"{folder}/normal.safetensors: run {run.id}"]
