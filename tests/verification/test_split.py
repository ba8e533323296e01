"""The ledger of a verification."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rampart.data import Dataset, to_pixels
from rampart.errors import Contradiction, ModelError, SettingsError
from rampart.ledger import VERDICTS, verdict_counts
from rampart.verification import Verdict, VerificationPlan, choose, split, verify, verify_split
from rampart.verification.split import COLUMNS
from tests.nets import fitted


@pytest.fixture(scope="module")
def network(digits: Dataset) -> nn.Module:
    """Right on most digits, with margins that some balls fit under and others do not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 16), nn.ReLU(), nn.Linear(16, 10))
    return fitted(model, digits, lr=0.003, steps=40)


def test_a_ledger_has_a_row_for_each_chosen_image(network: nn.Module, digits: Dataset) -> None:
    plan = VerificationPlan(eps=0.05, images=30, attack_first=True)
    ledger, examples = verify_split(network, digits.test, plan)
    assert tuple(ledger.columns) == COLUMNS
    assert ledger["image"].tolist() == choose(network, digits.test, 30, "common")
    assert ledger["label"].tolist() == digits.test.labels[torch.tensor(ledger["image"].tolist())].tolist()
    with torch.no_grad():
        predictions = network(to_pixels(digits.test.images[torch.tensor(ledger["image"].tolist())])).argmax(1)
    assert ledger["prediction"].tolist() == predictions.tolist()
    assert (ledger["correct"] == (ledger["label"] == ledger["prediction"])).all()
    assert (ledger["eps"] == 0.05).all()
    assert ledger.loc[~ledger["correct"], ["verdict", "stage", "lower_bound", "seconds"]].isna().all(axis=None)
    assert set(ledger.loc[ledger["correct"], "verdict"]) == {"safe-incomplete", "unsafe", "safe"}
    assert not ledger["correct"].all()
    assert set(examples) == set(ledger.loc[ledger["verdict"] == "unsafe", "image"])


def test_every_row_is_what_verify_says(network: nn.Module, digits: Dataset) -> None:
    plan = VerificationPlan(eps=0.005, images=10)
    ledger, _ = verify_split(network, digits.test, plan)
    for row in ledger[ledger["correct"]].itertuples():
        found = verify(network, to_pixels(digits.test.images[row.image]), row.label, 0.005)
        assert (row.verdict, row.stage) == (found.status, found.stage)
        assert row.lower_bound == pytest.approx(found.lower_bound, rel=1e-5)


def test_counterexamples_refute_their_images(network: nn.Module, digits: Dataset) -> None:
    ledger, examples = verify_split(network, digits.test, VerificationPlan(eps=0.05, images=30, attack_first=True))
    assert examples
    for row in ledger.itertuples():
        if row.image in examples:
            example, image = examples[row.image], to_pixels(digits.test.images[row.image])
            assert (example - image).abs().max() <= 0.05 + 1e-6
            with torch.no_grad():
                assert int(network(example[None]).argmax()) != row.label


def test_counts_of_a_ledger_add_up(network: nn.Module, digits: Dataset) -> None:
    ledger, _ = verify_split(network, digits.test, VerificationPlan(eps=0.05, images=30))
    counts = verdict_counts(ledger)
    assert sum(counts[f"verdicts/{verdict}"] for verdict in VERDICTS) + counts["verdicts/misclassified"] == 30
    proved = (ledger["correct"] & ledger["verdict"].isin(["safe-incomplete", "safe"])).mean()
    assert counts["verdicts/certified_accuracy"] == pytest.approx(proved)


def test_survivors_are_all_classified_correctly(network: nn.Module, digits: Dataset) -> None:
    plan = VerificationPlan(eps=0.005, images=10, selection="survivors", survive_eps=0.02)
    ledger, _ = verify_split(network, digits.test, plan)
    assert ledger["correct"].all()
    assert len(ledger) == 10


def test_a_network_for_other_images_is_named(digits: Dataset) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).eval()
    with pytest.raises(ModelError, match="3x32x32"):
        verify_split(model, digits.test, VerificationPlan(images=1))


@pytest.mark.parametrize(
    "change", [{"eps": -0.1}, {"eps": 2.0}, {"survive_eps": 8.0}, {"images": 0}, {"timeout": 0.0}, {"selection": "all"}]
)
def test_a_plan_refuses_what_cannot_be_done(change: dict[str, object]) -> None:
    with pytest.raises(SettingsError):
        VerificationPlan(**change)


def test_an_image_that_is_proved_and_broken_stops_the_run(
    network: nn.Module, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the verifier lies."""
    monkeypatch.setattr(split, "verify", lambda *given, **named: Verdict("safe", 1.0, None, 0, 0.0, "ibp"))
    with pytest.raises(Contradiction, match=r"proved robust at ε 0\.1, but PGD breaks it"):
        verify_split(network, digits.test, VerificationPlan(eps=0.1, images=30))
