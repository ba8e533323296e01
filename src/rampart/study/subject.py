"""What the steps on a model share: the model, the data that it is looked at with, and their tags."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rampart.arms import Arm
from rampart.data import Dataset, Split
from rampart.errors import ModelError
from rampart.models import Classifier, weights_digest
from rampart.models.released import CLASSES, PREFIX, SEED, meant
from rampart.settings import EmbedSettings, EvaluateSettings, ModelSettings, VerifySettings
from rampart.study.identity import identity
from rampart.study.opening import open_data, prepare
from rampart.tracking import Run, fetch_model, source_of
from rampart.tracking.queries import run_tags
from rampart.tracking.runs import class_names, class_text

if TYPE_CHECKING:
    from rampart.reports.drawing import Drawing

# Tags that tell which arm a run is of; a step on a model takes them over from the run that trained it.
ARM_TAGS = ("method", "augment", "contrastive", "arm", "seed", "train_profile")


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


def open_subject(run: Run, settings: ModelSettings) -> Subject:
    """Model and data as inputs of `run`, which is named and tagged after them and whose metrics are about them."""
    source = source_of(settings.model)
    model = fetch_model(settings.model).to(prepare(settings))
    known = run_tags(source.run) if source.run else _released(settings.model)
    label = f"{known['arm']} s{known['seed']}" if "arm" in known else Path(settings.model).stem
    run.name(f"{run.step} {label}")
    run.tags({name: known[name] for name in ARM_TAGS if name in known})
    weights = weights_digest(model)
    run.tags({"model_run": source.run or "", "model": settings.model, "weights": weights})
    data = open_data(run, settings)
    _require_its_data(model, known.get("class_names"), data, settings)
    run.about(source.model_id, "test")
    if source.model_id:
        run.uses([source.model_id])
    return Subject(model, label, source.run, weights, data, data.test.to(prepare(settings)))


def _require_its_data(model: Classifier, named: str | None, data: Dataset, settings: ModelSettings) -> None:
    """Raises ModelError where the model was not made for the dataset's classes or for images of their size, which many
    networks do not notice; `named` are the classes that it was trained on, where that is known. Its rates would mean
    nothing, and stand in the place of its arm's."""
    count, ours = model.architecture.classes, ",".join(data.classes)
    theirs = ",".join(class_names(named)) if named else ""
    # Servers cut long tags.
    same = ours == theirs or (ours.startswith(theirs) and not (named or "").endswith("]"))
    if count != len(data.classes) or not same:
        what = theirs or f"{count} classes"
        raise ModelError(
            f"the model tells apart {what}; dataset={settings.dataset} has {ours}: give the dataset that the model was "
            "trained on"
        )
    wanted, given = ("x".join(map(str, shape)) for shape in (model.architecture.in_shape, data.in_shape))
    if wanted != given:
        raise ModelError(
            f"the model takes images of {wanted}; dataset={settings.dataset} has such of {given}: give the dataset "
            "that the model was trained on"
        )


def _released(uri: str) -> dict[str, str]:
    """ARM_TAGS and classes of a model that came with the checkout; none of another file."""
    # Where another arm's model stands for the one that was asked for, it is that arm's.
    arm = Arm.called(meant(uri.removeprefix(PREFIX))) if uri.startswith(PREFIX) else None
    return arm.texts | {"arm": arm.name, "seed": SEED, "class_names": class_text(CLASSES)} if arm else {}


def finish(run: Run, settings: EvaluateSettings | VerifySettings | EmbedSettings, data: Dataset) -> None:
    run.tags({"identity": identity(run.step, settings, data.digest, settings.model)})


def draw(run: Run, name: str, drawing: Drawing, home: str | None = None) -> None:
    """A figure as NAME.png of a run, of `run` where no other is given."""
    from rampart.reports.drawing import save  # takes seconds, which most runs can do without

    save({name: drawing}, run.scratch)
    run.file(run.scratch / f"{name}.png", home)
