"""What stands for what in the figures: axes, colours, shapes, dashes and their legends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import pandas as pd

from rampart.reports.style import DASHES, METHOD_COLOURS, OPACITIES, SHAPES, STATUS_COLOURS, STATUS_SHAPES
from rampart.settings import eps_text


def radius_axis(radii: Sequence[float]) -> alt.X:
    """Places 0, 1, … that are labelled with the radii: they grow by factors, and 0 is among them."""
    texts = [eps_text(eps) for eps in radii]
    axis = alt.Axis(values=list(range(len(radii))), labelExpr=f"{texts}[datum.value]", labelAngle=-30)
    scale = alt.Scale(domain=[-0.3, len(radii) - 0.7], nice=False)
    return alt.X("place:Q", title="radius ε of the attack (pixels in [0, 1])", axis=axis, scale=scale)


def scale_of(looks: Mapping[str, Any], used: pd.Series | None = None) -> alt.Scale:
    """What stands for what, of the names that are used; of all where the same legend is to stand in every panel."""
    names = [name for name in looks if used is None or name in set(used)]
    return alt.Scale(domain=names, range=[looks[name] for name in names])


def status_colour() -> alt.Color:
    return alt.Color("status:N", scale=scale_of(STATUS_COLOURS), title=None)


def status_shape() -> alt.Shape:
    return alt.Shape("status:N", scale=scale_of(STATUS_SHAPES), title=None)


def colours(rows: pd.DataFrame, legend: bool = True) -> alt.Color:
    unknown = dict.fromkeys(rows["method"], METHOD_COLOURS["other"])
    scale = scale_of(unknown | METHOD_COLOURS, rows["method"])
    return alt.Color("method:N", scale=scale, title=None, **({} if legend else {"legend": None}))


SUPCON = alt.Legend(title=None, labelExpr="datum.label == 'none' ? 'no SupCon' : 'SupCon ' + datum.label")


def dashes(rows: pd.DataFrame) -> alt.StrokeDash:
    return alt.StrokeDash("contrastive:N", scale=scale_of(DASHES, rows["contrastive"]), legend=SUPCON)


def shapes(rows: pd.DataFrame) -> alt.Shape:
    return alt.Shape("contrastive:N", scale=scale_of(SHAPES, rows["contrastive"]), legend=SUPCON)


def lighter(rows: pd.DataFrame) -> alt.Opacity:
    scale = scale_of(OPACITIES, rows["contrastive"])
    return alt.Opacity("contrastive:O", sort=scale.domain, scale=scale, legend=None)


def number(column: str, title: str) -> alt.Tooltip:
    return alt.Tooltip(f"{column}:Q", title=title, format=".2f")
