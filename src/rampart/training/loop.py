"""The one training loop: a stage of epochs, with validation, the best epoch kept, and a checkpoint each."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

from rampart.data import Augmentation, Dataset, batches
from rampart.errors import BoundError, TrainingDiverged
from rampart.models import Classifier, classes_of
from rampart.training.criterion import Criterion
from rampart.training.methods import Method
from rampart.training.recipe import Recipe
from rampart.training.schedules import lr_factor, warmed_eps
from rampart.training.state import Progress, State, Streams
from rampart.training.step import Step
from rampart.training.stopping import Stop, stoppable

log = logging.getLogger(__name__)

# How far outputs may lie apart, beside their size, that are one output but for rounding.
ROUNDING = 1e-6


class Recorder(Protocol):
    """What training tells as it goes; `tracking` keeps it in MLflow, tests in a list."""

    def metrics(self, values: Mapping[str, float], step: int) -> None: ...

    def checkpoint(self, model: Classifier, state: State) -> str:
        """Keeps the model at the start of a stage, after an epoch, or where training stops, and says where; with the
        `state` training can go on from there."""
        ...


@dataclass(frozen=True)
class Stage:
    """One optimisation of `trained`: the whole network, or a part of it while the rest stands still."""

    name: str
    trained: nn.Module
    epochs: int
    method: Method
    criterion: Criterion


def fit(
    stage: Stage,
    model: Classifier,
    data: Dataset,
    recipe: Recipe,
    augmentation: Augmentation | None,
    streams: Streams,
    recorder: Recorder,
    first_epoch: int,
    before: State | None = None,
) -> int:
    """Trains `stage` and leaves the chosen epoch's weights in `model`; returns that epoch, counted from `first_epoch`.

    Args:
        before: where an interrupted training of the stage stood, which is gone on with.

    Raises:
        TrainingDiverged: a loss became NaN or infinite, or all ReLUs of a layer died; the last good checkpoint is
            named.
        KeyboardInterrupt: it was asked to stop (`stoppable`), and has left a checkpoint.
    """
    trained = stage.trained
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in trained.parameters():
        parameter.requires_grad_(True)
    step = Step(trained, model, stage.method, stage.criterion, recipe, streams)
    average = step.average
    steps = math.ceil(len(data.train) / recipe.batch_size)
    total = stage.epochs * steps
    # Summed up on the device: fetching a loss would wait for the device at every step.
    at = Progress(model, step.optimizers, average, streams, first_epoch, torch.zeros((), device=step.device))
    if before is not None:
        at.restore(before)
    kept = recorder.checkpoint(model, at.state(stage.name))

    def shuffled() -> Iterator[tuple[Tensor, Tensor]]:
        """The training batches of one epoch, augmented; of the one under way those that are not done."""
        for x, y in islice(batches(data.train, recipe.batch_size, streams.order, drop_single=True), at.batch, None):
            yield (augmentation(x, streams.device) if augmentation is not None else x), y

    def scheduled(batch: int) -> tuple[float, float]:
        """(ε, learning rate) at a batch of the epoch under way."""
        progress = ((at.epoch - first_epoch) * steps + batch) / total
        return warmed_eps(recipe.eps, recipe.eps_warmup, progress), recipe.lr * lr_factor(recipe.schedule, progress)

    done = (at.epoch - first_epoch) * steps + at.batch
    progress_bar = tqdm(total=total, initial=done, desc=stage.name, unit="batch", disable=None, leave=False)
    with stoppable() as stop, progress_bar as bar:
        if stop.asked:  # before the first batch
            raise KeyboardInterrupt
        while at.epoch < first_epoch + stage.epochs:
            # A frozen part keeps its running statistics, too.
            model.eval()
            trained.train()
            first, started = at.seen, time.perf_counter()
            eps, lr = scheduled(max(at.batch - 1, 0))  # of an epoch that was stopped after its last batch
            for x, y in shuffled():
                eps, lr = scheduled(at.batch)
                loss = step(x, y, eps, lr)
                at.count(loss, len(y))
                bar.update()
                if stop.asked:
                    recorder.checkpoint(model, at.state(stage.name))
                    raise KeyboardInterrupt
            mean_loss = at.loss_sum.item() / at.seen
            seconds = time.perf_counter() - started
            live = copy.deepcopy(model.state_dict())
            if average is not None:
                model.load_state_dict(average.module.state_dict())
            seen, trained_on = at.seen - first, at.state(stage.name, live)
            at.batch = 0
            try:
                if recipe.bn_batches:
                    measure_statistics(stage, model, islice(shuffled(), recipe.bn_batches))
                found = validate(stage, model, data, recipe, streams.device, stop)
            except KeyboardInterrupt:
                if stop.asked:
                    recorder.checkpoint(model, trained_on)
                raise
            # The loss is that of the steps' starts: the last step may have ruined the weights behind a finite one.
            fault = found.fault if math.isfinite(mean_loss) else f"the loss became {mean_loss}"
            if fault:
                raise TrainingDiverged(
                    f"{fault} in epoch {at.epoch} ({stage.name}): lower lr (now {recipe.lr:g}) or eps; "
                    f"the last good checkpoint is {kept}"
                )
            recorder.metrics(
                {
                    f"{stage.name}/loss": mean_loss,
                    f"{stage.name}/epsilon": eps,
                    f"{stage.name}/learning_rate": lr,
                    **({f"{stage.name}/images_per_second": seen / seconds} if seen else {}),
                    **found.metrics,
                },
                step=at.epoch,
            )
            # SupCon does not say how good a head on the encoder will be: its last epoch counts. Of equal epochs the
            # later one: it has seen more images at full ε.
            if recipe.select == "last" or not stage.criterion.needs_logits or found.score >= at.best_score:
                at.choose(found.score)
            at.next_epoch()
            kept = recorder.checkpoint(model, at.state(stage.name, live))
            bar.set_postfix({"loss": f"{mean_loss:.3f}", **{k: f"{v:.3f}" for k, v in found.metrics.items()}})
            model.load_state_dict(live)
            if stop.asked:
                raise KeyboardInterrupt
    model.load_state_dict(at.best_weights)
    last = first_epoch + stage.epochs - 1
    log.info("%s: kept epoch %d of %d (score %.4f)", stage.name, at.best, last, at.best_score)
    return at.best


def measure_statistics(stage: Stage, model: Classifier, chosen: Iterable[tuple[Tensor, Tensor]]) -> None:
    """BatchNorm's statistics of the weights as they stand, the mean over the `chosen` batches: those that training
    gathered lag behind its weights, and an average of weights has none of its own."""
    if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in stage.trained.modules()):
        return
    update_bn((x for x, _ in chosen), model)


class Validation(NamedTuple):
    """What validation images say of a model: a score (higher is better), metrics, and what is wrong with it, if so."""

    score: float
    metrics: dict[str, float]
    fault: str


def validate(
    stage: Stage, model: Classifier, data: Dataset, recipe: Recipe, generator: torch.Generator, stop: Stop
) -> Validation:
    """On the validation split, at the full ε whatever the warm-up.

    Raises:
        KeyboardInterrupt: a stop was asked for.
    """
    model.eval()
    encoder_alone = not stage.criterion.needs_logits
    sums: dict[str, Tensor | float] = {}
    parts: list[Tensor] = []
    bounded = True

    def add(name: str, value: Tensor) -> None:
        sums[name] = sums.get(name, 0.0) + value

    for x, y in batches(data.val, max(recipe.batch_size, 256)):
        if stop.asked:
            raise KeyboardInterrupt
        with torch.no_grad():
            if encoder_alone:
                # SupCon on clean embeddings: its value under attack or bounds would cost as much as an epoch.
                parts.append(model.embed(x))
                found = stage.criterion.clean(model, parts[-1], y)
                add("val/supcon_loss", stage.criterion(found, y) * len(y))
                continue
            parts.append(model(x))
            add("val/accuracy", (classes_of(parts[-1]) == y).sum())
        if stage.method.score_name != "accuracy":
            try:
                add(f"val/{stage.method.score_name}", stage.method.survives(x, y, recipe.eps, generator).sum())
            except BoundError:  # weights that overflow
                bounded = False
    metrics = {name: float(value) / len(data.val) for name, value in sums.items()}
    outputs = torch.cat(parts)
    score, fault = math.nan, ""
    if bounded and bool(outputs.isfinite().all()):
        score = -metrics["val/supcon_loss"] if encoder_alone else metrics[f"val/{stage.method.score_name}"]
    if not math.isfinite(score):
        fault = "an output or a bound became NaN or infinite"
    elif len(outputs) > 1 and bool((outputs - outputs[0]).abs().max() <= ROUNDING * outputs[0].abs().max()):
        # ReLUs that are 0 for every image have no gradient that could wake them.
        fault = "all images have come to one and the same output: ReLUs have died"
    return Validation(score, metrics, fault)
