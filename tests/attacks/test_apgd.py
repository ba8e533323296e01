"""Auto-PGD beside the reference, and the ensemble of which it is a part."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from rampart.attacks import MEMBERS, apgd, autoattack
from rampart.attacks import ensemble as members
from rampart.attacks.objectives import dlr, margin, targeted_dlr
from rampart.data import Dataset, to_pixels
from rampart.errors import ModelError, SettingsError
from rampart.models import build_model
from tests.nets import fitted

RADII = (0.0, 0.01, 0.03, 0.1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def learned(digits: Dataset) -> nn.Module:
    """A network that is right on most digits and easily attacked on many."""
    torch.manual_seed(0)
    return fitted(build_model("paper-cnn", (3, 32, 32), 10, width=0.125).train(), digits, lr=0.01, steps=15)


def some(digits: Dataset, model: nn.Module, count: int) -> tuple[Tensor, Tensor]:
    """Images that the model gets right."""
    x, y = to_pixels(digits.test.images[: 2 * count]), digits.test.labels[: 2 * count]
    with torch.no_grad():
        right = model(x).argmax(1) == y
    return x[right][:count], y[right][:count]


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_examples_lie_in_the_ball_and_success_is_confirmed(network, images, labels, norm: str, loss: str) -> None:
    radii = [3 * eps if norm == "l2" else eps for eps in RADII]
    result = apgd(network, images, labels, radii, 20, generator=generator(), norm=norm, loss=loss)
    order = float("inf") if norm == "linf" else 2
    for eps, examples in zip(radii, result.adversarial.double(), strict=True):
        distance = torch.linalg.vector_norm((examples - images.double()).flatten(1), ord=order, dim=1)
        assert distance.max() <= eps
        assert examples.min() >= 0
        assert examples.max() <= 1
    with torch.no_grad():
        wrong = torch.stack([network(examples).argmax(1) != labels for examples in result.adversarial])
    assert torch.equal(result.success, wrong)
    assert 4 < int(result.success[1].sum()) < int(result.success[-1].sum())


@pytest.mark.parametrize(("loss", "norm", "eps"), [("ce", "linf", 0.02), ("dlr", "linf", 0.02), ("ce", "l2", 0.5)])
def test_no_weaker_than_the_reference(digits, learned, loss: str, norm: str, eps: float) -> None:
    """pyautoattack's APGD of the same budget breaks no more than 0.3 points above ours."""
    pytest.importorskip("pyautoattack", reason="pyautoattack is not installed")
    from pyautoattack.autopgd_base import APGDAttack

    x, y = some(digits, learned, 350)
    assert len(x) > 334, "0.3 points are an image"
    ours = apgd(learned, x, y, eps, 25, 2, generator(), loss=loss, norm=norm).success[0]
    given = {"norm": {"linf": "Linf", "l2": "L2"}[norm], "eps": eps, "loss": loss, "seed": 0, "device": "cpu"}
    theirs = APGDAttack(learned, n_iter=25, n_restarts=2, **given).perturb(x.contiguous(), y)
    with torch.no_grad():
        broken = learned(theirs).argmax(1) != y
    assert 0.1 < float(broken.float().mean()) < 0.95
    assert float(broken.float().mean()) - float(ours.float().mean()) <= 0.003


def test_the_loss_without_scale_sees_through_large_logits(digits, learned) -> None:
    x, y = some(digits, learned, 100)

    class Loud(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 1e4 * learned(x)

    loud = Loud().eval()
    deaf, hears = (apgd(loud, x, y, 0.03, 20, generator=generator(), loss=loss).success for loss in ("ce", "dlr"))
    plain = apgd(learned, x, y, 0.03, 20, generator=generator(), loss="dlr").success
    assert int(deaf.sum()) < int(hears.sum()) // 2
    assert torch.equal(hears, plain)


def test_targets_are_the_other_classes_in_turn(network, images, labels) -> None:
    once = apgd(network, images, labels, 0.02, 20, generator=generator(), targets=1).success
    result = apgd(network, images, labels, 0.02, 20, generator=generator(), targets=9)
    assert bool((result.success | ~once).all())
    assert set(result.start.tolist()) <= {-1, 0, 1, 2}  # the network has three other classes


def test_restarts_never_hurt_and_the_seed_decides(network, images, labels) -> None:
    once, often = (apgd(network, images, labels, 0.02, 3, r, generator()).success for r in (1, 6))
    assert bool((often | ~once).all())
    first, again = (apgd(network, images, labels, 0.02, 10, generator=generator(3)).adversarial for _ in range(2))
    assert torch.equal(first, again)


def test_losses_are_what_the_papers_say() -> None:
    z, y = torch.tensor([[5.0, 1.0, 2.0, -1.0], [1.0, 4.0, 3.0, 0.0]]), torch.tensor([0, 2])
    assert margin(z, y).tolist() == [-3.0, 1.0]
    # -(5 - 2) / (5 - 1) and -(3 - 4) / (4 - 1).
    torch.testing.assert_close(dlr(z, y), torch.tensor([-3 / 4, 1 / 3]))
    # -(5 - 1) / (5 - (1 - 1) / 2) and -(3 - 4) / (4 - (1 + 0) / 2).
    torch.testing.assert_close(targeted_dlr(torch.tensor([1, 1]))(z, y), torch.tensor([-4 / 5, 1 / 3.5]))
    two = z[:, :2]
    torch.testing.assert_close(dlr(two, torch.tensor([0, 0])), torch.tensor([-4.0, 3.0]))
    torch.testing.assert_close(targeted_dlr(torch.tensor([1, 1]))(two, torch.tensor([0, 0])), torch.tensor([-4.0, 3.0]))


@pytest.mark.parametrize(
    ("change", "mentions"),
    [
        ({"steps": 0}, "steps"),
        ({"restarts": 0}, "restarts"),
        ({"loss": "hinge"}, "loss"),
        ({"targets": -1}, "targets"),
        ({"eps": -0.1}, "eps"),
    ],
)
def test_bad_arguments_are_named(network, images, labels, change: dict[str, object], mentions: str) -> None:
    with pytest.raises(SettingsError, match=mentions):
        apgd(network, images, labels, **{"eps": 0.1, **change})


def test_a_network_in_training_mode_is_refused(network, images, labels) -> None:
    with pytest.raises(ModelError, match=r"eval\(\)"):
        apgd(network.train(), images, labels, 0.1)


def test_the_ensemble_breaks_what_its_members_break(digits, learned, monkeypatch) -> None:
    """Few steps and queries, for it is the frame that is tested."""
    pytest.importorskip("pyautoattack", reason="pyautoattack is not installed")
    for name, value in (("STEPS", 5), ("QUERIES", 200)):
        monkeypatch.setattr(members, name, value)
    x, y = some(digits, learned, 40)
    parameters = [parameter.clone() for parameter in learned.parameters()]
    state = torch.get_rng_state()
    result = autoattack(learned, x, y, (0.005, 0.012), generator())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and p.requires_grad for p in learned.parameters())
    assert all(torch.equal(p, q) for p, q in zip(learned.parameters(), parameters, strict=True))
    for eps, examples in zip(result.eps, result.adversarial.double(), strict=True):
        assert (examples - x.double()).abs().max() <= eps
    with torch.no_grad():
        wrong = torch.stack([learned(examples).argmax(1) != y for examples in result.adversarial])
    assert torch.equal(result.success, wrong)
    assert {MEMBERS[start] for start in result.start.tolist() if start >= 0} >= {"apgd-ce"}
    alone = apgd(learned, x, y, (0.005, 0.012), 5, generator=generator()).success
    assert int(result.success.sum()) >= int(alone.sum())


@pytest.mark.parametrize(("height", "width"), [(4, 4), (7, 7), (12, 12), (16, 16), (16, 32), (24, 24), (24, 32)])
def test_sizes_that_square_cannot_tile_in_l2_are_refused(monkeypatch, height: int, width: int) -> None:
    pytest.importorskip("pyautoattack", reason="pyautoattack is not installed")
    for name, value in (("STEPS", 1), ("QUERIES", 2)):
        monkeypatch.setattr(members, name, value)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * height * width, 3)).eval()
    x, y = torch.rand(2, 3, height, width), torch.tensor([0, 1])
    autoattack(model, x, y, 0.001, generator())
    if height in (7, 16):
        autoattack(model, x, y, 0.001, generator(), norm="l2")
    else:
        with pytest.raises(SettingsError, match=f"{height}x{width}: take attack=apgd"):
            autoattack(model, x, y, 0.001, generator(), norm="l2")


@pytest.mark.parametrize(
    ("member", "dtype"), [("fab-t", torch.float32), ("fab-t", torch.float64), ("square", torch.float64)]
)
def test_members_of_the_other_library_break_images_by_themselves(
    digits, learned, monkeypatch, member: str, dtype: torch.dtype
) -> None:
    pytest.importorskip("pyautoattack", reason="pyautoattack is not installed")
    for name, value in (("STEPS", 20), ("QUERIES", 300)):
        monkeypatch.setattr(members, name, value)
    # Those before it find nothing: they have no step to take, and start at the image.
    monkeypatch.setattr(members, "untargeted", lambda *_: idle)
    monkeypatch.setattr(members, "targeted", lambda steps, targets, _: [idle] * targets)
    if member == "square":
        monkeypatch.setattr("pyautoattack.fab_pt.FABAttack_PT.perturb", lambda self, x, y: x)
    x, y = some(digits, learned, 30)
    model = copy.deepcopy(learned).to(dtype)
    result = autoattack(model, x.to(dtype), y, 0.06 if member == "square" else 0.02, generator())
    assert result.adversarial.dtype == dtype
    assert member in {MEMBERS[start] for start in result.start.tolist() if start >= 0}
    assert set(result.step.tolist()) == {-1}


def idle(model: nn.Module, ball: object, y: Tensor) -> object:
    from rampart.attacks.sweep import Attempt

    return Attempt(ball.x, torch.zeros_like(y))
