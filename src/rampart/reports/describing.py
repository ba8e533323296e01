"""What a run's page in the MLflow UI says of it, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from rampart.arms import Arm
from rampart.reports.tables import markdown
from rampart.settings import TrainSettings, eps_text


def training(arm: Arm, settings: TrainSettings, kept: Mapping[str, float]) -> str:
    stages = f"{settings.encoder_epochs} + {settings.head_epochs}" if arm.contrastive == "double" else settings.epochs
    eps = "" if arm.method == "normal" else f", ε {eps_text(settings.eps)} (pixels)"
    numbers = pd.DataFrame(
        [{"of the kept epoch, on validation images": name, "%": f"{100 * v:.2f}"} for name, v in kept.items()]
    )
    return (
        f"**{arm.name}, seed {settings.seed}**: {settings.architecture} × {settings.width:g}, {stages} epochs, "
        f"lr {settings.lr:g}, batch {settings.batch_size}{eps}\n\n{markdown(numbers)}\n"
    )


def evaluation(label: str, rates: Mapping[str, float], suspect: str) -> str:
    """`suspect`: what the checks of the attack said, empty where none was made."""
    rows = []
    for name, rate in rates.items():
        kind, _, key = name.partition("/")
        if kind == "robust_accuracy":
            row = {"ε": eps_text(float(key)), "robust accuracy %": rate, "attack success %": rates[f"asr/{key}"]}
            row["proved %"] = rates.get(f"certified_accuracy/{key}")
            rows.append(row)
    table = pd.DataFrame(rows).map(lambda v: v if isinstance(v, str) else "-" if pd.isna(v) else f"{100 * v:.2f}")
    checked = f" The attack's checks: {suspect}." if suspect else ""
    return f"**{label}**: accuracy {100 * rates['accuracy']:.2f} %.{checked}\n\n{markdown(table)}\n"


def verification(label: str, eps: str, counts: Mapping[str, float], picture: str) -> str:
    """`picture`: Markdown, or nothing."""
    named = {name.partition("/")[2]: value for name, value in counts.items()}
    shown = {name: f"{value:.0f}" for name, value in named.items() if name not in ("certified_accuracy", "seconds")}
    table = pd.DataFrame([{**shown, "certified %": f"{100 * named['certified_accuracy']:.2f}"}])
    return f"**{label}**: verdicts at ε {eps}\n\n{markdown(table)}\n\n{picture}\n"


def embedding(label: str, means: Mapping[str, float]) -> str:
    table = pd.DataFrame([{name: f"{value:.4f}" for name, value in means.items()}])
    said = "mean distances of the embeddings within a class and to the next one, and mean margin of the logits"
    return f"**{label}**: {said}\n\n{markdown(table)}\n"
