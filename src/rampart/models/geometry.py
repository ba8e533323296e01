"""Where a convolution's kernel lies."""

from __future__ import annotations

from typing import Any, NamedTuple

Pair = tuple[int, int]


def pair(value: Any) -> tuple[Any, Any]:
    """Rows and columns, of a setting that may be one number for both."""
    return (value[0], value[1]) if isinstance(value, tuple | list) else (value, value)


class Geometry(NamedTuple):
    """Where the kernel of a convolution lies on images of `in_size` (rows, columns)."""

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    in_size: Pair

    @property
    def spans(self) -> list[int]:
        """Rows and columns that the kernel reaches over."""
        return [dilation * (kernel - 1) + 1 for kernel, dilation in zip(self.kernel, self.dilation, strict=True)]

    @property
    def out_size(self) -> list[int]:
        """Rows and columns of its places."""
        return [left // stride + 1 for left, stride in zip(self._left(), self.stride, strict=True)]

    @property
    def skipped(self) -> list[int]:
        """Rows and columns at the far edge that no place covers, since a stride ends before them."""
        return [left % stride for left, stride in zip(self._left(), self.stride, strict=True)]

    def _left(self) -> list[int]:
        """Rows and columns behind the first place."""
        return [
            size + 2 * padding - span
            for size, padding, span in zip(self.in_size, self.padding, self.spans, strict=True)
        ]
