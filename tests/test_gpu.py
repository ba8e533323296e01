"""What a GPU computes is what a CPU does; skipped where there is none."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rampart.attacks import pgd
from rampart.bounds.margins import METHODS, margin_bounds
from rampart.data import Augmentation, Dataset, to_pixels
from rampart.evaluation import AttackPlan, CertificationPlan, TrustPlan, certify, evaluate, trust
from rampart.models import Classifier
from rampart.models.geometry import Geometry
from rampart.models.links import MANY, Conv
from rampart.training import Recipe, step, train
from rampart.training.methods import METHODS as TRAINING
from rampart.training.methods import Normal
from rampart.verification import VerificationPlan, verify_split
from tests.training.conftest import ListRecorder
from tests.training.test_step import ARMS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

SHORT: dict[str, Any] = {"epochs": 3, "width": 0.25, "batch_size": 32, "eps": 4 / 255, "ema": 0.9, "select": "last"}
MORE: dict[str, dict[str, Any]] = {
    "adversarial, bf16": {"method": "adversarial", "attack_steps": 2, "precision": "bf16"},
    "certified, supcon": {"method": "certified", "contrastive": "double", "encoder_epochs": 2, "head_epochs": 2},
    "compiled": {"compile": True, "batch_size": 16, "augment": True},
    "augmented": {"augment": True, "schedule": "cosine", "bn_batches": 2},
}


def weights(recipe: Recipe, data: Dataset, **given: Any) -> dict[str, Tensor]:
    return train(recipe, data, ListRecorder(), device="cuda", seed=3, **given).state_dict()


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in found.items():
        scale = expected[name].float().abs().max() + 1e-6
        assert ((value - expected[name]).float().abs().max() / scale).item() < 1e-3, name


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The steps that were recorded."""
    made: list[object] = []
    record = step._Recorded.__init__

    def counted(self: Any, *given: Any) -> None:
        record(self, *given)
        made.append(self)

    monkeypatch.setattr(step._Recorded, "__init__", counted)
    return made


@pytest.mark.parametrize("arm", [*ARMS, *MORE])
def test_recorded_steps_do_what_single_kernels_do(
    arm: str, few_digits: Dataset, recordings: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(**{**SHORT, **ARMS.get(arm, {}), **MORE.get(arm, {})})
    recorded = weights(recipe, few_digits)
    assert recordings
    recordings.clear()
    monkeypatch.setattr(step, "BEFORE_RECORDING", 10**9)
    assert_near(recorded, weights(recipe, few_digits))
    assert not recordings


def test_a_training_is_gone_on_with(few_digits: Dataset) -> None:
    recipe = Recipe(**{**SHORT, "method": "adversarial", "attack_steps": 2, "augment": True})
    whole = ListRecorder()
    model = train(recipe, few_digits, whole, seed=3, device="cuda")
    assert_near(weights(recipe, few_digits, before=whole.kept[2][1]), model.state_dict())


class Waiting(Normal):
    def batch_loss(self, x: Tensor, *given: Any) -> Tensor:
        assert x.sum().item() > 0
        return super().batch_loss(x, *given)


def test_a_method_that_waits_is_told_of_and_not_recorded(
    few_digits: Dataset,
    recordings: list[object],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setitem(TRAINING, "normal", Waiting)
    recipe = Recipe(**{**SHORT, "epochs": 4})
    assert recipe.epochs * (len(few_digits.train) // recipe.batch_size) > step.PATIENCE
    with caplog.at_level(logging.WARNING):
        weights(recipe, few_digits)
    assert not recordings
    assert caplog.text.count("waits for the GPU") == 1


@pytest.fixture(scope="module")
def trained(digits: Dataset) -> Classifier:
    """An adversarially trained network of the digits, on the CPU."""
    torch.manual_seed(0)
    recipe = Recipe(method="adversarial", epochs=8, width=0.25, lr=0.005, eps=8 / 255, attack_steps=3)
    return train(recipe, digits, ListRecorder(), device="cuda").cpu()


@pytest.mark.parametrize("method", METHODS)
def test_bounds(method: Any, trained: Classifier, digits: Dataset) -> None:
    x, y = to_pixels(digits.test.images[:32]), digits.test.labels[:32]
    here = margin_bounds(trained.cpu(), x, y, 8 / 255, method)
    there = margin_bounds(trained.cuda(), x.cuda(), y.cuda(), 8 / 255, method).cpu()
    rows = torch.isfinite(here)
    scale = here[rows].abs().max()
    assert (here[rows] - there[rows]).abs().max() < (2e-2 if method == "alpha-crown" else 1e-4) * scale


def test_many_maps_go_back_through_a_strided_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    def gradients(device: str) -> tuple[Tensor, ...]:
        weight, a, of_image = (tensor.to(device) for tensor in drawn)
        geometry = Geometry((3, 3), (2, 2), (1, 1), (1, 1), (16, 16))
        link = Conv(weight.requires_grad_(), weight[:, 0, 0, 0], geometry)
        found = link.pull(a.requires_grad_())
        return tuple(tensor.cpu() for tensor in (found, *torch.autograd.grad(found, (a, weight), of_image)))

    torch.manual_seed(0)
    drawn = torch.randn(32, 8, 3, 3), torch.randn(MANY, 32, 8, 8), torch.randn(MANY, 8, 16, 16)
    expected = gradients("cpu")
    # Where a GPU had another way.
    monkeypatch.setattr(torch.nn.functional, "conv_transpose2d", None)
    for mine, reference in zip(gradients("cuda"), expected, strict=True):
        assert (mine - reference).abs().max() < 1e-4 * reference.abs().max()


def test_bounds_keep_to_their_memory(trained: Classifier, digits: Dataset) -> None:
    x, y = to_pixels(digits.test.images[:128]).cuda(), digits.test.labels[:128].cuda()
    peaks = []
    for memory in (16, 16, 2048):  # what the first call takes stays with the libraries
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        margin_bounds(trained.cuda(), x, y, 16 / 255, "crown", memory=memory)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 256 << 20 < peaks[2]


def test_evaluation(trained: Classifier, digits: Dataset) -> None:
    plan = AttackPlan(eps=(4 / 255, 8 / 255, 16 / 255), steps=10, restarts=2, batch_size=100)
    proofs = CertificationPlan(certify="crown", certify_eps=(4 / 255, 8 / 255))
    ledgers = []
    for device in ("cpu", "cuda"):
        split = digits.test.to(device)
        ledger = evaluate(trained.to(device), split, plan)
        ledgers.append(certify(trained, split, ledger, proofs))
        assert trust(trained, split, ledger, plan, TrustPlan(trust_images=32)) is not None
    here, there = ledgers
    assert (here["prediction"] == there["prediction"]).all()
    for column in here.filter(regex="attacked/|certified/"):
        assert (here[column].fillna(False) != there[column].fillna(False)).mean() < 0.02, column


def test_verification(trained: Classifier, digits: Dataset) -> None:
    plan = VerificationPlan(eps=5 / 255, images=10, selection="common", timeout=600.0)
    verdicts = [
        verify_split(trained.to(device), digits.test.to(device), plan)[0]["verdict"].tolist()
        for device in ("cpu", "cuda")
    ]
    for here, there in zip(*verdicts, strict=True):
        assert {str(here), str(there)} not in ({"safe", "unsafe"}, {"safe-incomplete", "unsafe"})
    assert "error" not in verdicts[1]
    assert "timeout" not in verdicts[1]


def test_attacks_stay_in_their_balls(trained: Classifier, digits: Dataset) -> None:
    x, y = to_pixels(digits.test.images[:64]).cuda(), digits.test.labels[:64].cuda()
    found = pgd(trained.cuda(), x, y, 8 / 255, steps=5, generator=torch.Generator("cuda").manual_seed(0))
    moved = found.adversarial[0].double()
    assert (moved - x.double()).abs().max() <= 8 / 255
    assert moved.min() >= 0
    assert moved.max() <= 1


def test_augmentation_waits_for_nothing(digits: Dataset) -> None:
    x, generator = to_pixels(digits.train.images[:32]).cuda(), torch.Generator("cuda").manual_seed(0)
    Augmentation()(x, generator)
    with step._waits() as waits:
        Augmentation()(x, generator)
    assert waits == []


def test_a_model_that_computes_with_less_is_none_of_ours() -> None:
    """TF32 would leave bounds unsound."""
    assert not torch.backends.cudnn.allow_tf32
    x = torch.rand(64, 512, device="cuda")
    layer = nn.Linear(512, 512).cuda()
    exact = layer.double()(x.double())
    assert (layer.float()(x) - exact).abs().max() < 1e-5
