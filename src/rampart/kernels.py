"""Functions that can be compiled: element-wise ones into one pass over memory each, whole networks in training; and how
maps lie in memory for the fastest convolutions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

log = logging.getLogger(__name__)


class Kernel:
    """A function of tensors, called as it stands or, inside of `compiling`, as compiled code.

    Args:
        dynamic: whether one code shall serve tensors of all sizes.
    """

    compiling: ClassVar[bool] = False

    def __init__(self, function: Callable[..., Any], dynamic: bool = True) -> None:
        self.function, self.dynamic = function, dynamic
        self.compiled: Callable[..., Any] | None = None

    def __call__(self, *given: Any) -> Any:
        if not Kernel.compiling:
            return self.function(*given)
        if self.compiled is None:
            self.compiled = torch.compile(self.function, dynamic=self.dynamic or None)
        return self.compiled(*given)


@contextmanager
def compiling(wanted: bool) -> Iterator[None]:
    """Compiles every `Kernel` called inside: half a minute at first, which long trainings win back many times.

    Where nothing can be compiled, for want of a C++ compiler say, a warning tells so and the functions run as they are.
    """
    before = Kernel.compiling
    Kernel.compiling = wanted and (before or _works())
    try:
        yield
    finally:
        Kernel.compiling = before


@cache
def _works() -> bool:
    # Not above: it takes two seconds to import.
    import torch._dynamo
    import torch._inductor.config

    # It tells of every broadcast that it has guarded.
    logging.getLogger("torch.fx.experimental.symbolic_shapes").setLevel(logging.ERROR)
    # A kernel is compiled for each number of axes, memory layout and set of gradients asked for: 8 are soon reached.
    torch._dynamo.config.recompile_limit = 64
    # Part of the key of the cache on disk: a kernel made for one thread would be taken for two otherwise, each of which
    # might do what a single one should.
    torch._inductor.config.cpp.threads = torch.get_num_threads()
    try:
        torch.compile(_probe, dynamic=True)(torch.ones(2, device="cuda" if torch.cuda.is_available() else "cpu"))
    except Exception as error:  # of many kinds: no compiler, no headers, an unsupported platform
        log.warning("torch.compile does not work here (%s): going on without", str(error).strip().split("\n")[0])
        return False
    return True


def _probe(x: Tensor) -> Tensor:
    return x + 1


def convolved(x: Tensor) -> torch.memory_format:
    """How maps should lie in memory for convolutions in float32: a CPU's are faster where channels lie last, a GPU's
    where they do not."""
    return torch.channels_last if x.device.type == "cpu" else torch.contiguous_format


def keep_where(value: Tensor, x: Tensor, above: float = 0.0) -> Tensor:
    """value where x > `above`, else 0: one fast pass, where masks take three slow ones on a CPU."""
    kept: Tensor = torch.ops.aten.threshold_backward(value, x, above)
    return kept
