"""The study's figures. Colours are Okabe and Ito's, which colour-blind readers can tell apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from rampart.ledger import VERDICTS
from rampart.settings import eps_text

COLOURS = {
    "normal": "#E69F00",
    "adversarial": "#0072B2",
    "trades": "#56B4E9",
    "certified": "#009E73",
    "ibp": "#F0E442",
    "sabr": "#D55E00",
    "mtl-ibp": "#CC79A7",
    "other": "#666666",
}
VERDICT_COLOURS = {
    "safe-incomplete": "#009E73",
    "safe": "#56B4E9",
    "unsafe": "#D55E00",
    "timeout": "#E69F00",
    "unknown": "#BBBBBB",
    "error": "#000000",
    "misclassified": "#EEEEEE",
}
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#DDDDDD",
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def accuracy_bars(summary: pd.DataFrame) -> Figure:
    """Clean accuracy by arm, a panel each for training without and with augmentation (Figure 3)."""
    rows = summary[(summary["metric"] == "accuracy") & (summary["step"] == "evaluate")]
    figure, panels = _panels(rows, height=3.0)
    for axes, (_, part) in zip(panels, rows.groupby("augment"), strict=True):
        x = np.arange(len(part))
        errors = 100 * part["std"].fillna(0)
        for place, (_, row) in zip(x, part.iterrows(), strict=True):
            hatch = "///" if row["contrastive"] != "none" else ""
            axes.bar(place, 100 * row["mean"], 0.75, color=_colour(row), hatch=hatch, edgecolor="white", linewidth=0.5)
        if (part["seeds"] > 1).any():
            axes.errorbar(x, 100 * part["mean"], errors, fmt="none", ecolor="black", capsize=3)
        for place, (_, row) in zip(x, part.iterrows(), strict=True):
            axes.annotate(f"{100 * row['mean']:.1f}", (place, 100 * row["mean"]), ha="center", va="bottom", size=8)
        axes.set_xticks(x, [_label(row, "\n") for _, row in part.iterrows()], size=7.5)
        axes.set_ylim(0, 108)
    panels[0].set_ylabel("test accuracy (%)")
    return figure


def robust_curves(summary: pd.DataFrame) -> Figure:
    """Robust accuracy by arm over ε, 0 being clean accuracy (Figure 4)."""
    rows = summary[summary["metric"].isin(["robust_accuracy", "accuracy"]) & (summary["step"] == "evaluate")]
    radii = sorted({0.0, *rows["eps"].dropna()})
    figure, panels = _panels(rows, height=3.8)
    for axes, (_, part) in zip(panels, rows.groupby("augment"), strict=True):
        for _, line in part.groupby("arm", sort=False):
            line = line.fillna({"eps": 0.0}).sort_values("eps")
            first = line.iloc[0]
            axes.errorbar(
                [radii.index(eps) for eps in line["eps"]],
                100 * line["mean"],
                100 * line["std"] if (line["seeds"] > 1).any() else None,
                color=_colour(first),
                linestyle="-" if first["contrastive"] == "none" else "--",
                marker="o" if first["contrastive"] == "none" else "^",
                markersize=4,
                capsize=2,
                label=_label(first, " + "),
            )
        axes.set_xticks(range(len(radii)), [eps_text(eps) for eps in radii])
        axes.set_xlabel("PGD radius ε (pixels in [0, 1])")
        axes.set_ylim(-2, 102)
    panels[0].set_ylabel("robust accuracy (%)")
    _legend(figure, panels)
    return figure


def verdict_bars(summary: pd.DataFrame) -> Figure:
    """Verdicts by arm as stacked bars (Table 1)."""
    rows = summary[summary["step"] == "verify"]
    arms = rows.drop_duplicates(["arm", "engine"])
    keys = pd.MultiIndex.from_frame(arms[["arm", "engine"]])
    with plt.rc_context({**STYLE, "axes.grid.axis": "x"}):
        figure, axes = plt.subplots(figsize=(7.5, 0.32 * len(arms) + 1.2))
    left = np.zeros(len(arms))
    for verdict in (*VERDICTS, "misclassified"):
        found = rows[rows["metric"] == verdict].set_index(["arm", "engine"])["mean"]
        counts = found.reindex(keys).fillna(0).to_numpy()
        if not counts.any():
            continue
        bars = axes.barh(
            range(len(arms)), counts, left=left, label=verdict, color=VERDICT_COLOURS[verdict], edgecolor="white"
        )
        axes.bar_label(bars, [f"{count:.3g}" if count else "" for count in counts], label_type="center", size=7)
        left += counts
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_yticks(range(len(arms)), [arm if engine == "native" else f"{arm} ({engine})" for arm, engine in keys])
    axes.invert_yaxis()
    axes.set_xlabel(f"images, verified at ε {', '.join(sorted({eps_text(eps) for eps in arms['eps']}))}")
    axes.legend(ncol=4, fontsize=7.5, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def radius_curves(radii: pd.DataFrame) -> Figure:
    """Share of the images that are proved robust at ε, by arm: certified-radius curves."""
    figure, panels = _panels(radii, height=3.8)
    for axes, (_, part) in zip(panels, radii.groupby("augment"), strict=True):
        for _, images in part.groupby("arm", sort=False):
            first = images.iloc[0]
            found = np.sort(images["radius"].dropna().to_numpy())
            left = 100 * np.arange(len(found), -1, -1) / len(images)
            style = "-" if first["contrastive"] == "none" else "--"
            # Proved at ε are the images whose radius is ε or more.
            axes.step(np.r_[0, 255 * found], np.r_[left[:1], left[1:]], where="post", color=_colour(first),
                      linestyle=style, label=_label(first, " + "))  # fmt: skip
        axes.set_xlabel("ε × 255 (pixels in [0, 1])")
        axes.set_ylim(-2, 102)
        axes.set_xlim(left=0)
    panels[0].set_ylabel("proved robust (% of images)")
    _legend(figure, panels)
    return figure


def counterexamples(
    images: Tensor, examples: Tensor, labels: Sequence[int], predictions: Sequence[int], classes: Sequence[str]
) -> Figure:
    """A column for each image [N, C, H, W] in [0, 1]: as it is, its counterexample, and the difference enlarged."""
    count = len(images)
    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure, grid = plt.subplots(3, count, figsize=(max(1.3 * count, 3.2), 4.6), squeeze=False)
    difference = examples - images
    # Of each image alone: its largest change becomes black or white.
    enlarged = 0.5 + difference / (2 * difference.abs().amax((1, 2, 3), keepdim=True)).clamp(min=1e-6)
    for row, (pictures, names) in enumerate(
        ((images, labels), (examples, predictions), (enlarged, None)),
    ):
        for column, axes in enumerate(grid[row]):
            picture = pictures[column].permute(1, 2, 0).clamp(0, 1).cpu().numpy()
            axes.imshow(picture if picture.shape[2] == 3 else picture[..., 0], cmap="gray", vmin=0, vmax=1)
            axes.set_xticks([])
            axes.set_yticks([])
            if names is not None:
                axes.set_title(classes[names[column]], size=8)
    for axes, name in zip(grid[:, 0], ("image", "counterexample", "difference, enlarged"), strict=True):
        axes.set_ylabel(name, size=8)
    return figure


def umap_panels(points: dict[str, pd.DataFrame], classes: Sequence[str], columns: int = 4) -> Figure:
    """UMAP of embeddings, one panel an arm, coloured by class; wrong predictions are crosses (Figure 1)."""
    columns = min(columns, len(points))
    rows = math.ceil(len(points) / columns)
    colours = matplotlib.colormaps["tab10" if len(classes) <= 10 else "turbo"]
    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure, grid = plt.subplots(rows, columns, figsize=(2.7 * columns + 1.0, 2.7 * rows + 0.2), squeeze=False)
    for axes in grid.flat[len(points) :]:
        axes.axis("off")
    for axes, (title, frame) in zip(grid.flat, points.items(), strict=False):
        for label, name in enumerate(classes):
            colour = colours(label if len(classes) <= 10 else label / (len(classes) - 1))
            part = frame[frame["label"] == label]
            right = part["prediction"] == part["label"]
            axes.scatter(part["x"][right], part["y"][right], s=8, color=colour, label=name)
            axes.scatter(part["x"][~right], part["y"][~right], s=16, color=colour, marker="x", linewidth=1)
        axes.set_title(title, size=8)
        axes.set_xticks([])
        axes.set_yticks([])
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8, title="class")
    return figure


def _panels(rows: pd.DataFrame, height: float) -> tuple[Figure, Any]:
    """One panel for each value of `augment` that occurs, side by side on one scale."""
    found = sorted(rows["augment"].unique())
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, len(found), figsize=(5 * len(found), height), sharey=True, squeeze=False)
    for axes, augment in zip(panels[0], found, strict=True):
        axes.set_title("with augmentation" if augment else "without augmentation", size=9)
    return figure, panels[0]


def _legend(figure: Figure, panels: Any) -> None:
    """One legend of all panels, below them."""
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncol=3, fontsize=8, handlelength=4, frameon=False
    )


def _colour(row: pd.Series) -> str:
    return COLOURS.get(str(row["method"]), COLOURS["other"])


def _label(row: pd.Series, between: str) -> str:
    name = row["arm"] if row["method"] == "other" else row["method"]
    return name if row["contrastive"] == "none" else f"{name}{between}SupCon {row['contrastive']}"
