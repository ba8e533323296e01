"""The verify step: verdicts on chosen test images."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pandas as pd
import torch

from rampart.data import to_pixels
from rampart.errors import Contradiction
from rampart.ledger import verdict_counts
from rampart.reports import describing
from rampart.settings import Settings, VerifySettings, as_text
from rampart.study.identity import identity
from rampart.study.resuming import Paced, interrupted, salvaged
from rampart.study.subject import Subject, draw, finish, open_subject
from rampart.tracking import Run
from rampart.tracking.queries import find_runs, read_arrays, read_table
from rampart.tracking.runs import LEDGER
from rampart.verification import Progress, verify_split

log = logging.getLogger(__name__)


def run_verification(run: Run, settings: Settings, given: Mapping[str, str]) -> None:
    assert isinstance(settings, VerifySettings)
    subject = open_subject(run, settings)
    data, label = subject.data, subject.label
    whole = identity(run.step, replace(settings, part=""), data.digest, subject.weights)
    if settings.part:
        run.name(f"{run.step} {label}, {settings.part}")
        run.tags({"step": PART, "part_of": whole})
    progress = _progress(run, settings, subject, whole)
    progress.keep = Paced(lambda known: _keep(run, known.ledger, known.examples))
    number, _, count = (settings.part or "1/1").partition("/")
    try:
        ledger, examples = verify_split(subject.model, subject.test, settings, progress, (int(number) - 1, int(count)))
    except Contradiction:
        run.tags({"begun": "distrusted", "part_of": "distrusted"})  # nothing goes on from here
        raise
    counts = verdict_counts(ledger)
    _keep(run, ledger, examples)
    said = [f"{int(n)} {k.split('/')[1]}" for k, n in counts.items() if n and k.split("/")[1] in SAID]
    eps = as_text(settings, {})["eps"]
    log.info("%s: %d images at ε %s: %s", label, len(ledger), eps, ", ".join(said))
    if settings.part:
        finish(run, settings, data)
        return
    run.evidence(ledger)
    if examples:
        from rampart.reports import pictures

        shown = ledger[ledger["image"].isin(examples)].head(SHOWN)
        chosen = torch.tensor(shown["image"].tolist())
        picture = pictures.twins(
            to_pixels(data.test.images[chosen]).numpy(),
            np.stack([examples[image].cpu().numpy() for image in shown["image"]]),
            [data.classes[label] for label in shown["label"]],
            [data.classes[int(label)] for label in shown["counterexample_prediction"]],
        )
        draw(run, "counterexamples", picture)
    run.metrics(counts)
    pictured = run.shown("counterexamples.png") if examples else ""
    run.describe(describing.verification(label, eps, counts, pictured))
    finish(run, settings, data)


EXAMPLES = "counterexamples.npz"
# What a part's runs are called: reports look for whole ones.
PART = "verify-part"
# Counterexamples in a verification's picture.
SHOWN = 12


def _progress(run: Run, settings: VerifySettings, subject: Subject, whole: str) -> Progress:
    """What an interrupted verification has left behind, and what parts of it have."""
    before = interrupted(run, identity(run.step, settings, subject.data.digest, subject.weights))
    left = [before] if before else []
    if not settings.part:
        parts = find_runs(run.experiment, {"part_of": whole}, status=None)["run_id"]
        left += [(part, ledger) for part in parts if (ledger := salvaged(read_table, part, LEDGER)) is not None]
    progress = Progress()
    for old, ledger in left:
        examples = salvaged(read_arrays, old, EXAMPLES) or {}
        known = {row["image"] for row in progress.rows}
        rows = [{str(k): v for k, v in row.items() if pd.notna(v)} for row in ledger.to_dict("records")]
        # Of an image whose counterexample was not kept nothing is known.
        kept = [row for row in rows if "counterexample_prediction" not in row or str(row["image"]) in examples]
        kept = [row for row in kept if row["image"] not in known]
        refuted = [int(row["image"]) for row in kept if "counterexample_prediction" in row]
        progress.rows += kept
        progress.examples |= {image: torch.from_numpy(examples[str(image)]) for image in refuted}
    if left:
        _keep(run, progress.ledger, progress.examples)  # lest a second interruption loses it
    return progress


def _keep(run: Run, ledger: pd.DataFrame, examples: Mapping[int, torch.Tensor]) -> None:
    if examples:
        run.arrays({str(image): example.cpu().numpy() for image, example in examples.items()}, EXAMPLES)
    run.table(ledger, LEDGER)


SAID = ("safe-incomplete", "safe", "unsafe", "timeout", "unknown", "error", "misclassified")
