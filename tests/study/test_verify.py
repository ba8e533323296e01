"""Verification as a step: what it leaves in its run, and what becomes of it after an interruption."""

from __future__ import annotations

import itertools
from pathlib import Path

import pandas as pd
import pytest
import torch
from mlflow import MlflowClient

from rampart.data import Dataset
from rampart.errors import SettingsError
from rampart.models import build_model, save_model
from rampart.settings import resolve
from rampart.study.identity import identity
from rampart.study.steps import run_step
from rampart.tracking.queries import find_runs, read_arrays, read_table
from rampart.verification import split, verify
from tests.nets import fitted


@pytest.fixture
def weights(digits: Dataset, tmp_path: Path) -> str:
    """A network that is right on most digits and easily attacked."""
    model = fitted(build_model("paper-cnn", (3, 32, 32), 10, width=0.125).train(), digits, lr=0.01, steps=15)
    save_model(model, tmp_path / "model.safetensors")
    return str(tmp_path / "model.safetensors")


def settings(weights: str, **more: str) -> dict[str, str]:
    given = {"model": weights, "images": "10", "eps": "0.015", "attack_first": "True", "complete": "False"}
    return {**given, "threads": "1", **more}


def test_what_was_found_and_asked_is_kept(weights: str, tmp_path: Path) -> None:
    """Counterexamples as arrays and as a picture; the questions as files for other verifiers."""
    run = run_step("verify", settings(weights, export=str(tmp_path / "questions")))
    ledger, arrays = read_table(run, "ledger.parquet"), read_arrays(run, "counterexamples.npz")
    assert ledger is not None
    assert arrays is not None
    unsafe = ledger[ledger["verdict"] == "unsafe"]
    assert {int(image) for image in arrays} == set(unsafe["image"])
    assert len(unsafe) > 0
    assert (unsafe["counterexample_prediction"] != unsafe["label"]).all()
    assert all(array.shape == (3, 32, 32) for array in arrays.values())
    names = {artifact.path for artifact in MlflowClient().list_artifacts(run)}
    assert {"ledger.parquet", "counterexamples.npz", "counterexamples.png"} <= names
    assert len((tmp_path / "questions" / "instances.csv").read_text().splitlines()) == ledger["correct"].sum()


def test_an_interrupted_verification_is_gone_on_with(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def interrupted(*given: object, **named: object) -> object:
        asked.append(given)
        if len(asked) == 5:
            raise KeyboardInterrupt
        return verify(*given, **named)  # type: ignore[arg-type]

    seconds = itertools.count(step=10)
    monkeypatch.setattr("rampart.study.resuming.time.monotonic", lambda: next(seconds))
    monkeypatch.setattr(split, "verify", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_step("verify", settings(weights))
    monkeypatch.setattr(split, "verify", lambda *given, **named: asked.append(given) or verify(*given, **named))
    killed = find_runs("0", {"step": "verify"}, status="KILLED")["run_id"].iloc[0]
    finished = read_table(killed, "ledger.parquet")
    assert finished is not None
    assert 4 <= len(finished) < 10
    # Other settings have nothing to go on from.
    assert resumed_from(run_step("verify", settings(weights, images="2"))) is None
    asked.clear()
    run = run_step("verify", settings(weights))
    assert resumed_from(run) == killed
    ledger = read_table(run, "ledger.parquet")
    assert ledger is not None
    anew = ledger[~ledger["image"].isin(finished["image"])]
    assert len(asked) == (anew["correct"] & (anew["stage"] != "attack")).sum() > 0
    # What has finished is done anew when it is asked for again, and gives what nobody interrupted.
    again = run_step("verify", settings(weights))
    assert resumed_from(again) is None
    whole = read_table(again, "ledger.parquet")
    assert whole is not None
    settled = ["image", "label", "prediction", "verdict", "stage", "counterexample_prediction"]
    pd.testing.assert_frame_equal(ledger[settled], whole[settled])


def resumed_from(run: str) -> str | None:
    return MlflowClient().get_run(run).data.tags.get("rampart.resumed_from")


def test_every_certified_radius_is_attacked_too(weights: str) -> None:
    """So that the bracket has both ends."""
    given = {"model": weights, "eps": "0.02", "certify": "crown", "certify_eps": "0.005,0.01", "certify_images": "8"}
    run = run_step("evaluate", {**given, "steps": "3", "trust_images": "0", "corruptions": "none", "threads": "2"})
    ledger = read_table(run, "ledger.parquet")
    assert ledger is not None
    assert {column for column in ledger if column.startswith("attacked/")} == {
        "attacked/0.005",
        "attacked/0.01",
        "attacked/0.02",
    }
    found = find_runs("0", {"step": "evaluate"}).iloc[0]
    for eps in ("0.005", "0.01"):
        proved, left = found[f"metrics.certified_accuracy/{eps}"], found[f"metrics.attacked_accuracy/{eps}"]
        assert 0 <= proved <= left <= 1
    assert torch.get_num_threads() == 2


def test_other_answers_of_another_verifier_are_another_verification(weights: str, tmp_path: Path) -> None:
    answers = tmp_path / "results.csv"
    keys = []
    for text in ("unsat", "timeout", "unsat"):
        answers.write_text(text)
        keys.append(identity("verify", resolve("verify", settings(weights, engine=str(answers))), "d", "w"))
    assert keys[0] == keys[2] != keys[1]
    example = tmp_path / "m_image_3_eps_0.1.counterexample"
    (tmp_path / "kept.counterexamples").mkdir()
    for _ in range(2):  # under another name it is that of another image
        example.write_text("sat")
        keys.append(identity("verify", resolve("verify", settings(weights, engine=str(answers))), "d", "w"))
        example = example.rename(tmp_path / "m_image_4_eps_0.1.counterexample")
    assert len(set(keys)) == 4


def test_parts_are_gathered(weights: str) -> None:
    """Two of three parts, one of them done by a worker that was lost before its end, and the whole that finds both."""
    whole = read_table(run_step("verify", settings(weights)), "ledger.parquet")
    MlflowClient().delete_run(find_runs("0", {"step": "verify"})["run_id"].iloc[0])
    parts = [run_step("verify", settings(weights, part=part)) for part in ("1/3", "3/3")]
    tables = [read_table(part, "ledger.parquet") for part in parts]
    assert [len(table) for table in tables if table is not None] == [4, 3]
    MlflowClient().set_terminated(parts[1], "KILLED")
    assert list(find_runs("0", {"step": "verify"})["run_id"]) == []
    gathered = run_step("verify", settings(weights))
    ledger, examples = read_table(gathered, "ledger.parquet"), read_arrays(gathered, "counterexamples.npz")
    assert whole is not None
    assert ledger is not None
    same = ["image", "label", "prediction", "verdict", "lower_bound", "counterexample_prediction"]
    pd.testing.assert_frame_equal(ledger[same], whole[same])
    assert {int(image) for image in examples or {}} == set(ledger.loc[ledger["verdict"] == "unsafe", "image"])
    # What the parts have done was not done again: the very seconds are theirs.
    known = pd.concat([table for table in tables if table is not None]).set_index("image")["seconds"]
    assert (ledger.set_index("image").loc[known.index, "seconds"].dropna() == known.dropna()).all()
    # A part of more parts than images has nothing to do.
    nothing = read_table(run_step("verify", settings(weights, part="12/12")), "ledger.parquet")
    assert nothing is not None
    assert len(nothing) == 0
    with pytest.raises(SettingsError, match="part must be like 2/8"):
        run_step("verify", settings(weights, part="3/2"))
