from __future__ import annotations

from itertools import pairwise

import pytest

from rampart.training.schedules import lr_factor, ramp, warmed_eps


@pytest.mark.parametrize(
    ("schedule", "values"),
    [("constant", [1, 1, 1]), ("linear", [1, 0.5, 0]), ("cosine", [1, 0.5, 0])],
)
def test_the_learning_rate_at_the_start_in_the_middle_and_at_the_end(schedule: str, values: list[float]) -> None:
    assert [lr_factor(schedule, progress) for progress in (0.0, 0.5, 1.0)] == pytest.approx(values)


def test_cosine_is_flat_at_both_ends() -> None:
    assert lr_factor("cosine", 0.01) > lr_factor("linear", 0.01)
    assert lr_factor("cosine", 0.99) < lr_factor("linear", 0.99)


def test_eps_rises_over_its_share_of_the_stage_and_stays() -> None:
    assert warmed_eps(0.4, 0.5, 0.0) == 0
    assert [warmed_eps(0.4, 0.5, progress) for progress in (0.5, 0.7, 1.0)] == pytest.approx([0.4] * 3)
    steps = [warmed_eps(0.4, 0.5, i / 200) for i in range(101)]
    assert all(later > earlier for earlier, later in pairwise(steps))


def test_eps_rises_as_the_fourth_power_of_time_then_in_a_line_without_a_kink() -> None:
    assert warmed_eps(1.0, 1.0, 0.2) / warmed_eps(1.0, 1.0, 0.1) == pytest.approx(16)
    line = [warmed_eps(1.0, 1.0, progress) for progress in (0.25, 0.5, 0.75, 1.0)]
    assert line[1] - line[0] == pytest.approx(line[2] - line[1]) == pytest.approx(line[3] - line[2])
    step = 1e-6
    before, at, after = (warmed_eps(1.0, 1.0, 0.25 + shift) for shift in (-step, 0.0, step))
    assert (at - before) / step == pytest.approx((after - at) / step, rel=1e-3)


def test_without_warmup_eps_is_full_from_the_start() -> None:
    assert warmed_eps(0.4, 0.0, 0.0) == 0.4


def test_a_ramp_goes_from_its_first_value_to_its_last() -> None:
    assert [ramp((1.0, 0.5), share) for share in (0.0, 0.5, 1.0)] == [1.0, 0.75, 0.5]
    assert [ramp((0.3,), share) for share in (0.0, 1.0)] == [0.3, 0.3]
