"""margin_bounds: sound, as tight as auto_LiRPA, and clear about what it cannot do."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from itertools import pairwise
from math import prod

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rampart.bounds import METHODS, crown, ibp, margin_bounds
from rampart.bounds.box import Box, pixel_box
from rampart.bounds.compat import import_auto_lirpa
from rampart.bounds.margins import check, identity_spec, margin_spec
from rampart.errors import BoundError, ModelError, SettingsError, UnsupportedLayer
from rampart.models import Chain, Layout
from tests.exact import exact_margins, tiny_net
from tests.nets import CLASSES, NETS, margins, points_in_ball, randomised, small_net

# auto_LiRPA has no BatchNorm without scale and shift, no average pooling in windows that overlap, and no view in CROWN;
# its intervals do not take arithmetic after the last map as a part of that map.
SHARED_NETS = [name for name in NETS if name not in ("plain-norm", "pooled", "arithmetic")]
EPS = 0.04


def beyond_native(name: str) -> nn.Module:
    """Networks on [3, 2, 2] images for which auto_LiRPA must take over."""
    layers = {
        "tanh": [nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, CLASSES)],
        "leaky": [nn.Flatten(), nn.Linear(12, 8), nn.LeakyReLU(0.2), nn.Linear(8, CLASSES)],
        "activation-first": [nn.Flatten(), nn.LeakyReLU(0.2), nn.Linear(12, CLASSES)],
    }
    return nn.Sequential(*layers[name]).eval()


class Opaque(nn.Module):
    """An operation that neither engine can bound."""

    def __init__(self, operation: str) -> None:
        super().__init__()
        self.operation, self.head = operation, nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        x = x.sort(1).values if self.operation == "sort" else x.cumsum(1)
        return self.head(x)


def assert_close(ours: Tensor, theirs: Tensor, labels: Tensor) -> None:
    """Equal to 1e-4 of the bounds' scale, apart from the labels' entries."""
    entries = ~F.one_hot(labels, ours.shape[1]).bool()
    assert torch.allclose(ours[entries], theirs[entries], rtol=0, atol=1e-4 * theirs[entries].abs().max().item())


def sampled_minima(model: nn.Module, x: Tensor, y: Tensor, eps: float | Tensor) -> Tensor:
    """[B, K]: the smallest margins seen at 10,000 points of each image's ball, +inf at the label."""
    radii = torch.as_tensor(eps).expand_as(x)
    return torch.stack(
        [
            margins(model, points_in_ball(image, radius, 10_000), int(label)).amin(0)
            for image, label, radius in zip(x, y, radii, strict=True)
        ]
    )


def assert_sound(bounds: Tensor, seen: Tensor, slack: float = 1e-5) -> None:
    """Finite apart from the label, and never above what was seen (but for float32's rounding)."""
    assert torch.equal(bounds.isfinite(), seen.isfinite())
    assert bool((bounds <= seen + slack).all()), (bounds - seen).nan_to_num(-torch.inf).max()


@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "crown"])
@pytest.mark.parametrize("name", SHARED_NETS)
def test_native_bounds_equal_those_of_auto_lirpa(name: str, method: str) -> None:
    model, x, y = small_net(name)
    theirs = margin_bounds(model, x, y, EPS, method, engine="auto_lirpa")
    assert_close(margin_bounds(model, x, y, EPS, method), theirs, y)


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


def test_bounds_of_an_image_do_not_depend_on_its_batch() -> None:
    model, x, y = small_net("deep", count=4)
    alone = torch.cat([margin_bounds(model, x[i : i + 1], y[i : i + 1], EPS, "crown") for i in range(4)])
    assert_close(margin_bounds(model, x, y, EPS, "crown"), alone, y)


@pytest.mark.parametrize("name", ["tanh", "leaky", "activation-first"])
@pytest.mark.parametrize("method", METHODS)
def test_auto_lirpa_takes_over_and_says_so(name: str, method: str, caplog: pytest.LogCaptureFixture) -> None:
    model, x, y = beyond_native(name), torch.rand(2, 3, 2, 2), torch.tensor([0, 2])
    with caplog.at_level(logging.WARNING):
        bounds = margin_bounds(model, x, y, EPS, method)
    assert [record for record in caplog.records if "using auto_LiRPA" in record.getMessage()]
    assert_sound(bounds, sampled_minima(model, x, y, EPS))


class Around(nn.Module):
    """A function of two convolutions of an image, and a linear map of what it gives."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], features: int) -> None:
        super().__init__()
        self.function, self.one, self.two = function, nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(features, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self.one(x), self.two(x)).flatten(1))


def third(inputs: int, outputs: int) -> Tensor:
    """The weights of a convolution that averages, by 3 x 3."""
    return torch.full((outputs, inputs, 3, 3), 1 / 6)


# What auto_LiRPA is trusted with: (function, the size of what it gives).
FALLBACKS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int]] = {
    "tanh": (lambda a, b: a.tanh(), 144),
    "sigmoid": (lambda a, b: a.sigmoid(), 144),
    "leaky": (lambda a, b: F.leaky_relu(a, 0.2), 144),
    "absolute": (lambda a, b: a.abs(), 144),
    "maximum in windows": (lambda a, b: F.max_pool2d(a.relu(), 2), 36),
    "average in windows": (lambda a, b: F.avg_pool2d(a.tanh(), 2), 36),
    "transposed convolution": (lambda a, b: F.conv_transpose2d(a.tanh(), third(2, 4), stride=2), 338),
    "map without bias": (lambda a, b: F.linear(a.tanh().flatten(1), torch.linspace(-1, 1, 1440).view(10, 144)), 10),
    "difference": (lambda a, b: a.relu() - b, 144),
    "product": (lambda a, b: a.relu() * b, 144),
    "negation": (lambda a, b: -a.tanh(), 144),
    "side by side": (lambda a, b: torch.cat([a.relu(), b], 1), 288),
    "sum over channels": (lambda a, b: a.relu().sum(1), 36),
    "mean over channels": (lambda a, b: a.relu().mean(1), 36),
    "rows": (lambda a, b: a.relu()[:, :, 1:4], 72),
    "other order": (lambda a, b: a.tanh().permute(0, 2, 3, 1), 144),
    "dilated": (lambda a, b: F.conv2d(a.tanh(), third(4, 2), dilation=2, padding=2).tanh(), 72),
    "in groups": (lambda a, b: F.conv2d(a.tanh(), third(2, 4), groups=2, padding=1).tanh(), 144),
    "circular": (lambda a, b: F.conv2d(F.pad(a, (1,) * 4, "circular"), third(4, 2)).relu(), 72),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FALLBACKS)
def test_what_auto_lirpa_is_trusted_with_is_sound(name: str, method: str) -> None:
    model, x, y = Around(*FALLBACKS[name]).eval(), torch.rand(1, 3, 6, 6), torch.tensor([1])
    try:
        bounds = margin_bounds(model, x, y, EPS, method)
    except UnsupportedLayer:
        assert method == "alpha-crown", "which does not know all of them"
    else:
        assert_sound(bounds, sampled_minima(model, x, y, EPS))


UNTRUSTED: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int]] = {
    "steep": (lambda a, b: F.leaky_relu(a, 2.0), 144),
    "falling": (lambda a, b: F.leaky_relu(a, -0.5), 144),
    "square root": (lambda a, b: (a.relu() + 1).sqrt(), 144),
    "quotient": (lambda a, b: a / (b.relu() + 1), 144),
    "product of matrices": (lambda a, b: a.relu() @ b.transpose(2, 3), 144),
    "reflected": (lambda a, b: F.conv2d(F.pad(a, (1,) * 4, "reflect"), third(4, 2)).relu(), 72),
    "replicated": (lambda a, b: F.conv2d(F.pad(a, (1,) * 4, "replicate"), third(4, 2)).relu(), 72),
    "framed": (lambda a, b: F.pad(a, (1,) * 4, value=-1.0).tanh(), 256),
    "average in windows that overlap": (lambda a, b: F.avg_pool2d(a.tanh(), 3, 1, 1), 144),
}


@pytest.mark.parametrize("name", UNTRUSTED)
@pytest.mark.parametrize("method", METHODS)
def test_what_auto_lirpa_may_bound_wrongly_is_refused(name: str, method: str) -> None:
    model, x, y = Around(*UNTRUSTED[name]).eval(), torch.rand(1, 3, 6, 6), torch.tensor([1])
    with pytest.raises(UnsupportedLayer):
        margin_bounds(model, x, y, EPS, method)


@pytest.mark.parametrize("operation", ["sort", "cumsum"])
def test_a_layer_that_no_engine_can_bound_is_named_as_such(operation: str) -> None:
    with pytest.raises(UnsupportedLayer) as raised:
        margin_bounds(Opaque(operation).eval(), torch.rand(2, 3, 2, 2), torch.tensor([0, 2]), EPS, "crown")
    assert "\n" not in str(raised.value)
    assert operation in raised.value.path


@pytest.mark.parametrize("method", METHODS)
def test_a_dense_map_on_the_rows_of_an_image_is_bounded_or_refused(method: str) -> None:
    """auto_LiRPA can do it for some methods; no engine may take it for a map of vectors."""
    layers = [nn.Linear(2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(18, CLASSES)]
    model, x, y = nn.Sequential(*layers).eval(), torch.rand(2, 3, 2, 2), torch.tensor([0, 2])
    with contextlib.suppress(UnsupportedLayer):
        assert_sound(margin_bounds(model, x, y, EPS, method), sampled_minima(model, x, y, EPS))


@pytest.mark.parametrize("layer", [nn.AvgPool2d(2, 1), nn.AvgPool2d(2, 2, 1), nn.AdaptiveAvgPool2d(1)])
def test_pooling_that_auto_lirpa_bounds_wrongly_is_refused(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), layer, nn.Flatten(), nn.LazyLinear(CLASSES)).eval()
    x, y = torch.rand(2, 3, 4, 4), torch.tensor([0, 2])
    model(x)
    with pytest.raises(UnsupportedLayer, match="'2'"):
        margin_bounds(model, x, y, EPS, "ibp", engine="auto_lirpa")


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


@pytest.mark.parametrize("wrong", [(1.0, 0.5), (float("nan"), 1.0), (0.0, float("nan"))])
def test_bounds_that_cross_or_are_nan_are_an_error(wrong: tuple[float, float]) -> None:
    fine = Box(torch.zeros(2, 3), torch.ones(2, 3))
    check({0: fine, 2: Box(torch.zeros(1), torch.zeros(1))})
    lower, upper = (torch.full((2, 3), end) for end in wrong)
    with pytest.raises(BoundError, match="NaN or cross"):
        check({0: fine, 2: Box(lower, upper)})


def test_auto_lirpa_takes_a_network_in_float64() -> None:
    model, x, y = small_net("strided")
    model, x = model.double(), x.double()
    assert_close(margin_bounds(model, x, y, EPS, "crown"), margin_bounds(model, x, y, EPS, "crown", "auto_lirpa"), y)


def test_alpha_crown_of_auto_lirpa_is_sound_and_no_looser_than_crown() -> None:
    model, image = tiny_net((4, 4)), torch.rand(1, 1, 2)
    x, y = image[None], torch.tensor([1])
    bounds = margin_bounds(model, x, y, 0.1, "alpha-crown", engine="auto_lirpa")[0]
    assert bool((bounds <= exact_margins(model, image, 1, 0.1).float() + 1e-4).all())
    assert bool((bounds >= margin_bounds(model, x, y, 0.1, "crown")[0] - 1e-4).all())


@pytest.mark.parametrize("name", ["dense", "strided", "deep"])
def test_alpha_crown_comes_as_far_as_that_of_auto_lirpa_in_as_many_steps(name: str) -> None:
    model, x, y = small_net(name)
    ours, theirs = (margin_bounds(model, x, y, EPS, "alpha-crown", engine) for engine in ("native", "auto_lirpa"))
    entries = ~F.one_hot(y, CLASSES).bool()
    assert bool((ours[entries] >= theirs[entries] - 0.01 * theirs[entries].abs().max()).all())


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
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], mentions: str) -> None:
    model, x, y = small_net("dense")
    with pytest.raises(SettingsError, match=mentions):
        margin_bounds(model, x, y, **{"eps": EPS, **change})


@pytest.mark.parametrize("engine", ["native", "auto_lirpa"])
def test_a_network_in_training_mode_is_refused(engine: str) -> None:
    model, x, y = small_net("strided")
    with pytest.raises(ModelError, match=r"eval\(\)"):
        margin_bounds(model.train(), x, y, EPS, "ibp", engine)


def crown_alone(chain: Chain, box: Box) -> ibp.Intervals:
    """Bounds of every ReLU's input as Zhang et al. 2018 (algorithm 1) and auto_LiRPA have them: of each neuron by a row
    of CROWN, no interval among them."""
    inputs: ibp.Intervals = {}
    for place in chain.relus:
        value = chain.sources[place][0]
        shape = chain.links[value].out_shape
        rows = identity_spec(prod(shape), box.lower).unflatten(2, shape)
        lower, upper = (
            sign * crown.backward(chain, inputs, box, sign * rows, value).view(-1, *shape) for sign in (1, -1)
        )
        inputs[place] = Box(lower, upper)
    return inputs


@contextlib.contextmanager
def rows_for_all_neurons(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """auto_LiRPA without its short cut, intervals of neurons that these show to be stable in a whole batch."""
    library = import_auto_lirpa()

    class Whole(library.BoundedModule):
        def __init__(self, *args: object, bound_opts: dict[str, object], **kwargs: object) -> None:
            super().__init__(*args, bound_opts=bound_opts | {"sparse_intermediate_bounds": False}, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(library, "BoundedModule", Whole)
        yield


layer = st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(0, 2), st.booleans())


# An interval shows a neuron of the second layer to be off that CROWN leaves unstable; of a dense layer in both images.
@example(layers=[(3, 2, 0, False), (1, 1, 1, False), (3, 1, 0, False)], size=6, seed=433)
@example(layers=[(2, 2, 0, True)], size=4, seed=0)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layers=st.lists(layer, min_size=1, max_size=3), size=st.integers(4, 7), seed=st.integers(0, 999))
def test_bounds_of_random_networks_equal_those_of_auto_lirpa(monkeypatch, layers, size: int, seed: int) -> None:
    """Kernels, strides, paddings, with and without BatchNorm; sound on sampled points, too."""
    torch.manual_seed(seed)
    channels, parts = 2, []
    for kernel, stride, padding, norm in layers:
        parts += [nn.Conv2d(channels, 3, kernel, stride, padding), *([nn.BatchNorm2d(3)] if norm else []), nn.ReLU()]
        channels = 3
    x, y = torch.rand(2, 2, size, size), torch.tensor([0, 3])
    body = randomised(nn.Sequential(*parts))
    try:
        width = body(x).flatten(1).shape[1]
    except RuntimeError:
        assume(False)  # a kernel larger than its map
    model = nn.Sequential(body, nn.Flatten(), nn.Linear(width, 6), nn.ReLU(), nn.Linear(6, CLASSES)).eval()
    seen = sampled_minima(model, x, y, EPS)
    bounds = {method: margin_bounds(model, x, y, EPS, method) for method in ("ibp", "crown-ibp", "crown")}
    with rows_for_all_neurons(monkeypatch):
        theirs = {method: margin_bounds(model, x, y, EPS, method, engine="auto_lirpa") for method in bounds}
    for ours in bounds.values():
        assert_sound(ours, seen)
    for method in ("ibp", "crown-ibp"):
        assert_close(bounds[method], theirs[method], y)
    with torch.no_grad():
        chain, box = Layout(model).resolve(x), pixel_box(x, EPS)
        alone, inner = crown_alone(chain, box), crown.preactivations(chain, box)
        assert_close(crown.backward(chain, alone, box, margin_spec(y, CLASSES)), theirs["crown"], y)
    # Where an interval shows a neuron to be stable that CROWN does not, ours takes the interval.
    if all(torch.equal(inner[place].unstable, alone[place].unstable) for place in chain.relus):
        assert_close(bounds["crown"], theirs["crown"], y)
