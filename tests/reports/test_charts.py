"""Figures show the numbers that they are given; all of them can be drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from rampart.reports import charts, pictures
from rampart.reports.drawing import Drawing, Panels, save
from rampart.reports.numbers import summarise
from tests.reports.made import radii, values


def rows(panels: Panels) -> list[dict[str, Any]]:
    """All data that the figure carries."""
    return [row for spec in panels.specs for data in spec["datasets"].values() for row in data]


def marks(panels: Panels) -> int:
    return sum(len(spec.get("layer", [spec])) for spec in panels.specs)


def drawn(*drawings: Drawing) -> None:
    save({str(i): drawing for i, drawing in enumerate(drawings)}, Path())
    for i in range(len(drawings)):
        assert Path(f"{i}.png").read_bytes().startswith(b"\x89PNG")
        assert Path(f"{i}.pdf").read_bytes().startswith(b"%PDF")


BRACKET = (("certified_accuracy", 0.3), ("attacked_accuracy", 0.1))


def bracketed() -> pd.DataFrame:
    found = values()
    part = found[found["metric"] == "robust_accuracy"]
    ends = [part.assign(metric=name, value=part["value"] - shift) for name, shift in BRACKET]
    return summarise(pd.concat([found, *ends]))


def published() -> pd.DataFrame:
    """As a baseline gives them."""
    found = values()
    return found[found["step"] == "evaluate"].assign(step="published", value=lambda f: f["value"] - 0.05, run="")


def test_accuracy_is_a_bar_an_arm_with_its_spread() -> None:
    panels = charts.accuracy(summarise(values()))
    shown = {row["arm"]: row for row in rows(panels)}
    assert shown["normal"]["percent"] == pytest.approx(81)
    assert shown["certified"]["high"] - shown["certified"]["percent"] == pytest.approx(100 * 0.02 / 2**0.5)
    drawn(panels)


def test_published_numbers_are_a_layer_of_their_own() -> None:
    ours, both = values(), pd.concat([values(), published()])
    for chart in (charts.accuracy, charts.robust_curves):
        with_theirs = chart(summarise(both))
        assert marks(with_theirs) > marks(chart(summarise(ours)))
        shown = [row for row in rows(with_theirs) if row["step"] == "published"]
        assert {row["arm"] for row in shown} == {"normal", "certified"}
        drawn(with_theirs)


def test_robust_curves_begin_with_clean_accuracy() -> None:
    curve = [row for row in rows(charts.robust_curves(summarise(values()))) if row["arm"] == "normal"]
    points = {row["place"]: row["percent"] for row in curve}
    assert points == pytest.approx({0: 81, 1: 100 * (0.8 - 2 / 255), 2: 100 * (0.8 - 8 / 255)})


def test_brackets_reach_from_what_is_proved_to_what_is_not_broken() -> None:
    panels = charts.robust_curves(bracketed())
    bars = [row for row in rows(panels) if "attacked" in row and row["arm"] == "normal"]
    assert sorted(row["attacked"] - row["certified"] for row in bars) == pytest.approx([20, 20])
    drawn(panels)


def test_the_pareto_front_joins_the_arms_that_none_beats() -> None:
    arm = {"augment": False, "contrastive": "none", "engine": "native", "step": "evaluate", "seed": "0"}
    found = pd.DataFrame(
        [
            {**arm, "method": m, "arm": m, "metric": metric, "eps": eps, "value": value, "run": m, "suspect": False}
            for m, accuracy, proved in (("normal", 0.9, 0.1), ("certified", 0.6, 0.5), ("sabr", 0.6, 0.4))
            for metric, eps, value in (("accuracy", None, accuracy), ("certified_accuracy", 0.01, proved))
        ]
    ).astype({"eps": float})
    panels = charts.pareto(summarise(found))
    front, points = (layer["data"]["name"] for layer in panels.specs[0]["layer"][:2])
    data = panels.specs[0]["datasets"]
    assert {row["arm"] for row in data[front]} == {"normal", "certified"}
    assert {row["arm"] for row in data[points]} == {"normal", "certified", "sabr"}
    drawn(panels)


def test_verdicts_are_bars_that_add_up_to_the_images() -> None:
    ours = values()
    theirs = ours[ours["step"] == "verify"].assign(engine="abcrown")
    panels = charts.verdicts(summarise(pd.concat([ours, theirs])))
    ends: dict[str, float] = {}
    for row in rows(panels):
        ends[row["row"]] = max(ends.get(row["row"], 0), row["end"])
    assert ends == {"normal": 5, "normal (abcrown)": 5, "certified": 5, "certified (abcrown)": 5}
    drawn(panels)


def test_radius_curves_fall_at_each_images_radius() -> None:
    panels = charts.radius_curves(radii())
    curve = sorted((row["radius"], row["percent"]) for row in rows(panels) if row["arm"] == "normal")

    def share(eps: float) -> float:
        """The height of the last step that begins at or before ε."""
        return [percent for radius, percent in curve if radius <= 255 * eps][-1]

    assert [share(eps) for eps in (0.0, 0.0005, 0.0015, 0.0025, 0.004)] == [75, 75, 50, 25, 0]
    drawn(panels)


def test_times_end_where_the_slowest_image_was_settled() -> None:
    arm = {"augment": False, "contrastive": "none", "engine": "native"}
    found = pd.DataFrame(
        [
            {**arm, "method": m, "arm": m, "seconds": seconds}
            for m, settled in (("normal", (1.0, 4.0, None, None)), ("certified", (0.1, 0.2)), ("sabr", (None,)))
            for seconds in settled
        ]
    ).astype({"seconds": float})
    panels = charts.verification_times(found)
    last = {row["arm"]: (row["seconds"], row["percent"]) for row in rows(panels)}
    assert last == {"normal": (4.0, 50.0), "certified": (4.0, 100.0), "sabr": (4.0, 0.0)}
    drawn(panels)


def test_times_of_none_lie_where_a_logarithmic_axis_begins() -> None:
    arm = {"augment": False, "method": "normal", "contrastive": "none", "arm": "normal", "engine": "tool.csv"}
    panels = charts.verification_times(pd.DataFrame([{**arm, "seconds": 0.0}, {**arm, "seconds": float("nan")}]))
    assert [(row["seconds"], row["percent"]) for row in rows(panels)] == [(1e-3, 0.0), (1e-3, 50.0), (1e-3, 50.0)]
    drawn(panels)


def test_scatters_curves_and_confusions_are_drawn() -> None:
    points = pd.DataFrame({"image": [1, 2, 3], "label": [0, 1, 2], "prediction": [0, 1, 1], "x": [0.0, 1, 2], "y": 0.5})
    by_class = charts.umap({"a": points, "b": points}, ("cat", "dog", "ship"))
    assert [row["right"] for row in rows(by_class)[:3]] == [True, True, False]
    by_status = charts.umap_status({"a": points.assign(status=["proved", "broken", "open"])})
    places = points.assign(arm="a", separation=[0.1, 0.2, 0.3], certificate=[1.0, 2, 3], status="proved", kind="bound")
    counts = pd.DataFrame({"arm": "a", "class": ["cat", "dog"], "taken for": ["cat", "cat"], "percent": [100.0, 40]})
    arm = {"augment": True, "contrastive": "double", "engine": "native", "method": "sabr", "arm": "s", "stage": "head"}
    curves = pd.DataFrame(
        [{**arm, "metric": m, "epoch": e, "value": 3.0} for m in ("loss", "accuracy") for e in (1, 2)]
    )
    drawn(by_class, by_status, charts.geometry(places), charts.confusion(counts), charts.training_curves(curves))


def test_an_image_is_shown_beside_its_twin() -> None:
    images = np.random.default_rng(0).random((2, 3, 4, 4), dtype=np.float32)
    examples = (images + 0.02).clip(0, 1)
    picture = pictures.twins(images, examples, ["cat", "dog"], ["dog", "ship"])
    axes = picture.figure.axes
    assert [a.get_title() for a in axes] == ["cat", "dog", "dog", "ship", "", ""]
    shown = np.asarray(axes[3].images[0].get_array())
    assert np.allclose(shown, examples[1].transpose(1, 2, 0))
    drawn(picture)
