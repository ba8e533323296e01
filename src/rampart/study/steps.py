"""The entry points: each runs one step of the core inside one MLflow run."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from rampart.arms import Arm
from rampart.data import Dataset, Split, stratified_order, to_pixels
from rampart.errors import Contradiction
from rampart.evaluation import (
    AttackPlan,
    Trust,
    certify,
    embed,
    evaluate,
    geometry,
    sample,
    trust,
    trust_eps,
    withstand,
)
from rampart.ledger import attack_rates, corruption_rates, verdict_counts
from rampart.models import Classifier, predict, weights_digest
from rampart.reports import charts, describing, pictures
from rampart.reports.compare import compare
from rampart.reports.drawing import Drawing, save
from rampart.settings import (
    Common,
    CompareSettings,
    EmbedSettings,
    EvaluateSettings,
    ModelSettings,
    Settings,
    StudySettings,
    TrainSettings,
    TuneSettings,
    VerifySettings,
    as_text,
    eps_text,
    resolve,
)
from rampart.study.identity import identity
from rampart.study.opening import data_of, open_data, prepare
from rampart.study.resuming import Paced, interrupted, interrupted_training
from rampart.tracking import Run, fetch_model, open_run, source_of
from rampart.tracking.later import Later
from rampart.tracking.queries import find_runs, metric_history, metric_names, read_arrays, run_tags
from rampart.tracking.runs import ADVERSARIAL, LEDGER, PLACES, POINTS
from rampart.training import State, train
from rampart.verification import Progress, verify_split

log = logging.getLogger(__name__)

# Tags that tell which arm a run is of; a step on a model takes them over from the run that trained it.
ARM_TAGS = ("method", "augment", "contrastive", "arm", "seed", "train_profile")


def run_step(step: str, given: Mapping[str, str], study: str | None = None) -> str:
    """Runs `step` with the settings that the user gave as texts, as a run of its own under `study`'s; returns its id.

    Raises:
        RampartError: bad input; the run is FAILED then.
    """
    with open_run(step, study) as run:
        settings = resolve(step, given)
        run.params(as_text(settings, given))
        run.tags({"profile": settings.profile})
        if isinstance(settings, Common):
            prepare(settings)
        BODIES[step](run, settings, given)
        log.info("%s: done; open run %s (experiment %s) in the MLflow UI: make ui", step, run.id, run.experiment)
    return run.id


def _train(run: Run, settings: Settings, given: Mapping[str, str]) -> None:
    assert isinstance(settings, TrainSettings)
    arm = Arm(settings.method, settings.augment, settings.contrastive)
    device = prepare(settings)
    key = identity("train", settings, data_of(settings).digest)
    before = interrupted_training(run, key)
    run.name(f"{arm.name} s{settings.seed}")
    run.tags({"method": arm.method, "augment": arm.augment, "contrastive": arm.contrastive, "arm": arm.name})
    run.tags({"seed": settings.seed, "train_profile": settings.profile})
    data = open_data(run, settings)
    with Later() as later:
        epochs = Epochs(run, later)
        model = train(settings, data, epochs, settings, settings.seed, device, before)
    run.about(run.model(model, to_pixels(data.val.images[:2])), "val")
    chosen = epochs.chosen()
    run.metrics(chosen)
    run.describe(describing.training(arm, settings, chosen))
    run.tags({"identity": key})
    log.info("%s s%d: trained, logged as runs:/%s/model", arm.name, settings.seed, run.id)


BEST = "/best_epoch"


class Epochs:
    """A run as the Recorder of a training, which waits for nothing, and remembers what the kept epoch was like."""

    def __init__(self, run: Run, later: Later) -> None:
        self.run, self.later = run, later
        self.seen: dict[int, dict[str, float]] = {}
        # Of a training that is gone on with, epochs that its last checkpoint has not seen may have been told of.
        for name, step, value in metric_history(run.id, metric_names(run.id)).itertuples(index=False):
            self.seen.setdefault(step, {})[name] = value

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        known = self.seen.setdefault(step, {})
        new = {name: value for name, value in values.items() if name not in known}
        known.update(new)
        self.later.do(partial(self.run.metrics, new, step))

    def checkpoint(self, model: Classifier, state: State) -> str:
        self.later.do(partial(self.run.checkpoint, copy.deepcopy(model), state))
        return self.run.checkpoint_place(state)

    def chosen(self) -> dict[str, float]:
        """kept/<metric> on the validation images of the epoch whose weights the model has."""
        bests = [values[name] for _, values in sorted(self.seen.items()) for name in values if name.endswith(BEST)]
        values = self.seen.get(int(bests[-1]), {}).items()
        return {f"kept/{name.removeprefix('val/')}": value for name, value in values if name.startswith("val/")}


@dataclass(frozen=True)
class Subject:
    """The model that a step looks at, on its device, and the data that it looks at it with.

    Args:
        label: what it is called.
        run: that trained it, if any.
        weights: their digest.
    """

    model: Classifier
    label: str
    run: str | None
    weights: str
    data: Dataset
    test: Split


def _open(run: Run, settings: ModelSettings) -> Subject:
    """Model and data as inputs of `run`, which is named and tagged after them and whose metrics are about them."""
    source = source_of(settings.model)
    model = fetch_model(settings.model).to(prepare(settings))
    known = run_tags(source.run) if source.run else {}
    label = f"{known['arm']} s{known['seed']}" if "arm" in known else Path(settings.model).stem
    run.name(f"{run.step} {label}")
    run.tags({name: known[name] for name in ARM_TAGS if name in known})
    weights = weights_digest(model)
    run.tags({"model_run": source.run or "", "model": settings.model, "weights": weights})
    data = open_data(run, settings)
    run.about(source.model_id, "test")
    if source.model_id:
        run.uses([source.model_id])
    return Subject(model, label, source.run, weights, data, data.test.to(prepare(settings)))


def _finish(run: Run, settings: EvaluateSettings | VerifySettings | EmbedSettings, data: Dataset) -> None:
    run.tags({"identity": identity(run.step, settings, data.digest, settings.model)})


def _evaluate(run: Run, settings: Settings, given: Mapping[str, str]) -> None:
    assert isinstance(settings, EvaluateSettings)
    subject = _open(run, settings)
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
    found = _trust(run, settings, subject, ledger) if settings.trust_images else None
    ledger = withstand(model, test, ledger, settings, settings.seed, settings.batch_size)
    ledger = certify(model, test, ledger, settings, Paced(lambda so_far: run.table(so_far, LEDGER)))
    rates = attack_rates(ledger)
    run.evidence(ledger)
    run.metrics({**rates, **corruption_rates(ledger)})
    run.describe(describing.evaluation(label, rates, found.verdict if found else ""))
    _finish(run, settings, subject.data)
    by_name = {key.partition("/")[::2]: rate for key, rate in rates.items()}
    asr = [f"{100 * rate:.2f} % at {eps_text(float(eps))}" for (name, eps), rate in by_name.items() if name == "asr"]
    log.info("%s: accuracy %.2f %%, attack success %s", label, 100 * rates["accuracy"], ", ".join(asr))
    for (name, eps), rate in by_name.items():
        if name == "certified_accuracy":
            bracket = 100 * rate, 100 * by_name["attacked_accuracy", eps], eps_text(float(eps)), settings.certify
            log.info("%s: verified accuracy %.2f to %.2f %% at %s (%s)", label, *bracket)
    if found is not None and found.suspect:
        log.warning("%s: its attack rates are not to be trusted (%s): see trust.csv", label, ", ".join(found.suspect))


def _trust(run: Run, settings: EvaluateSettings, subject: Subject, ledger: pd.DataFrame) -> Trust:
    """Checks the attack's rates, and leaves adversarial images with which other models' rates can be checked."""
    model, test = subject.model, subject.test
    images, eps = sample(test, settings), trust_eps(settings)
    others = _adversarial(run, images, eps, settings.norm, subject)
    found = trust(model, test, ledger, settings, settings, others, settings.seed)
    run.csv(found.checks, "trust.csv")
    values = found.checks.dropna(subset="value")
    run.metrics({f"trust/{check}": value for check, value in zip(values["check"], values["value"], strict=True)})
    run.tags({"trust": found.verdict})
    kept = {
        "images": images.numpy(),
        "clean": test.images[images.to(test.images.device)].cpu().numpy(),
        "adversarial": found.adversarial.cpu().numpy(),
        "prediction": predict(model, found.adversarial).cpu().numpy(),
        "eps": np.array(eps),
        "norm": np.array(settings.norm),
    }
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


def _verify(run: Run, settings: Settings, given: Mapping[str, str]) -> None:
    assert isinstance(settings, VerifySettings)
    subject = _open(run, settings)
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
        _draw(run, "counterexamples", picture)
    run.metrics(counts)
    pictured = run.shown("counterexamples.png") if examples else ""
    eps = as_text(settings, {})["eps"]
    run.describe(describing.verification(label, eps, counts, pictured))
    _finish(run, settings, data)
    said = [f"{int(n)} {k.split('/')[1]}" for k, n in counts.items() if n and k.split("/")[1] in SAID]
    log.info("%s: %d images at ε %s: %s", label, len(ledger), eps, ", ".join(said))


def _draw(run: Run, name: str, drawing: Drawing, home: str | None = None) -> None:
    """A figure as NAME.png of a run, of `run` where no other is given."""
    save({name: drawing}, run.scratch)
    run.file(run.scratch / f"{name}.png", home)


EXAMPLES = "counterexamples.npz"
# Evaluations of other models whose adversarial examples are tried, and among how many they are looked for.
SOURCES, SOUGHT = 3, 50
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


def _embed(run: Run, settings: Settings, given: Mapping[str, str]) -> None:
    assert isinstance(settings, EmbedSettings)
    subject = _open(run, settings)
    data, label = subject.data, subject.label
    chosen = stratified_order(data.test, settings.seed)[: settings.points]
    points = embed(subject.model, subject.test, chosen, settings, settings.seed)
    # The picture belongs to the model; a model from a file has no run but this one.
    home = subject.run or run.id
    for place in {run.id, home}:
        run.table(points, POINTS, place)
    _draw(run, "umap", charts.umap({label: points}, data.classes), home)
    places = geometry(subject.model, subject.test)
    run.table(places, PLACES)
    means = {name: float(places[name].mean()) for name in ("within", "between", "margin")}
    run.metrics({f"embedding/{name}": value for name, value in means.items() if np.isfinite(value)})
    run.describe(describing.embedding(label, means))
    _finish(run, settings, data)
    log.info("%s: UMAP of %d embeddings in run %s (umap.png, umap.parquet)", label, len(points), home)


def _compare(run: Run, settings: Settings, given: Mapping[str, str]) -> None:
    assert isinstance(settings, CompareSettings)
    run.name(f"compare {settings.profile}")
    compare(run, settings)


def _tune(run: Run, settings: Settings, given: Mapping[str, str]) -> None:
    assert isinstance(settings, TuneSettings)
    from rampart.tuning import tune

    tune(run, settings, given)


def _main(run: Run, settings: Settings, given: Mapping[str, str]) -> None:
    assert isinstance(settings, StudySettings)
    from rampart.study.executor import run_study

    run_study(run, settings, given)


BODIES: dict[str, Callable[[Run, Any, Mapping[str, str]], None]] = {
    "train": _train,
    "evaluate": _evaluate,
    "verify": _verify,
    "embed": _embed,
    "compare": _compare,
    "tune": _tune,
    "main": _main,
}
