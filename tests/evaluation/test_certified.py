"""Certified accuracy: what is proved is what the bounds say, and never what an attack refutes."""

from __future__ import annotations

import logging

import pandas as pd
import pytest
import torch
from torch import Tensor

from rampart.attacks import pgd
from rampart.bounds import METHODS, exact, margin_bounds
from rampart.bounds.margins import PROVED
from rampart.data import Split, to_pixels
from rampart.errors import SettingsError
from rampart.evaluation import CertificationPlan, certified, certify
from rampart.ledger import attack_rates, contradiction, eps_key, evaluation_ledger
from rampart.models import Classifier
from tests.nets import small_classifier, undecided_classifier, wrong_in_a_corner

EPS = (0.002, 0.01, 0.04)


@pytest.fixture(scope="module")
def model() -> Classifier:
    return undecided_classifier()


@pytest.fixture(scope="module")
def split(model: Classifier) -> Split:
    """60 images, two of three labelled as the model says."""
    torch.manual_seed(4)
    images = torch.randint(256, (60, 3, 8, 8), dtype=torch.uint8)
    labels = model(to_pixels(images)).argmax(1)
    labels[::3] = (labels[::3] + 1) % 3
    return Split(images, labels)


def ledger_of(
    model: Classifier, split: Split, success: Tensor | None = None, eps: tuple[float, ...] = ()
) -> pd.DataFrame:
    predictions = model(to_pixels(split.images)).argmax(1)
    none = torch.zeros(0, len(split), dtype=torch.bool)
    return evaluation_ledger(split.labels, predictions, none if success is None else success, eps)


@pytest.mark.parametrize("method", METHODS)
def test_an_image_is_proved_where_it_is_correct_and_a_bound_says_so(
    method: str, model: Classifier, split: Split
) -> None:
    plan = CertificationPlan(certify=method, certify_eps=EPS, certify_batch=7)
    found = certify(model, split, ledger_of(model, split), plan)
    x, y = to_pixels(split.images), split.labels
    for eps in EPS:
        weaker = METHODS[: METHODS.index(method) + 1]
        best = torch.stack([margin_bounds(model, x, y, eps, m).amin(1) for m in weaker]).amax(0)
        expected = (best > PROVED) & torch.from_numpy(found["correct"].to_numpy().copy())
        # Batches differ in float32's last digits: an image on the edge may fall to either side.
        clear = (best - PROVED).abs() > 1e-5
        column = torch.tensor(found[f"certified/{eps_key(eps)}"].tolist())
        assert torch.equal(column[clear], expected[clear])
    shares = [attack_rates(found)[f"certified_accuracy/{eps_key(eps)}"] for eps in EPS]
    assert shares == sorted(shares, reverse=True)
    assert 0 < shares[0] <= attack_rates(found)["accuracy"]


@pytest.mark.parametrize("method", ["ibp", "crown", "branch-and-bound"])
def test_rounding_in_a_corner_of_the_ball_is_no_proof(method: str) -> None:
    images = torch.randint(25, 230, (12, 1, 1, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    labels, proved = torch.zeros(1, dtype=torch.int64), []
    plan = CertificationPlan(certify=method, certify_eps=(0.004,))
    for image in images:
        model, _ = wrong_in_a_corner(to_pixels(image), 0.004)
        for shift in (0.0, 3e-3):
            with torch.no_grad():
                model[3].bias[0] += shift
            split = Split(image[None], labels)
            proved.append(certify(model, split, ledger_of(model, split), plan)[f"certified/{eps_key(0.004)}"].item())
    assert proved == [False, True] * 12


def test_what_is_proved_no_attack_breaks(model: Classifier, split: Split) -> None:
    found = certify(model, split, ledger_of(model, split), CertificationPlan(certify="crown", certify_eps=EPS))
    x, y = to_pixels(split.images), split.labels
    for eps in EPS:
        proved = torch.tensor(found[f"certified/{eps_key(eps)}"].tolist())
        broken = pgd(model, x, y, eps, steps=20, restarts=3).success[0]
        assert not bool((proved & broken).any())


def test_an_image_that_an_attack_broke_is_not_bounded_there_or_beyond(
    model: Classifier, split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    success = torch.ones(1, len(split), dtype=torch.bool)
    asked = []
    monkeypatch.setattr(
        "rampart.bounds.exact.margin_bounds",
        lambda m, x, y, eps, *a, **k: asked.append(eps) or margin_bounds(m, x, y, eps, *a, **k),
    )
    found = certify(
        model, split, ledger_of(model, split, success, (0.01,)), CertificationPlan(certify="ibp", certify_eps=EPS)
    )
    assert {round(eps, 5) for eps in asked} == {0.002}
    assert not found["certified/0.01"].any()
    assert not found["certified/0.04"].any()


def test_a_part_of_the_images_is_the_same_for_every_model(model: Classifier, split: Split) -> None:
    plan = CertificationPlan(certify="ibp", certify_eps=(0.0,), certify_images=12)
    torch.manual_seed(9)
    ledgers = [certify(m, split, ledger_of(m, split), plan) for m in (model, small_classifier(classes=3))]
    chosen = [set(ledger.index[ledger["certified/0"].notna()]) for ledger in ledgers]
    assert chosen[0] == chosen[1]
    assert len(chosen[0]) == 12
    # At ε = 0 an image is proved where it is correct: rates are over the chosen images alone.
    part = ledgers[0].loc[sorted(chosen[0])]
    assert attack_rates(ledgers[0])["certified_accuracy/0"] == pytest.approx(part["correct"].mean(), abs=0.1)


def test_a_search_settles_what_bounds_leave_open(model: Classifier, split: Split) -> None:
    """It proves what CROWN proves and more, and what it refutes counts as attacked from that radius on."""
    attacked = ledger_of(model, split, torch.zeros(len(EPS), len(split), dtype=torch.bool), EPS)
    bounded, searched = (
        certify(model, split, attacked, CertificationPlan(certify=certify_by, certify_eps=EPS, certify_timeout=60))
        for certify_by in ("crown", "branch-and-bound")
    )
    assert not any(attacked[f"attacked/{eps_key(eps)}"].any() for eps in EPS)
    x, y = to_pixels(split.images), split.labels
    refuted = 0
    for eps in EPS:
        proved, broken = searched[f"certified/{eps_key(eps)}"].astype(bool), searched[f"attacked/{eps_key(eps)}"]
        assert proved[bounded[f"certified/{eps_key(eps)}"].astype(bool)].all()
        assert (proved ^ broken)[searched["correct"]].all()
        assert not (torch.tensor(proved.tolist()) & pgd(model, x, y, eps, restarts=3).success[0]).any()
        refuted += broken.sum()
        rates = attack_rates(searched)
        assert rates[f"certified_accuracy/{eps_key(eps)}"] == rates[f"attacked_accuracy/{eps_key(eps)}"]
    assert refuted > 0
    assert contradiction({"one": searched, "other": bounded}) is None


@pytest.mark.parametrize("certify_by", ["crown", "branch-and-bound"])
@pytest.mark.parametrize("batches", [1, 4, 6])
def test_an_interrupted_certification_goes_on_where_it_stopped(
    certify_by: str, batches: int, model: Classifier, split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    none = torch.zeros(len(EPS), len(split), dtype=torch.bool)
    given = ledger_of(model, split, none, EPS)
    plan = CertificationPlan(certify=certify_by, certify_eps=EPS, certify_batch=10, certify_timeout=60)
    tried: list[tuple[int, float]] = []
    prove = certified._Certification.prove

    def counted(self: certified._Certification, images: Tensor, eps: float) -> None:
        tried.extend((image, eps) for image in images.tolist())
        prove(self, images, eps)

    monkeypatch.setattr(certified._Certification, "prove", counted)
    whole = certify(model, split, given, plan)
    uninterrupted, kept = sorted(tried), []

    def keep(ledger: pd.DataFrame) -> None:
        kept.append(ledger.copy())
        if len(kept) == batches:
            raise KeyboardInterrupt

    tried.clear()
    with pytest.raises(KeyboardInterrupt):
        certify(model, split, given, plan, keep)
    assert 0 < len(tried) < len(uninterrupted)
    pd.testing.assert_frame_equal(certify(model, split, kept[-1], plan), whole)
    assert sorted(tried) == uninterrupted


def test_bounds_that_do_not_fit_into_memory_take_less(
    model: Classifier, split: Split, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plan = CertificationPlan(certify="crown", certify_eps=EPS)
    whole = certify(model, split, ledger_of(model, split), plan)

    def small(*given: object, **named: object) -> Tensor:
        if given[6] > 4:  # MiB
            raise torch.OutOfMemoryError("CUDA out of memory")
        return margin_bounds(*given, **named)

    monkeypatch.setattr(exact, "margin_bounds", small)
    with caplog.at_level(logging.WARNING):
        found = certify(model, split, ledger_of(model, split), plan)
    assert [record.args for record in caplog.records] == [(8,), (4,)]
    pd.testing.assert_frame_equal(found, whole)

    monkeypatch.setattr(exact, "margin_bounds", lambda *given, **_: small(*given[:6], 9))
    with pytest.raises(torch.OutOfMemoryError):
        certify(model, split, ledger_of(model, split), plan)


def test_none_leaves_the_ledger_as_it_is(model: Classifier, split: Split) -> None:
    ledger = ledger_of(model, split)
    assert certify(model, split, ledger, CertificationPlan()) is ledger


@pytest.mark.parametrize(
    ("change", "mentions"),
    [
        ({"certify": "crwn"}, "did you mean 'crown'"),
        ({"certify_eps": ()}, "certify_eps"),
        ({"certify_eps": (2.0,)}, "2"),
        ({"certify_images": -1}, "-1"),
        ({"certify_batch": 0}, "certify_batch"),
        ({"memory": -1}, "memory"),
        ({"certify_timeout": 0.0}, "certify_timeout"),
    ],
)
def test_a_bad_plan_is_named(change: dict[str, object], mentions: str) -> None:
    with pytest.raises(SettingsError, match=mentions):
        CertificationPlan(**change)
