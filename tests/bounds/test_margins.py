"""margin_bounds: sound, exact where it can be, and clear about what it cannot do."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import transforms

from rampart.bounds import METHODS, margin_bounds
from rampart.bounds.box import Box
from rampart.bounds.margins import check
from rampart.errors import BoundError, ModelError, SettingsError
from tests.bounds.soundness import EPS, assert_close, assert_sound, sampled_minima
from tests.exact import exact_margins, tiny_net
from tests.nets import CLASSES, NETS, margins, points_in_ball, small_net


@pytest.mark.parametrize("name", NETS)
def test_no_sampled_point_has_a_margin_below_its_bound(name: str) -> None:
    model, x, y = small_net(name)
    # Pixels at 0 and 1, so that the ball's cut matters.
    x[0] = x[0].round()
    seen = sampled_minima(model, x, y, EPS)
    for method in METHODS:
        assert_sound(margin_bounds(model, x, y, EPS, method), seen)


@pytest.mark.parametrize("name", NETS)
def test_alpha_crown_is_never_looser_than_crown_and_somewhere_tighter(name: str) -> None:
    model, x, y = small_net(name)
    plain, optimised = (margin_bounds(model, x, y, 2 * EPS, method) for method in ("crown", "alpha-crown"))
    assert bool((optimised >= plain - 1e-5).all())
    assert bool((optimised > plain + 1e-4).any())


@pytest.mark.parametrize("hidden", [(3,), (6,), (3, 3), (2, 2, 2)])
@pytest.mark.parametrize("seed", range(3))
def test_no_bound_lies_above_the_exact_minimum(hidden: tuple[int, ...], seed: int) -> None:
    torch.manual_seed(seed)
    model, image, label = tiny_net(hidden, inputs=2 + seed % 2), torch.rand(1, 1, 2 + seed % 2), seed
    exact = exact_margins(model, image, label, 0.2)
    found = margins(model, points_in_ball(image, 0.2, 2000), label).amin(0)
    assert torch.allclose(exact.float(), found, atol=0.1), "the exact minimum is wrong: sampling comes close to it"
    for method in METHODS:
        bounds = margin_bounds(model.double(), image[None].double(), torch.tensor([label]), 0.2, method)[0]
        assert bool((bounds <= exact + 1e-7).all()), method
        model.float()


def test_crown_is_exact_where_no_relu_switches() -> None:
    model, image = tiny_net((3, 3)).double(), torch.rand(1, 1, 2).double()
    exact = exact_margins(model, image, 0, 1e-4)
    for method in ("crown-ibp", "crown", "alpha-crown"):
        bounds = margin_bounds(model, image[None], torch.tensor([0]), 1e-4, method)[0]
        assert torch.allclose(bounds, exact, rtol=0, atol=1e-9), method


@pytest.mark.parametrize("engine", ["native", "auto_lirpa"])
@pytest.mark.parametrize("method", METHODS)
def test_a_network_without_relu_is_bounded_exactly(method: str, engine: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, CLASSES)).eval()
    x, y = torch.rand(2, 3, 2, 2), torch.tensor([1, 3])
    lower, upper = ((x + move).clamp(0, 1).flatten(1) for move in (-EPS, EPS))
    rows = model[1].weight[y][:, None] - model[1].weight
    offset = model[1].bias[y][:, None] - model[1].bias
    worst = (torch.where(rows > 0, lower[:, None], upper[:, None]) * rows).sum(2) + offset
    assert_close(margin_bounds(model, x, y, EPS, method, engine), worst.detach(), y)


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Flatten(), nn.Linear(12, 6), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, CLASSES)],
        [nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, CLASSES)],
    ],
    ids=["dense-dense", "convolution-dense"],
)
@pytest.mark.parametrize("method", ["crown", "alpha-crown"])
def test_two_affine_maps_before_the_first_relu(layers: list[nn.Module], method: str) -> None:
    model, x, y = nn.Sequential(*layers).eval(), torch.rand(2, 3, 2, 2), torch.tensor([0, 2])
    assert_sound(margin_bounds(model, x, y, EPS, method), sampled_minima(model, x, y, EPS))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NETS)
def test_at_eps_0_the_bounds_are_the_margins(name: str, method: str) -> None:
    model, x, y = small_net(name)
    exact = torch.cat([margins(model, image[None], int(label)) for image, label in zip(x, y, strict=True)])
    assert_close(margin_bounds(model, x, y, 0.0, method), exact, y)


@pytest.mark.parametrize("engine", ["native", "auto_lirpa"])
@pytest.mark.parametrize("method", ["ibp", "crown"])
def test_the_entry_of_the_label_is_infinite(method: str, engine: str) -> None:
    model, x, y = small_net("strided", count=3)
    bounds = margin_bounds(model, x, y, EPS, method, engine)
    assert torch.equal(bounds.isposinf(), F.one_hot(y, CLASSES).bool())


def test_a_larger_ball_never_has_a_higher_ibp_bound() -> None:
    model, x, y = small_net("strided")
    bounds = [margin_bounds(model, x, y, eps, "ibp") for eps in (0.0, 0.01, 0.02, 0.05)]
    for smaller, larger in pairwise(bounds):
        assert bool((larger <= smaller).all())


@pytest.mark.parametrize("method", METHODS)
def test_no_images_have_no_bounds(method: str) -> None:
    model, x, y = small_net("strided")
    assert margin_bounds(model, x[:0], y[:0], EPS, method).shape == (0, CLASSES)

    class Viewed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(x.shape[0], -1)[:, :CLASSES]

    assert margin_bounds(Viewed().eval(), x[:0], y[:0], EPS, method).shape == (0, CLASSES)


def test_bounds_of_an_image_do_not_depend_on_its_batch() -> None:
    model, x, y = small_net("deep", count=4)
    alone = torch.cat([margin_bounds(model, x[i : i + 1], y[i : i + 1], EPS, "crown") for i in range(4)])
    assert_close(margin_bounds(model, x, y, EPS, "crown"), alone, y)


@pytest.mark.parametrize("engine", ["native", "auto_lirpa"])
@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "crown"])
def test_every_pixel_may_have_a_radius_of_its_own(method: str, engine: str) -> None:
    model, x, y = small_net("strided")
    eps = 2 * EPS * torch.rand_like(x)
    bounds = margin_bounds(model, x, y, eps, method, engine)
    assert_close(bounds, margin_bounds(model, x, y, eps, method), y)
    assert_sound(bounds, sampled_minima(model, x, y, eps))
    inner, outer = (margin_bounds(model, x, y, radius.item(), method, engine) for radius in (eps.min(), eps.max()))
    assert bool((inner >= bounds - 1e-5).all())
    assert bool((bounds >= outer - 1e-5).all())
    assert not torch.allclose(inner, outer)


def test_weights_that_overflow_give_an_error_and_no_bound() -> None:
    model, x, y = small_net("dense")
    with torch.no_grad():
        model[1].weight.fill_(3e38)
    for method in METHODS:
        with pytest.raises(BoundError, match="overflow"):
            margin_bounds(model, x, y, EPS, method)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_a_bound_beyond_all_numbers_is_no_proof(method: str, dtype: torch.dtype) -> None:
    """Every logit and every inner bound is a number, but the margin's bound is more than that."""
    large = torch.finfo(dtype).max / 2
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2)).eval().to(dtype)
    with torch.no_grad():
        model[1].weight.fill_(1.0)
        model[1].bias.fill_(1.0)
        model[3].weight.copy_(large * torch.tensor([[-0.95], [0.95]], dtype=dtype))
        model[3].bias.copy_(large * torch.tensor([1.8, -1.8], dtype=dtype))
    x = torch.full((1, 1, 1, 1), 0.9, dtype=dtype)
    assert bool(model(x).isfinite().all())
    assert int(model(x).argmax()) == 1
    with contextlib.suppress(BoundError):
        assert margin_bounds(model, x, torch.tensor([0]), 0.05, method)[0, 1] < 0


@pytest.mark.parametrize("wrong", [(1.0, 0.5), (float("nan"), 1.0), (0.0, float("nan"))])
def test_bounds_that_cross_or_are_nan_are_an_error(wrong: tuple[float, float]) -> None:
    fine = Box(torch.zeros(2, 3), torch.ones(2, 3))
    check({0: fine, 2: Box(torch.zeros(1), torch.zeros(1))})
    lower, upper = (torch.full((2, 3), end) for end in wrong)
    with pytest.raises(BoundError, match="NaN or cross"):
        check({0: fine, 2: Box(lower, upper)})


@pytest.mark.parametrize("engine", ["native", "auto_lirpa"])
def test_the_model_and_the_images_stay_as_they_are(engine: str) -> None:
    model, x, y = small_net("strided")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = x.clone()
    for method in METHODS if engine == "native" else ("ibp", "crown-ibp", "crown"):
        margin_bounds(model, x, y, EPS, method, engine)
    assert [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])] == []
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(x, images)


@pytest.mark.parametrize(
    ("change", "mentions"),
    [
        ({"method": "crwn"}, "did you mean 'crown'"),
        ({"engine": "nativ"}, "did you mean 'native'"),
        ({"eps": -0.1}, "-0.1"),
        ({"eps": float("nan")}, "eps"),
        ({"eps": -0.1, "engine": "auto_lirpa"}, "-0.1"),
        ({"eps": "4/255"}, "eps must be one number, not '4/255'"),
        ({"eps": [0.1, 0.2], "engine": "auto_lirpa"}, "eps must be one number"),
        ({"x": np.zeros((2, 3, 2, 2), np.float32)}, "images must be a tensor, not ndarray"),
        ({"y": [0, 1]}, "labels must be a tensor, not list"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], mentions: str) -> None:
    model, x, y = small_net("dense")
    with pytest.raises(SettingsError, match=mentions):
        margin_bounds(model, **{"x": x, "y": y, "eps": EPS, **change})


@pytest.mark.parametrize("engine", ["native", "auto_lirpa"])
def test_a_network_in_training_mode_is_refused(engine: str) -> None:
    model, x, y = small_net("strided")
    with pytest.raises(ModelError, match=r"eval\(\)"):
        margin_bounds(model.train(), x, y, EPS, "ibp", engine)


class Overwriting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.sub_(0.25).flatten(1))


@pytest.mark.parametrize(
    "model",
    [Overwriting(), nn.Sequential(transforms.Normalize([0.5], [0.5], inplace=True), nn.Flatten(), nn.Linear(12, 5))],
)
@pytest.mark.parametrize("engine", ["native", "auto_lirpa"])
def test_a_network_that_overwrites_the_images_is_refused_and_they_stay(model: nn.Module, engine: str) -> None:
    x, y = torch.rand(2, 3, 2, 2), torch.tensor([0, 2])
    before = x.clone()
    with pytest.raises(ModelError, match="overwrites the images"):
        margin_bounds(model.eval(), x, y, EPS, "ibp", engine)
    assert torch.equal(x, before)


@pytest.mark.parametrize("engine", ["native", "auto_lirpa"])
@pytest.mark.parametrize("change", [lambda x: 255 * x, lambda x: (x - 0.5) / 0.2, lambda x: x / 0])
def test_images_that_are_no_pixels_are_refused(change: Callable[[Tensor], Tensor], engine: str) -> None:
    model, x, y = small_net("strided")
    with pytest.raises(SettingsError, match="between 0 and 1"):
        margin_bounds(model, change(x), y, EPS, "ibp", engine)


def test_what_rounding_takes_beyond_the_range_of_pixels_is_no_obstacle() -> None:
    model, x, y = small_net("strided")
    x[0, 0, 0, 0], x[0, 0, 0, 1] = 1 + 1e-7, -1e-7
    assert torch.allclose(margin_bounds(model, x, y, EPS), margin_bounds(model, x.clamp(0, 1), y, EPS), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_too_coarse_for_a_proof_are_refused(dtype: torch.dtype) -> None:
    model, x, y = small_net("dense")
    with pytest.raises(SettingsError, match="float32 or float64"):
        margin_bounds(model.to(dtype), x.to(dtype), y, EPS, "ibp")


@pytest.mark.parametrize("engine", ["native", "auto_lirpa"])
def test_each_image_needs_a_label(engine: str) -> None:
    model, x, y = small_net("dense", count=3)
    with pytest.raises(SettingsError, match=r"3 images have labels of shape \(1,\)"):
        margin_bounds(model, x, y[:1], EPS, "ibp", engine)
    with pytest.raises(SettingsError, match=r"3 images have labels of shape \(3, 1\)"):
        margin_bounds(model, x, y[:, None], EPS, "ibp", engine)
    with pytest.raises(SettingsError, match=r"0 images have labels of shape \(3,\)"):
        margin_bounds(model, x[:0], y, EPS, "ibp", engine)


@pytest.mark.parametrize("engine", ["native", "auto_lirpa"])
@pytest.mark.parametrize("y", [[0, CLASSES], [0, -1], [0.0, 1.0]])
def test_a_label_is_one_of_the_models_classes(y: list[int], engine: str) -> None:
    model, x, _ = small_net("dense", count=2)
    with pytest.raises(SettingsError, match=f"from 0 to {CLASSES - 1}"):
        margin_bounds(model, x, torch.tensor(y), EPS, "ibp", engine)


@pytest.mark.parametrize("shape", [(3, 1, 1, 1), (5,), (1, 1, 1, 1, 1)])
def test_radii_fit_the_images(shape: tuple[int, ...]) -> None:
    model, x, y = small_net("strided", count=1)
    with pytest.raises(SettingsError, match="does not broadcast"):
        margin_bounds(model, x, y, torch.full(shape, EPS), "crown")


@pytest.mark.parametrize("eps", [8.0, torch.tensor([8.0])])
def test_a_radius_is_in_pixels(eps: float | Tensor) -> None:
    model, x, y = small_net("strided", count=1)
    with pytest.raises(SettingsError, match="8/255, say, instead of 8"):
        margin_bounds(model, x, y, eps, "crown")


def test_there_is_a_radius() -> None:
    model, x, y = small_net("strided", count=1)
    with pytest.raises(SettingsError, match="eps is empty"):
        margin_bounds(model, x, y, torch.zeros(0), "crown")


def test_logits_are_a_row_an_image() -> None:
    x, y = torch.rand(2, 1, 2, 2), torch.tensor([0, 1])
    for model in (nn.Conv2d(1, 3, 2), nn.Sequential(nn.Flatten(), nn.Linear(4, 1))):
        with pytest.raises(ModelError, match="two classes or more"):
            margin_bounds(model.eval(), x, y, EPS, "crown")


def test_bounds_are_not_computed_under_autocast() -> None:
    model, x, y = small_net("dense")
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(SettingsError, match="autocast"):
        margin_bounds(model, x, y, EPS, "ibp")


@pytest.mark.parametrize("method", ["crown-ibp", "crown", "alpha-crown"])
def test_an_interval_wider_than_a_number_gives_no_bound(method: str) -> None:
    """Its ends are finite, but u / (u - l) is 0: the ReLU would count as switched off."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 1), nn.ReLU(), nn.Linear(1, 2)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[2.8e38, -2.8e38]]))
        model[1].bias.zero_()
        model[3].weight.copy_(torch.tensor([[-1e-38], [0.0]]))
        model[3].bias.copy_(torch.tensor([1.0, 0.0]))
    with pytest.raises(BoundError, match="overflow"):
        margin_bounds(model, torch.full((1, 1, 1, 2), 0.5), torch.tensor([0]), 0.5, method)


def test_radii_may_be_of_another_precision() -> None:
    model, x, y = small_net("strided")
    eps = torch.full((1, x.shape[1], 1, 1), EPS, dtype=torch.float64)
    assert torch.equal(margin_bounds(model, x, y, eps), margin_bounds(model, x, y, EPS))
