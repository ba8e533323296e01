"""How figures look. Colours are Okabe and Ito's, which colour-blind readers can tell apart; what a colour says, a
line's dashes, a point's shape or a label says, too, so that figures can be printed in grey."""

from __future__ import annotations

from typing import Any

METHOD_COLOURS = {
    "normal": "#E69F00",
    "adversarial": "#0072B2",
    "trades": "#56B4E9",
    "certified": "#009E73",
    "ibp": "#B8A800",
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
    "misclassified": "#E5E5E5",
}
# What is known of an image at one ε.
STATUS_COLOURS = {"proved": "#009E73", "broken": "#D55E00", "open": "#999999", "misclassified": "#000000"}
STATUS_SHAPES = {"proved": "circle", "broken": "triangle-up", "open": "square", "misclassified": "cross"}
DASHES = {"none": [1, 0], "single": [2, 2], "double": [5, 3]}
OPACITIES = {"none": 1.0, "single": 0.55, "double": 0.55}
SHAPES = {"none": "circle", "single": "square", "double": "triangle-up"}
# Ten classes, then as many hues as there are.
CLASS_SCHEMES = {True: "tableau10", False: "turbo"}

FONT = "Liberation Sans, Arial, sans-serif"
VEGA: dict[str, Any] = {
    "font": FONT,
    "background": "white",
    "view": {"stroke": None},
    "axis": {"gridColor": "#E3E3E3", "domainColor": "#888888", "tickColor": "#888888", "titleFontWeight": "normal"},
    "axisX": {"grid": False},
    "legend": {
        "symbolOpacity": 1,
        "orient": "bottom",
        "columns": 3,
        "labelLimit": 260,
        "symbolStrokeWidth": 2,
        "titleFontWeight": "normal",
    },
    "title": {"fontSize": 12, "fontWeight": "normal", "anchor": "start"},
}
MATPLOTLIB: dict[Any, Any] = {"font.size": 9, "figure.constrained_layout.use": True}
