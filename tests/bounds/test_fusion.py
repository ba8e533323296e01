"""Bounds that training minimises: above the loss of every point, exact at ε = 0, differentiable."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rampart.bounds import ibp
from rampart.bounds.box import pixel_box
from rampart.bounds.fusion import fused_cross_entropy
from rampart.bounds.margins import chain_bounds, margin_spec
from rampart.losses import worst_case_logits
from rampart.models import Layout
from tests.nets import CLASSES, NETS, points_in_ball, small_net


def fused(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    chain, box = Layout(model).resolve(x), pixel_box(x, eps)
    return fused_cross_entropy(chain, box, ibp.intervals(chain, box), margin_spec(y, CLASSES).to(x.dtype))


def by_margins(model: nn.Module, x: Tensor, y: Tensor, eps: float, method: str = "crown-ibp") -> Tensor:
    spec = margin_spec(y, CLASSES).to(x.dtype)
    bounds = chain_bounds(Layout(model).resolve(x), pixel_box(x, eps), spec, method)
    return F.cross_entropy(worst_case_logits(bounds, y), y, reduction="none")


LOSSES = {"fused": fused, "margin": by_margins}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("eps", [0.005, 0.05])
def test_no_sampled_point_has_a_loss_above_the_bound(name: str, loss: str, eps: float) -> None:
    model, x, y = small_net(name)
    with torch.no_grad():
        for image, label, bound in zip(x, y, LOSSES[loss](model, x, y, eps), strict=True):
            logits = model(points_in_ball(image, eps, 2000))
            worst = F.cross_entropy(logits, label.expand(len(logits)), reduction="none").max()
            assert worst <= bound + 1e-5


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", NETS)
def test_at_eps_0_the_bound_is_the_loss(name: str, loss: str) -> None:
    model, x, y = small_net(name)
    with torch.no_grad():
        bound, exact = LOSSES[loss](model, x, y, 0.0), F.cross_entropy(model(x), y, reduction="none")
    assert torch.allclose(bound, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("eps", [0.0, 0.02, 1.0])
def test_every_parameter_gets_a_finite_gradient(loss: str, eps: float) -> None:
    """In training mode, with bounds as loose as they get at ε = 1: early epochs must not overflow."""
    model, x, y = small_net("strided", count=4)
    model.train()
    value = LOSSES[loss](model, x, y, eps).mean()
    assert value.isfinite()
    value.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
    assert sum(float(parameter.grad.abs().sum()) for parameter in model.parameters()) > 0


@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradient_is_that_of_the_bound(loss: str) -> None:
    """Along a random direction of the weights, against a central difference in float64."""
    model, x, y = small_net("dense")
    model, x = model.double(), x.double()
    LOSSES[loss](model, x, y, 0.02).sum().backward()
    direction = [torch.randn_like(p) for p in model.parameters()]
    slope = sum(float((p.grad * d).sum()) for p, d in zip(model.parameters(), direction, strict=True))

    def moved(step: float) -> float:
        with torch.no_grad():
            for p, d in zip(model.parameters(), direction, strict=True):
                p += step * d
            value = float(LOSSES[loss](model, x, y, 0.02).sum())
            for p, d in zip(model.parameters(), direction, strict=True):
                p -= step * d
        return value

    step = 1e-6
    assert slope == pytest.approx((moved(step) - moved(-step)) / (2 * step), rel=1e-3)


def test_bounds_of_thousands_do_not_overflow_the_fused_loss() -> None:
    model, x, y = small_net("dense")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 30
    value = fused(model, x, y, 0.5)
    assert bool(value.isfinite().all())
    assert bool((value >= F.cross_entropy(model(x), y, reduction="none")).all())
