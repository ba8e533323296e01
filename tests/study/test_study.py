"""A small study, looked at through the tracking server alone."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import pandas as pd
import psutil
import pytest
from mlflow import MlflowClient

from rampart.settings import ARM_STEPS, STEPS, TrainSettings, resolve
from rampart.study.identity import IDLE, identity, what
from rampart.tracking import initialise
from rampart.tracking.queries import find_runs, read_table
from tests.conftest import TINY_STUDY, Study, as_words, run_rampart

ARMS = {"normal", "certified", "normal+supcon-double", "certified+supcon-double"}


def test_every_arm_has_every_step_nested_under_the_study(study: Study) -> None:
    (main,) = find_runs("0", {"step": "main"})["run_id"]
    for step in ("train", "evaluate", "verify", "embed"):
        runs = find_runs("0", {"step": step})
        assert set(runs["tags.rampart.arm"]) == ARMS
        assert set(runs["tags.mlflow.parentRunId"]) == {main}
        assert set(runs["tags.rampart.profile"]) == {"quick"}
    names = set(find_runs("0", {"step": "train"})["tags.mlflow.runName"])
    assert names == {f"{arm} s0" for arm in ARMS}


def test_curves_settings_and_pictures_are_in_the_runs(study: Study) -> None:
    client = MlflowClient()
    for _, run in find_runs("0", {"step": "train"}).iterrows():
        stage = "head" if "supcon" in run["tags.rampart.arm"] else "train"
        for curve in ("loss", "epsilon", "learning_rate", "images_per_second"):
            history = client.get_metric_history(run["run_id"], f"{stage}/{curve}")
            assert len(history) == (1 if stage == "head" else 2), curve
        assert run["params.width"] == "0.125"
        assert f"metrics.{stage}/best_epoch" in run.dropna().index
        files = {file.path for file in client.list_artifacts(run["run_id"])}
        assert {"umap.png", "umap.parquet", "checkpoints"} <= files


def test_output_shows_the_three_tables_and_the_report(study: Study) -> None:
    for title in ("Accuracy (the study's Figure 3)", "Robust accuracy (the study's Figure 4)", "Verdicts"):
        assert title in study.output
    assert study.output.strip().splitlines()[-1].startswith("report: ")


def test_tables_equal_what_the_ledgers_say(study: Study) -> None:
    """Recomputed by hand, from the ledgers of the runs that the table names."""
    (compare,) = find_runs("0", {"step": "compare"})["run_id"]
    values = pd.read_csv(MlflowClient().download_artifacts(compare, "values.csv"))
    assert set(values["arm"]) == ARMS
    for _, row in values.iterrows():
        ledger = read_table(row["run"], "ledger.parquet")
        assert ledger is not None
        right = ledger["label"] == ledger["prediction"]
        if row["step"] == "verify":
            counts = ledger["verdict"].value_counts()
            proved = counts.get("safe-incomplete", 0) + counts.get("safe", 0)
            expected = {
                "accuracy": right.mean(),
                "misclassified": (~right).sum(),
                "images": len(ledger),
                "certified_accuracy": proved / len(ledger),
            }.get(row["metric"], counts.get(row["metric"], 0))
        elif row["metric"] == "accuracy":
            expected = right.mean()
        elif row["metric"].startswith("corrupted"):
            kind = row["metric"].partition("/")[2]
            tried = [column for column in ledger if column.startswith(f"withstood/{kind}")]
            assert len(tried) == (5 if kind else 25)
            expected = ledger[tried].to_numpy().mean()
        elif row["metric"].startswith("trust/"):
            checks = pd.read_csv(MlflowClient().download_artifacts(row["run"], "trust.csv")).set_index("check")
            expected = checks.loc[row["metric"].removeprefix("trust/"), "value"]
        elif row["metric"] in ("certified_accuracy", "attacked_accuracy"):
            proved = ledger["certified/0.0156863"]
            assert proved.notna().sum() == 40
            held = proved if row["metric"] == "certified_accuracy" else ~ledger["attacked/0.0156863"]
            expected = (right & held)[proved.notna()].mean()
        else:
            broken = ledger[f"attacked/{row['eps']:.6g}"]
            asr = (broken & right).sum() / right.sum()
            expected = {"asr": asr, "afr": 1 - asr, "robust_accuracy": right.mean() * (1 - asr)}[row["metric"]]
        assert abs(row["value"] - expected) < 1e-9, row.to_dict()


def test_verdict_and_attack_never_contradict(study: Study) -> None:
    for _, run in find_runs("0", {"step": "verify"}).iterrows():
        ledger = read_table(run["run_id"], "ledger.parquet")
        assert ledger is not None
        attacked = find_runs("0", {"step": "evaluate", "arm": run["tags.rampart.arm"]})["run_id"][0]
        broken = read_table(attacked, "ledger.parquet")
        assert broken is not None
        proved = ledger[ledger["verdict"] == "safe-incomplete"]
        # Both at 4/255.
        assert not broken.set_index("image").loc[proved["image"], "attacked/0.0156863"].any()


@pytest.mark.slow
def test_a_finished_arm_is_not_run_again_unless_its_settings_change(own: Path) -> None:
    before = {step: len(find_runs("0", {"step": step})) for step in ("train", "evaluate", "verify", "embed")}
    again = run_rampart("main", TINY_STUDY, own)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("was there already") == 4
    assert {step: len(find_runs("0", {"step": step})) for step in before} == before
    members = [read_table(run, "members.parquet") for run in find_runs("0", {"step": "main"})["run_id"]]
    assert members[0] is not None
    assert members[1] is not None
    assert set(members[0]["run"]) == set(members[1]["run"])
    assert members[0]["reused"].all()
    # Another attack is measured anew, on the same models.
    changed = run_rampart("main", {**TINY_STUDY, "methods": "normal", "evaluate.steps": "2"}, own)
    assert changed.returncode == 0, changed.stderr
    assert len(find_runs("0", {"step": "train"})) == before["train"]
    assert len(find_runs("0", {"step": "evaluate"})) == before["evaluate"] + 2


def test_identity_follows_settings_data_model_but_not_the_machine() -> None:
    base = resolve("train", {})
    known = identity("train", base, "digest")
    assert identity("train", resolve("train", {"threads": "1", "device": "cpu"}), "digest") == known
    assert identity("train", resolve("train", {"dataset": "folder:elsewhere"}), "digest") == known
    assert identity("train", resolve("train", {"lr": "0.1"}), "digest") != known
    assert identity("train", resolve("train", {"seed": "1"}), "digest") != known
    assert identity("train", base, "other") != known


def test_a_new_setting_leaves_finished_studies_finished() -> None:
    """A setting that changes nothing by its default goes into IDLE; with any other one, or another default, steps are
    others than these, and are said to be so here."""
    finished = {
        "train": "c06ed3c650b1fc407ae53fbb7951d976",
        "evaluate": "32a2852902407248b24d68da77cec0be",
        "verify": "a0057672783deb19ccd20d5845f692c9",
        "embed": "68b472a27541f59de1ec40259a27576a",
    }
    by_default = {"train": TrainSettings(), **{step: STEPS[step](model="file") for step in finished if step != "train"}}
    assert {step: what(identity(step, given, "digest", "w")) for step, given in by_default.items()} == finished
    assert IDLE.items() <= {field.name: field.default for step in ARM_STEPS for field in fields(STEPS[step])}.items()
    assert what(identity("train", TrainSettings(dropout=0.1), "digest", "w")) != finished["train"]


@pytest.mark.slow
def test_an_arm_that_fails_does_not_stop_the_others(store: Path) -> None:
    """The certified arms diverge; the normal ones are trained, compared, and the failure is said at the end."""
    settings = {**TINY_STUDY, "contrastive": "none", "points": "20", "profile": str(store / "own.yaml")}
    (store / "own.yaml").write_text("arms:\n  - when: {method: certified}\n    set: {lr: 1.0e+30}\n")
    done = run_rampart("main", settings, store)
    assert done.returncode == 2
    assert "1 of 2 arms failed, certified s0: the loss became" in done.stderr.splitlines()[-1]
    assert "report: " in done.stdout
    assert set(find_runs("0", {"step": "evaluate"})["tags.rampart.arm"]) == {"normal"}
    assert list(find_runs("0", {"step": "main"}, status=None)["status"]) == ["FAILED"]


@pytest.mark.slow
def test_a_study_that_is_told_to_stop_leaves_no_run_running_and_no_process(store: Path) -> None:
    settings = {**TINY_STUDY, "epochs": "1000", "methods": "normal", "contrastive": "none", "augment": "False,True"}
    process = subprocess.Popen(
        [sys.executable, "-m", "rampart", "main", *as_words(settings)], stderr=subprocess.PIPE, text=True
    )
    initialise()
    while process.poll() is None and len(find_runs("0", {"step": "train"}, status="RUNNING")) < 2:
        time.sleep(0.5)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    _, said = process.communicate()
    assert process.returncode == 130, said
    assert "interrupted" in said
    assert find_runs("0", {}, status="RUNNING").empty
    assert set(find_runs("0", {}, status=None)["status"]) == {"KILLED"}
    psutil.wait_procs(workers, timeout=30)
    assert not any(worker.is_running() for worker in workers)


@pytest.mark.slow
def test_two_studies_begun_at_the_same_moment_do_each_step_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a store that neither of them finds ready."""
    folder = tmp_path / "fresh"
    folder.mkdir()
    settings = {**TINY_STUDY, "methods": "normal", "contrastive": "none", "workers": "1", "points": "20"}
    settings |= {"evaluate.certify": "none", "evaluate.trust_images": "0", "evaluate.corruptions": "none"}
    settings["images"] = "3"
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: run_rampart("main", settings, folder), range(2)))
    assert [done.returncode for done in both] == [0, 0], both[0].stderr[-2000:] + both[1].stderr[-2000:]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
    for step in ("train", "evaluate", "verify", "embed"):
        assert list(find_runs("0", {"step": step}, status=None)["status"]) == ["FINISHED"], step
    mains = find_runs("0", {"step": "main"})["run_id"]
    tables = [table for run in mains if (table := read_table(run, "members.parquet")) is not None]
    assert len(tables) == 2
    # Both have all of it; what one did the other found done.
    assert list(tables[0]["run"]) == list(tables[1]["run"])
    assert (tables[0]["reused"] ^ tables[1]["reused"]).all()
