"""How this process holds memory."""

from __future__ import annotations

import ctypes

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
# What a process may hold unused: a step of the study's network on CROWN-IBP margins takes more than half of it.
KEPT = 1 << 30


def keep_freed_memory() -> None:
    """Lets the C library keep tensors' memory for the next ones, up to 1 GiB, instead of giving it back to the kernel,
    which zeroes each page that it hands out: a sixth of a plain training step on a CPU, a third of one on margins.

    Does nothing where the C library is not glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, KEPT)
