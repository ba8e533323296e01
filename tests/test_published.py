"""The study's published models give the study's published figures, through the command line."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from mlflow import MlflowClient

from rampart.ledger import eps_key
from tests.conftest import SHARED, run_rampart

DATA = SHARED / "data"
# On the JPEG copy of the test set, in percent.
ACCURACY = {
    "augmented-normal": 78.31,
    "augmented-contrastive": 78.07,
    "augmented-adversarial": 72.14,
    "augmented-adversarial-contrastive": 51.09,
    "augmented-certified": 50.16,
    "augmented-certified-contrastive": 33.35,
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.is_dir(), reason="CIFAR-10 and the study's models are not beside this checkout"),
]


@pytest.fixture(scope="module")
def cifar10_jpeg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cifar10-jpeg")
    with tarfile.open(DATA / "cifar10-jpeg.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize("name", ACCURACY)
def test_accuracy_and_attack_rates(
    name: str, cifar10_jpeg: Path, store: Path, study_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the attack is not taken for one that masked gradients deceive."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cifar10_jpeg / ".cache"))  # decoded once
    radii = ["1/255", "2/255", "4/255", "8/255", "16/255"]
    settings = {"model": str(study_models[name]), "dataset": f"folder:{cifar10_jpeg}", "eps_space": "normalized"}
    settings |= {"corruptions": "none", "certify": "none"}
    done = run_rampart("evaluate", {**settings, "eps": ",".join(radii)}, store)
    assert done.returncode == 0, done.stderr
    (run,) = MlflowClient().search_runs(["0"])
    assert 100 * run.data.metrics["accuracy"] == pytest.approx(ACCURACY[name], abs=0.005)
    assert run.data.tags["rampart.trust"] == "ok"
    key = name.replace("augmented-", "augmented/").replace("/contrastive", "/normal-contrastive")
    published = json.loads((DATA / "paper-results.json").read_text())["models"][key]["pgd_asr"]
    for text in radii:
        pixel = float(text.split("/")[0]) / 510
        ours = 100 * run.data.metrics[f"asr/{eps_key(pixel)}"]
        # The JPEG test set and the scored last iterate add a few points.
        assert -2 <= ours - published[text] <= 10, (text, ours, published[text])
