"""`python -m rampart.tracking.ui`: makes the store ready for the MLflow UI, says where to look, prints the store."""

from __future__ import annotations

import logging

from rampart.console import configure_logging, said_if_it_fails
from rampart.tracking.queries import compare_page, find_runs, ui
from rampart.tracking.store import location

# Runs that one address takes.
MOST = 60


def address() -> str:
    """The UI's compare view of the arms of the newest comparison; its front page where there is none yet."""
    found = find_runs(None, {"step": "compare"}, max_results=1)
    if found.get("tags.rampart.arms") is None:
        return ui()
    return compare_page(found["experiment_id"][0], found["tags.rampart.arms"][0].split())


def main() -> None:
    configure_logging()
    logging.getLogger("rampart").info("the newest study's arms side by side: %s", address())
    print(location())


if __name__ == "__main__":
    raise SystemExit(said_if_it_fails(main))
