"""`python -m rampart.tracking.ui`: makes the store ready for the MLflow UI and says where to look first."""

from __future__ import annotations

import logging

import mlflow

from rampart.console import configure_logging
from rampart.tracking import store
from rampart.tracking.queries import compare_page, ui

# Runs that one address takes.
MOST = 60


def address() -> str:
    """The UI's compare view of the arms of the newest comparison; its front page where there is none yet."""
    store.initialise()
    with store.asking():
        found = mlflow.search_runs(
            search_all_experiments=True,
            filter_string="tags.`rampart.step` = 'compare' and attributes.status = 'FINISHED'",
            order_by=["attributes.start_time DESC"],
            max_results=1,
            output_format="list",
        )
    arms = [run.data.tags["rampart.arms"] for run in found if "rampart.arms" in run.data.tags]
    return compare_page(found[0].info.experiment_id, arms[0].split()) if arms else ui()


if __name__ == "__main__":
    configure_logging()
    logging.getLogger("rampart").info("the newest study's arms side by side: %s", address())
