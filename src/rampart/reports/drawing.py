"""What a figure is: something that the HTML page shows and that files hold as PNG and PDF."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import altair as alt
import matplotlib

matplotlib.use("Agg")

import matplotlib.figure

from rampart.reports.style import VEGA

alt.data_transformers.disable_max_rows()

# What a figure has once, however many charts are in it.
OF_THE_WHOLE = ("$schema", "config", "datasets")
RENDER = Path(__file__).with_name("render.py")


@dataclass(frozen=True)
class Panels:
    """Interactive charts side by side, `columns` in a row where there is room."""

    charts: list[Any]
    columns: int = 2

    @cached_property
    def specs(self) -> list[dict[str, Any]]:
        """One for each chart, in Vega-Lite. Kept: to write and to check one takes long."""
        return [{**chart.to_dict(), "config": VEGA} for chart in self.charts]

    @property
    def spec(self) -> dict[str, Any]:
        """All in one; data are named by their content, so that they can be put together."""
        data = {name: rows for spec in self.specs for name, rows in spec["datasets"].items()}
        views = [{key: part for key, part in spec.items() if key not in OF_THE_WHOLE} for spec in self.specs]
        whole = {key: self.specs[0][key] for key in OF_THE_WHOLE}
        return {**whole, "datasets": data, "concat": views, "columns": self.columns}


@dataclass(frozen=True)
class Picture:
    """A grid of images."""

    figure: matplotlib.figure.Figure


Drawing = Panels | Picture


def save(drawings: Mapping[str, Drawing], folder: Path) -> None:
    """NAME.png and NAME.pdf of each in `folder`."""
    specs = {}
    for name, drawing in drawings.items():
        if isinstance(drawing, Panels):
            specs[name] = drawing.spec
            continue
        for kind in ("png", "pdf"):
            drawing.figure.savefig(folder / f"{name}.{kind}", dpi=150, bbox_inches="tight")
    if specs:
        _render(json.dumps(specs), str(folder))


def script() -> str:
    """What draws Panels in a browser: Vega, Vega-Lite and vegaEmbed."""
    return _render("")


def _render(given: str, *words: str) -> str:
    # -P: the modules beside the program are not for it.
    command = [sys.executable, "-P", str(RENDER), *words]
    return subprocess.run(command, input=given, stdout=subprocess.PIPE, text=True, check=True, encoding="utf-8").stdout
