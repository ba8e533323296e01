"""Tables and figures from hand-made evidence."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from mlflow import MlflowClient

from rampart.errors import Contradiction, RampartError
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
            key = {"augment": False, "method": method, "contrastive": "none", "arm": method, "engine": "native"}
            key["seed"] = seed
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
    return pd.DataFrame(rows).astype({"eps": float}).assign(suspect=False)


def test_seeds_become_mean_and_deviation_and_keep_their_runs() -> None:
    table = tables.accuracy(summarise(values()))
    assert list(table["method"]) == ["normal", "certified"]
    assert list(table["accuracy %"]) == ["81.00 ± 1.41", "51.00 ± 1.41"]
    assert set(table["runs"][0].split()) == {"normal-0", "normal-1"}


def test_radii_are_columns_in_ascending_order() -> None:
    table = tables.by_eps(summarise(values()), "asr")
    assert list(table.columns) == ["method", "augmentation", "SupCon", "ε 2/255", "ε 8/255", "runs"]
    assert table["ε 8/255"][0] == "3.14 ± 0.00"


def test_rates_of_an_attack_that_failed_a_check_are_marked() -> None:
    found = values()
    found["suspect"] = (found["run"] == "normal-1") & found["metric"].isin(["asr", "robust_accuracy"])
    summary = summarise(found)
    assert tables.by_eps(summary, "asr")["ε 8/255"].tolist() == ["3.14 ± 0.00 †", "3.14 ± 0.00"]
    assert "†" not in " ".join(tables.accuracy(summary)["accuracy %"])
    latex = tables.latex(tables.by_eps(summary, "asr").drop(columns="runs"), "c", "l")
    assert "$\\dagger$" in latex
    assert "†" not in latex


def named(metric: str, value: float) -> dict[str, object]:
    key = {"augment": False, "method": "normal", "contrastive": "none", "arm": "normal", "engine": "native"}
    return {**key, "seed": "0", "step": "evaluate", "metric": metric, "eps": float("nan"), "value": value, "run": "r"}


def test_checks_that_failed_are_marked_and_missing_ones_are_a_stroke() -> None:
    rows = [named("trust/zero_gradients", 0.5), named("trust/noise", 0.0), named("corrupted/jpeg", 0.25)]
    table = tables.trust(summarise(pd.DataFrame(rows).assign(suspect=False)))
    assert table["zero gradients (≤ 5)"].tolist() == ["50.0 †"]
    assert table["noise (≤ 2)"].tolist() == ["0.0"]
    assert table["transfer (≤ 3)"].tolist() == ["-"]


def test_corruptions_have_their_columns_and_their_mean() -> None:
    rows = [named("corrupted/jpeg", 0.25), named("corrupted/gaussian_noise", 0.75), named("corrupted_accuracy", 0.5)]
    table = tables.corruptions(summarise(pd.DataFrame(rows).assign(suspect=False)))
    assert table[["gaussian noise", "jpeg", "contrast", "mean"]].iloc[0].tolist() == ["75.00", "25.00", "-", "50.00"]


def test_verdicts_keep_every_word() -> None:
    table = tables.verdicts(summarise(values()))
    assert list(table.columns[4:-1]) == [
        "safe-incomplete", "safe", "unsafe", "timeout", "unknown", "error", "misclassified", "images", "certified %",
    ]  # fmt: skip
    assert table["unknown"][0] == "2.0 ± 0.0"
    assert table["certified %"][0] == "60.00 ± 0.00"
    assert table["ε"][0] == "2/255"


def test_another_verifier_has_rows_of_its_own() -> None:
    ours = values()
    theirs = ours[ours["step"] == "verify"].assign(engine="abcrown", run="other")
    theirs.loc[theirs["metric"] == "unknown", "value"] = 4
    summary = summarise(pd.concat([ours, theirs]))
    table = tables.verdicts(summary)
    assert sorted(zip(table["method"], table["verifier"], table["unknown"], strict=True)) == sorted(
        (method, engine, f"{count:.1f} ± 0.0")
        for method in ("normal", "certified")
        for engine, count in (("native", 2), ("abcrown", 4))
    )
    labels = [text.get_text() for text in figures.verdict_bars(summary).axes[0].get_yticklabels()]
    assert sorted(labels) == ["certified", "certified (abcrown)", "normal", "normal (abcrown)"]


def test_verified_accuracy_is_a_bracket() -> None:
    found = values()
    part = found[found["metric"] == "robust_accuracy"]
    lower, upper = (part.assign(metric=name, value=part["value"] - shift) for name, shift in BRACKET)
    table = tables.brackets(summarise(pd.concat([found, lower, upper])))
    base = 100 * (0.8 - 2 / 255)
    assert table["ε 2/255"][0] == f"{base - 30:.2f} ± 0.00 – {base - 10:.2f} ± 0.00"
    # Runs of older versions know the lower end alone.
    mixed = tables.brackets(summarise(pd.concat([found, lower, upper[upper["method"] == "certified"]])))
    assert ["–" in text for text in mixed["ε 2/255"]] == [method == "certified" for method in mixed["method"]]
    assert tables.brackets(summarise(pd.concat([found, lower])))["ε 2/255"][0] == f"{base - 30:.2f} ± 0.00"


BRACKET = (("certified_accuracy", 0.3), ("attacked_accuracy", 0.1))


def radii() -> pd.DataFrame:
    key = {"augment": False, "contrastive": "none", "engine": "native"}
    rows = [
        {**key, "method": method, "arm": method, "run": f"run of {method}", "radius": radius}
        for method, found in (("normal", (0.001, 0.003, float("nan"), 0.002)), ("certified", (0.01, 0.0, 0.02)))
        for radius in found
    ]
    return pd.DataFrame(rows)


def test_radii_have_quartiles_and_a_curve() -> None:
    table = tables.radii(radii())
    assert table["images"].tolist() == [4, 3]
    assert table["misclassified"].tolist() == [1, 0]
    assert table["median × 255"].tolist() == [f"{0.002 * 255:.3f}", f"{0.01 * 255:.3f}"]
    assert table["runs"].tolist() == ["run of normal", "run of certified"]
    curve = figures.radius_curves(radii()).axes[0].get_lines()[0]

    def share(eps: float) -> float:
        """Of the steps at ε × 255: the height of the last one that begins at or before it."""
        return float(curve.get_ydata()[curve.get_xdata() <= 255 * eps][-1])

    assert [share(eps) for eps in (0.0, 0.0005, 0.0015, 0.0025, 0.004)] == [75, 75, 50, 25, 0]


def test_a_counterexample_is_shown_beside_its_image() -> None:
    images = torch.rand(2, 3, 4, 4)
    examples = (images + 0.02 * torch.rand(2, 3, 4, 4).sign()).clamp(0, 1)
    figure = figures.counterexamples(images, examples, [0, 1], [1, 2], ("cat", "dog", "ship"))
    assert [axes.get_title() for axes in figure.axes] == ["cat", "dog", "dog", "ship", "", ""]
    shown = torch.from_numpy(figure.axes[3].images[0].get_array().data).permute(2, 0, 1)
    assert torch.allclose(shown, examples[1])


def test_a_model_that_is_proved_and_broken_stops_the_comparison() -> None:
    """Whichever runs say so: here an evaluation and a verification."""
    row = {"image": [3], "label": [1], "prediction": [1], "correct": [True]}
    with open_run("evaluate") as run:
        _evaluation(run, 0, 0.9)
        run.table(pd.DataFrame({**row, "attacked/0.1": [True]}), "ledger.parquet")
    with open_run("verify") as other:
        _evaluation(other, 0, 0.9)
        other.params({"eps_pixel": "0.1"})
        verdict = {"eps": [0.1], "verdict": ["safe"], "seconds": [1.0], "radius": [float("nan")]}
        other.table(pd.DataFrame({**row, **verdict}), "ledger.parquet")
    with pytest.raises(Contradiction, match=f"image 3 was proved robust at ε 0.1 .run {other.id}. and broken"):
        collect(run.experiment, CompareSettings())


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
