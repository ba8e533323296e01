"""What the study claims, as rows: arms of which one has something in place of another, what difference there is, and
how sure that is.

A difference is judged twice. Over seeds: would training again show it, too? A paired t-test and its confidence interval
(Student 1908), from three common seeds on. Over images: do these very models differ on other images of the same kind?
McNemar's exact test (1947) of the first common seed, and a bootstrap interval (Efron 1979) of the mean over the common
seeds. p-values are Holm's (1979), corrected for the number of claims in the table.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import DescrStatsW

from rampart.ledger import PROVED, attacked_by, eps_key
from rampart.reports.evidence import Evidence
from rampart.reports.tables import marked
from rampart.settings import eps_text

LEVEL = 0.05
ENOUGH = 3  # seeds
RESAMPLES = 10_000
# Stands for what else two arms differ in where a training is not known.
UNSAID = "?"


@dataclass(frozen=True)
class Claim:
    """That `arm` differs from `other`, whose name differs from its own in `factor` alone, in a metric.

    Args:
        factor: SupCon, augmentation or method.
        change: what `arm` has in place of what `other` has.
        among: what else their names say, which they share.
    """

    factor: str
    change: str
    among: str
    arm: str
    other: str


def claims(evidence: Evidence, eps: float | None) -> pd.DataFrame:
    """A row a claim and metric: the Claim's fields; also, what else the trainings differ in; metric, eps; difference
    (of shares of the images that both arms have: arm less other, the mean over common seeds, or of the first seeds
    where there is none in common); seeds, seed_low, seed_high, seed_p (NaN where it cannot be said); images, image_low,
    image_high, image_p; runs, the ids of those compared; finding; suspect, whether the attack behind it has failed a
    check."""
    trained = _trained(evidence)
    distrusted = set(evidence.values.loc[evidence.values["suspect"], "run"])
    outcomes = {name: _outcomes(evidence, name, eps) for name in METRICS}
    rows = []
    for claim, (metric, sources) in product(_pairs(evidence), outcomes.items()):
        # Of one kind for both: a certification of the test set says more than a verification of some images.
        both = [by_arm for by_arm in sources if claim.arm in by_arm and claim.other in by_arm]
        found = _compared(both[0][claim.arm], both[0][claim.other]) if both else {}
        if found:
            radius = float("nan") if metric == "accuracy" or eps is None else eps
            suspect = metric == "robust accuracy" and not distrusted.isdisjoint(found["runs"].split())
            also = _also(trained, claim, found.pop("pairs"))
            rows.append({**claim.__dict__, "also": also, "metric": metric, "eps": radius, **found, "suspect": suspect})
    table = pd.DataFrame(rows)
    if table.empty:
        return table
    for kind in ("seed_p", "image_p"):
        known = table[kind].notna()
        if known.any():
            table.loc[known, kind] = multipletests(table.loc[known, kind], LEVEL, "holm")[1]
    return table.assign(finding=[_finding(row) for row in table.to_dict("records")])


def _pairs(evidence: Evidence) -> Iterator[Claim]:
    """Pairs of arms whose names differ in one thing: SupCon beside none (first: it is what the study asks about),
    augmented beside plain, a method beside `normal`."""
    arms = evidence.of("evaluate", "verify").drop_duplicates("arm")
    arms = arms[arms["method"] != "other"]
    have = {(row["method"], row["augment"], row["contrastive"]): row["arm"] for row in arms.to_dict("records")}
    for (method, augment, kind), arm in have.items():
        if kind != "none" and (method, augment, "none") in have:
            among = f"{method}, {_augmented(augment)}"
            yield Claim("SupCon", f"SupCon {kind}, not none", among, arm, have[method, augment, "none"])
    for (method, augment, kind), arm in have.items():
        if augment and (method, False, kind) in have:
            yield Claim("augmentation", "augmented, not plain", _named(method, kind), arm, have[method, False, kind])
    for (method, augment, kind), arm in have.items():
        if method != "normal" and ("normal", augment, kind) in have:
            among = f"{_augmented(augment)}{'' if kind == 'none' else f', SupCon {kind}'}"
            yield Claim("method", f"{method}, not normal", among, arm, have["normal", augment, kind])


def _trained(evidence: Evidence) -> dict[tuple[str, str], dict[str, str]]:
    """What has a part in the training of each arm and seed, as far as it is known: older exports do not tell."""
    runs = evidence.of("train")
    told = runs.get("trained", pd.Series("", runs.index)).fillna("")
    known = zip(runs["arm"], runs["seed"], told, strict=True)
    return {(arm, seed): found for arm, seed, text in known if text and (found := json.loads(text))}


def _also(trained: Mapping[Any, Mapping[str, str]], claim: Claim, pairs: list[tuple[str, str]]) -> str:
    """The settings, by name, that have a part in the trainings of both arms and are not the same, in any pair of seeds;
    ? where a training is not known."""
    names: dict[str, None] = {}
    for one, two in pairs:
        ours, theirs = trained.get((claim.arm, one)), trained.get((claim.other, two))
        if ours is None or theirs is None:
            return UNSAID
        names |= dict.fromkeys(name for name in ours if name in theirs and ours[name] != theirs[name])
    return ", ".join(names)


def _augmented(augment: bool) -> str:
    return "augmented" if augment else "plain"


def _named(method: str, kind: str) -> str:
    return method if kind == "none" else f"{method}, SupCon {kind}"


METRICS = ("accuracy", "robust accuracy", "certified accuracy")


Outcomes = dict[str, dict[str, pd.Series]]


def _outcomes(evidence: Evidence, metric: str, eps: float | None) -> list[Outcomes]:
    """Whether the metric counts an image, by image, seed and arm, named after the run: as evaluations say and, of
    certified accuracy, as verifications do."""
    sources: list[Outcomes] = []
    for step in ("evaluate", "verify") if metric == "certified accuracy" else ("evaluate",):
        found: Outcomes = {}
        runs = evidence.of(step)
        for run in runs[runs["engine"] == "native"].to_dict("records"):
            # Those that an arm has survived are other images for each arm.
            if run.get("params.selection") == "survivors":
                continue
            outcome = _outcome(evidence.ledgers[run["run_id"]].set_index("image"), metric, eps)
            if outcome is not None:
                found.setdefault(run["arm"], {})[run["seed"]] = outcome.rename(run["run_id"])
        sources.append(found)
    return sources


def _outcome(ledger: pd.DataFrame, metric: str, eps: float | None) -> pd.Series | None:
    right: pd.Series = ledger["correct"]
    if metric == "accuracy":
        return right
    if eps is None:
        return None
    if metric == "robust accuracy":
        return right & ~attacked_by(ledger, eps) if f"attacked/{eps_key(eps)}" in ledger else None
    if "verdict" in ledger:
        same = ledger["eps"].map(eps_key).eq(eps_key(eps)).all()
        return ledger["verdict"].isin(PROVED) if same else None
    column = f"certified/{eps_key(eps)}"
    return (right & ledger[column].astype("boolean"))[ledger[column].notna()].astype(bool) if column in ledger else None


def _compared(ours: dict[str, pd.Series], theirs: dict[str, pd.Series]) -> dict[str, Any]:
    """On the images that all have; nothing where there is none."""
    seeds = [seed for seed in ours if seed in theirs]  # in the order of the tables
    chosen = [(seed, seed) for seed in seeds] or [(next(iter(ours)), next(iter(theirs)))]
    pairs = [(ours[one], theirs[two]) for one, two in chosen]
    images = pairs[0][0].index
    for pair in pairs:
        images = images.intersection(pair[0].index).intersection(pair[1].index)
    if images.empty:
        return {}
    sides = [[side.loc[images].to_numpy(dtype=bool) for side in pair] for pair in pairs]
    differences = np.array([one.astype(float) - two for one, two in sides])
    by_seed = differences.mean(1)
    runs = " ".join(str(side.name) for pair in pairs for side in pair)
    found: dict[str, Any] = {
        "pairs": chosen,
        "difference": by_seed.mean(),
        "seeds": len(seeds),
        "images": len(images),
        "runs": runs,
    }
    found |= dict.fromkeys(("seed_low", "seed_high", "seed_p"), float("nan"))
    # Without any spread the t statistic is not defined.
    if len(seeds) >= ENOUGH and np.ptp(by_seed) > 1e-9:
        sample = DescrStatsW(by_seed)
        low, high = sample.tconfint_mean(LEVEL)
        found |= {"seed_low": low, "seed_high": high, "seed_p": sample.ttest_mean(0)[1]}
    # Of the first seed alone: what it tells is of these images, whether the others agree is told by the seeds.
    one, two = sides[0]
    table = [[(one & two).sum(), (one & ~two).sum()], [(~one & two).sum(), (~one & ~two).sum()]]
    low, high = bootstrap(differences.mean(0))
    image_p = float(mcnemar(table, exact=True).pvalue)
    return found | {"image_low": low, "image_high": high, "image_p": image_p, "first": by_seed[0]}


def bootstrap(values: np.ndarray) -> tuple[float, float]:
    """Percentile interval of the mean. Images have few distinct values, so that a resample is a multinomial draw of how
    often each occurs."""
    distinct, counts = np.unique(values, return_counts=True)
    draws = np.random.default_rng(0).multinomial(len(values), counts / len(values), size=RESAMPLES)
    low, high = np.quantile(draws @ distinct / len(values), [LEVEL / 2, 1 - LEVEL / 2])
    return float(low), float(high)


def _finding(row: Mapping[Any, Any]) -> str:
    """Over seeds where there are enough; else what these models alone show."""
    direction = "higher" if row["difference"] > 0 else "lower"
    if pd.notna(row["seed_p"]):
        return direction if row["seed_p"] < LEVEL else "no difference shown"
    agrees = row["first"] * row["difference"] > 0  # else the test speaks for the other direction
    alone = direction if agrees and row["image_p"] < LEVEL else "no difference shown"
    why = "not enough seeds" if row["seeds"] < ENOUGH else "the same in every seed"
    return f"{why}; these models: {alone}"


def claim_table(found: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """`claims` in readable form, in points of percent; with the published difference where there is one."""
    published = published[published["step"] == "published"]
    known = published.assign(key=published["eps"].map(eps_key)).set_index(["arm", "metric", "key"])["value"].to_dict()

    def points(value: float) -> str:
        return "-" if pd.isna(value) else f"{100 * value:+.2f}"

    def interval(low: float, high: float) -> str:
        return "-" if pd.isna(low) else f"{points(low)} … {points(high)}"

    def theirs(row: Mapping[Any, Any]) -> str:
        name, key = str(row["metric"]).replace(" ", "_"), eps_key(row["eps"])
        pair = [known.get((row[side], name, key)) for side in ("arm", "other")]
        ours, others = pair
        return "-" if ours is None or others is None else points(ours - others)

    rows = []
    for row in found.to_dict("records"):
        at = "" if pd.isna(row["eps"]) else f" at ε {eps_text(row['eps'])}"
        rows.append(
            {
                "changed": row["change"],
                "among": row["among"],
                "differs also in": row["also"] or "-",
                "metric": row["metric"] + at,
                "difference": points(row["difference"]),
                "finding": marked(row["finding"], row["suspect"]),
                "95 % over seeds": interval(row["seed_low"], row["seed_high"]),
                "p (seeds)": "-" if pd.isna(row["seed_p"]) else f"{row['seed_p']:.2g}",
                "95 % over images": interval(row["image_low"], row["image_high"]),
                "p (McNemar)": "<1e-300" if row["image_p"] < 1e-300 else f"{row['image_p']:.2g}",
                "n": f"{row['seeds']} seeds, {row['images']} images",
                **({"published": theirs(row)} if len(published) else {}),
                "runs": row["runs"],
            }
        )
    return pd.DataFrame(rows)
