"""Rates are counts of the ledger's rows."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rampart.errors import RampartError
from rampart.ledger import (
    PROVED,
    VERDICTS,
    attack_rates,
    attacked_by,
    contradiction,
    eps_key,
    evaluation_ledger,
    mark_attacked,
    verdict_counts,
)

RADII = (1 / 255, 8 / 255)


@pytest.fixture
def ledger() -> pd.DataFrame:
    """Six images, four of them correct; the attack breaks one of the four at 1/255 and three at 8/255."""
    labels, predictions = torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([0, 1, 2, 0, 2, 1])
    success = torch.tensor([[True, False, False, False, True, True], [True, True, True, False, True, True]])
    return evaluation_ledger(labels, predictions, success, RADII)


def verified(verdicts: list[str | None], correct: list[bool]) -> pd.DataFrame:
    return pd.DataFrame({"verdict": verdicts, "correct": correct, "seconds": [0.5] * len(verdicts)})


def test_a_row_says_what_was_seen_of_its_image(ledger: pd.DataFrame) -> None:
    assert list(ledger.columns) == [
        "image", "label", "prediction", "correct", "attacked/0.00392157", "attacked/0.0313725"
    ]  # fmt: skip
    assert ledger["image"].tolist() == [0, 1, 2, 3, 4, 5]
    assert ledger["label"].tolist() == [0, 1, 2, 0, 1, 2]
    assert ledger["prediction"].tolist() == [0, 1, 2, 0, 2, 1]
    assert ledger["correct"].tolist() == [True, True, True, True, False, False]
    assert ledger["attacked/0.0313725"].tolist() == [True, True, True, False, True, True]


def test_rates_are_over_the_correctly_classified(ledger: pd.DataFrame) -> None:
    assert attack_rates(ledger) == pytest.approx(
        {
            "accuracy": 4 / 6,
            "asr/0.00392157": 1 / 4,
            "afr/0.00392157": 3 / 4,
            "robust_accuracy/0.00392157": 3 / 6,
            "asr/0.0313725": 3 / 4,
            "afr/0.0313725": 1 / 4,
            "robust_accuracy/0.0313725": 1 / 6,
        }
    )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_robust_accuracy_is_accuracy_times_afr(images: list[tuple[bool, bool]]) -> None:
    correct, broken = (torch.tensor(column) for column in zip(*images, strict=True))
    success = (broken | ~correct)[None]
    rates = attack_rates(evaluation_ledger(torch.zeros(len(images)), (~correct).float(), success, [0.1]))
    assert rates["robust_accuracy/0.1"] == pytest.approx(rates["accuracy"] * rates["afr/0.1"])
    assert rates["asr/0.1"] == pytest.approx(1 - rates["afr/0.1"])


def test_a_model_that_is_always_wrong_has_nothing_to_attack() -> None:
    ledger = evaluation_ledger(torch.zeros(3), torch.ones(3), torch.ones(1, 3, dtype=torch.bool), [0.1])
    assert attack_rates(ledger) == {"accuracy": 0.0, "asr/0.1": 0.0, "afr/0.1": 1.0, "robust_accuracy/0.1": 0.0}


def test_every_radius_needs_its_row_of_successes() -> None:
    with pytest.raises(ValueError, match="zip"):
        evaluation_ledger(torch.zeros(3), torch.zeros(3), torch.ones(1, 3, dtype=torch.bool), RADII)


@pytest.mark.parametrize(("eps", "key"), [(1 / 255, "0.00392157"), (8 / 255, "0.0313725"), (0.0, "0"), (0.5, "0.5")])
def test_the_key_of_a_radius(eps: float, key: str) -> None:
    assert eps_key(eps) == key


def test_the_radii_of_the_study_have_keys_of_their_own() -> None:
    radii = [k / scale for k in range(1, 33) for scale in (255, 510)]
    assert len({eps_key(eps) for eps in radii}) == len(set(radii))


def test_verdicts_are_counted_and_never_merged() -> None:
    verdicts = ["safe-incomplete", "safe-incomplete", "safe", "unsafe", "timeout", "unknown", "error", None]
    counts = verdict_counts(verified(verdicts, [True] * 7 + [False]))
    assert counts == {
        "verdicts/safe-incomplete": 2,
        "verdicts/safe": 1,
        "verdicts/unsafe": 1,
        "verdicts/timeout": 1,
        "verdicts/unknown": 1,
        "verdicts/error": 1,
        "verdicts/misclassified": 1,
        "verdicts/images": 8,
        "verdicts/certified_accuracy": 3 / 8,
        "verdicts/seconds": 4.0,
    }


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from([None, *VERDICTS]), min_size=1, max_size=20))
def test_every_image_is_counted_once(verdicts: list[str | None]) -> None:
    counts = verdict_counts(verified(verdicts, [verdict is not None for verdict in verdicts]))
    parts = [counts[f"verdicts/{name}"] for name in (*VERDICTS, "misclassified")]
    assert sum(parts) == counts["verdicts/images"] == len(verdicts)
    assert counts["verdicts/certified_accuracy"] == sum(verdict in PROVED for verdict in verdicts) / len(verdicts)


def test_a_verdict_that_is_none_of_ours_is_refused() -> None:
    with pytest.raises(RampartError, match="'safe-ish'"):
        verdict_counts(verified(["safe", "safe-ish"], [True, True]))


def test_balls_are_nested(ledger: pd.DataFrame) -> None:
    """An attack of a smaller radius counts at a larger one, and so does a counterexample entered later."""
    assert attacked_by(ledger, 0.5 / 255).sum() == 0
    assert attacked_by(ledger, 1 / 255).tolist() == [True, False, False, False, True, True]
    assert attacked_by(ledger, 4 / 255).tolist() == [True, False, False, False, True, True]
    assert attacked_by(ledger, 8 / 255).tolist() == [True, True, True, False, True, True]
    mark_attacked(ledger, 3, 4 / 255)
    assert not ledger["attacked/0.00392157"][3]
    assert ledger["attacked/0.0313725"][3]
    mark_attacked(ledger, 1, 1 / 255)
    assert ledger["attacked/0.00392157"][1]


def test_a_ledger_says_that_branch_and_bound_has_broken_an_image(ledger: pd.DataFrame) -> None:
    ledger["broken_eps"] = pd.array([1 / 255, 8 / 255, 8 / 255, pd.NA, pd.NA, pd.NA], dtype="Float64")
    ledger["broken_by"] = pd.array(["pgd", "pgd", "pgd", pd.NA, pd.NA, pd.NA], dtype="string")
    for name in ("broken_restart", "broken_step"):
        ledger[name] = pd.array([0, 0, 0, pd.NA, pd.NA, pd.NA], dtype="Int64")
    for image, eps in ((0, 1 / 255), (1, 1 / 255), (3, 2 / 255)):
        mark_attacked(ledger, image, eps)
    assert ledger["broken_eps"].fillna(0).tolist() == [1 / 255, 1 / 255, 8 / 255, 2 / 255, 0, 0]
    assert ledger["broken_by"].fillna("").tolist() == ["pgd", "branch-and-bound", "pgd", "branch-and-bound", "", ""]
    assert ledger["broken_step"].isna().tolist() == [False, True, False, True, True, True]


def proof(image: int, eps: float, verdict: str = "safe", radius: float = float("nan")) -> pd.DataFrame:
    row = {"image": image, "eps": eps, "verdict": verdict, "correct": True, "seconds": 0.1, "radius": radius}
    return pd.DataFrame([row])


@pytest.mark.parametrize(
    ("other", "image"),
    [
        (proof(0, 1 / 255), 0),
        (proof(0, 2 / 255), 0),
        (proof(0, 0.5 / 255), None),
        (proof(1, 1 / 255), None),
        (proof(1, 8 / 255), 1),
        (proof(3, 8 / 255), None),
        (proof(0, 2 / 255, "unknown"), None),
        (proof(1, 0.5 / 255, "safe-incomplete", radius=9 / 255), 1),
        (proof(1, 0.5 / 255, "safe-incomplete", radius=7 / 255), None),
    ],
)
def test_an_image_that_is_proved_and_broken_is_found(
    ledger: pd.DataFrame, other: pd.DataFrame, image: int | None
) -> None:
    said = contradiction({"attack": ledger, "proof": other})
    if image is None:
        assert said is None
    else:
        assert said is not None
        assert said.startswith(f"image {image} was proved robust")
        assert "(run proof)" in said
        assert "(run attack)" in said


def test_two_verifiers_that_disagree_are_found() -> None:
    assert contradiction({"a": proof(5, 0.1, "unsafe"), "b": proof(5, 0.1, "safe")}) is not None
    assert contradiction({"a": proof(5, 0.1, "unsafe"), "b": proof(5, 0.1, "timeout")}) is None
    assert contradiction({"a": proof(5, 0.1, "unsafe"), "b": proof(5, 0.09, "safe")}) is None


def test_the_bracket_is_of_the_images_that_were_to_be_proved(ledger: pd.DataFrame) -> None:
    ledger["certified/0.00392157"] = pd.array([False, True, pd.NA, pd.NA, False, pd.NA], dtype="boolean")
    rates = attack_rates(ledger)
    assert rates["certified_accuracy/0.00392157"] == pytest.approx(1 / 3)
    assert rates["attacked_accuracy/0.00392157"] == pytest.approx(1 / 3)
    assert rates["robust_accuracy/0.00392157"] == pytest.approx(3 / 6)
