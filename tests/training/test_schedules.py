from __future__ import annotations

import pytest

from rampart.training.schedules import lr_factor, warmed_eps


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
    assert [warmed_eps(0.4, 0.5, progress) for progress in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([0, 0.2, 0.4, 0.4])


def test_without_warmup_eps_is_full_from_the_start() -> None:
    assert warmed_eps(0.4, 0.0, 0.0) == 0.4
