"""The verify step: verdicts on chosen test images."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch

from rampart.data import to_pixels
from rampart.errors import Contradiction
from rampart.ledger import verdict_counts
from rampart.reports import describing, pictures
from rampart.settings import Settings, VerifySettings, as_text
from rampart.study.identity import identity
from rampart.study.resuming import Paced, interrupted
from rampart.study.subject import Subject, draw, finish, open_subject
from rampart.tracking import Run
from rampart.tracking.queries import read_arrays
from rampart.tracking.runs import LEDGER
from rampart.verification import Progress, verify_split

log = logging.getLogger(__name__)


def run_verification(run: Run, settings: Settings, given: Mapping[str, str]) -> None:
    assert isinstance(settings, VerifySettings)
    subject = open_subject(run, settings)
    data, label = subject.data, subject.label
    progress = _progress(run, settings, subject)
    progress.keep = Paced(lambda known: _keep(run, known.ledger, known.examples))
    try:
        ledger, examples = verify_split(subject.model, subject.test, settings, progress)
    except Contradiction:
        run.tags({"begun": "distrusted"})  # nothing goes on from here
        raise
    counts = verdict_counts(ledger)
    _keep(run, ledger, examples)
    run.evidence(ledger)
    if examples:
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
    eps = as_text(settings, {})["eps"]
    run.describe(describing.verification(label, eps, counts, pictured))
    finish(run, settings, data)
    said = [f"{int(n)} {k.split('/')[1]}" for k, n in counts.items() if n and k.split("/")[1] in SAID]
    log.info("%s: %d images at ε %s: %s", label, len(ledger), eps, ", ".join(said))


EXAMPLES = "counterexamples.npz"
# Counterexamples in a verification's picture.
SHOWN = 12


def _progress(run: Run, settings: VerifySettings, subject: Subject) -> Progress:
    """What an interrupted verification has left behind."""
    before = interrupted(run, identity(run.step, settings, subject.data.digest, subject.weights))
    if before is None:
        return Progress()
    old, ledger = before
    examples = read_arrays(old, EXAMPLES) or {}
    rows = [{str(k): v for k, v in row.items() if pd.notna(v)} for row in ledger.to_dict("records")]
    # Of an image whose counterexample was not kept nothing is known.
    kept = [row for row in rows if "counterexample_prediction" not in row or str(row["image"]) in examples]
    refuted = [int(row["image"]) for row in kept if "counterexample_prediction" in row]
    progress = Progress(kept, {image: torch.from_numpy(examples[str(image)]) for image in refuted})
    _keep(run, progress.ledger, progress.examples)  # lest a second interruption loses it
    return progress


def _keep(run: Run, ledger: pd.DataFrame, examples: Mapping[int, torch.Tensor]) -> None:
    if examples:
        run.arrays({str(image): example.cpu().numpy() for image, example in examples.items()}, EXAMPLES)
    run.table(ledger, LEDGER)


SAID = ("safe-incomplete", "safe", "unsafe", "timeout", "unknown", "error", "misclassified")
