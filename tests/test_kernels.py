"""Kernels: the same values compiled and not, and a machine that cannot compile."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from rampart import kernels
from rampart.bounds.box import Box
from rampart.bounds.relaxation import relax, through_relu
from rampart.kernels import Kernel, compiling, keep_where


def gradients(layout: torch.memory_format) -> list[Tensor]:
    """Values and gradients of a step of CROWN through a ReLU."""
    torch.manual_seed(0)
    lower = torch.randn(4, 3, 6, 6).contiguous(memory_format=layout).requires_grad_()
    upper = (lower.detach() + torch.rand_like(lower)).requires_grad_()
    a = torch.randn(4, 2, 3, 6, 6).requires_grad_()
    coefficients, constant = through_relu(a, relax(Box(lower, upper)))
    (coefficients.square().sum() + constant.square().sum()).backward()
    return [coefficients, constant, *(x.grad for x in (lower, upper, a) if x.grad is not None)]


@pytest.mark.slow
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_compiled_kernels_give_the_same_values_and_gradients(layout: torch.memory_format) -> None:
    plain = gradients(layout)
    with compiling(True):
        if not Kernel.compiling:
            pytest.skip("torch.compile does not work here: it needs a C++ compiler")
        compiled = gradients(layout)
    assert len(plain) == 5
    for one, other in zip(plain, compiled, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def test_where_nothing_can_be_compiled_a_warning_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*given: object, **named: object) -> None:
        raise RuntimeError("no C++ compiler\nsecond line")

    kernels._works.cache_clear()
    monkeypatch.setattr(torch, "compile", broken)
    with caplog.at_level(logging.WARNING), compiling(True):
        assert not Kernel.compiling
    kernels._works.cache_clear()
    assert "no C++ compiler" in caplog.text
    assert "second line" not in caplog.text


def test_kernels_are_compiled_inside_of_compiling_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_works", lambda: True)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: lambda *given: ("compiled", function(*given)))
    double = Kernel(lambda x: 2 * x)
    with compiling(True):
        assert double(2) == ("compiled", 4)
        with compiling(False):
            assert double(2) == 4
        assert double(3) == ("compiled", 6)
    assert double(2) == 4


def test_keep_where() -> None:
    value, x = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([-1.0, 0.5, 0.6])
    assert keep_where(value, x).tolist() == [0, 2, 3]
    assert keep_where(value, x, 0.5).tolist() == [0, 0, 3]
