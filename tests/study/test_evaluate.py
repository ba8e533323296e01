"""Evaluation as a step: what it leaves in its run, and what becomes of it after an interruption."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient
from torch import nn

from rampart.data import Dataset, Split
from rampart.errors import ModelError
from rampart.evaluation import attacked
from rampart.ledger import mark_attacked
from rampart.models import build_model, load_model, released, save_model
from rampart.settings import ModelSettings, resolve
from rampart.study.resuming import Paced
from rampart.study.steps import run_step
from rampart.study.subject import _require_its_data
from rampart.tracking.queries import find_runs, read_arrays, read_table
from rampart.tracking.release import release
from tests.nets import fitted


def weights(digits: Dataset, folder: Path, seed: int) -> str:
    torch.manual_seed(seed)
    model = fitted(build_model("paper-cnn", (3, 32, 32), 10, width=0.125).train(), digits, lr=0.01, steps=15)
    save_model(model, folder / f"model{seed}.safetensors")
    return str(folder / f"model{seed}.safetensors")


def settings(model: str, **more: str) -> dict[str, str]:
    given = {"model": model, "eps": "4/255,1/255,4/255", "steps": "5", "batch_size": "100", "trust_images": "40"}
    return {**given, "certify_images": "20", "threads": "1", **more}


def test_an_interrupted_evaluation_is_gone_on_with(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, asked, plain = weights(digits, tmp_path, 0), [], attacked._attacked_batch

    def interrupted(*given: object) -> pd.DataFrame:
        asked.append(given)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return plain(*given)  # type: ignore[arg-type]

    seconds = itertools.count(step=10)
    monkeypatch.setattr("rampart.study.resuming.time.monotonic", lambda: next(seconds))
    monkeypatch.setattr(attacked, "_attacked_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_step("evaluate", settings(model))
    killed = find_runs("0", {"step": "evaluate"}, status="KILLED")["run_id"].iloc[0]
    finished = read_table(killed, "ledger.parquet")
    assert finished is not None
    assert len(finished) == 300
    monkeypatch.setattr(attacked, "_attacked_batch", lambda *given: asked.append(given) or plain(*given))
    asked.clear()
    run = run_step("evaluate", settings(model))
    assert MlflowClient().get_run(run).data.tags["rampart.resumed_from"] == killed
    assert len(asked) == 2  # of five batches, three are known
    again = run_step("evaluate", settings(model))
    assert "rampart.resumed_from" not in MlflowClient().get_run(again).data.tags
    ledger, whole = read_table(run, "ledger.parquet"), read_table(again, "ledger.parquet")
    assert ledger is not None
    assert [column for column in ledger if column.startswith("attacked/")] == [
        "attacked/0.00392157",
        "attacked/0.0156863",
    ]
    pd.testing.assert_frame_equal(ledger, whole)


def test_rates_are_checked_and_other_models_give_images_to_check_with(digits: Dataset, tmp_path: Path) -> None:
    model, other = (weights(digits, tmp_path, seed) for seed in (0, 1))
    first = run_step("evaluate", settings(model))
    data = MlflowClient().get_run(first).data
    assert data.tags["rampart.trust"] == "ok"
    assert "trust/zero_gradients" in data.metrics
    assert "trust/transfer" not in data.metrics
    assert data.metrics["corrupted_accuracy"] == pytest.approx(
        sum(value for name, value in data.metrics.items() if name.startswith("corrupted/")) / 5
    )
    arrays = read_arrays(first, "adversarial.npz")
    assert arrays is not None
    assert arrays["adversarial"].shape == (40, 3, 32, 32)
    # The same model's own images prove nothing of it.
    same = MlflowClient().get_run(run_step("evaluate", settings(model, seed="1"))).data
    assert "trust/transfer" not in same.metrics
    second = MlflowClient().get_run(run_step("evaluate", settings(other))).data
    assert 0 <= second.metrics["trust/transfer"] <= 0.03
    without = run_step("evaluate", settings(other, trust_images="0", corruptions="none"))
    data = MlflowClient().get_run(without).data
    assert "rampart.trust" not in data.tags
    assert not [name for name in data.metrics if name.startswith(("trust/", "corrupted"))]


def test_a_released_model_is_of_the_arm_that_it_is_called_after(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(released, "FOLDER", tmp_path / "models")
    model = load_model(weights(digits, tmp_path, 0))
    release(model, "mtl-ibp", released.FOLDER)
    with pytest.raises(ModelError, match=r"airplane.*give the dataset"):
        run_step("evaluate", settings("rampart:mtl-ibp"))
    monkeypatch.setattr("rampart.study.subject.CLASSES", digits.classes)
    found = {}
    for name in ("mtl-ibp+aug+supcon-double", "mine"):
        release(model, name, released.FOLDER)
        run = run_step("evaluate", settings(f"rampart:{name}", trust_images="0", corruptions="none"))
        tags = MlflowClient().get_run(run).data.tags
        found[name] = {key: tags.get(f"rampart.{key}") for key in ("arm", "method", "augment", "contrastive", "seed")}
    arm = "mtl-ibp+aug+supcon-double"
    assert found == {
        arm: {"arm": arm, "method": "mtl-ibp", "augment": "True", "contrastive": "double", "seed": "0"},
        "mine": dict.fromkeys(("arm", "method", "augment", "contrastive", "seed")),
    }
    # What stands for another arm's model is not called so.
    asked = "rampart:certified+aug+supcon-double"
    run = run_step("evaluate", settings(asked, trust_images="0", corruptions="none"))
    assert MlflowClient().get_run(run).data.tags["rampart.arm"] == arm


def test_an_interrupted_evaluation_whose_ledger_is_broken_begins_anew(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = weights(digits, tmp_path, 0)
    quick = {"trust_images": "0", "corruptions": "none", "steps": "1"}

    def interrupted(*given: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("rampart.study.evaluating.finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_step("evaluate", settings(model, **quick))
    killed = find_runs("0", {"step": "evaluate"}, status="KILLED")["run_id"].iloc[0]
    (tmp_path / "ledger.parquet").write_bytes(b"PAR1, cut")
    MlflowClient().log_artifact(killed, str(tmp_path / "ledger.parquet"))
    run = run_step("evaluate", settings(model, **quick))
    assert f"ledger.parquet of run {killed} cannot be read" in caplog.text
    assert "rampart.resumed_from" not in MlflowClient().get_run(run).data.tags
    assert len(read_table(run, "ledger.parquet")) == len(digits.test)


def test_what_the_checks_have_found_outlives_an_interruption(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Branch and bound breaks just what a weak attack has missed: asked again, the checks would find nothing."""
    model = weights(digits, tmp_path, 0)
    weak = {"steps": "1", "rel_step": "0.01", "restarts": "1", "corruptions": "none"}

    def interrupted(model: nn.Module, test: Split, ledger: pd.DataFrame, plan: object, keep: Paced) -> None:
        for image in ledger["image"]:
            mark_attacked(ledger, image, 1 / 255)
        keep.write(ledger)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("rampart.study.evaluating.certify", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_step("evaluate", settings(model, **weak))
    run_step("evaluate", settings(model, **weak))
    killed, finished = (
        find_runs("0", {"step": "evaluate"}, status=status).iloc[0] for status in ("KILLED", "FINISHED")
    )
    assert finished["tags.rampart.resumed_from"] == killed["run_id"]
    assert finished["metrics.robust_accuracy/0.00392157"] == 0
    assert "one_step" in killed["tags.rampart.trust"]
    assert finished["tags.rampart.trust"] == killed["tags.rampart.trust"]
    assert finished["metrics.trust/one_step"] == killed["metrics.trust/one_step"]
    one, other = (read_arrays(run["run_id"], "adversarial.npz") for run in (killed, finished))
    assert one is not None
    assert other is not None
    np.testing.assert_array_equal(one["adversarial"], other["adversarial"])
    np.testing.assert_array_equal(one["prediction"], other["prediction"])


def test_a_model_for_images_of_another_size_is_refused(digits: Dataset) -> None:
    """Many networks would take them without a word."""
    found = resolve("evaluate", settings("m.safetensors"))
    assert isinstance(found, ModelSettings)
    with pytest.raises(ModelError, match=r"takes images of 3x28x28; dataset=\S+ has such of 3x32x32"):
        _require_its_data(build_model(in_shape=(3, 28, 28), width=0.125), None, digits, found)


@pytest.mark.parametrize(
    ("named", "fits"), [('["a", "b"]', False), ('["a", "bb"]', True), ('["a", "b', True), (None, True)]
)
def test_classes_have_the_same_names_as_far_as_these_are_known(named: str | None, fits: bool, digits: Dataset) -> None:
    model, data = build_model(width=0.125, classes=2), replace(digits, classes=("a", "bb"))
    found = resolve("evaluate", settings("m.safetensors"))
    assert isinstance(found, ModelSettings)
    with contextlib.nullcontext() if fits else pytest.raises(ModelError, match=r"tells apart a,b; .* has a,bb"):
        _require_its_data(model, named, data, found)
