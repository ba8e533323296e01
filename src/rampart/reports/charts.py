"""The interactive figures. All take tidy frames with the columns of `numbers.KEYS`, in the order of the tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import altair as alt
import pandas as pd

from rampart.reports.drawing import Panels
from rampart.reports.encoding import (
    colours,
    dashes,
    lighter,
    number,
    radius_axis,
    scale_of,
    shapes,
    status_colour,
    status_shape,
)
from rampart.reports.numbers import KEYS
from rampart.reports.style import CLASS_SCHEMES, VERDICT_COLOURS
from rampart.settings import eps_text

WIDTH, HEIGHT = 300, 240
SMALL = 165
ALL = [0, 100]


def accuracy(summary: pd.DataFrame) -> Panels:
    """Clean accuracy by arm, a panel each for training without and with augmentation (Figure 3); a stroke where another
    source has published one."""
    rows = _percent(summary[(summary["metric"] == "accuracy") & summary["step"].isin(["evaluate", "published"])])

    def panel(part: pd.DataFrame) -> alt.LayerChart:
        ours, published = part[part["step"] == "evaluate"], part[part["step"] == "published"]
        x = alt.X("label:N", sort=None, title=None, axis=alt.Axis(labelAngle=-30, labelLimit=160))
        y = alt.Y("percent:Q", title="test accuracy (%)", scale=alt.Scale(domain=ALL))
        base = alt.Chart(ours).encode(x=x)
        layers = [
            base.mark_bar(stroke="black").encode(
                y=y,
                color=colours(ours, legend=False),
                opacity=lighter(ours),
                tooltip=["arm", number("percent", "accuracy %"), number("spread", "±"), "seeds"],
            ),
            base.mark_rule().encode(y="low:Q", y2="high:Q"),
            base.mark_text(dy=-6, baseline="bottom").encode(y="high:Q", text=alt.Text("percent:Q", format=".1f")),
        ]
        if len(published):
            stroke = alt.Chart(published).mark_tick(color="black", thickness=2, width=26)
            layers.append(stroke.encode(x=x, y=y, tooltip=["arm", number("percent", "published accuracy %")]))
        return alt.layer(*layers)

    return _by_augmentation(rows, panel)


def robust_curves(summary: pd.DataFrame) -> Panels:
    """Robust accuracy by arm over ε, 0 being clean accuracy (Figure 4), with the bracket from certified accuracy up to
    what no attack has broken, where there is one; dotted where another source has published it."""
    chosen = summary[
        summary["metric"].isin(["robust_accuracy", "accuracy"]) & summary["step"].isin(["evaluate", "published"])
    ]
    rows = _percent(chosen.fillna({"eps": 0.0}))
    brackets = _brackets(summary)
    radii = sorted({*rows["eps"], *brackets["eps"]})
    x = radius_axis(radii)

    def panel(part: pd.DataFrame) -> alt.LayerChart:
        ours = part[part["step"] == "evaluate"].assign(place=lambda f: f["eps"].map(radii.index))
        published = part[part["step"] == "published"].assign(place=lambda f: f["eps"].map(radii.index))
        y = alt.Y("percent:Q", title="robust accuracy (%)", scale=alt.Scale(domain=ALL))
        keyed = {"x": x, "color": colours(ours), "detail": "arm:N"}
        tip = ["arm", "ε", number("percent", "robust accuracy %"), number("spread", "±"), "seeds"]
        base = alt.Chart(ours).encode(**keyed)
        layers: list[Any] = [
            base.mark_line().encode(y=y, strokeDash=dashes(ours)),
            base.mark_point(filled=True, size=40).encode(y=y, shape=shapes(ours), tooltip=tip),
            base.mark_rule().encode(y="low:Q", y2="high:Q"),
        ]
        if len(published):
            dotted = alt.Chart(published).encode(**keyed, y=y)
            tip = ["arm", "ε", number("percent", "published %")]
            layers += [
                dotted.mark_line(strokeDash=[1, 3], opacity=0.7),
                dotted.mark_point(size=30, opacity=0.7).encode(shape=shapes(published), tooltip=tip),
            ]
        known = brackets[brackets["augment"].isin(part["augment"])]
        if len(known):
            order = {arm: i for i, arm in enumerate(dict.fromkeys(known["arm"]))}
            shift = known["arm"].map(order) - (len(order) - 1) / 2
            known = known.assign(place=known["eps"].map(radii.index) + 0.5 * shift / max(len(order), 4))
            bars = alt.Chart(known).mark_bar(width=3, opacity=0.55).encode(
                x=x, y="certified:Q", y2="attacked:Q", color=colours(known), detail="arm:N",
                tooltip=["arm", "ε", number("certified", "proved %"), number("attacked", "not broken %")],
            )  # fmt: skip
            layers.insert(0, bars)
        return alt.layer(*layers)

    return _by_augmentation(rows, panel)


def pareto(summary: pd.DataFrame) -> Panels:
    """Accuracy against certified accuracy, one panel for each ε at which images were to be proved; the line joins the
    arms that none beats in both."""
    accuracy = summary[(summary["metric"] == "accuracy") & (summary["step"] == "evaluate")]
    proved = summary[(summary["metric"] == "certified_accuracy") & (summary["step"] == "evaluate")]
    clean = accuracy.set_index("arm")["mean"]
    rows = proved[proved["arm"].isin(clean.index)]
    rows = _percent(rows.assign(accuracy=100 * rows["arm"].map(clean)))
    top = max(1.1 * rows["percent"].max(), 1)  # nothing may be proved at all

    def panel(part: pd.DataFrame) -> alt.LayerChart:
        x = alt.X("accuracy:Q", title="test accuracy (%)", scale=alt.Scale(zero=False, padding=16))
        y = alt.Y("percent:Q", title="certified accuracy (%)", scale=alt.Scale(domain=[0, top]))
        tip = ["arm", number("accuracy", "accuracy %"), number("percent", "certified %"), "seeds"]
        points = alt.Chart(part).encode(x=x, y=y)
        front = alt.Chart(part[_undominated(part)]).mark_line(color="#888888", strokeDash=[4, 3])
        return alt.layer(
            front.encode(x=x, y=y),
            points.mark_point(filled=True, size=90, opacity=1).encode(
                color=colours(part),
                shape=shapes(part),
                tooltip=tip,
                stroke=alt.condition(alt.datum.augment, alt.value("black"), alt.value("transparent")),
            ),
        ).properties(width=WIDTH, height=HEIGHT, title=f"at ε {part['ε'].iloc[0]}")

    return Panels([panel(part) for _, part in rows.groupby("eps")])


def verdicts(summary: pd.DataFrame) -> Panels:
    """Verdicts by arm as stacked bars (Table 1)."""
    rows = summary[summary["step"].eq("verify") & summary["metric"].isin(list(VERDICT_COLOURS))]
    rows = rows.assign(
        count=rows["mean"],
        order=rows["metric"].map(list(VERDICT_COLOURS).index),
        verdict=rows["metric"],
        row=_row_names(rows),
        ε=rows["eps"].map(eps_text),
    )
    rows = rows[rows["count"] > 0].sort_values("order", kind="stable")
    # Where each bar begins and ends, for its number to stand in its middle.
    rows["end"] = rows.groupby("row", sort=False)["count"].cumsum()
    rows["middle"] = rows["end"] - rows["count"] / 2
    order = list(dict.fromkeys(_row_names(summary[summary["step"] == "verify"])))
    y = alt.Y("row:N", sort=order, title=None, axis=alt.Axis(labelLimit=260))
    colour = alt.Color("verdict:N", scale=scale_of(VERDICT_COLOURS, rows["verdict"]), title=None)
    base = alt.Chart(rows).encode(y=y)
    bars = base.mark_bar(stroke="white").encode(
        x=alt.X("count:Q", title="images", axis=alt.Axis(tickMinStep=1), scale=alt.Scale(nice=False)),
        color=colour,
        order="order:Q",
        tooltip=["row", "verdict", alt.Tooltip("count:Q", format=".3g"), "ε", "seeds"],
    )
    wide = 0.05 * rows["end"].max()  # enough for a number
    text = (
        base.transform_filter(alt.datum["count"] >= wide)
        .mark_text(fontSize=9)
        .encode(
            x="middle:Q",
            text=alt.Text("count:Q", format=".3~g"),
            color=alt.condition("datum.verdict == 'error'", alt.value("white"), alt.value("black")),
        )
    )
    return Panels([alt.layer(bars, text).properties(width=460, height=alt.Step(20))], 1)


def verification_times(settled: pd.DataFrame) -> Panels:
    """Share of the images that is settled (proved or refuted) within so many seconds each; `settled` has a row an image
    and its seconds, NaN where it was not settled."""
    settled = settled.assign(seconds=settled["seconds"].clip(lower=1e-3))  # the axis is logarithmic
    rows = []
    for _, part in settled.groupby(["arm", "engine"], sort=False):
        found = part["seconds"].dropna().sort_values()
        share = [100 * (i + 1) / len(part) for i in range(len(found))]
        keys = part.iloc[0][KEYS].to_dict()
        # Each curve rises from the axis and goes on to the right.
        rises = [(found.min(), 0.0)] if share else []
        end = (settled["seconds"].max(), share[-1] if share else 0.0)
        for seconds, percent in [*rises, *zip(found, share, strict=True), end]:
            rows.append({**keys, "seconds": seconds, "percent": percent})

    x = alt.X("seconds:Q", scale=alt.Scale(type="log"), title="seconds an image", axis=alt.Axis(format="~g"))
    tips = ["arm", "engine", number("percent", "settled %"), alt.Tooltip("seconds:Q", format=".3g")]
    return _steps(pd.DataFrame(rows), x, "images settled (%)", tips)


def radius_curves(radii: pd.DataFrame) -> Panels:
    """Share of the images that are proved robust at ε, by arm: certified-radius curves."""
    rows = []
    for _, part in radii.groupby(["arm", "engine"], sort=False):
        found = part["radius"].dropna().sort_values()
        keys = part.iloc[0][KEYS].to_dict()
        # Proved at ε are the images whose radius is ε or more.
        rows.append({**keys, "radius": 0.0, "percent": 100 * len(found) / len(part)})
        for i, radius in enumerate(found):
            rows.append({**keys, "radius": 255 * radius, "percent": 100 * (len(found) - i - 1) / len(part)})

    x = alt.X("radius:Q", title="ε × 255 (pixels in [0, 1])")
    tips = ["arm", alt.Tooltip("radius:Q", format=".3f", title="ε × 255"), number("percent", "proved %")]
    return _steps(pd.DataFrame(rows), x, "proved robust (% of images)", tips)


def _steps(rows: pd.DataFrame, x: alt.X, title: str, tips: list[Any]) -> Panels:
    """Curves of `percent` that change at each point."""

    def panel(part: pd.DataFrame) -> alt.Chart:
        return (
            alt.Chart(part)
            .mark_line(interpolate="step-after")
            .encode(
                x=x,
                y=alt.Y("percent:Q", title=title, scale=alt.Scale(domain=ALL)),
                color=colours(part),
                strokeDash=dashes(part),
                detail=["arm:N", "engine:N"],
                tooltip=tips,
            )
        )

    return _by_augmentation(rows, panel)


def confusion(counts: pd.DataFrame) -> Panels:
    """Which class is taken for which: a panel an arm; `counts` has arm, class, taken for, and the share of the class in
    percent."""
    kinds = list(dict.fromkeys(counts["class"]))

    def panel(part: pd.DataFrame) -> alt.Chart:
        return (
            alt.Chart(part)
            .mark_rect()
            .encode(
                x=alt.X("taken for:N", sort=kinds, axis=alt.Axis(labelAngle=-45, labelFontSize=8)),
                y=alt.Y("class:N", sort=kinds, axis=alt.Axis(labelFontSize=8)),
                color=alt.Color("percent:Q", scale=alt.Scale(scheme="blues", domain=ALL), legend=None),
                tooltip=["class", "taken for", alt.Tooltip("percent:Q", format=".1f")],
            )
        )

    return _by_arm({str(arm): part for arm, part in counts.groupby("arm", sort=False)}, panel)


def umap(points: Mapping[str, pd.DataFrame], classes: Sequence[str]) -> Panels:
    """UMAP of embeddings, one panel an arm, coloured by class; wrong predictions are crosses (Figure 1)."""
    colour = alt.Color(
        "class:N",
        sort=list(classes),
        scale=alt.Scale(domain=list(classes), scheme=CLASS_SCHEMES[len(classes) <= 10]),
        legend=alt.Legend(columns=5, title=None, symbolType="circle"),
    )
    named = {
        arm: frame.assign(
            **{"class": [classes[i] for i in frame["label"]]}, right=frame["label"] == frame["prediction"]
        )
        for arm, frame in points.items()
    }
    shape = alt.Shape("right:N", scale=alt.Scale(domain=[True, False], range=["circle", "cross"]), legend=None)
    return _by_arm(named, lambda frame: _scatter(frame, colour, shape, "class"))


def umap_status(points: Mapping[str, pd.DataFrame]) -> Panels:
    """The same, coloured by `status`: what is known of the image at one ε."""
    return _by_arm(points, lambda frame: _scatter(frame, status_colour(), status_shape(), "status"))


def geometry(points: pd.DataFrame) -> Panels:
    """How far an image's embedding is from other classes beyond its own, against what could be proved of it: a panel an
    arm; `points` has arm, separation, certificate, status."""
    title = points["kind"].iloc[0]

    def panel(part: pd.DataFrame) -> alt.Chart:
        return (
            alt.Chart(part[["image", "separation", "certificate", "status"]])
            .mark_point(filled=True, size=35, opacity=0.8)
            .encode(
                x=alt.X("separation:Q", title="between − within"),
                y=alt.Y("certificate:Q", title=title),
                color=status_colour(),
                shape=status_shape(),
                tooltip=["image", "status", alt.Tooltip("separation:Q", format=".3f"),
                         alt.Tooltip("certificate:Q", format=".4g")],
            )
        )  # fmt: skip

    return _by_arm({str(arm): part for arm, part in points.groupby("arm", sort=False)}, panel)


def training_curves(curves: pd.DataFrame) -> Panels:
    """Loss and validation accuracy by epoch; `curves` has KEYS, stage, metric, epoch, and value (mean over seeds)."""
    charts = []
    for augment, part in curves.groupby("augment"):
        for metric, lines in part.groupby("metric", sort=False):
            percent = metric != "loss"
            scale = alt.Scale(domain=ALL) if percent else alt.Scale(zero=False)
            charts.append(
                alt.Chart(lines)
                .mark_line()
                .encode(
                    x=alt.X("epoch:Q", title="epoch", axis=alt.Axis(tickMinStep=1)),
                    y=alt.Y("value:Q", title=f"{metric} (%)" if percent else str(metric), scale=scale),
                    color=colours(lines),
                    strokeDash=dashes(lines),
                    detail=["arm:N", "stage:N"],
                    tooltip=["arm", "stage", "epoch", alt.Tooltip("value:Q", format=".4g")],
                )
                .properties(width=WIDTH, height=180, title=_augmented(bool(augment)))
            )
    return Panels(charts, 3)


def _by_augmentation(rows: pd.DataFrame, panel: Any) -> Panels:
    """One panel for each value of `augment` that occurs, side by side on one scale."""
    rows = rows.assign(label=_labels(rows))
    charts = [
        panel(part).properties(width=WIDTH, height=HEIGHT, title=_augmented(bool(augment)))
        for augment, part in rows.groupby("augment")
    ]
    return Panels(charts)


def _by_arm(frames: Mapping[str, pd.DataFrame], panel: Callable[[pd.DataFrame], alt.Chart]) -> Panels:
    """A small panel an arm, four in a row."""
    charts = [panel(f).properties(width=SMALL, height=SMALL, title=str(arm)) for arm, f in frames.items()]
    return Panels(charts, 4)


def _augmented(augment: bool) -> str:
    return "with augmentation" if augment else "without augmentation"


def _labels(rows: pd.DataFrame) -> list[str]:
    names = rows["arm"].where(rows["method"] == "other", rows["method"])
    pairs = zip(names, rows["contrastive"], strict=True)
    return [name if kind == "none" else f"{name} + SupCon {kind}" for name, kind in pairs]


def _row_names(rows: pd.DataFrame) -> list[str]:
    """Arms with the verifier, where it is not ours, and ε, where there are several."""
    several = rows["eps"].nunique() > 1
    triples = zip(rows["arm"], rows["engine"], rows["eps"], strict=True)
    return [
        f"{arm}{'' if engine == 'native' else f' ({engine})'}{f' at ε {eps_text(eps)}' if several else ''}"
        for arm, engine, eps in triples
    ]


def _percent(summary: pd.DataFrame) -> pd.DataFrame:
    """Shares as percentages with the ends of their spread over seeds, and ε as text."""
    spread = 100 * summary["std"].fillna(0)
    percent = 100 * summary["mean"]
    return summary.drop(columns="runs").assign(
        percent=percent,
        spread=spread,
        low=percent - spread,
        high=percent + spread,
        ε=["" if pd.isna(eps) else eps_text(eps) for eps in summary["eps"]],
    )


def _brackets(summary: pd.DataFrame) -> pd.DataFrame:
    """A row an arm and ε with what is proved and what is not broken, in percent."""
    rows = summary[(summary["step"] == "evaluate") & summary["eps"].notna()]
    keys = ["augment", "method", "contrastive", "arm", "eps"]
    ends = [
        rows[rows["metric"] == metric].set_index(keys)["mean"].mul(100).rename(name)
        for metric, name in (("certified_accuracy", "certified"), ("attacked_accuracy", "attacked"))
    ]
    found = pd.concat(ends, axis=1, join="inner").reset_index()
    return found.assign(ε=[eps_text(eps) for eps in found["eps"]])


def _undominated(rows: pd.DataFrame) -> list[bool]:
    """Which rows no other one beats in both accuracy and percent."""
    pairs = list(zip(rows["accuracy"], rows["percent"], strict=True))
    return [not any(o != p and o[0] >= p[0] and o[1] >= p[1] for o in pairs) for p in pairs]


def _scatter(frame: pd.DataFrame, colour: alt.Color, shape: alt.Shape, said: str) -> alt.Chart:
    bare = {"axis": None, "scale": alt.Scale(zero=False)}
    columns = ["image", "x", "y", said, *(["right"] if "right" in frame else [])]
    points = alt.Chart(frame[columns].round({"x": 3, "y": 3})).mark_point(filled=True, size=22, opacity=0.85)
    x, y = alt.X("x:Q", **bare), alt.Y("y:Q", **bare)
    return points.encode(x=x, y=y, color=colour, shape=shape, tooltip=["image", said])
