"""Products of matrices give what a transposed convolution does, and its derivatives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is missing: it comes with PyTorch for GPUs")

from rampart.models.geometry import Geometry
from rampart.models.links import Conv
from rampart.models.pulling import pull
from tests.nets import convolutions

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@settings(max_examples=60, deadline=None)
@given(convolutions(), st.integers(1, 6))
def test_it_is_the_transpose(geometry: Geometry, rows: int) -> None:
    weight = torch.randn(4, 2, *geometry.kernel, device=DEVICE).double().requires_grad_()
    link = Conv(weight, weight.new_zeros(4), geometry)
    a = weight.new_empty(rows, *link.out_shape).normal_().requires_grad_()
    expected, found = link.pull(a), pull(a, weight, geometry)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    of_image = torch.randn_like(expected)
    for mine, reference in zip(
        torch.autograd.grad(found, (a, weight), of_image),
        torch.autograd.grad(expected, (a, weight), of_image),
        strict=True,
    ):
        assert torch.allclose(mine, reference, rtol=0, atol=1e-11)


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    weight, a = torch.randn(4, 2, 3, 3, device=DEVICE), torch.randn(3, 4, 2, 2, device=DEVICE, requires_grad=True)
    link = Conv(weight, weight.new_zeros(4), Geometry((3, 3), (2, 2), (1, 1), (1, 1), (4, 4)))
    found = pull(a, weight, link.geometry)
    (to_a,) = torch.autograd.grad(found.sum(), a)
    assert torch.allclose(to_a, torch.autograd.grad(link.pull(a).sum(), a)[0], atol=1e-5)
    assert not pull(a.detach(), weight, link.geometry).requires_grad
