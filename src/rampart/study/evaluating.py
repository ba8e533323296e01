"""The evaluate step: a model attacked, checked, corrupted and certified on the test images."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pandas as pd
import torch

from rampart.evaluation import AttackPlan, Trust, certify, evaluate, sample, trust, trust_eps, withstand
from rampart.ledger import attack_rates, corruption_rates
from rampart.models import predict
from rampart.reports import describing
from rampart.settings import EvaluateSettings, Settings, eps_text
from rampart.study.identity import identity
from rampart.study.resuming import Paced, interrupted, salvaged
from rampart.study.subject import Subject, finish, open_subject
from rampart.tracking import Run
from rampart.tracking.queries import find_runs, read_arrays, read_text
from rampart.tracking.runs import ADVERSARIAL, LEDGER

log = logging.getLogger(__name__)


# Evaluations of other models whose adversarial examples are tried, and among how many they are looked for.
SOURCES, SOUGHT = 3, 50
CHECKS = "trust.csv"


def run_evaluation(run: Run, settings: Settings, given: Mapping[str, str]) -> None:
    assert isinstance(settings, EvaluateSettings)
    subject = open_subject(run, settings)
    model, test, label = subject.model, subject.test, subject.label
    plan: AttackPlan = settings
    if settings.certify != "none":  # the other end of the bracket in which the robust accuracy lies
        plan = replace(settings, eps=tuple({*settings.eps, *settings.certify_eps}))
    before = interrupted(run, identity(run.step, settings, subject.data.digest, subject.weights))
    finished = before[1] if before else None
    if finished is not None:
        run.table(finished, LEDGER)  # lest a second interruption loses it
    ledger = evaluate(
        model, test, plan, settings.seed, finished, Paced(lambda parts: run.table(pd.concat(parts), LEDGER))
    )
    run.table(ledger, LEDGER)
    found = _trust(run, settings, subject, ledger, before[0] if before else "") if settings.trust_images else None
    ledger = withstand(model, test, ledger, settings, settings.seed, settings.batch_size)
    ledger = certify(model, test, ledger, settings, Paced(lambda so_far: run.table(so_far, LEDGER)))
    rates = attack_rates(ledger)
    run.evidence(ledger)
    run.metrics({**rates, **corruption_rates(ledger)})
    run.describe(describing.evaluation(label, rates, found.verdict if found else ""))
    finish(run, settings, subject.data)
    by_name = {key.partition("/")[::2]: rate for key, rate in rates.items()}
    asr = [f"{100 * rate:.2f} % at {eps_text(float(eps))}" for (name, eps), rate in by_name.items() if name == "asr"]
    log.info("%s: accuracy %.2f %%, attack success %s", label, 100 * rates["accuracy"], ", ".join(asr))
    for (name, eps), rate in by_name.items():
        if name == "certified_accuracy":
            bracket = 100 * rate, 100 * by_name["attacked_accuracy", eps], eps_text(float(eps)), settings.certify
            log.info("%s: verified accuracy %.2f to %.2f %% at %s (%s)", label, *bracket)
    if found is not None and found.suspect:
        log.warning("%s: its attack rates are not to be trusted (%s): see %s", label, ", ".join(found.suspect), CHECKS)


def _trust(run: Run, settings: EvaluateSettings, subject: Subject, ledger: pd.DataFrame, before: str) -> Trust:
    """Checks the attack's rates, and leaves adversarial images with which other models' rates can be checked. What the
    run `before`, from which this one goes on, has found stands: since then branch and bound may have entered into the
    ledger just those images that the attack had missed."""
    kept = salvaged(read_arrays, before, ADVERSARIAL) if before else None
    told = read_text(before, CHECKS) if kept is not None else None
    if kept is not None and told is not None:
        checks = pd.read_csv(io.StringIO(told), dtype={"value": "Float64", "passed": "boolean"})
        found = Trust(checks, torch.from_numpy(kept["adversarial"]))
    else:
        model, test, images, eps = subject.model, subject.test, sample(subject.test, settings), trust_eps(settings)
        others = _adversarial(run, images, eps, settings.norm, subject)
        found = trust(model, test, ledger, settings, settings, others, settings.seed)
        kept = {
            "images": images.numpy(),
            "clean": test.images[images.to(test.images.device)].cpu().numpy(),
            "adversarial": found.adversarial.cpu().numpy(),
            "prediction": predict(model, found.adversarial).cpu().numpy(),
            "eps": np.array(eps),
            "norm": np.array(settings.norm),
        }
    run.csv(found.checks, CHECKS)
    values = found.checks.dropna(subset="value")
    run.metrics({f"trust/{check}": value for check, value in zip(values["check"], values["value"], strict=True)})
    run.tags({"trust": found.verdict})
    run.arrays(kept, ADVERSARIAL)
    return found


def _adversarial(run: Run, images: torch.Tensor, eps: float, norm: str, subject: Subject) -> list[torch.Tensor]:
    """Adversarial examples of those images at that radius that other models' newest evaluations have left."""
    found: dict[str, torch.Tensor] = {}
    others = find_runs(run.experiment, {"step": "evaluate", "dataset_digest": subject.data.digest}, max_results=SOUGHT)
    for other in others.to_dict("records"):
        name = other.get("tags.rampart.weights")
        if len(found) == SOURCES:
            break
        if name in (subject.weights, *found) or not isinstance(name, str):
            continue
        arrays = read_arrays(other["run_id"], ADVERSARIAL) or {}
        same = np.array_equal(arrays.get("images", []), images.numpy())
        if same and (float(arrays["eps"]), str(arrays["norm"])) == (eps, norm):
            found[name] = torch.from_numpy(arrays["adversarial"])
    return list(found.values())
