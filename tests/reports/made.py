"""Hand-made numbers, and runs that say they have finished a step."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from rampart.ledger import attack_rates, verdict_counts
from rampart.tracking import Run, open_run


def values() -> pd.DataFrame:
    """Two arms, two seeds, in no good order."""
    rows = []
    for method, base in (("certified", 0.5), ("normal", 0.8)):
        for seed in ("1", "0"):
            key = {"augment": False, "method": method, "contrastive": "none", "arm": method, "engine": "native"}
            key["seed"] = seed
            shift = 0.02 * int(seed)
            run = f"{method}-{seed}"
            rows.append(
                {**key, "step": "evaluate", "metric": "accuracy", "eps": None, "value": base + shift, "run": run}
            )
            for eps in (8 / 255, 2 / 255):
                rate = {**key, "step": "evaluate", "eps": eps, "run": run}
                rows.append({**rate, "metric": "robust_accuracy", "value": base - eps})
                rows.append({**rate, "metric": "asr", "value": eps})
            for metric, value in (("safe-incomplete", 3), ("unknown", 2), ("images", 5), ("certified_accuracy", 0.6)):
                entry = {**key, "step": "verify", "metric": metric, "eps": 2 / 255, "value": value, "run": f"v-{run}"}
                rows.append(entry)
    return pd.DataFrame(rows).astype({"eps": float}).assign(suspect=False)


def radii() -> pd.DataFrame:
    key = {"augment": False, "contrastive": "none", "engine": "native"}
    rows = [
        {**key, "method": method, "arm": method, "run": f"run of {method}", "radius": radius}
        for method, found in (("normal", (0.001, 0.003, float("nan"), 0.002)), ("certified", (0.01, 0.0, 0.02)))
        for radius in found
    ]
    return pd.DataFrame(rows)


CLASSES = ("cat", "dog", "ship")
ARM = {"profile": "quick", "arm": "normal", "method": "normal", "augment": False, "contrastive": "none", "seed": 0}


def evaluation(right: str, broken: str = "", **tags: object) -> pd.DataFrame:
    """A ledger: an image a character, 1 where it is classified correctly, and where an attack of ε 0.1 broke it."""
    frame = pd.DataFrame({"image": range(len(right)), "label": [i % 3 for i in range(len(right))]})
    frame["correct"] = [c == "1" for c in right]
    frame["prediction"] = frame["label"].where(frame["correct"], (frame["label"] + 1) % 3)
    frame["attacked/0.1"] = [c == "1" for c in broken.ljust(len(right), "0")]
    return frame


def verification(verdicts: Mapping[int, str], eps: float = 0.1) -> pd.DataFrame:
    """A ledger: the verdict of each image; None where it is misclassified."""
    frame = pd.DataFrame({"image": list(verdicts), "label": [i % 3 for i in verdicts], "eps": eps})
    frame["verdict"] = pd.array(list(verdicts.values()), dtype="string")
    frame["correct"] = frame["verdict"].notna()
    return frame.assign(prediction=frame["label"], seconds=0.5, radius=float("nan"), lower_bound=0.25)


def finished(step: str, ledger: pd.DataFrame | None, **tags: object) -> Run:
    """A run that has finished a step with that ledger; a tag that is None it does not have."""
    with open_run(step) as run:
        known: dict[str, object] = {**ARM, "dataset_digest": "d", "dataset": "made", "class_names": ",".join(CLASSES)}
        known |= {"split": f"3/1/{0 if ledger is None else len(ledger)} by 0.2, 42", "model": "runs:/x/model"}
        known |= {"weights": "w", **tags}
        run.tags({name: value for name, value in known.items() if value is not None})
        if ledger is not None and step == "verify":
            run.params({"eps_pixel": "0.1"})
            run.metrics(verdict_counts(ledger))
        elif ledger is not None:
            run.metrics(attack_rates(ledger))
        if ledger is not None:
            run.evidence(ledger)
    return run
