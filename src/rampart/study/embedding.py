"""The embed step: UMAP and geometry of a model's embeddings."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np

from rampart.data import stratified_order
from rampart.evaluation import embed, geometry
from rampart.reports import charts, describing
from rampart.settings import EmbedSettings, Settings
from rampart.study.subject import draw, finish, open_subject
from rampart.tracking import Run
from rampart.tracking.runs import PLACES, POINTS

log = logging.getLogger(__name__)


def run_embedding(run: Run, settings: Settings, given: Mapping[str, str]) -> None:
    assert isinstance(settings, EmbedSettings)
    subject = open_subject(run, settings)
    data, label = subject.data, subject.label
    chosen = stratified_order(data.test, settings.seed)[: settings.points]
    points = embed(subject.model, subject.test, chosen, settings, settings.seed)
    # The picture belongs to the model; a model from a file has no run but this one.
    home = subject.run or run.id
    for place in {run.id, home}:
        run.table(points, POINTS, place)
    draw(run, "umap", charts.umap({label: points}, data.classes), home)
    places = geometry(subject.model, subject.test)
    run.table(places, PLACES)
    means = {name: float(places[name].mean()) for name in ("within", "between", "margin")}
    run.metrics({f"embedding/{name}": value for name, value in means.items() if np.isfinite(value)})
    run.describe(describing.embedding(label, means))
    finish(run, settings, data)
    log.info("%s: UMAP of %d embeddings in run %s (umap.png, umap.parquet)", label, len(points), home)
