"""Rates are what a ledger says."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from rampart.errors import RampartError
from rampart.ledger import VERDICTS, attack_rates, evaluation_ledger, verdict_counts


def test_rates_are_over_the_images_that_they_speak_of() -> None:
    labels, predictions = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, 0])
    # The last image is wrong as it stands, so it is broken at every ε and no success of the attack.
    success = torch.tensor([[False, False, False, True], [True, False, True, True]])
    ledger = evaluation_ledger(labels, predictions, success, [0.01, 0.02])
    assert list(ledger.columns) == ["image", "label", "prediction", "correct", "attacked/0.01", "attacked/0.02"]
    rates = attack_rates(ledger)
    assert rates["accuracy"] == 0.75
    assert rates["asr/0.01"] == 0
    assert rates["asr/0.02"] == pytest.approx(2 / 3)
    assert rates["afr/0.02"] == pytest.approx(1 / 3)
    for eps in ("0.01", "0.02"):
        assert rates[f"robust_accuracy/{eps}"] == pytest.approx(rates["accuracy"] * rates[f"afr/{eps}"])


def test_a_model_that_is_always_wrong_has_no_attack_success() -> None:
    ledger = evaluation_ledger(torch.tensor([0, 0]), torch.tensor([1, 1]), torch.ones(1, 2, dtype=torch.bool), [0.1])
    assert attack_rates(ledger) == {"accuracy": 0, "asr/0.1": 0, "afr/0.1": 1, "robust_accuracy/0.1": 0}


def test_verdicts_are_counted_apart_and_never_merged() -> None:
    ledger = pd.DataFrame(
        {"correct": [True] * 6 + [False], "verdict": [*VERDICTS, None], "seconds": [1.0] * 6 + [None]}
    )
    counts = verdict_counts(ledger)
    assert all(counts[f"verdicts/{verdict}"] == 1 for verdict in VERDICTS)
    assert counts["verdicts/misclassified"] == 1
    assert counts["verdicts/certified_accuracy"] == pytest.approx(2 / 7)
    ledger.loc[0, "verdict"] = "probably safe"
    with pytest.raises(RampartError, match="probably safe"):
        verdict_counts(ledger)
