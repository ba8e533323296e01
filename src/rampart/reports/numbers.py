"""The numbers of runs as one tidy table, a row each, and what several seeds make of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import pandas as pd

from rampart.ledger import VERDICTS, eps_key
from rampart.settings import parse_eps
from rampart.training.recipe import MethodName

# What every row of a comparison's tables has.
KEYS = ["augment", "method", "contrastive", "arm", "engine"]
METHOD_ORDER = get_args(MethodName)
CONTRASTIVE_ORDER = ["none", "single", "double"]


def numbers(run: pd.Series) -> pd.DataFrame:
    """The run's metrics in long form; eps is NaN where a metric has none."""
    rows = []
    suspect = str(run.get("tags.rampart.trust", "")).startswith("suspect")
    verified = _verified_eps(run) if run["step"] == "verify" else float("nan")
    # The server gives columns in an order of its own.
    for name in sorted(map(str, run.index)):
        value = run[name]
        if not name.startswith("metrics.") or pd.isna(value):
            continue
        metric, _, rest = name.removeprefix("metrics.").partition("/")
        eps = verified
        if metric == "verdicts":
            metric = rest
        elif metric in _NAMED:
            metric = name.removeprefix("metrics.")
        elif metric in _METRICS and rest:
            eps = float(rest)
        if metric.partition("/")[0] in _METRICS:
            rows.append({**{key: run[key] for key in (*KEYS, "seed", "step")}, "metric": metric, "eps": eps})
            rows[-1] |= {"value": float(value), "run": run["run_id"], "suspect": metric in _ATTACKED and suspect}
    return pd.DataFrame(rows)


def logged_name(row: Mapping[Any, Any]) -> str:
    """What the run calls the metric of a row of `Evidence.values`."""
    if row["step"] == "verify":
        return f"verdicts/{row['metric']}"
    return row["metric"] if pd.isna(row["eps"]) else f"{row['metric']}/{eps_key(row['eps'])}"


# Metrics that an attack has a part in, those with a name behind the stroke instead of ε, and all that are compared.
_ATTACKED = {"asr", "afr", "robust_accuracy", "attacked_accuracy"}
_NAMED = {"trust", "corrupted"}
_METRICS = {
    *("accuracy", "certified_accuracy", "corrupted_accuracy", *_ATTACKED, *_NAMED),
    *(*VERDICTS, "misclassified", "images"),
}


def _verified_eps(run: pd.Series) -> float:
    # With the digits that metrics' names have, so that both are one number.
    return float(eps_key(parse_eps("eps_pixel", run["params.eps_pixel"], "pixel")))


def ordered(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows in the order of the study's tables: augmentation, method, contrastive, seed."""

    def rank(column: pd.Series) -> pd.Series:
        if column.name in ("seed", "eps"):
            return pd.to_numeric(column, errors="coerce")
        order = {"method": METHOD_ORDER, "contrastive": CONTRASTIVE_ORDER}.get(str(column.name))
        return column.map(lambda v: order.index(v) if v in order else len(order)) if order else column.astype(str)

    return frame.sort_values([*KEYS, *(c for c in ("seed", "eps") if c in frame)], key=rank)


def summarise(values: pd.DataFrame) -> pd.DataFrame:
    """Mean, standard deviation (over seeds, n - 1) and maximum of each number, with the runs that it came from."""
    grouped = values.groupby([*KEYS, "step", "metric", "eps"], dropna=False, sort=False)
    summary = grouped.agg(
        mean=("value", "mean"),
        std=("value", "std"),
        largest=("value", "max"),
        seeds=("value", "size"),
        suspect=("suspect", "any"),
        runs=("run", lambda r: " ".join(r)),
    ).reset_index()
    return ordered(summary)
