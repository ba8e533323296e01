"""The pieces under every bound: a ReLU's relaxation, the ball cut to [0, 1], a linear form's minimum on a box."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rampart.bounds.box import Box, lower_on, pixel_box
from rampart.bounds.relaxation import rectified, relax, through_relu
from rampart.errors import SettingsError

numbers = st.floats(-5, 5, allow_subnormal=False)


@given(st.lists(numbers, min_size=2, max_size=2).map(sorted), st.floats(0, 1))
def test_a_relu_lies_between_its_two_lines(ends: list[float], share: float) -> None:
    lower, upper = (torch.tensor([[end]], dtype=torch.float64) for end in ends)
    relaxed = relax(Box(lower, upper))
    v = lower + (upper - lower) * share
    assert bool(relaxed.lower_slope * v <= v.clamp(min=0) + 1e-12)
    assert bool(v.clamp(min=0) <= relaxed.upper_slope * v + relaxed.intercept + 1e-12)
    if ends[0] > 0 or ends[1] < 0:  # however near to it
        assert relaxed.lower_slope == relaxed.upper_slope == (ends[0] > 0)
        assert relaxed.intercept == 0


def boxes() -> tuple[Tensor, Tensor]:
    """Float64 boxes of every kind, none of them with an end near 0."""
    lower = torch.tensor([[-1.0, -2.0, 0.5, -3.0, -0.2]], dtype=torch.float64)
    return lower, torch.tensor([[2.0, 0.3, 1.5, -1.0, 3.0]], dtype=torch.float64)


@pytest.mark.parametrize("make", [Box, Box.around])
def test_the_derivatives_of_a_relaxation_are_exact(make: Callable[[Tensor, Tensor], Box]) -> None:
    """And of the box behind the ReLU, whichever pair the box before it is made of."""
    lower, upper = boxes()
    box = Box(lower, upper)
    pair = (lower, upper) if make is Box else (box.center, box.half)

    def relaxed(first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
        after, relaxation = rectified(make(first, second))
        return after.center, after.half, *relaxation

    expected = lower.relu(), upper.relu(), *relax(box)
    center, half, *lines = relaxed(*pair)
    for value, exact in zip((center - half, center + half, *lines), expected, strict=True):
        torch.testing.assert_close(value, exact)
    assert torch.autograd.gradcheck(relaxed, [value.requires_grad_() for value in pair])


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("own_slopes", [False, True])
def test_the_derivatives_of_a_step_through_a_relu_are_exact(rows: int, own_slopes: bool) -> None:
    """To the coefficients, both slopes and the intercept; lower slopes shared by all rows or one for each."""
    lower, upper = (end.requires_grad_() for end in boxes())
    a = torch.randn(1, rows, 5, dtype=torch.float64).requires_grad_()
    slopes = torch.rand(1, rows if own_slopes else 1, 5, dtype=torch.float64).requires_grad_()

    def step(a: Tensor, lower: Tensor, upper: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
        return through_relu(a, relax(Box(lower, upper)), slopes)

    assert torch.autograd.gradcheck(step, (a, lower, upper, slopes))


@pytest.mark.parametrize("slope", [0.0, 0.4, 1.0])
def test_a_step_through_a_relu_bounds_it_from_below(slope: float) -> None:
    lower, upper = boxes()
    a, slopes = torch.randn(1, 4, 5, dtype=torch.float64), torch.full((1, 1, 5), slope, dtype=torch.float64)
    coefficients, constant = through_relu(a, relax(Box(lower, upper)), slopes)
    for share in torch.rand(200, 5, dtype=torch.float64):
        v = (lower + (upper - lower) * share)[0]
        assert bool((coefficients[0] @ v + constant[0] <= a[0] @ v.relu() + 1e-9).all())


def test_the_upper_line_touches_the_relu_at_both_ends() -> None:
    relaxed = relax(Box(torch.tensor([[-1.0, -3.0]]), torch.tensor([[2.0, 1.0]])))
    assert torch.allclose(relaxed.upper_slope, torch.tensor([[2 / 3, 1 / 4]]))
    assert torch.allclose(relaxed.intercept, torch.tensor([[2 / 3, 3 / 4]]))


def test_the_lower_line_is_the_one_with_the_smaller_area() -> None:
    relaxed = relax(Box(torch.tensor([[-1.0, -3.0, 1.0, -2.0]]), torch.tensor([[2.0, 1.0, 2.0, -1.0]])))
    assert relaxed.lower_slope.tolist() == [[1.0, 0.0, 1.0, 0.0]]


def test_the_ball_is_cut_to_the_range_of_pixels() -> None:
    box = pixel_box(torch.tensor([[0.0, 0.05, 0.5, 0.98]]), 0.1)
    assert torch.allclose(box.lower, torch.tensor([[0.0, 0.0, 0.4, 0.88]]))
    assert torch.allclose(box.upper, torch.tensor([[0.1, 0.15, 0.6, 1.0]]))


def test_a_radius_for_each_pixel() -> None:
    box = pixel_box(torch.full((1, 3), 0.5), torch.tensor([0.0, 0.1, 0.2]))
    assert torch.allclose(box.half, torch.tensor([[0.0, 0.1, 0.2]]))


@pytest.mark.parametrize("eps", [-0.1, torch.tensor([0.1, -0.1])])
def test_a_negative_radius_is_refused(eps: float | Tensor) -> None:
    with pytest.raises(SettingsError, match=r"-0\.1"):
        pixel_box(torch.rand(1, 2), eps)


def test_lower_on_is_the_smallest_value_at_the_corners() -> None:
    lower = torch.randn(2, 3)
    box, a = Box(lower, lower + torch.rand(2, 3)), torch.randn(2, 4, 3)
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    points = box.lower[:, None] + (box.upper - box.lower)[:, None] * corners
    assert torch.allclose(lower_on(box, a), (a @ points.mT).amin(2), atol=1e-6)
