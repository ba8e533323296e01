"""The pieces under every bound: a ReLU's relaxation, the ball cut to [0, 1], a linear form's minimum on a box."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rampart.bounds.box import Box, lower_on, pixel_box
from rampart.bounds.relaxation import relax
from rampart.errors import SettingsError

numbers = st.floats(-5, 5, allow_subnormal=False)


@given(st.lists(numbers, min_size=2, max_size=2).map(sorted), st.floats(0, 1))
def test_a_relu_lies_between_its_two_lines(ends: list[float], share: float) -> None:
    lower, upper = (torch.tensor([[end]], dtype=torch.float64) for end in ends)
    relaxed = relax(Box(lower, upper))
    v = lower + (upper - lower) * share
    # The interval is widened by 1e-8 where it has no width.
    assert bool(relaxed.lower_slope * v <= v.clamp(min=0) + 1e-7)
    assert bool(v.clamp(min=0) <= relaxed.upper_slope * v + relaxed.intercept + 1e-7)
    assert bool(relaxed.unstable) == (ends[0] < 0 < ends[1])


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
