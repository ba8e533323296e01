"""The whole comparison: what it leaves, and that nothing but the store is needed for it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from rampart.__main__ import main
from rampart.models import build_model
from rampart.study.steps import run_step
from rampart.tracking import fetch_model, open_run, source_of
from rampart.tracking.queries import find_models, find_runs, run_page
from tests.conftest import TINY_STUDY, Study, as_words, mlflow_server, run_rampart
from tests.reports.made import evaluation, finished, verification

KINDS = {".csv", ".md", ".tex", ".png", ".pdf"}


def files(run: str, kind: str = "") -> dict[str, bytes]:
    """A run's artifacts by name."""
    folder = Path(MlflowClient().download_artifacts(run, ""))
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name.endswith(kind)}


def test_every_table_and_figure_is_there_in_every_form(study: Study) -> None:
    (compare,) = find_runs("0", {"step": "compare"})["run_id"]
    found = {path.path for path in MlflowClient().list_artifacts(compare)}
    for name in ("accuracy", "robust_accuracy", "verdicts", "geometry"):
        assert {f"{name}{kind}" for kind in KINDS} <= found, name
    for name in ("verification_times", "confusion", "most_broken", "umap", "umap_status", "training"):
        assert {f"{name}.png", f"{name}.pdf"} <= found, name
    for name in ("attack_success", "trust", "corruptions", "claims", "costs"):
        assert {f"{name}.csv", f"{name}.md", f"{name}.tex"} <= found, name
    assert {"report.html", "values.csv", "summary.csv"} <= found


def test_everything_is_built_again_from_the_store_alone(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(own / "nothing"))
    (before,) = find_runs("0", {"step": "compare"})["run_id"]
    again = run_step("compare", {"study": find_runs("0", {"step": "main"})["run_id"].iloc[0]})
    old, new = files(before, ".csv"), files(again, ".csv")
    assert len(old) >= 10
    assert old == new


def test_every_number_leads_to_its_run(study: Study) -> None:
    (compare,) = find_runs("0", {"step": "compare"})["run_id"]
    page = files(compare, ".html")["report.html"].decode()
    for step in ("evaluate", "verify", "embed", "train"):
        for run in find_runs("0", {"step": step})["run_id"]:
            assert f'<a href="{run_page("0", run)}"' in page, step


def test_models_evaluations_and_report_are_linked(study: Study) -> None:
    client = MlflowClient()
    models = find_models("0").set_index("run_id")
    trained = find_runs("0", {"step": "train"})
    assert set(models.index) == set(trained["run_id"])
    for step in ("evaluate", "verify", "embed"):
        for row in find_runs("0", {"step": step}).to_dict("records"):
            (given,) = client.get_run(row["run_id"]).inputs.model_inputs
            assert given.model_id == models.loc[row["tags.rampart.model_run"], "model_id"]
    (compare,) = find_runs("0", {"step": "compare"})["run_id"]
    assert {entry.model_id for entry in client.get_run(compare).inputs.model_inputs} == set(models["model_id"])
    # The newest number of each kind stands beside the model, wherever it was measured.
    for run, model in models.iterrows():
        evaluated = find_runs("0", {"step": "evaluate", "model_run": str(run)}).iloc[0]
        assert model["metrics.asr/0.0156863"] == evaluated["metrics.asr/0.0156863"]
        kept = [name for name in model.dropna().index if str(name).startswith("metrics.kept/")]
        assert "metrics.kept/accuracy" in kept


def test_every_run_says_what_it_is(study: Study) -> None:
    for step, words in (
        ("train", "seed 0"), ("evaluate", "robust accuracy %"), ("verify", "safe-incomplete"), ("embed", "within"),
        ("compare", "Robust accuracy (the study's Figure 4)"),
    ):  # fmt: skip
        for run in find_runs("0", {"step": step}).to_dict("records"):
            assert words in run["tags.mlflow.note.content"], step
    (note,) = find_runs("0", {"step": "compare"})["tags.mlflow.note.content"]
    pictures = re.findall(r"!\[.*?\]\(get-artifact\?path=(.*?)&run_uuid=(\w+)\)", note)
    assert {"accuracy.png", "robust_accuracy.png", "certified_accuracy.png", "verdicts.png"} == {
        name for name, _ in pictures
    }
    for name, run in pictures:
        assert MlflowClient().download_artifacts(run, name)


def test_the_best_of_each_arm_is_in_the_registry(study: Study) -> None:
    found = find_runs("0", {"step": "evaluate"}).set_index("tags.rampart.arm")
    for arm in ("certified", "certified+supcon-double"):
        name = f"rampart-{arm.replace('+', '-')}"
        for alias, metric in (("best-certified", "certified_accuracy"), ("best-robust", "robust_accuracy")):
            assert source_of(f"models:/{name}@{alias}").run == found.loc[arm, "tags.rampart.model_run"]
            assert fetch_model(f"models:/{name}@{alias}")
            tags = MlflowClient().get_model_version_by_alias(name, alias).tags
            assert tags[f"rampart.{alias}.metric"] == f"{metric}/0.0156863"
            assert tags[f"rampart.{alias}.run"] == found.loc[arm, "run_id"]
            assert tags[f"rampart.{alias}.value"] == f"{found.loc[arm, f'metrics.{metric}/0.0156863']:.6g}"


def test_published_figures_stand_beside_ours(own: Path) -> None:
    file = own / "published.json"
    models = {
        "plain/normal": {"test_accuracy": 67.71, "pgd_asr": {"4/255": 90.03}},
        "augmented/normal": {"test_accuracy": 79.7},
    }
    models["plain/normal"]["abcrown_20_images"] = {"timeout": 8, "safe": 12}
    file.write_text(json.dumps({"eps_space": "pixel", "models": models}))
    run = run_step("compare", {"baseline": str(file)})
    tables = files(run, ".csv")
    (own / "beside.csv").write_bytes(tables["published.csv"])
    beside = pd.read_csv(own / "beside.csv", dtype=str)
    assert beside["metric"].tolist() == ["accuracy", "attack success", "robust accuracy"]
    assert beside["published %"].tolist() == ["67.71", "90.03", f"{67.71 * (1 - 0.9003):.2f}"]
    ours = float(beside["ours %"][0].split()[0])
    assert float(beside["difference"][0]) == pytest.approx(ours - 67.71, abs=0.006)
    assert b"published" in tables["verdicts.csv"]
    page = files(run, ".html")["report.html"].decode()
    assert "published: published.json, its ε in pixels" in page


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"baseline": "nowhere.json"}, "baseline 'nowhere.json' cannot be read"),
        ({"profile": "best"}, "nothing to compare: experiment 0 has no finished evaluation of profile 'best'"),
        ({"study": "abc"}, "no run 'abc'"),
    ],
)
def test_bad_input_ends_in_one_line_and_a_failed_run(
    settings: dict[str, str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *as_words(settings)]) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line
    (failed,) = find_runs("0", {"step": "compare"}, status="FAILED")["tags.rampart.error"]
    assert failed in line


def test_a_profile_paper_has_its_alias(monkeypatch: pytest.MonkeyPatch) -> None:
    said = []
    monkeypatch.setattr("rampart.reports.registry.register", lambda *given: said.append(given))
    with open_run("train") as trained:
        trained.tags({"arm": "normal"})
        trained.model(build_model(width=0.125).eval(), torch.rand(2, 3, 32, 32))
    finished("evaluate", evaluation("1110", "0100"), profile="paper", model_run=trained.id)
    finished("evaluate", evaluation("1111", "0100"), profile="paper", model_run=trained.id, seed=1)
    run_step("compare", {"profile": "paper"})
    assert [(run, name, alias) for run, name, alias, _ in said] == [
        (trained.id, "rampart-normal", "best-robust"), (trained.id, "rampart-normal", "paper"),
    ]  # fmt: skip
    assert said[0][3]["value"] == "0.75"


def test_who_may_not_name_models_has_the_report_nevertheless(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def forbidden(*given: object) -> None:
        raise MlflowException("API request to endpoint registered-models/alias failed with error code 403")

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", forbidden)
    with open_run("train") as trained:
        trained.tags({"arm": "normal"})
        trained.model(build_model(width=0.125).eval(), torch.rand(2, 3, 32, 32))
    finished("evaluate", evaluation("1110", "0100"), model_run=trained.id)
    run = run_step("compare", {})
    assert "have no names in the Model Registry" in caplog.text
    assert files(run, ".html")
    assert MlflowClient().get_run(run).data.tags["rampart.arms"]


@pytest.mark.slow
def test_a_full_store_is_read_in_seconds_and_little_memory() -> None:
    """5,000 runs of another experiment and 500 of ours: 125 models with their four steps."""
    client = MlflowClient()
    other = mlflow.create_experiment("other")
    for i in range(5000):
        run = client.create_run(other)
        client.log_batch(run.info.run_id, tags=[], metrics=[], params=[])
        if i % 10 == 0:
            client.set_tag(run.info.run_id, "rampart.step", "evaluate")
    for seed in range(125):
        with open_run("train") as trained:
            trained.tags({"arm": "normal"})
            for epoch in range(10):
                trained.metrics({"train/loss": 1.0, "val/accuracy": 0.5}, step=epoch)
        for step in ("evaluate", "verify", "embed"):
            ledger = evaluation("1110" * 90) if step == "evaluate" else None
            if step == "verify":
                ledger = verification(dict.fromkeys(range(20), "safe"))
            finished(step, ledger, seed=seed, model_run=trained.id)
    # In a process of its own: this one holds what other tests have left.
    done = subprocess.run([sys.executable, "-c", READS], capture_output=True, text=True, check=True)
    seconds, memory, runs = map(float, done.stdout.split())
    print(f"{seconds:.1f} s, {memory:.0f} MiB")
    assert runs == 250
    assert memory < 1024


READS = """
import time
import psutil
from rampart.reports.evidence import collect
from rampart.settings import CompareSettings
started = time.perf_counter()
evidence = collect("0", CompareSettings())
print(time.perf_counter() - started, psutil.Process().memory_info().rss / 2**20, evidence.values["run"].nunique())
"""


@pytest.fixture
def http_store(store: Path, postgres: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An MLflow server over HTTP, its runs in PostgreSQL, its artifacts in a folder that it alone reads and writes."""
    words = ["server", "--backend-store-uri", postgres.replace("postgresql://", "postgresql+psycopg://")]
    words += ["--artifacts-destination", str(store / "served")]
    with mlflow_server(words, store) as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        yield uri


@pytest.mark.slow
def test_a_study_on_a_server_is_built_again_from_the_server_alone(
    http_store: str, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = store / "work"
    folder.mkdir()
    done = run_rampart("main", {**TINY_STUDY, "methods": "normal"}, folder, http_store)
    assert done.returncode == 0, done.stderr
    assert not (folder / "mlruns").exists()
    shutil.rmtree(folder)
    monkeypatch.chdir(store)
    (before,) = find_runs("0", {"step": "compare"})["run_id"]
    again = run_step("compare", {"study": find_runs("0", {"step": "main"})["run_id"].iloc[0]})
    old, new = files(before, ".csv"), files(again, ".csv")
    assert len(old) >= 10
    assert old == new
    assert f'<a href="{run_page("0", again)}"'.encode() in files(again, ".html")["report.html"]
    assert run_page("0", again).startswith(http_store)
