from rampart.arms import Arm, grid


def test_names() -> None:
    assert Arm("certified", True, "double").name == "certified+aug+supcon-double"
    assert Arm("normal", False, "none").name == "normal"
    assert Arm("adversarial", False, "single").name == "adversarial+supcon-single"


def test_the_study_has_twelve_arms() -> None:
    arms = grid(("normal", "adversarial", "certified"), (False, True), ("none", "double"))
    assert len(arms) == len({arm.name for arm in arms}) == 12
    assert [Arm.called(arm.name) for arm in arms] == arms
    assert Arm.called("normal+augmented") is None
