"""What tables and figures need beside the metrics: computed from the ledgers and arrays of the evidence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd

from rampart.ledger import PROVED, ROUNDED, attack_rates, attacked_by, eps_key
from rampart.reports.evidence import Evidence
from rampart.reports.numbers import KEYS
from rampart.reports.repeating import way
from rampart.tracking.queries import seconds_at_work

SETTLED = (*PROVED, "unsafe")
STAGES = ("train", "encoder", "head")


def reference_eps(evidence: Evidence) -> float | None:
    """The radius (pixels) at which most is known: that of the verifications, else the smallest that images were to be
    proved at, else the middle one of those attacked; None where there is none."""
    verified = evidence.values.loc[evidence.values["step"] == "verify", "eps"]
    if len(verified):
        return float(verified.mode().iloc[0])
    for metric, place in (("certified_accuracy", 0.0), ("robust_accuracy", 0.5)):
        radii = sorted({*evidence.values.loc[evidence.values["metric"] == metric, "eps"]} - {0.0})
        if radii:
            return float(radii[int(place * (len(radii) - 1))])
    return None


def statuses(evidence: Evidence, arm: str, eps: float) -> pd.Series:
    """What is known of the test images at ε (pixels), by image, for the seed of an arm whose embeddings are shown:
    `misclassified`, `broken` (by an attack or a search), `proved`, or `open`."""
    found: dict[str, set[int]] = {"known": set(), "misclassified": set(), "broken": set(), "proved": set()}
    for run in map(str, _of_embedded(evidence, arm, "evaluate", "verify")["run_id"]):
        ledger = evidence.ledgers[run]
        wrong = ledger.loc[~ledger["correct"], "image"]
        found["known"] |= {*ledger["image"]}
        found["misclassified"] |= {*wrong}
        broken = attacked_by(ledger, eps)
        proved = pd.Series(False, index=ledger.index)
        for column in ledger.columns:
            if str(column).startswith("certified/") and float(str(column).partition("/")[2]) >= eps * (1 - ROUNDED):
                proved |= ledger[column].fillna(False).astype(bool)
        if "verdict" in ledger:
            broken |= (ledger["verdict"] == "unsafe") & (ledger["eps"] <= eps * (1 + ROUNDED))
            proved |= ledger["verdict"].isin(PROVED) & (ledger["eps"] >= eps * (1 - ROUNDED))
            if "radius" in ledger:
                proved |= ledger["radius"].fillna(0).astype(float) >= eps * (1 - ROUNDED)
        found["broken"] |= {*ledger.loc[broken, "image"]}
        found["proved"] |= {*ledger.loc[proved, "image"]}
    status = pd.Series("open", index=sorted(found["known"]), dtype=object)
    for name in ("proved", "broken", "misclassified"):
        status[sorted(found[name])] = name
    return status


def _of_embedded(evidence: Evidence, arm: str, *steps: str) -> pd.DataFrame:
    """The runs of these steps that looked at the model whose embeddings an arm's report shows."""
    embedded = evidence.first("embed").set_index("arm")["seed"]
    runs = evidence.of(*steps)
    return runs[(runs["arm"] == arm) & (runs["seed"] == embedded[arm])]


def on_common_images(evidence: Evidence) -> pd.DataFrame:
    """The evidence's values; those of what was to be proved only of the images that all seeds of an arm share."""
    values = evidence.values.copy()
    for _, rows in values[_proofs(values)].groupby(["arm", "metric", "eps"]):
        eps = float(rows["eps"].iloc[0])
        chosen = {_chosen(evidence, run, eps) for run in rows["run"]}
        common = frozenset.intersection(*chosen)
        if common and len(chosen) > 1:
            name, ledgers = f"{rows['metric'].iloc[0]}/{eps_key(eps)}", [evidence.ledgers[run] for run in rows["run"]]
            rates = [attack_rates(ledger[ledger["image"].isin(common)])[name] for ledger in ledgers]
            values.loc[rows.index, "value"] = rates
    return values


def of_whole_set(evidence: Evidence) -> pd.DataFrame:
    """Of the evidence's values those of the first seed of each arm of which all images were to be proved; none where
    that holds for all runs."""
    rows = evidence.values[_proofs(evidence.values)]
    whole = [
        len(_chosen(evidence, run, eps)) == len(evidence.ledgers[run])
        for run, eps in zip(rows["run"], rows["eps"], strict=True)
    ]
    return rows[whole].drop_duplicates(["arm", "metric", "eps"]) if not all(whole) else rows.head(0)


def _proofs(values: pd.DataFrame) -> pd.Series:
    return values["metric"].isin(["certified_accuracy", "attacked_accuracy"]) & (values["step"] == "evaluate")


def _chosen(evidence: Evidence, run: str, eps: float) -> frozenset[int]:
    """The images that were to be proved at ε."""
    ledger = evidence.ledgers[run]
    return frozenset(ledger.loc[ledger[f"certified/{eps_key(eps)}"].notna(), "image"])


def certified_radii(evidence: Evidence) -> pd.DataFrame:
    """One row an image whose radius was looked for (KEYS, run, radius; NaN where it is misclassified)."""
    parts = [pd.DataFrame(columns=[*KEYS, "run", "radius"])]
    for run, ledger in _ledgers(evidence, "verify"):
        if "radius" in ledger and ledger["radius"].notna().any():
            keys = {key: run[key] for key in KEYS}
            parts.append(pd.DataFrame({"radius": ledger["radius"].astype(float)}).assign(**keys, run=run["run_id"]))
    return pd.concat(parts[1:] or parts, ignore_index=True)


def verification_seconds(evidence: Evidence) -> pd.DataFrame:
    """One row a verified image (KEYS, seconds; NaN where it was not settled); misclassified ones were not verified."""
    parts = [pd.DataFrame(columns=[*KEYS, "seconds"])]
    for run, ledger in _ledgers(evidence, "verify"):
        tried = ledger[ledger["verdict"].notna()]
        seconds = tried["seconds"].where(tried["verdict"].isin(SETTLED))
        parts.append(pd.DataFrame({"seconds": seconds}).assign(**{key: run[key] for key in KEYS}))
    return pd.concat([part for part in parts[1:] if len(part)] or parts[:1], ignore_index=True)


def confusion(evidence: Evidence) -> pd.DataFrame:
    """Columns arm, class, taken for, percent (of the class): every arm's first seed."""
    parts = []
    for _, run in evidence.first("evaluate").iterrows():
        ledger = evidence.ledgers[run["run_id"]]
        shares = pd.crosstab(ledger["label"], ledger["prediction"], normalize="index")
        shares = 100 * shares.reindex(columns=range(len(evidence.classes)), fill_value=0.0)
        tidy = shares.rename_axis(index="class").reset_index().melt("class", var_name="taken for", value_name="percent")
        for name in ("class", "taken for"):
            tidy[name] = [evidence.classes[i] for i in tidy[name]]
        parts.append(tidy.assign(arm=run["arm"]))
    return pd.concat(parts, ignore_index=True).round({"percent": 2})


def geometry(evidence: Evidence, known: Mapping[str, pd.Series]) -> pd.DataFrame:
    """One row an image of the seed of an arm whose embeddings are shown (KEYS, run, image, within, between, separation,
    margin, its status as `known` by arm, and certificate: its certified radius × 255 where `kind` says so, else the
    proven lower bound of its margin at the verified ε; NaN where it was not verified)."""
    radii = len(certified_radii(evidence)) > 0
    parts = []
    for _, run in evidence.first("embed").iterrows():
        if run["arm"] not in evidence.places:
            continue
        places = evidence.places[run["arm"]]
        frame = places.assign(separation=places["between"] - places["within"], run=run["run_id"])
        certificate = pd.Series(dtype=float)
        verified = _of_embedded(evidence, run["arm"], "verify")
        for home in verified.loc[verified["engine"] == "native", "run_id"]:
            ledger = evidence.ledgers[home].set_index("image")
            column, scale = ("radius", 255) if radii else ("lower_bound", 1)
            certificate = scale * ledger.get(column, pd.Series(float("nan"), ledger.index)).astype(float)
        frame["certificate"] = frame["image"].map(certificate)
        frame["status"] = frame["image"].map(known[run["arm"]]).fillna("open")
        parts.append(frame.assign(**{key: run[key] for key in KEYS}))
    if not parts:
        return pd.DataFrame()
    kind = "certified radius × 255" if radii else "proven lower bound of the margin"
    return pd.concat(parts, ignore_index=True).assign(kind=kind)


def mean_curves(evidence: Evidence) -> pd.DataFrame:
    """Loss and validation accuracies by epoch, in percent but for the loss, as means over seeds."""
    curves = evidence.curves[~evidence.curves["metric"].eq("supcon_loss")]
    found = curves.groupby([*KEYS, "stage", "metric", "epoch"], sort=False)["value"].mean().reset_index()
    percent = found["metric"] != "loss"
    found["value"] = found["value"].where(~percent, 100 * found["value"])
    return found.assign(metric=found["metric"].str.replace("_", " "))


def costs(evidence: Evidence) -> pd.DataFrame:
    """One row a run: KEYS, seed, step, run, machine, seconds, and images a second of a training's stages (train, or
    encoder and head)."""
    rows = evidence.of("train", "evaluate", "verify")
    found = rows[[*KEYS, "seed", "step"]].assign(run=rows["run_id"], seconds=seconds_at_work(rows))
    found["machine"] = rows.get("tags.rampart.machine", pd.Series("-", rows.index)).fillna("-")
    for stage in STAGES:
        found[stage] = rows.get(f"metrics.{stage}/images_per_second", pd.Series(np.nan, rows.index)).astype(float)
    return found


def commands(evidence: Evidence) -> pd.DataFrame:
    """How every arm's first seed was trained, evaluated and verified, and those seeds with which it was done otherwise
    (step, arm, command, runs); one row where all arms share a command."""
    rows = []
    for step in ("train", "evaluate", "verify"):
        runs = evidence.of(step)
        runs = runs[runs["engine"] == "native"]
        runs = runs[~runs.assign(way=runs["command"].map(way)).duplicated(["arm", "way"])]
        for text, alike in runs.groupby("command", sort=False):
            arms = "all" if set(alike["arm"]) == set(runs["arm"]) and len(alike) > 1 else ", ".join(alike["arm"])
            rows.append({"step": step, "arm": arms, "command": text, "runs": " ".join(alike["run_id"])})
    return pd.DataFrame(rows, columns=["step", "arm", "command", "runs"])


class Twins(NamedTuple):
    """Images [N, C, H, W] in [0, 1] and their adversarial examples, with what they are and what they are taken for."""

    images: np.ndarray
    examples: np.ndarray
    names: list[str]
    found: list[str]
    eps: float


def most_broken(evidence: Evidence, count: int = 10) -> Twins | None:
    """The images that most arms are broken on, each with the adversarial example of the most robust of these arms; None
    where no evaluation has kept examples."""
    rates = evidence.values[evidence.values["metric"] == "robust_accuracy"].groupby("arm")["value"].mean()
    kept = {
        arm: arrays
        for arm, arrays in evidence.examples.items()
        if {"clean", "prediction"} <= arrays.keys() and arm in rates
    }
    if not kept:
        return None
    newest = next(iter(kept.values()))
    # Arms that were probed on other images, or at another radius, have nothing to say of these.
    alike = {
        a: k for a, k in kept.items() if np.array_equal(k["images"], newest["images"]) and k["eps"] == newest["eps"]
    }
    homes = evidence.first("evaluate").set_index("arm")["run_id"]
    labels, fooled = None, {}
    for arm, arrays in alike.items():
        ledger = evidence.ledgers[homes[arm]].set_index("image").loc[arrays["images"]]
        labels = ledger["label"].to_numpy()
        fooled[arm] = ledger["correct"].to_numpy() & (arrays["prediction"] != labels)
    assert labels is not None
    votes = np.sum(list(fooled.values()), axis=0)
    chosen = [i for i in np.argsort(-votes, kind="stable")[:count] if votes[i]]
    if not chosen:
        return None
    names = [*evidence.classes, "no class"]  # where a model gives NaN its prediction is -1
    best = [max((arm for arm in alike if fooled[arm][i]), key=lambda arm: (rates[arm], arm)) for i in chosen]
    return Twins(
        newest["clean"][chosen] / np.float32(255),
        np.stack([alike[arm]["adversarial"][i] for arm, i in zip(best, chosen, strict=True)]),
        [f"{evidence.classes[labels[i]]}\n{votes[i]} of {len(alike)} arms" for i in chosen],
        [
            f"{names[alike[arm]['prediction'][i]]}\n{arm.replace('+', chr(10) + '+ ')}"
            for arm, i in zip(best, chosen, strict=True)
        ],
        float(newest["eps"]),
    )


def _ledgers(evidence: Evidence, step: str) -> list[tuple[pd.Series, pd.DataFrame]]:
    return [(run, evidence.ledgers[run["run_id"]]) for _, run in evidence.of(step).iterrows()]
