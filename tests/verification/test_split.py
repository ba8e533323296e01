"""The ledger of a verification."""

from __future__ import annotations

import copy
from itertools import count
from threading import Event

import pandas as pd
import pytest
import torch
from torch import nn

from rampart.attacks import pgd
from rampart.data import Dataset, Split, to_pixels
from rampart.errors import Contradiction, ModelError, SettingsError
from rampart.ledger import VERDICTS, verdict_counts
from rampart.models import predict
from rampart.verification import Progress, Verdict, VerificationPlan, choose, split, verify, verify_split
from rampart.verification.split import COLUMNS, RADIUS_STEPS
from tests.nets import fitted, undecided_classifier


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
            assert (example.double() - image.double()).abs().max() <= 0.05
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
    "change",
    [
        {"eps": -0.1},
        {"eps": 2.0},
        {"survive_eps": 8.0},
        {"images": 0},
        {"timeout": 0.0},
        {"selection": "all"},
        {"engine": "natve"},
        {"radius": 1.5},
        {"images_at_once": 0},
        {"engine": "abcrown", "radius": 0.1},
    ],
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


@pytest.mark.parametrize("attack_first", [False, True])
def test_what_float32_alone_gets_wrong_contradicts_no_proof(attack_first: bool) -> None:
    """A neuron of 16,777,216 + 2.2 x loses the image below x = 0.45 in float32, in which PGD runs."""
    first, last = nn.Linear(1, 2), nn.Linear(2, 2)
    model = nn.Sequential(nn.Flatten(), first, nn.ReLU(), last).eval()
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[2.2], [0.0]]))
        first.bias.fill_(2**24)
        last.weight.copy_(torch.tensor([[1.0, -1.0], [0.0, 0.0]]))
        last.bias.copy_(torch.tensor([-0.5, 0.0]))
    images = torch.full((1, 1, 1, 1), 128, dtype=torch.uint8)
    assert pgd(model, to_pixels(images), torch.tensor([0]), 0.1).success.all()
    plan = VerificationPlan(eps=0.1, images=1, attack_first=attack_first)
    ledger, examples = verify_split(model, Split(images, torch.tensor([0])), plan)
    assert ledger["verdict"].tolist() == ["safe-incomplete"]
    assert not examples


def test_no_image_needs_a_copy_of_the_model(
    network: nn.Module, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[object] = []

    def counting(what: object, *given: object) -> object:
        copied.append(what)
        return whole(what, *given)

    whole = copy.deepcopy
    monkeypatch.setattr(copy, "deepcopy", counting)
    counts = []
    for images in (4, 20):
        copied.clear()
        ledger, _ = verify_split(network, digits.test, VerificationPlan(eps=0.05, images=images, attack_first=True))
        counts.append(sum(what is network for what in copied))
    assert (ledger["stage"] == "attack").sum() > 2
    assert counts[0] == counts[1]


@pytest.mark.parametrize("together", [10, 256])
def test_parts_and_what_is_gone_on_with_give_the_verdicts_of_the_whole(
    together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it depends on PGD's starts whether an image is broken."""
    monkeypatch.setattr(split, "TOGETHER", together)
    monkeypatch.setattr(split, "verify", lambda *given, **named: Verdict("unknown", -1.0, None, 0, 0.0, "crown"))
    model = undecided_classifier()
    images = torch.randint(256, (24, 3, 8, 8), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    data = Split(images, predict(model, to_pixels(images)))
    plan = VerificationPlan(eps=0.03, images=24, attack_first=True)
    progress = Progress()
    ledger, _ = verify_split(model, data, plan, progress)
    whole = dict(zip(ledger["image"], ledger["verdict"], strict=True))
    for parts in (2, 8):
        found = [verify_split(model, data, plan, part=(part, parts))[0] for part in range(parts)]
        together_again = pd.concat(found)
        assert dict(zip(together_again["image"], together_again["verdict"], strict=True)) == whole
    for done in (5, 12):
        rest = Progress(progress.rows[:done], dict(progress.examples))
        ledger, _ = verify_split(model, data, plan, rest)
        assert dict(zip(ledger["image"], ledger["verdict"], strict=True)) == whole


def test_images_side_by_side_get_the_same_verdicts(network: nn.Module, digits: Dataset) -> None:
    torch.set_num_threads(2)
    one, two = (
        verify_split(network, digits.test, VerificationPlan(eps=0.03, images=24, attack_first=True, images_at_once=n))
        for n in (1, 3)
    )
    settled = ["image", "prediction", "correct", "verdict", "stage", "domains"]
    assert one[0][settled].equals(two[0][settled])
    assert one[0]["lower_bound"].tolist() == pytest.approx(two[0]["lower_bound"].tolist(), rel=1e-4, nan_ok=True)
    assert one[1].keys() == two[1].keys()
    assert torch.get_num_threads() == 2


def test_after_an_error_of_one_image_none_is_begun_and_those_beside_it_are_kept(
    network: nn.Module, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(2)
    asked = count()
    failed = Event()

    def failing(*given: object, **named: object) -> Verdict:
        if next(asked) == 0:
            assert failed.wait(60)
            return Verdict("unknown", -1.0, None, 0, 0.0, "branch and bound")
        failed.set()
        raise ModelError("no more")

    monkeypatch.setattr(split, "verify", failing)
    progress = Progress()
    with pytest.raises(ModelError, match="no more"):
        verify_split(network, digits.test, VerificationPlan(eps=0.03, images=60, images_at_once=2), progress)
    assert next(asked) == 2
    assert progress.ledger["verdict"].dropna().tolist() == ["unknown"]
    assert torch.get_num_threads() == 2


def test_a_radius_is_proved_and_nearly_the_largest(digits: Dataset) -> None:
    """Of a linear network it is known exactly, but for the tolerance of a proof."""
    model = fitted(nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), digits, lr=0.003, steps=40)
    plan = VerificationPlan(eps=0.02, images=12, radius=0.2)
    ledger, _ = verify_split(model, digits.test, plan)
    weight, bias = model[1].weight.detach().double(), model[1].bias.detach().double()
    proved = {True: 0, False: 0}
    for row in ledger[ledger["correct"]].itertuples():
        x = to_pixels(digits.test.images[row.image]).flatten().double()
        gap = weight[row.label] - weight

        def margin(eps: float, x: torch.Tensor = x, gap: torch.Tensor = gap, label: int = row.label) -> float:
            worst = (torch.minimum(gap * (x - eps).clamp(min=0), gap * (x + eps).clamp(max=1))).sum(1)
            others = worst + bias[label] - bias
            others[label] = torch.inf
            return float(others.min())

        assert row.radius == 0 or margin(row.radius) > 0
        # The interval that bisection started from, halved six times.
        width = (0.2 - 0.02 if row.verdict == "safe-incomplete" else 0.02) / 2**RADIUS_STEPS
        assert row.radius >= 0.2 - width or margin(row.radius + 1.01 * width) < 2e-4
        proved[row.verdict == "safe-incomplete"] += 1
    assert min(proved.values()) > 0
    assert ledger.loc[~ledger["correct"], "radius"].isna().all()


def test_work_that_was_finished_is_not_done_again(
    network: nn.Module, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = VerificationPlan(eps=0.05, images=20, attack_first=True)
    whole, examples = verify_split(network, digits.test, plan)
    kept: list[int] = []
    first = Progress(keep=lambda progress: kept.append(len(progress.rows)))
    verify_split(network, digits.test, plan, first)
    assert kept == list(range(1, 21))
    asked = []

    def counting(*given: object, **named: object) -> Verdict:
        asked.append(given)
        return verify(*given, **named)

    monkeypatch.setattr(split, "verify", counting)
    done = {row["image"] for row in first.rows[:12]}
    rest = Progress(first.rows[:12], {image: x for image, x in first.examples.items() if image in done})
    ledger, again = verify_split(network, digits.test, plan, rest)
    assert len(asked) == (whole["correct"] & (whole["stage"] != "attack"))[12:].sum() > 0
    settled = ["image", "prediction", "correct", "verdict", "stage", "counterexample_prediction"]
    assert ledger[settled].equals(whole[settled])
    assert again.keys() == examples.keys()


def test_a_counterexample_has_its_prediction(network: nn.Module, digits: Dataset) -> None:
    ledger, examples = verify_split(network, digits.test, VerificationPlan(eps=0.05, images=20, attack_first=True))
    for row in ledger.itertuples():
        if row.verdict == "unsafe":
            with torch.no_grad():
                assert int(network(examples[row.image][None]).argmax()) == row.counterexample_prediction != row.label
        else:
            assert row.counterexample_prediction is pd.NA


def test_a_model_for_auto_lirpa_is_verified_one_image_at_a_time(digits: Dataset) -> None:
    model = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 12), nn.Sigmoid(), nn.Linear(12, 10))
    fitted(model, digits, lr=0.02, steps=60)
    ledger, _ = verify_split(model, digits.test, VerificationPlan(eps=0.001, images=4, images_at_once=2))
    assert set(ledger["verdict"].dropna()) <= {"safe-incomplete", "unknown"}
