"""PGD keeps its promises: inside the ball, honest about success, every iterate counted."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rampart.attacks import AttackResult, apgd, perturb, pgd
from rampart.attacks.objectives import margin
from rampart.bounds import margin_bounds
from rampart.errors import ModelError, SettingsError
from rampart.verification import verify

RADII = (0.0, 0.01, 0.03, 0.1)


class Threshold(nn.Module):
    """One pixel: class 1 where it is above `at`, else class 0."""

    def __init__(self, at: float) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.tensor(at))

    def forward(self, x: Tensor) -> Tensor:
        above = x.flatten(1).sum(1) - self.at
        return torch.stack([-above, above], 1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def attack(
    network: nn.Module, x: Tensor, y: Tensor, eps: float | tuple[float, ...], **settings: object
) -> AttackResult:
    return pgd(network, x, y, eps, generator=generator(), **settings)


def test_examples_lie_in_the_ball_and_in_the_range_of_pixels(network, images, labels) -> None:
    images[0], images[1] = images[0].round(), images[1] * 0.01
    result = attack(network, images, labels, RADII, step_size=0.02)
    for eps, examples in zip(RADII, result.adversarial.double(), strict=True):
        assert (examples - images.double()).abs().max() <= eps  # to the last bit
        assert examples.min() >= 0
        assert examples.max() <= 1


def test_a_model_that_rounds_its_input_has_no_gradient_and_stops_no_attack(images, labels) -> None:
    class Rounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(images[0].numel(), 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear((x > 0.5).float().flatten(1))

    result = attack(Rounded().eval(), images, labels % 3, 0.2)
    assert result.success.shape == (1, len(images))


def test_a_model_that_begins_with_a_sum_over_pixels_is_attacked(images) -> None:
    """Its gradient is one number that stands for all pixels."""

    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.sum((2, 3)) / 4)

    model = Summed().eval()
    with torch.no_grad():
        y = model(images).argmax(1)
    moved = [
        pgd(model, images, y, 0.1, generator=generator()).adversarial[0],
        apgd(model, images, y, 0.1, steps=10, generator=generator()).adversarial[0],
        perturb(lambda x: F.cross_entropy(model(x), y), images, 0.1, 5, 0.05, generator()),
    ]
    for examples in moved:
        assert (margin(model(examples), y) > margin(model(images), y)).all()


@pytest.mark.parametrize("attacked_by", [pgd, partial(apgd, steps=5)], ids=["pgd", "apgd"])
def test_where_a_model_gives_nan_it_errs(attacked_by: Callable[..., AttackResult]) -> None:
    """NaN is the largest number to argmax, which takes it for the class at its place."""

    class Poisoned(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            above = x.flatten(1).sum(1, keepdim=True)
            return torch.cat([1 + torch.sqrt(0.6 - above), above * 0], 1)

    x, y = torch.full((2, 1, 1, 1), 0.5), torch.tensor([0, 0])
    result = attacked_by(Poisoned().eval(), x, y, (0.01, 0.2), generator=generator())
    assert result.success.tolist() == [[False, False], [True, True]]
    result = attacked_by(Poisoned().eval(), x + 0.2, y, 0.01)
    assert result.broken_eps.tolist() == [0.0, 0.0]


def test_a_part_of_a_model_in_training_mode_is_refused(images, labels) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(images[0].numel(), 3), nn.BatchNorm1d(3)).eval()
    model[2].train()
    with pytest.raises(ModelError, match="eval"):
        attack(model, images, labels % 3, 0.1)
    with pytest.raises(ModelError, match="eval"):
        margin_bounds(model, images, labels % 3, 0.1)
    with pytest.raises(ModelError, match="eval"):
        verify(model, images[0], 0, 0.1)


def test_radii_may_come_as_arrays_and_images_with_gradients_or_from_inference_mode(network, images, labels) -> None:
    expected = attack(network, images, labels, RADII, step_size=0.02)
    assert 0 < expected.success.sum() < expected.success.numel()
    for eps in (np.array(RADII), torch.tensor(RADII, dtype=torch.float64), list(map(np.float64, RADII))):
        assert torch.equal(attack(network, images, labels, eps, step_size=0.02).success, expected.success)
    again = attack(network, images.clone().requires_grad_(), labels, RADII, step_size=[0.02] * len(RADII))
    with torch.inference_mode():
        there = attack(network, images.clone(), labels.clone(), RADII, step_size=0.02)
    for result in (again, there):
        assert torch.equal(result.adversarial, expected.adversarial)
    with torch.no_grad():
        assert attack(network, images[:0], labels[:0], RADII).success.shape == (len(RADII), 0)


def test_success_is_what_a_forward_pass_on_the_examples_says(network, images, labels) -> None:
    result = attack(network, images, labels, RADII)
    with torch.no_grad():
        wrong = torch.stack([network(examples).argmax(1) != labels for examples in result.adversarial])
    assert torch.equal(result.success, wrong)
    # Otherwise this test shows nothing.
    assert 4 < int(result.success[-1].sum()) <= len(images)
    assert int(result.success[1].sum()) < len(images)


def test_an_image_broken_at_one_eps_is_broken_at_the_larger_ones(network, images, labels) -> None:
    success = attack(network, images, labels, RADII).success
    for smaller, larger in pairwise(success):
        assert bool((larger | ~smaller).all())


def test_misclassified_images_count_as_broken_by_themselves(network, images, labels) -> None:
    result = attack(network, images, labels, RADII)
    assert bool(result.success[:, :4].all())
    for examples in result.adversarial:
        assert torch.equal(examples[:4], images[:4])


def test_at_eps_0_nothing_but_misclassification_breaks_an_image(network, images, labels) -> None:
    result = attack(network, images, labels, 0.0)
    assert torch.equal(result.adversarial[0], images)
    assert result.success[0].tolist() == [True] * 4 + [False] * 36


def test_results_follow_the_order_of_eps_as_given(network, images, labels) -> None:
    ascending = attack(network, images, labels, RADII)
    mixed = attack(network, images, labels, (RADII[2], RADII[0], RADII[3], RADII[1]))
    assert mixed.eps == (RADII[2], RADII[0], RADII[3], RADII[1])
    assert torch.equal(mixed.success[[1, 3, 0, 2]], ascending.success)
    assert torch.equal(mixed.adversarial[[1, 3, 0, 2]], ascending.adversarial)


def test_step_sizes_follow_the_order_of_eps(network, images, labels) -> None:
    sizes = (0.1, 0.001, 0.02, 0.004)
    ascending = attack(network, images, labels, RADII, step_size=sizes)
    reverse = attack(network, images, labels, RADII[::-1], step_size=sizes[::-1])
    assert torch.equal(reverse.adversarial.flip(0), ascending.adversarial)


def test_the_smallest_of_several_eps_is_attacked_as_if_alone(network, images, labels) -> None:
    together, alone = attack(network, images, labels, (0.02, 0.05)), attack(network, images, labels, 0.02)
    assert torch.equal(together.success[0], alone.success[0])
    assert torch.equal(together.adversarial[0], alone.adversarial[0])


@pytest.mark.parametrize("eps", RADII[1:])
def test_on_a_linear_model_the_success_set_is_the_exact_one_alone_or_among_others(eps: float) -> None:
    """Two classes: the worst point is a corner that PGD reaches from any start."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).double().eval()
    x = torch.rand(60, 3, 2, 2).double()
    with torch.no_grad():
        y = model(x).argmax(1)
        weight, bias = model[1].weight[1] - model[1].weight[0], model[1].bias[1] - model[1].bias[0]
        toward = weight * torch.where(y == 1, -1, 1)[:, None]
        corner = torch.where(toward > 0, x.flatten(1) + eps, x.flatten(1) - eps).clamp(0, 1)
        exact = (corner @ weight + bias > 0).long() != y
    assert 0 < int(exact.sum()) < 60
    assert torch.equal(attack(model, x, y, eps).success[0], exact)
    assert torch.equal(attack(model, x, y, RADII).success[RADII.index(eps)], exact)


@pytest.mark.parametrize("steps", [1, 4])
def test_the_last_iterate_counts(steps: int) -> None:
    """Only the far end of the ball breaks an image, and starts on its near side reach it with the last step."""
    eps = 0.1
    model, x, y = (
        Threshold(0.5 + 0.999 * eps).eval(),
        torch.full((64, 1, 1, 1), 0.5),
        torch.zeros(64, dtype=torch.int64),
    )
    step = 2 * eps / steps
    assert bool(attack(model, x, y, eps, steps=steps, step_size=step).success.all())
    if steps > 1:
        one_less = attack(model, x, y, eps, steps=steps - 1, step_size=step).success
        assert 0 < int(one_less.sum()) < 64


def test_the_start_counts() -> None:
    """Steps of almost nothing: what is broken is what the random start broke."""
    model, x, y = Threshold(0.55).eval(), torch.full((64, 1, 1, 1), 0.5), torch.zeros(64, dtype=torch.int64)
    broken = attack(model, x, y, 0.1, steps=1, step_size=1e-9).success[0]
    starts = 0.4 + 0.2 * torch.rand(64, 1, 1, 1, generator=generator())
    assert torch.equal(broken, starts.flatten() > 0.55)


def test_an_iterate_in_between_counts() -> None:
    """A band that the attack steps into and out of again."""

    class Band(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            pixel = x.flatten(1).sum(1)
            inside = (pixel > 0.52) & (pixel < 0.56)
            # The logits rise along the pixel, so that the gradient leads through the band.
            return torch.stack([10 - pixel, pixel + 100 * inside], 1)

    x, y = torch.full((64, 1, 1, 1), 0.5), torch.zeros(64, dtype=torch.int64)
    result = attack(Band().eval(), x, y, 0.1, steps=10, step_size=0.03)
    low_start = torch.rand(64, 1, 1, 1, generator=generator()).flatten() < 0.5
    assert bool(result.success[0][low_start].all())
    assert bool((result.adversarial[0][low_start] < 0.56).all())


def test_more_steps_of_the_same_size_never_hurt(network, images, labels) -> None:
    few, many = (attack(network, images, labels, 0.03, steps=s, step_size=0.005).success for s in (2, 10))
    assert bool((many | ~few).all())
    assert int(many.sum()) > int(few.sum())


def test_more_restarts_never_hurt(network, images, labels) -> None:
    settings = {"steps": 1, "step_size": 1e-6}
    once, often = (attack(network, images, labels, 0.05, restarts=r, **settings).success for r in (1, 30))
    assert bool((often | ~once).all())
    assert int(often.sum()) > int(once.sum())


def test_the_same_seed_gives_the_same_attack_and_another_one_does_not(network, images, labels) -> None:
    first, again, other = (pgd(network, images, labels, 0.05, generator=generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.adversarial, again.adversarial)
    assert not torch.equal(first.adversarial, other.adversarial)


def test_without_gradients_around_it_the_attack_has_its_own(network, images, labels) -> None:
    expected = attack(network, images, labels, RADII)
    with torch.no_grad():
        found = attack(network, images, labels, RADII)
        moved = ascend(network, images, labels, 0.05)
    assert torch.equal(found.adversarial, expected.adversarial)
    assert torch.equal(moved, ascend(network, images, labels, 0.05))


def test_a_surrogate_is_followed_and_the_model_believed(network, images, labels) -> None:
    """One that errs everywhere stops every start at once: where the model disagrees it is attacked itself."""

    class Wrong(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return -network(x)

    alone = attack(network, images, labels, 0.03).success
    same = attack(network, images, labels, 0.03, surrogate=network)
    assert torch.equal(same.success, alone)
    found = attack(network, images, labels, 0.03, surrogate=Wrong().eval())
    with torch.no_grad():
        assert torch.equal(found.success[0], network(found.adversarial[0]).argmax(1) != labels)
    assert int(found.success.sum()) >= 0.9 * int(alone.sum()) > 4


def test_each_eps_has_its_own_step_even_beside_its_like(network, images, labels) -> None:
    twice = attack(network, images, labels, (0.02, 0.02), step_size=(1e-9, 0.004))
    assert int(twice.success[0].sum()) < int(twice.success[1].sum())


def test_what_broke_an_image_is_told(network, images, labels) -> None:
    """The smallest radius, the start and the step; a step less does not do it."""
    result = attack(network, images, labels, RADII, steps=6, step_size=0.004, restarts=3)
    for row, (smallest, start, step) in enumerate(
        zip(result.broken_eps.tolist(), result.start.tolist(), result.step.tolist(), strict=True)
    ):
        broken_at = [eps for eps, found in zip(RADII, result.success[:, row].tolist(), strict=True) if found]
        if row < 4:
            assert (smallest, start, step) == (0.0, -1, -1)
        elif broken_at:
            assert smallest == pytest.approx(broken_at[0])
            assert 0 <= start < 3
            assert 0 <= step <= 6
        else:
            assert (smallest, start, step) == (float("inf"), -1, -1)
    assert set(result.start.tolist()) >= {-1, 0}
    late = (result.step > 0) & (result.start == 0) & (result.broken_eps == RADII[1])
    assert bool(late.any())
    fewer = attack(network, images, labels, RADII[1], steps=int(result.step[late].min()) - 1 or 1, step_size=0.004)
    assert not bool(fewer.success[0][late].all())


def test_of_an_unbroken_image_the_nearest_miss_is_kept(network, images, labels) -> None:
    result = attack(network, images, labels, 0.02, steps=8, restarts=3)
    held = ~result.success[0]
    assert bool(held.any())
    with torch.no_grad():
        before, after = (margin(network(x), labels) for x in (images, result.adversarial[0]))
    assert bool((after[held] > before[held]).all())
    assert bool((after[held] <= 0).all())


def test_models_that_hide_their_gradient_altogether_can_be_attacked(images) -> None:
    """As does one that counts: what is left is the random start."""

    class Counting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            bright = (x.flatten(1) > 0.5).sum(1).float()
            return torch.stack([bright, 48.5 - bright], 1)

    labels = Counting()(images).argmax(1)
    assert bool(attack(Counting().eval(), images, labels, 0.1, restarts=5).success.any())


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_gradient_that_is_no_number_leads_nowhere(network, images, labels, norm: str) -> None:
    class Root(nn.Module):
        """Its square root of 0 has an infinite gradient, times 0."""

        def forward(self, x: Tensor) -> Tensor:
            return network(x + (x - x).abs().sqrt())

    result = attack(Root().eval(), images, labels, 0.05, norm=norm)
    assert bool(result.adversarial.isfinite().all())
    assert 4 <= int(result.success.sum()) < len(images)


@pytest.mark.parametrize("loss", ["ce", "margin", "dlr"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_every_loss_and_norm_finds_what_the_ball_holds(network, images, labels, norm: str, loss: str) -> None:
    eps = 0.03 if norm == "linf" else 0.2
    result = attack(network, images, labels, (eps / 4, eps), steps=20, norm=norm, loss=loss, schedule="cosine")
    order = float("inf") if norm == "linf" else 2
    for radius, examples in zip((eps / 4, eps), result.adversarial.double(), strict=True):
        distance = torch.linalg.vector_norm((examples - images.double()).flatten(1), ord=order, dim=1)
        assert distance.max() <= radius
        assert examples.min() >= 0
        assert examples.max() <= 1
    assert 4 < int(result.success[0].sum()) < int(result.success[1].sum())


def test_in_an_l2_ball_a_linear_model_is_broken_where_it_can_be() -> None:
    """Two classes, far from the borders of [0, 1]: the worst point lies along the weights."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).double().eval()
    x, eps = 0.4 + 0.2 * torch.rand(60, 3, 2, 2).double(), 0.1
    with torch.no_grad():
        logits = model(x)
        y, weight = logits.argmax(1), model[1].weight[1] - model[1].weight[0]
        exact = (logits[:, 1] - logits[:, 0]).abs() < eps * weight.norm()
    assert 0 < int(exact.sum()) < 60
    assert torch.equal(attack(model, x, y, eps, steps=300, step_size=0.05, norm="l2").success[0], exact)


def test_a_very_confident_network_is_attacked_in_l2() -> None:
    """The squares of its gradients are 0 in single precision."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.stack([torch.full((12,), 50.0), torch.full((12,), -50.0)]))
        model[1].bias.copy_(torch.tensor([-300.0, 300.0]))
    x = 0.5 + torch.linspace(0.04, 0.055, 20).view(20, 1, 1, 1).expand(20, 3, 2, 2)
    y, eps = torch.zeros(20, dtype=torch.long), 0.2
    gaps = (model(x) @ torch.tensor([1.0, -1.0])).detach()
    assert (float(gaps.min()), float(gaps.max())) == pytest.approx((48, 66), abs=1)
    assert 1200 * float((x - 0.5).max()) < 100 * eps * math.sqrt(12)  # all can be broken
    assert bool(attack(model, x, y, eps, steps=10, norm="l2").success.all())


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_networks_of_half_precision_are_attacked_in_it(norm: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval().to(dtype), torch.rand(8, 3, 2, 2).to(dtype)
    found = attack(model, x, model(x).argmax(1), 0.3, norm=norm)
    assert found.adversarial.dtype == dtype
    assert bool(found.success.any())


def test_the_attack_leaves_network_and_images_as_they_are(network, images, labels) -> None:
    before = {name: value.clone() for name, value in network.state_dict().items()}
    copy = images.clone()
    attack(network, images, labels, RADII)
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.equal(images, copy)
    assert not images.requires_grad


def test_frozen_parameters_can_be_attacked(network, images, labels) -> None:
    expected = attack(network, images, labels, 0.05).success
    assert torch.equal(attack(network.requires_grad_(False), images, labels, 0.05).success, expected)


@pytest.mark.parametrize(
    ("eps", "change", "mentions"),
    [
        (-0.1, {}, "eps"),
        ((0.1, -0.1), {}, "eps"),
        (float("nan"), {}, "eps"),
        ((), {}, "eps"),
        (0.1, {"steps": 0}, "steps"),
        (0.1, {"restarts": 0}, "restarts"),
        (0.1, {"step_size": 0.0}, "step_size"),
        ((0.1, 0.2), {"step_size": (0.1,)}, "step sizes"),
        (0.1, {"step_size": (0.1, -0.1)}, "step"),
        (0.1, {"loss": "hinge"}, "loss"),
        (0.1, {"norm": "Linf"}, "did you mean 'linf'"),
        (0.1, {"schedule": "linear"}, "schedule"),
        (8.0, {}, "8/255, say, instead of 8"),
        ("8/255", {}, "eps must be a number of pixels, or several, not '8/255'"),
        (["0.1", "0.2"], {}, "eps must be a number of pixels"),
    ],
)
def test_bad_arguments_are_named(network, images, labels, eps, change, mentions: str) -> None:
    with pytest.raises(SettingsError, match=mentions) as raised:
        pgd(network, images, labels, eps, **change)
    assert "\n" not in str(raised.value)


def test_a_network_in_training_mode_is_refused(network, images, labels) -> None:
    with pytest.raises(ModelError, match=r"eval\(\)"):
        pgd(network.train(), images, labels, 0.1)


def ascend(network: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int = 10, step: float = 0.02) -> Tensor:
    return perturb(lambda moved: F.cross_entropy(network(moved), y), x, eps, steps, step, generator())


@pytest.mark.parametrize("eps", RADII)
def test_perturbed_images_lie_in_the_ball_and_in_the_range_of_pixels(network, images, labels, eps: float) -> None:
    images[0] = images[0].round()
    moved = ascend(network, images, labels, eps, step=0.05).double()
    assert (moved - images.double()).abs().max() <= eps
    assert moved.min() >= 0
    assert moved.max() <= 1


def test_perturb_raises_the_loss(network, images, labels) -> None:
    starts, ends = (ascend(network, images, labels, 0.05, steps=steps) for steps in (0, 10))
    before, started, after = (F.cross_entropy(network(x), labels, reduction="none") for x in (images, starts, ends))
    assert bool((after > torch.maximum(before, started)).all())


def test_perturb_reaches_the_worst_corner_of_a_linear_loss() -> None:
    weight, x = torch.randn(3, 2, 2), torch.rand(5, 3, 2, 2)
    moved = perturb(lambda moved: (moved * weight).sum(), x, 0.1, 4, 0.05, generator())
    assert torch.allclose(moved, (x + 0.1 * weight.sign()).clamp(0, 1))


def test_perturb_returns_no_graph_and_leaves_no_gradients(network, images, labels) -> None:
    moved = ascend(network, images, labels, 0.05)
    assert not moved.requires_grad
    assert all(parameter.grad is None for parameter in network.parameters())


def test_perturb_draws_its_start_from_the_generator(network, images, labels) -> None:
    assert torch.equal(ascend(network, images, labels, 0.05), ascend(network, images, labels, 0.05))
    expected = (images - 0.05).clamp(0, 1)
    expected += ((images + 0.05).clamp(0, 1) - expected) * torch.rand(images.shape, generator=generator())
    assert torch.allclose(ascend(network, images, labels, 0.05, steps=0), expected)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda y: y[:-1], "give one for each"),
        (lambda y: y[:, None], "give one for each"),
        (lambda y: y + 1000, "from 0 to"),
        (lambda y: y - 1000, "from 0 to"),
        (lambda y: y.int(), "whole numbers"),
        (lambda y: y.float(), "whole numbers"),
        (lambda y: y.numpy(), "labels must be a tensor, not ndarray"),
        (lambda y: y.tolist(), "labels must be a tensor, not list"),
    ],
)
def test_labels_that_are_none_are_refused(network, images, labels, change, says: str) -> None:
    for attack in (pgd, apgd):
        with pytest.raises(SettingsError, match=says):
            attack(network, images, change(labels), 0.05)


def test_images_that_are_no_pixels_or_are_overwritten_are_refused(network, images, labels) -> None:
    with pytest.raises(SettingsError, match="between 0 and 1"):
        pgd(network, 255 * images, labels, 0.1)
    overwriting = nn.Sequential(nn.Hardtanh(0.25, 0.75, inplace=True), network).eval()
    before = images.clone()
    with pytest.raises(ModelError, match="overwrites the images"):
        pgd(overwriting, images, labels, 0.1)
    assert torch.equal(images, before)
