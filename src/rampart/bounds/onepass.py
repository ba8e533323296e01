"""A step of CROWN through a ReLU, and its derivative, each in one pass over a GPU's memory (in Triton, which comes with
PyTorch for GPUs). What they compute stands in `relaxation.py`."""

# Annotations are not postponed, and programs for the GPU have no others than Triton's: it reads them.
import torch
import triton
import triton.language as tl
from torch import Tensor

# Numbers that a program of the GPU works on at once; fewer where it goes through all rows of an image, so that there
# are enough programs.
BLOCK, BLOCK_OF_ROWS = 1024, 256


def through(a: Tensor, slope: Tensor, intercept: Tensor) -> tuple[Tensor, Tensor]:
    """(coefficients, constant) of `relaxation.through_relu` with its own lower slopes: a [B, K, *shape], slope and
    intercept of the upper side [B, 1, *shape]."""
    order = _order(a)
    rows = _flat(a, order)
    out, constant = torch.empty_like(rows), a.new_empty(a.shape[:2])
    _through[tuple(a.shape[:2])](
        rows, _flat(slope, order), _flat(intercept, order), out, constant, rows.shape[2], BLOCK
    )
    return _shaped(out, a.shape, order), constant


def through_backward(
    a: Tensor, slope: Tensor, intercept: Tensor, of_out: Tensor, of_constant: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by a, slope and intercept of `through`, from those by what it gives."""
    order = _order(a)
    rows, slope, intercept = _flat(a, order), _flat(slope, order), _flat(intercept, order)
    of_rows, to_slope, to_intercept = torch.empty_like(rows), torch.empty_like(slope), torch.empty_like(intercept)
    images, count, size = rows.shape
    _through_backward[images, triton.cdiv(size, BLOCK_OF_ROWS)](
        rows, slope, intercept, _flat(of_out, order), of_constant.contiguous(),
        of_rows, to_slope, to_intercept, count, size, BLOCK_OF_ROWS,
    )  # fmt: skip
    one = (images, 1, *a.shape[2:])
    return _shaped(of_rows, a.shape, order), _shaped(to_slope, one, order), _shaped(to_intercept, one, order)


def _order(a: Tensor) -> list[int]:
    """The axes of a as they lie in memory, the outermost first."""
    return [0, 1, *sorted(range(2, a.dim()), key=a.stride, reverse=True)]


def _flat(x: Tensor, order: list[int]) -> Tensor:
    """[B, K, *shape] -> [B, K, size]."""
    return x.permute(order).flatten(2).contiguous()


def _shaped(flat: Tensor, shape: tuple[int, ...], order: list[int]) -> Tensor:
    """Back."""
    back = [order.index(axis) for axis in range(len(order))]
    return flat.view([shape[axis] for axis in order]).permute(back)


@triton.jit
def _through(a, slope, intercept, out, constant, size: tl.constexpr, block: tl.constexpr):
    image = tl.program_id(0).to(tl.int64)
    row = image * tl.num_programs(1) + tl.program_id(1)
    total = tl.full([block], 0, a.dtype.element_ty)
    for start in range(0, size, block):
        place = start + tl.arange(0, block)
        inside = place < size
        value = tl.load(a + row * size + place, inside, other=0.0)
        upper = tl.load(slope + image * size + place, inside, other=0.0)
        cut = tl.load(intercept + image * size + place, inside, other=0.0)
        negative = tl.minimum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
        moved = negative * upper + tl.where(upper > 0.5, value - negative, 0.0)
        tl.store(out + row * size + place, moved, inside)
        total += negative * cut
    tl.store(constant + row, tl.sum(total, 0))


@triton.jit
def _through_backward(
    a,
    slope,
    intercept,
    of_out,
    of_constant,
    to_a,
    to_slope,
    to_intercept,
    rows: tl.constexpr,
    size: tl.constexpr,
    block: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * block + tl.arange(0, block)
    inside = place < size
    upper = tl.load(slope + image * size + place, inside, other=0.0)
    cut = tl.load(intercept + image * size + place, inside, other=0.0)
    by_slope = tl.full([block], 0, a.dtype.element_ty)
    by_intercept = tl.full([block], 0, a.dtype.element_ty)
    for number in range(rows):
        row = image * rows + number
        value = tl.load(a + row * size + place, inside, other=0.0)
        of = tl.load(of_out + row * size + place, inside, other=0.0)
        of_total = tl.load(of_constant + row)
        negative = tl.minimum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
        rising = tl.where(upper > 0.5, of, 0.0)
        tl.store(to_a + row * size + place, tl.where(value < 0, upper * of + cut * of_total, rising), inside)
        by_slope += negative * of
        by_intercept += negative * of_total
    tl.store(to_slope + image * size + place, by_slope, inside)
    tl.store(to_intercept + image * size + place, by_intercept, inside)
