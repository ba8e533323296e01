"""What a GPU's programs compute is what PyTorch's operations do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is missing: it comes with PyTorch for GPUs")

from rampart.bounds.onepass import BLOCK, BLOCK_OF_ROWS, through, through_backward
from rampart.bounds.relaxation import Relaxation, through_relu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def drawn(shape: tuple[int, ...], last: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients [2, 3, *shape], some of them 0, and a relaxation; `last`: channels lie last in memory."""
    a, slope, intercept = torch.randn(2, 3, *shape), torch.rand(2, *shape), torch.rand(2, *shape)
    a[a.abs() < 0.3], slope[slope < 0.3], slope[slope > 0.9] = 0, 0, 1
    if last:
        a = a.flatten(0, 1).contiguous(memory_format=torch.channels_last).view(2, 3, *shape)
    return a.to(DEVICE), slope.to(DEVICE), intercept.to(DEVICE)


@pytest.mark.parametrize(
    ("shape", "last"), [((BLOCK + 5,), False), ((BLOCK_OF_ROWS,), False), ((5, 3, 4), False), ((5, 9, 8), True)]
)
def test_a_step_through_a_relu_and_its_derivative(shape: tuple[int, ...], last: bool) -> None:
    a, slope, intercept = drawn(shape, last)
    found = through(a, slope.unsqueeze(1), intercept.unsqueeze(1))
    of = torch.randn_like(found[0]), torch.randn_like(found[1])
    gradients = through_backward(a, slope.unsqueeze(1), intercept.unsqueeze(1), *of)
    at = [tensor.cpu().double().requires_grad_() for tensor in (a, slope, intercept)]
    expected = through_relu(at[0], Relaxation(*at[1:]))
    references = torch.autograd.grad(expected, at, [tensor.cpu().double() for tensor in of])
    assert found[0].stride() == a.stride()
    for mine, reference in zip((*found, *gradients), (*expected, *references), strict=True):
        assert torch.allclose(mine.cpu().double().view(reference.shape), reference, rtol=0, atol=1e-4)


def test_a_nan_stays() -> None:
    a, slope, intercept = drawn((7,), False)
    a[1, 2, 3] = torch.nan
    moved, constant = through(a, slope.unsqueeze(1), intercept.unsqueeze(1))
    assert moved.isnan().sum() == constant.isnan().sum() == 1
    assert moved[1, 2, 3].isnan()
