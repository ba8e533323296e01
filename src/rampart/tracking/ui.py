"""`python -m rampart.tracking.ui`: makes the store ready for the MLflow UI and says where to look first."""

from __future__ import annotations

import logging

from rampart.console import configure_logging
from rampart.tracking.queries import compare_page, find_runs, ui

# Runs that one address takes.
MOST = 60


def address() -> str:
    """The UI's compare view of the arms of the newest comparison; its front page where there is none yet."""
    found = find_runs(None, {"step": "compare"}, max_results=1)
    if found.get("tags.rampart.arms") is None:
        return ui()
    return compare_page(found["experiment_id"][0], found["tags.rampart.arms"][0].split())


if __name__ == "__main__":
    configure_logging()
    logging.getLogger("rampart").info("the newest study's arms side by side: %s", address())
