"""Bounds that training minimises: above the loss of every point, exact at ε = 0, differentiable."""

from __future__ import annotations

import contextlib
import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rampart.bounds import crown, ibp
from rampart.bounds.box import pixel_box
from rampart.bounds.compat import import_auto_lirpa
from rampart.bounds.fusion import chords, fused_cross_entropy
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


@pytest.mark.parametrize("name", ["dense", "deep", "maps-in-a-row"])
def test_the_linear_form_is_bounded_as_auto_lirpa_bounds_it_with_the_same_gradients(name: str) -> None:
    """One specification row an image over the intervals of the inner neurons: CROWN-IBP."""
    model, x, y = small_net(name, count=3)
    chain, box = Layout(model).resolve(x), pixel_box(x, 0.03)
    found = ibp.intervals(chain, box)
    row = chords(chain, found, margin_spec(y, CLASSES))[0].detach()
    ours = crown.backward(chain, ibp.inputs(chain, found), box, row[:, None])
    library = import_auto_lirpa()
    with contextlib.redirect_stdout(io.StringIO()):
        bounded = library.BoundedModule(copy.deepcopy(model), x)
    ball = library.PerturbationLpNorm(norm=float("inf"), x_L=box.lower, x_U=box.upper)
    theirs, _ = bounded.compute_bounds(
        x=(library.BoundedTensor(x, ball),), C=row[:, None], method="CROWN-IBP", bound_upper=False
    )
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-4 * theirs.abs().max().item())
    expected = torch.autograd.grad(theirs.sum(), list(bounded.parameters()), allow_unused=True)
    gradients = torch.autograd.grad(ours.sum(), list(model.parameters()), allow_unused=True)
    # auto_LiRPA orders parameters by its own graph: each of ours has its twin among those of its shape.
    for gradient in gradients:
        assert gradient is not None
        scale = 1e-4 * gradient.abs().max().item() + 1e-6
        twins = [g for g in expected if g is not None and g.shape == gradient.shape]
        assert any(torch.allclose(gradient, twin, rtol=0, atol=scale) for twin in twins)


def test_the_chords_lie_above_the_sum_of_exponentials() -> None:
    model, x, y = small_net("strided", count=3)
    with torch.no_grad():
        chain, box = Layout(model).resolve(x), pixel_box(x, 0.05)
        row, constant, shift = chords(chain, ibp.intervals(chain, box), margin_spec(y, CLASSES))
        for image in range(3):
            logits = model(points_in_ball(x[image], 0.05, 2000))
            exact = (logits - logits[:, y[image], None]).exp().sum(1)
            assert bool((exact <= shift[image].exp() * (logits @ row[image] + constant[image]) + 1e-4).all())
