"""`python -m rampart.tracking.ui`: makes the store ready for the MLflow UI, says where to look, prints the store."""

from __future__ import annotations

import logging

from rampart.console import configure_logging, said_if_it_fails
from rampart.tracking.queries import compare_page, find_runs, ui
from rampart.tracking.store import location

# Runs that one address takes.
MOST = 60


def address() -> str:
    """The UI's compare view of the newest comparison's arms; its front page where no run of this store was compared."""
    found = find_runs(None, {"step": "compare", "arms": "%"}, max_results=1)
    return ui() if found.empty else compare_page(found["experiment_id"][0], found["tags.rampart.arms"][0].split())


def main() -> None:
    configure_logging()
    logging.getLogger("rampart").info("to open in a browser: %s", address())
    print(location())


if __name__ == "__main__":
    raise SystemExit(said_if_it_fails(main))
