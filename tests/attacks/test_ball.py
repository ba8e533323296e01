"""No point of a ball is farther from its image than its radius, whatever float32 rounds."""

from __future__ import annotations

import pytest
import torch

from rampart.attacks import Ball


@pytest.mark.parametrize("eps", [0.0, 1e-9, 1e-7, 0.1, 8 / 255, 1.0])
def test_the_ends_of_a_ball_are_in_it_by_float64(eps: float) -> None:
    x = torch.rand(20, 3, 8, 8)
    ball = Ball.around(x, eps)
    for end in (ball.lower, ball.upper):
        assert (end.double() - x.double()).abs().max() <= eps
        assert end.min() >= 0
        assert end.max() <= 1


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_some_rows_of_balls_are_the_balls_of_these_images(norm: str) -> None:
    x, rows = torch.rand(6, 3, 2, 2), torch.tensor([4, 1])
    ball, expected = Ball.around(x, 0.1, norm)[rows], Ball.around(x[rows], 0.1, norm)
    assert (ball.eps, ball.norm) == (expected.eps, expected.norm)
    for name in ("x", "lower", "upper"):
        assert torch.equal(getattr(ball, name), getattr(expected, name))
