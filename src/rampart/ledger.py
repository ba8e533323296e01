"""The per-image table behind every rate. Rates are computed from it here and nowhere else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import pandas as pd
from torch import Tensor

from rampart.errors import RampartError

VERDICTS = ("safe-incomplete", "safe", "unsafe", "timeout", "unknown", "error")
PROVED = ("safe-incomplete", "safe")


# Stands in `broken_by` beside the attacks.
SEARCH = "branch-and-bound"

# Radii that stand in names have six digits.
ROUNDED = 1e-5


def eps_key(eps: float) -> str:
    """ε (pixels) as it stands in column and metric names: 1/255 -> '0.00392157'."""
    return f"{eps:.6g}"


def evaluation_ledger(labels: Tensor, predictions: Tensor, success: Tensor, eps: Sequence[float]) -> pd.DataFrame:
    """One row an image: image, label, prediction, correct, and attacked/<ε>: whether the attack made it err.

    Args:
        labels, predictions: [N].
        success: bool [E, N].
        eps: E radii in pixels.
    """
    frame = pd.DataFrame({"image": range(len(labels)), "label": labels.cpu(), "prediction": predictions.cpu()})
    frame["correct"] = frame["label"] == frame["prediction"]
    for radius, row in zip(eps, success.cpu(), strict=True):
        frame[f"attacked/{eps_key(radius)}"] = row.numpy()
    return frame


def attacked_by(ledger: pd.DataFrame, eps: float) -> pd.Series:
    """Which images an attack of radius `eps` (pixels) or less broke."""
    broken = pd.Series(False, index=ledger.index)
    for column in ledger.columns:
        kind, _, key = str(column).partition("/")
        if kind == "attacked" and float(key) <= eps * (1 + ROUNDED):
            broken |= ledger[column]
    return broken


def mark_attacked(ledger: pd.DataFrame, image: int, eps: float) -> None:
    """Enters a counterexample of radius `eps` (pixels) that branch and bound has found: it stands for the larger radii,
    too, and where the ledger says what broke an image at the smallest radius, it does so of this one."""
    row = ledger["image"] == image
    for column in ledger.columns:
        kind, _, key = str(column).partition("/")
        if kind == "attacked" and float(key) >= eps * (1 - ROUNDED):
            ledger.loc[row, column] = True
    if "broken_eps" in ledger and not (ledger.loc[row, "broken_eps"] <= eps * (1 + ROUNDED)).fillna(False).any():
        ledger.loc[row, ["broken_eps", "broken_by"]] = eps, SEARCH
        ledger.loc[row, ["broken_restart", "broken_step"]] = pd.NA


def attack_rates(ledger: pd.DataFrame) -> dict[str, float]:
    """accuracy, asr/<ε>, afr/<ε>, robust_accuracy/<ε> for every ε attacked, and for every ε at which images were to be
    proved the shares of those images between which their true robust accuracy lies: certified_accuracy/<ε> and
    attacked_accuracy/<ε> (correct, and not broken at ε or less); all in [0, 1].

    ASR is over the correctly classified images (0 where there is none); robust accuracy = accuracy * AFR.
    """
    correct = ledger["correct"]
    rates = {"accuracy": float(correct.mean())}
    for column in ledger.columns:
        kind, _, key = str(column).partition("/")
        if kind == "attacked":
            asr = float(ledger.loc[correct, column].mean()) if correct.any() else 0.0
            rates[f"asr/{key}"], rates[f"afr/{key}"] = asr, 1 - asr
            rates[f"robust_accuracy/{key}"] = float((correct & ~ledger[column]).mean())
        elif kind == "certified":
            chosen = ledger[column].notna()
            rates[f"certified_accuracy/{key}"] = float((correct & ledger[column])[chosen].mean())
            rates[f"attacked_accuracy/{key}"] = float((correct & ~attacked_by(ledger, float(key)))[chosen].mean())
    return rates


def corruption_rates(ledger: pd.DataFrame) -> dict[str, float]:
    """corrupted/<corruption>: accuracy under it, the mean over its strengths; corrupted_accuracy: the mean of these.
    Nothing where no corruption was tried."""
    found: dict[str, list[float]] = {}
    for column in ledger.columns:
        kind, _, rest = str(column).partition("/")
        if kind == "withstood":
            found.setdefault(rest.partition("/")[0], []).append(float(ledger[column].mean()))
    means = {f"corrupted/{kind}": sum(shares) / len(shares) for kind, shares in found.items()}
    return {**means, **({"corrupted_accuracy": sum(means.values()) / len(means)} if means else {})}


def contradiction(ledgers: Mapping[str, pd.DataFrame]) -> str | None:
    """What is wrong with ledgers of one model, by run: an image proved at one ε and broken at that ε or less.

    A line that names image, radii and runs; None where all agree.
    """
    broken: dict[int, tuple[float, str]] = {}
    proved: dict[int, tuple[float, str]] = {}
    for run, ledger in ledgers.items():
        for image, eps, robust in _facts(ledger):
            known = proved if robust else broken
            if image not in known or (eps > known[image][0]) == robust:
                known[image] = eps, run
    for image in sorted(broken.keys() & proved.keys()):
        (low, by), (high, of) = broken[image], proved[image]
        if low <= high * (1 + ROUNDED):
            return f"image {image} was proved robust at ε {high:.6g} (run {of}) and broken at {low:.6g} (run {by})"
    return None


def _facts(ledger: pd.DataFrame) -> Iterator[tuple[int, float, bool]]:
    """(image, ε, whether it is robust there) of all that a ledger says of correctly classified images."""
    correct = ledger[ledger["correct"]]
    for column in correct.columns:
        kind, _, key = str(column).partition("/")
        if kind in ("attacked", "certified"):
            for image in correct.loc[correct[column].fillna(False).astype(bool), "image"]:
                yield image, float(key), kind == "certified"
    if "verdict" in correct:
        settled = correct[correct["verdict"].isin([*PROVED, "unsafe"])]
        robust = settled["verdict"].isin(PROVED).tolist()
        yield from zip(settled["image"].tolist(), settled["eps"].tolist(), robust, strict=True)
    if "radius" in correct:
        found = correct[correct["radius"] > 0]
        yield from zip(found["image"].tolist(), found["radius"].tolist(), [True] * len(found), strict=True)


def verdict_counts(ledger: pd.DataFrame) -> dict[str, float]:
    """verdicts/<verdict> for every verdict, verdicts/misclassified, and the shares certified_accuracy and accuracy."""
    found = Counter(ledger["verdict"].dropna())
    foreign = set(found) - set(VERDICTS)
    if foreign:
        raise RampartError(f"a ledger holds the unknown verdict '{min(foreign)}'")
    return {
        **{f"verdicts/{verdict}": float(found[verdict]) for verdict in VERDICTS},
        "verdicts/misclassified": float((~ledger["correct"]).sum()),
        "verdicts/images": float(len(ledger)),
        "verdicts/certified_accuracy": float(ledger["verdict"].isin(PROVED).mean()) if len(ledger) else 0.0,
        "verdicts/seconds": float(ledger["seconds"].sum()),
    }
