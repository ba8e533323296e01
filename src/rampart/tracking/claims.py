"""Who does a step, where several studies could do it at the same moment: each step is done once."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from mlflow import MlflowClient

from rampart.tracking.store import asking, end_lost, gone, sweep

log = logging.getLogger(__name__)

CHOOSING = "choosing"
# Seconds between two looks at those who are ahead: the first, and the longest.
PAUSES = (0.2, 5.0)
# Seconds that a process whose study is gone has to leave a checkpoint.
FAREWELL = 60


@contextmanager
def claimed(run_id: str, experiment: str, key: str, name: str) -> Iterator[None]:
    """Waits until no other run of the experiment claims `key`, and claims it for `run_id` meanwhile; whoever waits is
    told of it by `name`.

    Lamport's bakery (1974), whose registers are tags of running runs: it needs no more of the server than that a tag
    that is written can be read. The claim of a run whose process is gone falls with the run.
    """
    client, tag = MlflowClient(), f"rampart.claim.{key}"
    with asking():
        client.set_tag(run_id, tag, CHOOSING)
        others = _claims(experiment, tag)
        others.pop(run_id, None)
        number = 1 + max((int(text) for text in others.values() if text != CHOOSING), default=0)
        client.set_tag(run_id, tag, str(number))
    try:
        pause, longest = PAUSES
        told = None
        while ahead := _ahead(experiment, tag, number, run_id):
            if ahead != told:
                log.info("%s: waiting for run %s, which is at it", name, ahead)
                told = ahead
            time.sleep(pause)
            pause = min(2 * pause, longest)
            sweep(experiment, everywhere=True)
        yield
    finally:
        with asking():
            # With a run that was deleted meanwhile its claim is gone.
            if client.get_run(run_id).info.lifecycle_stage == "active":
                client.delete_tag(run_id, tag)


def _ahead(experiment: str, tag: str, number: int, run_id: str) -> str | None:
    """A run that comes first."""
    with asking():
        others = _claims(experiment, tag)
    for other, text in others.items():
        if other != run_id and (text == CHOOSING or (int(text), other) < (number, run_id)):
            return other
    return None


def _claims(experiment: str, tag: str) -> dict[str, str]:
    """The running runs that claim, and what they have written."""
    found = MlflowClient().search_runs([experiment], f"attributes.status = 'RUNNING' and tags.`{tag}` LIKE '%'")
    # One that was found may have taken its claim back before its tags were read.
    return {run.info.run_id: run.data.tags[tag] for run in found if tag in run.data.tags}


def bury(experiment: str, task: str) -> None:
    """Ends the runs of a step that nobody works at any more, though they say that they are RUNNING. For whoever has
    claimed the step: what still works at it belongs to a study that is gone, and has been told to stop."""
    client = MlflowClient()
    running = f"attributes.status = 'RUNNING' and tags.`rampart.task` = '{task}'"
    for left in client.search_runs([experiment], running):
        run_id = left.info.run_id
        for _ in range(FAREWELL):
            if gone(left.data.tags) or client.get_run(run_id).info.status != "RUNNING":
                break
            time.sleep(1.0)
        if client.get_run(run_id).info.status == "RUNNING":
            end_lost(run_id)
