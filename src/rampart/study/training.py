"""The train step: one arm's training as a run that goes on where it was stopped."""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections.abc import Mapping

from rampart.arms import Arm
from rampart.data import to_pixels
from rampart.models import Classifier
from rampart.reports import describing
from rampart.settings import Settings, TrainSettings
from rampart.study.identity import identity
from rampart.study.opening import data_of, open_data, prepare
from rampart.study.resuming import interrupted_training
from rampart.tracking import Run
from rampart.tracking.later import Later
from rampart.tracking.queries import metric_history, metric_names
from rampart.tracking.runs import Point
from rampart.training import State, train
from rampart.training.stopping import stoppable

log = logging.getLogger(__name__)


def run_training(run: Run, settings: Settings, given: Mapping[str, str]) -> None:
    assert isinstance(settings, TrainSettings)
    arm = Arm(settings.method, settings.augment, settings.contrastive)
    device = prepare(settings)
    key = identity("train", settings, data_of(settings).digest)
    # A random state of one kind of device is none of another.
    before, place = interrupted_training(run, f"{key} {device.type}")
    run.name(f"{arm.name} s{settings.seed}")
    run.tags(arm.texts | {"arm": arm.name})
    run.tags({"seed": settings.seed, "train_profile": settings.profile})
    data = open_data(run, settings)
    # Until all is told: the SIGTERM that follows a Ctrl-C must not stop that.
    with stoppable() as stop, Later() as later, Epochs(run, later, place) as epochs:
        model = train(settings, data, epochs, settings, settings.seed, device, before)
    if stop.asked:
        raise KeyboardInterrupt
    run.about(run.model(model, to_pixels(data.val.images[:2])), "val")
    chosen = epochs.chosen()
    known = metric_names(run.id)
    run.metrics({name: value for name, value in chosen.items() if name not in known})
    run.describe(describing.training(arm, settings, chosen))
    run.tags({"identity": key})
    log.info("%s s%d: trained, logged as runs:/%s/model", arm.name, settings.seed, run.id)


BEST = "/best_epoch"


# Seconds between two times that the server is told: a small training's epochs are shorter than what it takes to tell.
PACE = 1.0


class Epochs:
    """A run as the Recorder of a training, which waits for nothing, and remembers what the kept epoch was like.

    The server is told in the background of all metrics, and of the newest checkpoint, PACE seconds after the last time;
    at the end of a `with` block at once.
    """

    def __init__(self, run: Run, later: Later, place: int = 0) -> None:
        """
        Args:
            place: of CHECKPOINTS, where the first one is written; the others follow by turns.
        """
        self.run, self.later = run, later
        self.seen: dict[int, dict[str, float]] = {}
        # Of a training that is gone on with, epochs that its last checkpoint has not seen may have been told of.
        for name, step, value in metric_history(run.id, metric_names(run.id)).itertuples(index=False):
            self.seen.setdefault(step, {})[name] = value
        self._lock, self._over, self._next = threading.Lock(), threading.Event(), 0.0
        self._points: list[Point] = []
        self._newest: tuple[Classifier, State] | None = None
        self._place = place  # where the newest will be
        # With its place the one that is written, as often as it takes: no other was promised there.
        self._writing: tuple[Classifier, State, int] | None = None
        self._asked = False  # whether `_tell` is to be called anyway

    def __enter__(self) -> Epochs:
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self.later.do(self._tell)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        known = self.seen.setdefault(step, {})
        new = {name: value for name, value in values.items() if name not in known}
        known.update(new)
        with self._lock:
            self._points.append((new, step, time.time()))

    def checkpoint(self, model: Classifier, state: State) -> str:
        # Off a GPU at once: no other thread may call it while a step is recorded.
        model = copy.deepcopy(model).cpu()
        with self._lock:
            self._newest = (model, state)
            asked, self._asked = self._asked, True
            place = self._place
        if not asked:
            self.later.do(self._tell)
        return self.run.checkpoint_uri(place)

    def _tell(self) -> None:
        """In the background; what fails is tried again, with the metrics that are new then."""
        self._over.wait(self._next - time.monotonic())
        with self._lock:
            points = list(self._points)
            if self._newest and not self._writing:
                self._writing, self._newest = (*self._newest, self._place), None
                self._place = 1 - self._place
            self._asked = False
        self.run.curves(points)
        if self._writing:
            self.run.checkpoint(*self._writing)
        with self._lock:
            del self._points[: len(points)]
            self._writing = None
        self._next = time.monotonic() + PACE

    def chosen(self) -> dict[str, float]:
        """kept/<metric> on the validation images of the epoch whose weights the model has."""
        bests = [values[name] for _, values in sorted(self.seen.items()) for name in values if name.endswith(BEST)]
        values = self.seen.get(int(bests[-1]), {}).items()
        return {f"kept/{name.removeprefix('val/')}": value for name, value in values if name.startswith("val/")}
