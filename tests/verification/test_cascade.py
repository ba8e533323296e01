"""verify never says more than is true: proofs against the exact minimum, counterexamples checked in float64."""

from __future__ import annotations

import copy
import importlib.util
import logging

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rampart.bounds import crown
from rampart.bounds.box import Box
from rampart.bounds.ibp import Intervals
from rampart.errors import ModelError, RampartError, SettingsError, UnsupportedLayer
from rampart.models import Chain
from rampart.verification import Verdict, verify
from rampart.verification.verdict import is_counterexample
from tests.exact import exact_margins, tiny_net
from tests.nets import CLASSES, NETS, margins, points_in_ball, small_net, wrong_in_a_corner

RADII = (0.02, 0.1, 0.3)


def predicted(model: nn.Module, image: Tensor) -> int:
    with torch.no_grad():
        return int(model(image[None]).argmax())


def refutes(model: nn.Module, found: Verdict, image: Tensor, label: int, eps: float) -> bool:
    """Whether the counterexample is in the ball and in [0, 1], and float64 gives it another label."""
    example = found.counterexample.double()
    assert example.shape == image.shape
    inside = (example - image.double()).abs().max() <= eps and example.min() >= 0 and example.max() <= 1
    return bool(inside) and predicted(copy.deepcopy(model).double(), example) != label


def sum_above(threshold: float) -> nn.Module:
    """Class 0 where the four pixels of an image sum up to more than `threshold`."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 0]]))
        model[1].bias.copy_(torch.tensor([-threshold, 0.0]))
    return model


@pytest.mark.parametrize("attack_first", [False, True])
@pytest.mark.parametrize("hidden", [(5,), (3, 3)])
@pytest.mark.parametrize("seed", range(4))
def test_verdicts_agree_with_the_exact_minimum(hidden: tuple[int, ...], seed: int, attack_first: bool) -> None:
    torch.manual_seed(seed)
    model, image = tiny_net(hidden), torch.rand(1, 1, 2)
    label = predicted(model, image)
    for eps in RADII:
        exact = float(exact_margins(model, image, label, eps).min())
        found = verify(model, image, label, eps, attack_first=attack_first, complete=False)
        assert found.status in {"safe-incomplete", "unsafe", "unknown"}
        assert found.lower_bound <= exact + 1e-4
        if found.status == "safe-incomplete":
            assert exact > 0
            assert found.lower_bound > 0
        if found.status == "unsafe":
            assert exact < 0
            assert refutes(model, found, image, label, eps)


def test_the_seeds_above_meet_every_verdict() -> None:
    """Otherwise the test above shows little."""
    seen = set()
    for seed in range(4):
        torch.manual_seed(seed)
        model, image = tiny_net((3, 3)), torch.rand(1, 1, 2)
        label = predicted(model, image)
        for attack in (False, True):
            seen |= {verify(model, image, label, eps, attack_first=attack, complete=False).status for eps in RADII}
    assert seen == {"safe-incomplete", "unsafe", "unknown"}


@pytest.mark.parametrize("name", NETS)
def test_no_sampled_point_contradicts_a_verdict(name: str) -> None:
    model, x, _ = small_net(name, count=1)
    label = predicted(model, x[0])
    for eps in (0.001, 0.01, 0.1):
        found = verify(model, x[0], label, eps, timeout=2)
        lowest = float(margins(model, points_in_ball(x[0], eps, 2000), label).min())
        assert found.status in {"safe-incomplete", "safe", "unsafe", "timeout"}
        assert found.lower_bound <= lowest + 1e-4
        if lowest < 0:
            assert found.status in {"unsafe", "timeout"}
        if found.status == "unsafe":
            assert refutes(model, found, x[0], label, eps)
        else:
            assert found.counterexample is None


@pytest.mark.parametrize("seed", [1, 2])
def test_each_stage_settles_what_the_one_before_left_open(seed: int) -> None:
    """As the ball grows: IBP, then CROWN, then α-CROWN, then none of them."""
    torch.manual_seed(seed)
    model, image = tiny_net((16, 16)), torch.rand(1, 1, 2)
    label = predicted(model, image)

    def largest(stages: set[str]) -> float:
        """The radius up to which these stages settle the image, by bisection."""
        low, high = 0.0, 1.0
        for _ in range(14):
            middle = (low + high) / 2
            found = verify(model, image, label, middle, complete=False)
            proved = found.status == "safe-incomplete" and found.stage in stages
            low, high = (middle, high) if proved else (low, middle)
        return low

    assert 0 < largest({"ibp"}) < largest({"ibp", "crown"}) < largest({"ibp", "crown", "alpha-crown"})
    found = verify(model, image, label, 1.0, complete=False)
    assert (found.status, found.stage) == ("unknown", "alpha-crown")
    assert set(found.stage_seconds) == {"attack", "ibp", "crown", "alpha-crown"}
    assert 0 < sum(found.stage_seconds.values()) <= found.seconds


def test_a_misclassified_image_is_its_own_counterexample() -> None:
    model, x, _ = small_net("strided", count=1)
    wrong = (predicted(model, x[0]) + 1) % CLASSES
    found = verify(model, x[0], wrong, 0.01)
    assert found.status == "unsafe"
    assert torch.equal(found.counterexample, x[0])
    assert found.lower_bound <= float(margins(model, x, wrong).min())


def test_eps_0_is_settled_at_once() -> None:
    model, x, _ = small_net("strided", count=1)
    label = predicted(model, x[0])
    found = verify(model, x[0], label, 0.0)
    assert (found.status, found.stage, found.domains) == ("safe-incomplete", "ibp", 0)
    assert found.lower_bound == pytest.approx(float(margins(model, x, label).min()), rel=1e-3, abs=1e-4)


def test_an_attack_finds_what_bounds_cannot_refute() -> None:
    model, image = sum_above(1.99), torch.full((1, 2, 2), 0.5)
    attacked = verify(model, image, 0, 0.05, attack_first=True)
    assert (attacked.status, attacked.stage) == ("unsafe", "attack")
    assert refutes(model, attacked, image, 0, 0.05)
    bounded = verify(model, image, 0, 0.05, complete=False)
    assert bounded.status == "unknown"
    assert bounded.counterexample is None
    assert bounded.lower_bound == pytest.approx(0.01 - 4 * 0.05, abs=1e-5)


def brighter_than(threshold: float) -> nn.Module:
    """Class 0 where an image of one pixel is above `threshold`."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0], [0.0]]))
        model[1].bias.copy_(torch.tensor([-threshold, 0.0]))
    return model


@pytest.mark.parametrize(("steps", "unsafe"), [(-1, False), (0, False), (2, True)])
def test_a_point_that_rounding_alone_brings_into_the_ball_refutes_nothing(steps: int, unsafe: bool) -> None:
    """The network errs from so many numbers of float32 above the one next to the ball's end on."""
    end = np.float32(0.5 - 0.1)
    model, image = brighter_than(float(end + steps * np.spacing(end))), torch.full((1, 1, 1), 0.5)
    found = verify(model, image, 0, 0.1)
    assert (found.status == "unsafe") == unsafe
    assert not unsafe or refutes(model, found, image, 0, 0.1)


def test_the_smallest_balls_have_no_slack() -> None:
    image = torch.full((1, 1, 1), 0.5)
    for eps in (0.0, 1e-7, 1e-3):
        near, far = image - eps / 2, image - eps - 2**-23
        assert is_counterexample(brighter_than(0.6), near, image, 0, eps)
        assert not is_counterexample(brighter_than(0.6), far, image, 0, eps)


def test_an_image_at_the_edge_of_the_pixels_range_is_proved_on_the_cut_ball() -> None:
    """Beyond 0 the network would err, but no pixel is there."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0], [0.0]]))
        model[1].bias.copy_(torch.tensor([0.01, 0.0]))
    found = verify(model, torch.zeros(1, 1, 1), 0, 0.5, attack_first=True)
    assert found.status == "safe-incomplete"
    assert found.lower_bound == pytest.approx(0.01, abs=1e-6)


def test_out_of_time_no_further_stage_is_begun() -> None:
    found = verify(sum_above(1.99), torch.full((1, 2, 2), 0.5), 0, 0.05, timeout=1e-9)
    assert (found.status, found.stage) == ("timeout", "ibp")
    assert found.seconds > 0


def test_the_native_engine_hands_over_to_auto_lirpa_where_it_has_to() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.LeakyReLU(0.2), nn.Linear(8, CLASSES)).eval()
    image = torch.rand(3, 2, 2)
    label = predicted(model, image)
    statuses = []
    for eps in (0.0001, 0.5):
        found = verify(model, image, label, eps)
        lowest = float(margins(model, points_in_ball(image, eps, 2000), label).min())
        assert found.lower_bound <= lowest + 1e-4
        statuses.append(found.status)
        assert found.status != "unsafe" or refutes(model, found, image, label, eps)
    # Without branch and bound it is an attack that may still settle the image.
    assert statuses == ["safe-incomplete", "unsafe"]
    assert verify(model, image, label, 0.5, complete=False).status == "unknown"


def test_a_layer_that_no_engine_can_bound_is_named() -> None:
    class Sorted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1).sort(1).values

    image = torch.rand(1, 2, 2)
    with pytest.raises(UnsupportedLayer) as raised:
        verify(nn.Sequential(nn.Identity(), Sorted()).eval(), image, 3, 0.01)
    assert raised.value.path == "1.sort"


@pytest.mark.parametrize("scale", [1e-5, 1.0, 1e6])
def test_a_proof_does_not_depend_on_the_scale_of_the_logits(scale: float) -> None:
    """Near the radius at which the margin is 0, float32 cannot tell; a little below it can."""
    statuses = []
    for seed in range(8):
        torch.manual_seed(seed)
        model, image = nn.Sequential(nn.Flatten(), nn.Linear(3072, 2)).eval(), torch.rand(3, 32, 32) * 0.5 + 0.25
        with torch.no_grad():
            model[1].weight *= scale
            model[1].bias *= scale
        label, weight = predicted(model, image), model[1].weight.double()
        with torch.no_grad():
            logits = copy.deepcopy(model).double()(image.double()[None])[0]
        difference = weight[label] - weight[1 - label]
        exact = float(((logits[label] - logits[1 - label]) / difference.abs().sum()).detach())
        for share in (1 - 1e-2, 1 + 1e-7, 1 + 1e-6, 1 + 1e-5):
            statuses.append((share, verify(model, image, label, exact * share).status))
    assert {status for share, status in statuses if share < 1} == {"safe-incomplete"}
    assert "safe-incomplete" not in {status for share, status in statuses if share > 1}


def test_an_image_that_does_not_fit_into_memory_is_begun_anew_with_half(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole, asked = crown.preactivations, []

    def preactivations(chain: Chain, box: Box, memory: int, single: bool) -> Intervals:
        asked.append(memory)
        if memory > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(chain, box, memory, single)

    monkeypatch.setattr("rampart.bounds.crown.preactivations", preactivations)
    model, image, _ = small_net("strided", 1)
    label = predicted(model, image[0])
    with caplog.at_level(logging.WARNING):
        found = verify(model, image[0], label, 0.05, memory=32)
    assert asked == [32, 16, 8]
    assert found.status in {"safe-incomplete", "safe", "unsafe"}
    assert "memory=8" in caplog.text
    monkeypatch.setattr("rampart.bounds.crown.preactivations", lambda *_, single: preactivations(*_[:2], 9, single))
    assert verify(model, image[0], label, 0.05, memory=32).status == "error"


def test_verdicts_and_attacks_do_not_need_inference_mode_to_be_off() -> None:
    model, images, _ = small_net("strided", 6)
    labels = model(images).argmax(1)
    for eps in (0.02, 0.3):
        expected = [verify(model, image, int(label), eps).status for image, label in zip(images, labels, strict=True)]
        with torch.inference_mode():
            made_there = images.clone()
            found = [verify(model, x, int(label), eps).status for x, label in zip(made_there, labels, strict=True)]
        assert found == expected


@pytest.mark.parametrize("label", [0, 1, 2])
def test_a_network_of_nan_gives_an_error_whatever_the_label(label: int) -> None:
    """Not a counterexample: what it says of the image is nothing."""
    model = tiny_net((3, 3))
    with torch.no_grad():
        model[3].weight.fill_(torch.nan)
    found = verify(model, torch.rand(1, 1, 2), label, 0.01, attack_first=True)
    assert found.status == "error"
    assert found.counterexample is None


@pytest.mark.parametrize("eps", [0.01, 0.9])
def test_a_model_that_converts_its_images_is_settled(eps: float) -> None:
    """It cannot be run in float64, where counterexamples are checked otherwise."""

    class Converting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_net((4,))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.float())

    model = Converting().eval()
    image = torch.rand(1, 1, 2, generator=torch.Generator().manual_seed(0))
    label = predicted(model, image)
    found, same = (verify(one, image, label, eps) for one in (model, model.inner))
    assert found.status == same.status
    assert found.status in ("safe-incomplete", "safe", "unsafe")


def test_without_auto_lirpa_a_network_that_needs_it_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)).eval()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RampartError, match="make setup"):
        verify(model, torch.rand(1, 1, 2), predicted(model, torch.rand(1, 1, 2)), 0.01)


@pytest.mark.parametrize("seed", range(10))
def test_what_cancels_in_a_network_is_no_proof(seed: int) -> None:
    """A BatchNorm of nearly constant channels loses many digits of float32. Beyond an affine network's exact radius
    nothing may count as proved."""
    torch.manual_seed(seed)
    images = 0.5 + 0.004 * (torch.rand(64, 3, 8, 8) - 0.5)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, 2), nn.BatchNorm2d(16, momentum=1.0), nn.Flatten(), nn.Linear(144, 2))
    with torch.no_grad():
        model(images)
    x, y = images[:8], model.eval()(images[:8]).argmax(1)
    exact = copy.deepcopy(model).double()
    pixels = x.double().requires_grad_()
    logits = exact(pixels)
    margins = (logits.gather(1, y[:, None]) - logits.gather(1, 1 - y[:, None])).squeeze(1)
    (gradient,) = torch.autograd.grad(margins.sum(), pixels)
    margins, gradient, proved = margins.detach(), gradient.detach(), []
    for image, margin, slope, label in zip(x, margins, gradient, y.tolist(), strict=True):
        radius = float(margin / slope.abs().sum())
        assert not verify(model, image, label, radius * (1 + 1e-5)).status.startswith("safe")
        proved.append(verify(model, image, label, radius / 2).status == "safe-incomplete")
    assert sum(proved) > 4


@pytest.mark.parametrize("seed", range(6))
def test_rounding_in_a_corner_of_the_ball_is_no_proof(seed: int) -> None:
    """A neuron that is on in the last hundredth of the ball alone: what float32 rounds of it is seen nowhere else."""
    eps, image = 1 / 255, 0.1 + 0.8 * torch.rand(1, 1, 8, generator=torch.Generator().manual_seed(seed))
    model, corner = wrong_in_a_corner(image, eps)
    assert is_counterexample(model, corner, image, 0, eps)
    assert not verify(model, image, 0, eps, timeout=5).status.startswith("safe")
    with torch.no_grad():
        model[3].bias[0] += 3e-3
    assert not is_counterexample(model, corner, image, 0, eps)
    assert verify(model, image, 0, eps, timeout=5).status.startswith("safe")


def test_bounds_that_overflow_give_an_error() -> None:
    """The image itself is classified, but no bound is a number."""
    model, image = tiny_net((3, 3)).double(), torch.zeros(1, 1, 2, dtype=torch.float64)
    with torch.no_grad():
        model[1].weight.fill_(1e308)
        model[1].bias.zero_()
        model[3].weight.copy_(torch.tensor([[1.0, -1, 1], [1, 1, -1], [-1, 1, 1]]) * 1e308)
    found = verify(model, image, predicted(model, image), 0.5)
    assert found.status == "error"
    assert found.lower_bound == -torch.inf


@pytest.mark.parametrize(
    ("change", "mentions"),
    [
        ({"label": 3}, "label 3"),
        ({"label": -1}, "label -1"),
        ({"label": 1.5}, "label 1.5"),
        ({"eps": -0.1}, "eps"),
        ({"eps": 1.5}, "eps"),
        ({"eps": float("nan")}, "eps"),
        ({"eps": "1/255"}, "eps must be one number, not '1/255'"),
        ({"timeout": "10"}, "timeout must be one number"),
        ({"image": np.zeros((1, 1, 2), np.float32)}, "image must be a tensor, not ndarray"),
        ({"timeout": 0.0}, "timeout"),
        ({"engine": "natve"}, "did you mean 'native'"),
        ({"branching": "kfbs"}, "did you mean 'kfsb'"),
        ({"memory": 0}, "memory"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], mentions: str) -> None:
    with pytest.raises(SettingsError, match=mentions) as raised:
        verify(tiny_net((3,)), **{"image": torch.rand(1, 1, 2), "label": 0, "eps": 0.1, **change})
    assert "\n" not in str(raised.value)


def test_a_network_in_training_mode_is_refused() -> None:
    """BatchNorm would follow this one image: a verdict on another network than the one that is used."""
    model, x, _ = small_net("strided", count=1)
    with pytest.raises(ModelError, match=r"eval\(\)"):
        verify(model.train(), x[0], 0, 0.01)


def test_verification_leaves_the_network_as_it_is() -> None:
    model, x, _ = small_net("strided", count=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    verify(model, x[0], predicted(model, x[0]), 0.1, attack_first=True)
    assert [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])] == []
    assert all(parameter.grad is None and parameter.dtype == torch.float32 for parameter in model.parameters())


def test_a_network_in_float64_is_settled_as_in_float32() -> None:
    """By branch and bound, too."""
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 3)]
    model, image = nn.Sequential(*layers).eval(), torch.rand(3, 2, 2)
    label = predicted(model, image)
    found = [verify(model, image, label, 0.3), verify(copy.deepcopy(model).double(), image.double(), label, 0.3)]
    assert [(verdict.status, verdict.stage) for verdict in found] == [("safe", "branch-and-bound")] * 2


def test_a_method_that_auto_lirpa_lacks_for_a_network_ends_no_verification() -> None:
    """α-CROWN of auto_LiRPA 0.3 fails on a convolution behind a tanh: what CROWN leaves open is unknown or refuted."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, padding=1), nn.Tanh(), nn.Flatten()]
    model, image = nn.Sequential(*layers, nn.Linear(144, CLASSES)).eval(), torch.rand(3, 6, 6)
    label = predicted(model, image)
    found = {eps: verify(model, image, label, eps).status for eps in (0.02, 0.1, 0.5)}
    assert found[0.02] == "safe-incomplete"
    assert {found[0.1], found[0.5]} <= {"unknown", "unsafe"}


def test_an_image_that_is_none_is_refused() -> None:
    model = sum_above(0.5)
    with pytest.raises(SettingsError, match="between 0 and 1"):
        verify(model, torch.full((1, 1, 2), 128.0), 0, 0.1)
    with pytest.raises(ModelError, match="does not take images of 1x3x3"):
        verify(model, torch.rand(1, 3, 3), 0, 0.1)
