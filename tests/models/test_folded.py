"""The network that attackers see: the same outputs and the same gradients by its input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rampart.models import Folded, Layout, build_model
from rampart.models.folded import _SubPixel
from tests.nets import NETS, small_net


def slope(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """(outputs, gradient by x of a sum of them that weighs each differently)."""
    moved = x.clone().requires_grad_()
    outputs = model(moved)
    weights = torch.linspace(-1, 1, outputs.numel(), dtype=x.dtype).view_as(outputs)
    return outputs.detach(), torch.autograd.grad((weights * outputs).sum(), moved)[0]


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_outputs_and_gradients_are_the_network_s(name: str, channels_last: bool) -> None:
    torch.manual_seed(0)
    model, x, _ = small_net(name, 3)
    model, x = model.double(), x.double()
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    expected, gradient = slope(model, x)
    found, folded = slope(Folded(Layout(model), x), x)
    assert torch.allclose(found, expected, rtol=0, atol=1e-9)
    assert torch.allclose(folded, gradient, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "size"),
    [(3, 2, 1, 8), (2, 2, 0, 6), (5, 2, 2, 8), (3, 3, 0, 9), (5, 3, 1, 9), (4, 4, 0, 8), (1, 2, 0, 8), (4, 2, 1, 10)],
)
def test_sub_pixel_gradient_of_strided_convolutions(kernel: int, stride: int, padding: int, size: int) -> None:
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(3, 5, kernel, stride, padding)).double()
    x = torch.rand(2, 3, size, size + stride, dtype=torch.float64)
    folded = Folded(Layout(conv), x)
    moved = x.clone().requires_grad_()
    assert type(folded(moved).grad_fn).__name__ == f"{_SubPixel.__name__}Backward"
    for found, expected in zip(slope(folded, x), slope(conv, x), strict=True):
        assert torch.allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [7, 9])
def test_uneven_images_take_the_plain_gradient(size: int) -> None:
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(3, 5, 3, 2, 1)).double()
    x = torch.rand(2, 3, size, size, dtype=torch.float64)
    for found, expected in zip(slope(Folded(Layout(conv), x), x), slope(conv, x), strict=True):
        assert torch.allclose(found, expected, rtol=0, atol=1e-12)


def test_no_weight_gets_a_gradient_or_another_value() -> None:
    model = build_model(width=0.125).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, y = torch.rand(4, 3, 32, 32).requires_grad_(), torch.arange(4)
    folded = Folded(Layout(model), x.detach())
    F.cross_entropy(folded(x), y).backward()
    assert x.grad is not None
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_images_are_not_overwritten() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.ReLU(), nn.Linear(64, 3))
    x = torch.randn(2, 3, 8, 8)
    before = x.clone()
    found, expected = slope(Folded(Layout(model.eval()), x), x), slope(model, x)
    assert torch.equal(x, before)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
