"""The study's tables in readable form; every row ends with the runs that its numbers came from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import pandas as pd

from rampart.data.corruptions import CORRUPTIONS
from rampart.evaluation.trust import ALLOWED
from rampart.ledger import VERDICTS, eps_key
from rampart.reports.baseline import stands_in
from rampart.reports.derived import STAGES
from rampart.settings import eps_text

ARM = ["method", "augmentation", "SupCon"]
# Beside what comes from an attack that has failed a check, and beside that check.
MARK = "†"
# Columns of words; all others hold numbers.
WORDS = {
    *(*ARM, "machine", "changed", "among", "differs also in", "metric", "finding", "n", "runs", "verifier"),
    *("step", "arm", "command"),
}
# What tells the rows of a table apart.
ROW = ["arm", "engine"]


def accuracy(summary: pd.DataFrame) -> pd.DataFrame:
    """Clean test accuracy by arm, in percent (the study's Figure 3)."""
    rows = summary[(summary["metric"] == "accuracy") & (summary["step"] == "evaluate")]
    return _pivoted(rows, [("accuracy %", rows["metric"] == "accuracy")], _percent)


def by_eps(summary: pd.DataFrame, metric: str) -> pd.DataFrame:
    """`robust_accuracy` (the study's Figure 4) or `asr` by arm and ε, in percent."""
    rows = summary[(summary["metric"] == metric) & (summary["step"] == "evaluate")]
    return _pivoted(rows, _radii(rows), _percent)


def brackets(summary: pd.DataFrame) -> pd.DataFrame:
    """Between which percentages the robust accuracy lies by arm and ε: proved, and not broken by an attack."""
    rows = summary[
        summary["metric"].isin(["certified_accuracy", "attacked_accuracy"]) & (summary["step"] == "evaluate")
    ]
    proved = rows["metric"] == "certified_accuracy"
    table, upper = (
        _pivoted(rows, [(name, mask & chosen) for name, mask in _radii(rows)], _percent) for chosen in (proved, ~proved)
    )
    for name, _ in _radii(rows):
        known = upper[name] != "-"  # runs of older versions have no upper end
        table[name] = table[name].where(~known, table[name] + " – " + upper[name])
    return table


def corruptions(summary: pd.DataFrame) -> pd.DataFrame:
    """Accuracy under natural corruptions by arm, in percent: of each the mean over its strengths, and their mean."""
    rows = summary[summary["metric"].str.startswith("corrupted") & (summary["step"] == "evaluate")]
    kinds = [(kind.replace("_", " "), rows["metric"] == f"corrupted/{kind}") for kind in CORRUPTIONS]
    return _pivoted(rows, [*kinds, ("mean", rows["metric"] == "corrupted_accuracy")], _percent)


def trust(summary: pd.DataFrame) -> pd.DataFrame:
    """What the checks of the attacks found, in percent of the correctly classified images that were probed."""
    rows = summary[summary["metric"].str.startswith("trust/")]

    def text(row: pd.Series) -> str:
        allowed = ALLOWED[row["metric"].removeprefix("trust/")]
        return marked(f"{100 * row['mean']:.1f}", row["largest"] > allowed)  # in any seed

    columns = [
        (f"{check.replace('_', ' ')} (≤ {100 * most:g})", rows["metric"] == f"trust/{check}")
        for check, most in ALLOWED.items()
    ]
    return _pivoted(rows, columns, text)


def radii(found: pd.DataFrame) -> pd.DataFrame:
    """Certified radii by arm in pixels times 255; an image that is misclassified has none."""
    arms = found.drop_duplicates(ROW).reset_index(drop=True)
    table = _arms(arms)
    groups = found.groupby(ROW, sort=False)["radius"]
    table["images"] = groups.size().to_list()
    table["misclassified"] = groups.agg(lambda radius: radius.isna().sum()).to_list()
    for name, share in (("lower quartile", 0.25), ("median", 0.5), ("upper quartile", 0.75)):
        table[f"{name} × 255"] = [f"{255 * value:.3f}" for value in groups.quantile(share)]
    return table.assign(runs=_runs_of(found))


def geometry(points: pd.DataFrame) -> pd.DataFrame:
    """Mean distances of the embeddings and margin by arm, and how they go with the certificates (Spearman's ρ)."""
    arms = points.drop_duplicates(ROW).reset_index(drop=True)
    table = _arms(arms)
    groups = points.groupby(ROW, sort=False)
    for name in ("within", "between", "margin"):
        table[name] = [f"{value:.3f}" for value in groups[name].mean()]
    proved = points[np.isfinite(points["certificate"])].groupby(ROW, sort=False)
    for name in ("separation", "margin"):
        found = {
            key: part[name].corr(part["certificate"], method="spearman") for key, part in proved if len(part) >= FEWEST
        }
        rho = [found.get(key, float("nan")) for key in zip(arms["arm"], arms["engine"], strict=True)]
        table[f"ρ({name}, certificate)"] = ["-" if pd.isna(value) else f"{value:+.2f}" for value in rho]
    return table.assign(runs=_runs_of(points))


# Images below which a correlation says nothing.
FEWEST = 8


def costs(found: pd.DataFrame) -> pd.DataFrame:
    """Seconds of each step and speed of training by arm and machine, means over seeds; of a training in two stages the
    speeds of both."""
    row = [*ROW, "machine"]
    found = found.assign(place=found.groupby(ROW, sort=False).ngroup()).sort_values("place", kind="stable")
    rows = found.drop_duplicates(row).reset_index(drop=True)
    table = _arms(rows).assign(machine=rows["machine"])
    groups = [part for _, part in found.groupby(row, sort=False)]
    for step, name in (("train", "training s"), ("evaluate", "evaluation s"), ("verify", "verification s")):
        table[name] = [_mean(group.loc[group["step"] == step, "seconds"], 1) or "-" for group in groups]
    table["training images/s"] = [
        " / ".join(filter(None, (_mean(group[stage], 0) for stage in STAGES))) or "-" for group in groups
    ]
    return table.assign(runs=_runs_of(found, row=row))


def _mean(values: pd.Series, digits: int) -> str:
    return f"{values.mean():.{digits}f}" if values.notna().any() else ""


def beside(summary: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """Ours and what another source has published, in percent, for every number that both have."""
    ours, theirs = (frame.assign(key=frame["eps"].map(eps_key)) for frame in (summary, published))
    ours, theirs = ours[ours["step"] == "evaluate"], theirs[theirs["step"] == "published"]
    rows = ours.merge(theirs[["arm", "metric", "key", "value"]], on=["arm", "metric", "key"])
    place = {arm: i for i, arm in enumerate(dict.fromkeys(rows["arm"]))}
    rows = rows.assign(place=rows["arm"].map(place)).sort_values(["place", "metric", "eps"], ignore_index=True)
    table = _arms(rows)
    table["metric"] = rows["metric"].map({"asr": "attack success"}).fillna(rows["metric"].str.replace("_", " "))
    table["ε"] = ["-" if pd.isna(eps) else eps_text(eps) for eps in rows["eps"]]
    table["ours %"] = [_percent(row) for _, row in rows.iterrows()]
    table["published %"] = [f"{100 * value:.2f}" for value in rows["value"]]
    table["difference"] = [f"{100 * value:+.2f}" for value in rows["mean"] - rows["value"]]
    return table.assign(runs=rows["runs"].to_list())


def side_by_side(summaries: Mapping[str, pd.DataFrame], radii: Iterable[float]) -> pd.DataFrame:
    """Profiles by name beside each other and beside what was published: accuracy, robust and certified accuracy at each
    ε (pixels), in percent, means over seeds. An arm that stands in for `certified` is in its row."""
    parts = []
    for name, summary in summaries.items():
        step, method = summary["step"], summary["method"]
        method = method.mask(method == stands_in(method), "certified")
        parts.append(summary.assign(method=method, source=step.mask(step == "evaluate", name)))
    rows = pd.concat(parts, ignore_index=True)
    wanted = [("accuracy", float("nan"))]
    wanted += [(metric, eps) for metric in ("robust_accuracy", "certified_accuracy") for eps in radii]
    columns = []
    for metric, eps in wanted:
        alike = (rows["metric"] == metric) & (rows["eps"].map(eps_key) == eps_key(eps))
        title = metric.removesuffix("_accuracy") + ("" if pd.isna(eps) else f" at {eps_text(eps)}")
        for source in ("published", *summaries):
            mask = alike & (rows["source"] == source)
            if mask.any():
                columns.append((f"{title}: {source}", mask))
    # A model of no arm has a row of its own.
    rows = rows.assign(name=rows["arm"].where(rows["method"] == "other", ""))

    def text(number: pd.Series) -> str:
        return marked(f"{100 * number['mean']:.1f}", number["suspect"])

    return _pivoted(rows, columns, text, ["augment", "method", "contrastive", "name"]).drop(columns="runs")


def verdicts(summary: pd.DataFrame) -> pd.DataFrame:
    """Images by verdict, arm and ε (the study's Table 1), and the share proved robust."""
    rows = summary[summary["step"] == "verify"]
    columns = [(name, rows["metric"] == name) for name in (*VERDICTS, "misclassified", "images")]
    row = [*ROW, "eps"]
    table = _pivoted(rows, columns, _count, row)
    certified = _pivoted(rows, [("certified %", rows["metric"] == "certified_accuracy")], _percent, row)
    table.insert(len(table.columns) - 1, "certified %", certified["certified %"])
    arms = rows.drop_duplicates(row)
    table.insert(len(ARM), "ε", [eps_text(eps) for eps in arms["eps"]])
    if (arms["engine"] != "native").any():
        table.insert(len(ARM), "verifier", arms["engine"].to_list())
    return table


def markdown(table: pd.DataFrame) -> str:
    table = table.map(lambda cell: cell.replace("|", "\\|") if isinstance(cell, str) else cell)
    if "command" in table:
        table = table.assign(command="`" + table["command"] + "`")
    return table.to_markdown(index=False, disable_numparse=True)


def latex(table: pd.DataFrame, caption: str, label: str) -> str:
    """booktabs; needs \\usepackage{booktabs}."""
    text = table.astype(str).to_latex(index=False, escape=True, caption=caption, label=label)
    for character, command in SYMBOLS.items():
        text = text.replace(character, command)
    return text


# What LaTeX's usual input encoding does not know.
SYMBOLS = {
    "±": "$\\pm$",
    MARK: "$\\dagger$",
    "ε": "$\\varepsilon$",
    "ρ": "$\\rho$",
    "≤": "$\\le$",
    "×": "$\\times$",
    "–": "--",
    "…": "\\ldots{}",
    "−": "$-$",
}


def _radii(rows: pd.DataFrame) -> list[tuple[str, pd.Series]]:
    return [(f"ε {eps_text(eps)}", rows["eps"] == eps) for eps in sorted(rows["eps"].unique())]


def _pivoted(
    rows: pd.DataFrame,
    columns: list[tuple[str, pd.Series]],
    text: Callable[[pd.Series], str],
    row: list[str] = ROW,
) -> pd.DataFrame:
    """One row an arm, or whatever else `row` tells apart; each column holds the text of the number that its mask picks,
    '-' where there is none."""
    first = rows.drop_duplicates(row)
    keys = [tuple(key) for key in first[row].to_numpy()]
    table = _arms(first)
    for name, mask in columns:
        picked = {tuple(number[row]): text(number) for _, number in rows[mask].iterrows()}
        table[name] = [picked.get(key, "-") for key in keys]
    return table.assign(runs=_runs_of(rows, "runs", row))


def _runs_of(rows: pd.DataFrame, column: str = "run", row: list[str] = ROW) -> list[str]:
    """The ids of all runs behind each row of a table, each once."""

    def union(runs: Iterable[str]) -> str:
        return " ".join(dict.fromkeys(run for ids in runs for run in ids.split()))

    return rows.groupby(row, sort=False)[column].agg(union).to_list()


def _arms(rows: pd.DataFrame) -> pd.DataFrame:
    other = rows["method"] == "other"
    return pd.DataFrame(
        {
            "method": rows["arm"].where(other, rows["method"]),
            "augmentation": ["yes" if augment else "-" for augment in rows["augment"]],
            "SupCon": ["-" if kind == "none" else kind for kind in rows["contrastive"]],
        }
    ).reset_index(drop=True)


def _percent(row: pd.Series) -> str:
    spread = f" ± {100 * row['std']:.2f}" if row["seeds"] > 1 else ""
    return marked(f"{100 * row['mean']:.2f}{spread}", row["suspect"])


def marked(text: str, failed: bool) -> str:
    """The text, with a mark where what it says rests on an attack that has failed a check."""
    return f"{text} {MARK}" if failed else text


def _count(row: pd.Series) -> str:
    return f"{row['mean']:.1f} ± {row['std']:.1f}" if row["seeds"] > 1 else f"{row['mean']:.0f}"


def short_runs(table: pd.DataFrame) -> pd.DataFrame:
    """Run ids, where there are any, cut to eight characters, for the terminal."""
    if "runs" not in table:
        return table
    return table.assign(runs=table["runs"].map(lambda ids: " ".join(run[:8] for run in ids.split())))
