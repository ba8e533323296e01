"""What a user reads while Rampart works."""

from __future__ import annotations

import logging
import sys


def configure_logging(quiet: bool = False) -> None:
    """Our own messages on stderr (warnings only if `quiet`); of libraries, warnings."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("rampart").setLevel(logging.WARNING if quiet else logging.INFO)
