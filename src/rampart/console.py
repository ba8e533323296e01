"""What a user reads while Rampart works."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable

from rampart.errors import RampartError


def configure_logging(quiet: bool = False) -> None:
    """Our own messages on stderr (warnings only if `quiet`); of libraries, warnings."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # MLflow sets its own level when it is imported: it tells of each migration of a fresh database, and of the
    # machine's metrics.
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    # Connections log each try at a server that is away.
    for noisy, level in (("mlflow", logging.WARNING), ("alembic", logging.WARNING), ("urllib3", logging.ERROR)):
        logging.getLogger(noisy).setLevel(level)
    logging.getLogger("rampart").setLevel(logging.WARNING if quiet else logging.INFO)


def said_if_it_fails(work: Callable[[], None]) -> int:
    """The exit status of a small command: 0, or 2 where it failed, after one line that says why."""
    try:
        work()
    except (RampartError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def hush() -> None:
    """In a worker's process: only its parent draws a progress bar, and says more than warnings."""
    os.environ["TQDM_DISABLE"] = "1"
    configure_logging(quiet=True)
