"""Products with matrices whose rows read a few ranges of columns: neurons of convolutions, sorted by their place."""

from __future__ import annotations

import torch
from torch import Tensor

# Rows that are multiplied at once.
BLOCK = 64
# Columns of zeros that are multiplied rather than left out, since small products are slow.
GAP = 64


class Banded:
    """A matrix [R, C], of which blocks of rows are multiplied where their columns are not all 0.

    On a GPU the matrix is one block: it is the start of a product that costs time there.
    """

    def __init__(self, matrix: Tensor) -> None:
        size = max(len(matrix), 1) if matrix.is_cuda else BLOCK
        self.blocks = [
            (slice(start, start + size), columns, matrix[start : start + size, columns])
            for start in range(0, len(matrix), size)
            for columns in ([slice(None)] if matrix.is_cuda else _ranges(matrix[start : start + size]))
        ]

    def add(self, out: Tensor, rows: Tensor) -> None:
        """Adds rows [D, R] @ matrix to out [D, C]."""
        for which, columns, block in self.blocks:
            out[:, columns].addmm_(rows[:, which], block)

    def add_transposed(self, out: Tensor, rows: Tensor) -> None:
        """Adds rows [D, C] @ matrix.T to out [D, R]."""
        for which, columns, block in self.blocks:
            out[:, which].addmm_(rows[:, columns], block.T)


def _ranges(block: Tensor) -> list[slice]:
    """Of columns that are not all 0; those with less than GAP between them are one."""
    columns = (block != 0).any(0).nonzero().squeeze(1)
    if not len(columns):
        return []
    cuts = (columns.diff() > GAP).nonzero().squeeze(1)
    starts = torch.cat([columns[:1], columns[cuts + 1]])
    stops = torch.cat([columns[cuts], columns[-1:]]) + 1
    return [slice(start, stop) for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)]
