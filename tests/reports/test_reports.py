"""Tables and figures from hand-made evidence."""

from __future__ import annotations

import pandas as pd
import pytest
from mlflow import MlflowClient

from rampart.errors import RampartError
from rampart.reports import figures, tables
from rampart.reports.evidence import collect, summarise
from rampart.settings import CompareSettings
from rampart.tracking import Run, open_run
from rampart.tracking.queries import find_runs
from tests.conftest import Study


def values() -> pd.DataFrame:
    """Two arms, two seeds, in no good order."""
    rows = []
    for method, base in (("certified", 0.5), ("normal", 0.8)):
        for seed in ("1", "0"):
            key = {"augment": False, "method": method, "contrastive": "none", "arm": method, "seed": seed}
            shift = 0.02 * int(seed)
            run = f"{method}-{seed}"
            rows.append(
                {**key, "step": "evaluate", "metric": "accuracy", "eps": None, "value": base + shift, "run": run}
            )
            for eps in (8 / 255, 2 / 255):
                rate = {**key, "step": "evaluate", "eps": eps, "run": run}
                rows.append({**rate, "metric": "robust_accuracy", "value": base - eps})
                rows.append({**rate, "metric": "asr", "value": eps})
            for metric, value in (("safe-incomplete", 3), ("unknown", 2), ("images", 5), ("certified_accuracy", 0.6)):
                entry = {**key, "step": "verify", "metric": metric, "eps": 2 / 255, "value": value, "run": f"v-{run}"}
                rows.append(entry)
    return pd.DataFrame(rows).astype({"eps": float})


def test_seeds_become_mean_and_deviation_and_keep_their_runs() -> None:
    table = tables.accuracy(summarise(values()))
    assert list(table["method"]) == ["normal", "certified"]
    assert list(table["accuracy %"]) == ["81.00 ± 1.41", "51.00 ± 1.41"]
    assert set(table["runs"][0].split()) == {"normal-0", "normal-1"}


def test_radii_are_columns_in_ascending_order() -> None:
    table = tables.by_eps(summarise(values()), "asr")
    assert list(table.columns) == ["method", "augmentation", "SupCon", "ε 2/255", "ε 8/255", "runs"]
    assert table["ε 8/255"][0] == "3.14 ± 0.00"


def test_verdicts_keep_every_word() -> None:
    table = tables.verdicts(summarise(values()))
    assert list(table.columns[4:-1]) == [
        "safe-incomplete", "safe", "unsafe", "timeout", "unknown", "error", "misclassified", "images", "certified %",
    ]  # fmt: skip
    assert table["unknown"][0] == "2.0 ± 0.0"
    assert table["certified %"][0] == "60.00 ± 0.00"
    assert table["ε"][0] == "2/255"


def test_latex_is_booktabs_and_escaped() -> None:
    text = tables.latex(tables.accuracy(summarise(values())).drop(columns="runs"), "A_b", "tab:x")
    assert "\\toprule" in text
    assert "$\\pm$" in text
    assert "accuracy \\%" in text


def test_figures_show_the_numbers_of_the_table() -> None:
    summary = summarise(values())
    figure = figures.accuracy_bars(summary)
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert heights == pytest.approx([81, 51])
    lines = figures.robust_curves(summary).axes[0].get_lines()
    shown = {tuple(line.get_ydata()) for line in lines if len(line.get_ydata()) == 3}
    assert any(curve == pytest.approx((81, 100 * (0.8 - 2 / 255), 100 * (0.8 - 8 / 255))) for curve in shown)
    widths = [bar.get_width() for bar in figures.verdict_bars(summary).axes[0].patches]
    assert sum(widths) == 10


def _evaluation(run: Run, seed: int, accuracy: float, digest: str = "d") -> None:
    run.tags({"profile": "quick", "arm": "normal", "method": "normal", "augment": False, "contrastive": "none"})
    run.tags({"seed": seed, "dataset_digest": digest, "model": "runs:/x/model", "dataset": "digits", "split": "3/1/2"})
    run.metrics({"accuracy": accuracy, "asr/0.1": 0.5})


def test_the_newest_finished_run_of_an_arm_and_seed_counts() -> None:
    for seed, accuracy in ((0, 0.1), (0, 0.7), (1, 0.9)):
        with open_run("evaluate") as run:
            _evaluation(run, seed, accuracy)
    with open_run("evaluate") as failed:
        _evaluation(failed, 0, 0.0)
    MlflowClient().set_terminated(failed.id, "FAILED")
    evidence = collect(run.experiment, CompareSettings())
    found = evidence.values[evidence.values["metric"] == "accuracy"]
    assert sorted(found["value"]) == [0.7, 0.9]
    assert any("older run" in note for note in evidence.notes)


def test_runs_on_another_dataset_are_left_out_and_said() -> None:
    with open_run("evaluate") as run:
        _evaluation(run, 0, 0.5, digest="old")
    with open_run("evaluate") as run:
        _evaluation(run, 1, 0.6, digest="new")
    evidence = collect(run.experiment, CompareSettings())
    assert set(evidence.values["run"]) == {run.id}
    assert any("another dataset" in note for note in evidence.notes)


def test_a_run_that_is_no_study_is_refused() -> None:
    with open_run("evaluate") as run:
        _evaluation(run, 0, 0.5)
    with pytest.raises(RampartError, match="no study"):
        collect(run.experiment, CompareSettings(study=run.id))


def test_umap_points_of_every_arm_are_found(study: Study) -> None:
    main = find_runs("0", {"step": "main"})["run_id"].iloc[-1]
    evidence = collect("0", CompareSettings(study=main))
    assert set(evidence.points) == {"normal", "certified", "normal+supcon-double", "certified+supcon-double"}
    assert evidence.classes == tuple("0123456789")
    assert all(len(points) == 30 for points in evidence.points.values())
