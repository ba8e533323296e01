"""Parts of a batch side by side on a CPU's threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TypeVar

import torch

T = TypeVar("T")

# Fewer images than this in a part, and its maps are too small for a thread of its own.
LEAST = 32


def side_by_side(function: Callable[[slice], T], images: int) -> list[T]:
    """`function` of parts of a batch on a CPU, in order: as many parts as PyTorch may use threads, each part with its
    share of them. Threads that meet after each part of the work, not in each operation of it, wait less."""
    threads = torch.get_num_threads()
    count = max(1, min(threads, images // LEAST))
    cuts = [images * k // count for k in range(count + 1)]
    parts = [slice(first, last) for first, last in pairwise(cuts)]
    if count == 1:
        return [function(part) for part in parts]
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(threads // count,)) as pool:
            return list(pool.map(function, parts))
    finally:
        # What a thread sets for itself is what later threads begin with.
        torch.set_num_threads(threads)
