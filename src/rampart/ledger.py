"""The per-image table behind every rate. Rates are computed from it here and nowhere else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pandas as pd
from torch import Tensor

from rampart.errors import RampartError

VERDICTS = ("safe-incomplete", "safe", "unsafe", "timeout", "unknown", "error")
PROVED = ("safe-incomplete", "safe")


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


def attack_rates(ledger: pd.DataFrame) -> dict[str, float]:
    """accuracy, asr/<ε>, afr/<ε>, robust_accuracy/<ε> for every ε attacked, and certified_accuracy/<ε> for every ε at
    which images were to be proved (a share of those images), all in [0, 1].

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
    return rates


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
