"""Tables from hand-made evidence."""

from __future__ import annotations

import pandas as pd

from rampart.reports import tables
from rampart.reports.numbers import summarise
from tests.reports.made import radii, values


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
    # In one seed alone, too.
    seeds = [{**named("trust/noise", value), "seed": str(seed)} for seed, value in enumerate((0.05, 0.0, 0.0))]
    assert tables.trust(summarise(pd.DataFrame(seeds).assign(suspect=False)))["noise (≤ 2)"].tolist() == ["1.7 †"]


def test_corruptions_have_their_columns_and_their_mean() -> None:
    rows = [named("corrupted/jpeg", 0.25), named("corrupted/gaussian_noise", 0.75), named("corrupted_accuracy", 0.5)]
    table = tables.corruptions(summarise(pd.DataFrame(rows).assign(suspect=False)))
    assert table[["gaussian noise", "jpeg", "contrast", "mean"]].iloc[0].tolist() == ["75.00", "25.00", "-", "50.00"]


def test_profiles_stand_side_by_side_and_what_stands_in_for_certified_beside_it() -> None:
    first = summarise(values())
    second = first.assign(mean=first["mean"] / 2).replace({"method": {"certified": "sabr"}})
    published = first[first["metric"] == "accuracy"].assign(step="published", mean=0.125)
    table = tables.side_by_side({"a": pd.concat([first, published]), "b": second}, [8 / 255, 1 / 255])
    assert list(table.columns[3:]) == [
        "accuracy: published", "accuracy: a", "accuracy: b", "robust at 8/255: a", "robust at 8/255: b",
    ]  # fmt: skip
    assert table["method"].tolist() == ["normal", "certified"]
    assert table["accuracy: published"].tolist() == ["12.5", "12.5"]
    assert table["accuracy: a"].tolist() == ["81.0", "51.0"]
    assert table["accuracy: b"].tolist() == ["40.5", "25.5"]


def test_models_of_no_arm_have_rows_of_their_own_side_by_side_and_marks() -> None:
    found = values().replace({"method": {"normal": "other", "certified": "other"}})
    found["suspect"] = (found["arm"] == "normal") & (found["metric"] == "robust_accuracy")
    table = tables.side_by_side({"a": summarise(found)}, [8 / 255])
    assert table["method"].tolist() == ["certified", "normal"]
    assert table["accuracy: a"].tolist() == ["51.0", "81.0"]
    assert table["robust at 8/255: a"].tolist() == ["46.9", "76.9 †"]


def test_cells_of_markdown_keep_to_their_columns() -> None:
    text = tables.markdown(pd.DataFrame({"method": ["my|net"], "command": ["a | b"]}))
    assert text.splitlines()[-1].replace(" ", "") == "|my\\|net|`a\\|b`|"


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


def test_radii_have_quartiles_and_a_curve() -> None:
    table = tables.radii(radii())
    assert table["images"].tolist() == [4, 3]
    assert table["misclassified"].tolist() == [1, 0]
    assert table["median × 255"].tolist() == [f"{0.002 * 255:.3f}", f"{0.01 * 255:.3f}"]
    assert table["runs"].tolist() == ["run of normal", "run of certified"]


def test_latex_is_booktabs_and_escaped() -> None:
    text = tables.latex(tables.accuracy(summarise(values())).drop(columns="runs"), "A_b", "tab:x")
    assert "\\toprule" in text
    assert "$\\pm$" in text
    assert "accuracy \\%" in text


def test_geometry_is_set_against_certificates() -> None:
    arm = {"augment": False, "contrastive": "none", "engine": "native", "method": "normal", "arm": "normal"}
    places = pd.DataFrame({"within": 0.25, "between": [0.5 + i / 100 for i in range(9)], "margin": range(9)})
    places = places.assign(separation=places["between"] - places["within"], certificate=range(9, 0, -1), run="r")
    table = tables.geometry(places.assign(**arm))
    assert table[["within", "between", "margin"]].iloc[0].tolist() == ["0.250", "0.540", "4.000"]
    assert table["ρ(separation, certificate)"].tolist() == ["-1.00"]
    # Of few images, or of infinite bounds, a correlation says nothing.
    few = places.assign(certificate=[*range(7), float("inf"), float("nan")])
    assert tables.geometry(few.assign(**arm))["ρ(margin, certificate)"].tolist() == ["-"]


def test_costs_are_means_over_seeds_on_one_machine() -> None:
    nan = float("nan")
    rows = pd.DataFrame(
        [
            ("a", "0", "train", "cpu", 10.0, 500.0, nan, nan),
            ("a", "1", "train", "cpu", 20.0, 700.0, nan, nan),
            ("a", "2", "train", "gpu", 2.0, 9000.0, nan, nan),
            ("b", "0", "train", "cpu", 30.0, nan, 400.0, 1600.0),
            ("a", "0", "evaluate", "cpu", 4.0, nan, nan, nan),
            ("b", "0", "verify", "gpu", 5.0, nan, nan, nan),
        ],
        columns=["arm", "seed", "step", "machine", "seconds", "train", "encoder", "head"],
    )
    rows = rows.assign(augment=False, contrastive="none", engine="native", method="normal", run=rows.index.astype(str))
    assert tables.costs(rows).iloc[:, 3:].to_numpy().tolist() == [
        ["cpu", "15.0", "4.0", "-", "600", "0 1 4"],
        ["gpu", "2.0", "-", "-", "9000", "2"],
        ["cpu", "30.0", "-", "-", "400 / 1600", "3"],
        ["gpu", "-", "-", "5.0", "-", "5"],
    ]


def test_seeds_that_were_verified_at_different_radii_have_rows_of_their_own() -> None:
    found = values()
    other = (found["step"] == "verify") & (found["seed"] == "1")
    found.loc[other, "eps"] = 4 / 255
    table = tables.verdicts(summarise(found))
    assert table[["method", "ε", "images", "runs"]].to_numpy().tolist() == [
        [method, eps, "5", f"v-{method}-{seed}"]
        for method in ("normal", "certified")
        for eps, seed in (("2/255", 0), ("4/255", 1))
    ]


def test_a_row_names_all_runs_of_its_numbers() -> None:
    found = values()
    table = tables.by_eps(summarise(found[(found["seed"] == "0") | (found["eps"] != 2 / 255)]), "asr")
    assert set(table["runs"][0].split()) == {"normal-0", "normal-1"}
