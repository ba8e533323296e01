"""Work on a split in batches that fit into memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TypeVar

from rampart.errors import is_out_of_memory

log = logging.getLogger(__name__)
T = TypeVar("T")


def in_parts(work: Callable[[slice], T], count: int, size: int, start: int = 0) -> Iterator[T]:
    """work(slice) for one batch of `size` rows after the other, from row `start` to row `count`.

    A batch that does not fit into memory is halved, with a warning, and so are those after it.
    """
    while start < count:
        part = slice(start, min(start + size, count))
        try:
            found = work(part)
        except RuntimeError as error:
            if not is_out_of_memory(error) or size == 1:
                raise
            size = -(-min(size, count - start) // 2)
            log.warning("out of memory: going on with %d images a batch", size)
            continue
        yield found
        start = part.stop
