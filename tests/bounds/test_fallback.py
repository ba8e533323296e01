"""Where auto_LiRPA takes over, what it is trusted with, and what is refused."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.prune import l1_unstructured

from rampart.bounds import METHODS, find_layout, margin_bounds
from rampart.bounds.exact import Exact
from rampart.errors import UnsupportedLayer
from rampart.models import Layout
from tests.bounds.soundness import EPS, assert_sound, sampled_minima
from tests.nets import CLASSES


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
    "other places": (lambda a, b: a.relu().flatten(1)[:, [5, 0, 3]], 3),
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
    "rounded": (lambda a, b: (10 * a.tanh()).to(torch.int32).float(), 144),
    "places taken twice": (lambda a, b: a.relu().flatten(1)[:, [0, 0, 1]], 3),
    "sum in windows": (lambda a, b: F.avg_pool2d(a.tanh(), 2, divisor_override=1), 36),
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


@pytest.mark.parametrize(
    "layer",
    [
        *(nn.AvgPool2d(2, 1), nn.AvgPool2d(2, 2, 1), nn.AvgPool2d(2, divisor_override=1), nn.AdaptiveAvgPool2d(1)),
        nn.AvgPool2d(2, ceil_mode=True),
    ],
)
def test_pooling_that_auto_lirpa_bounds_wrongly_is_refused(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), layer, nn.Flatten(), nn.LazyLinear(CLASSES)).eval()
    x, y = torch.rand(2, 3, 4, 4), torch.tensor([0, 2])
    model(x)
    with pytest.raises(UnsupportedLayer, match="'2'"):
        margin_bounds(model, x, y, EPS, "ibp", engine="auto_lirpa")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_what_a_hook_changes_is_bounded_or_refused(place: int, method: str) -> None:
    """On the network and on a leaf, of what goes in and of what comes out; none may be passed over."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, CLASSES)).eval()
    module = (model, model[3])[place % 2]
    if place < 2:
        module.register_forward_pre_hook(lambda _, given: (2 - 3 * given[0],))
    else:
        module.register_forward_hook(lambda _, given, found: -3 * found)
    x, y = torch.rand(2, 3, 2, 2), torch.tensor([0, 2])
    with contextlib.suppress(UnsupportedLayer):
        assert_sound(margin_bounds(model, x, y, EPS, method), sampled_minima(model, x, y, EPS))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "layer", [nn.MaxPool2d((2, 3), 2), nn.MaxPool2d(2, 1), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2, ceil_mode=True)]
)
def test_maxima_in_other_windows_than_side_by_side_are_refused(layer: nn.Module, method: str) -> None:
    """auto_LiRPA 0.3 takes (2, 3) with a stride of 2 for windows side by side: bounds far above the truth."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), layer, nn.Flatten(), nn.LazyLinear(CLASSES)).eval()
    x, y = torch.rand(2, 3, 5, 7), torch.tensor([0, 2])
    model(x)
    with pytest.raises(UnsupportedLayer, match="auto_LiRPA"):
        margin_bounds(model, x, y, EPS, method)


@pytest.mark.parametrize("pool", [nn.AvgPool2d(2, ceil_mode=True), nn.MaxPool2d(2, ceil_mode=True)])
def test_a_black_image_tells_as_little_of_a_network_as_it_is(pool: nn.Module) -> None:
    """A map without bias makes 0 of it whatever the pooling does: that alone may not be taken for the same network."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map, self.pool, self.head = nn.Conv2d(1, 1, 3, padding=1, bias=False), pool, nn.Linear(1, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.pool(self.map(x)).mean((2, 3)))

    with pytest.raises(UnsupportedLayer):
        margin_bounds(Pooled().eval(), torch.zeros(1, 1, 3, 3), torch.tensor([0]), 0.25, "ibp")


def test_layers_that_differ_from_the_network_are_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever has been overlooked: what was read of a network is run beside it."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, CLASSES)).eval()
    assert find_layout(model, torch.rand(1, 3, 2, 2)) is not None
    other = nn.Sequential(nn.Flatten(), nn.Linear(12, CLASSES)).eval()
    monkeypatch.setattr("rampart.bounds.margins.Layout", lambda _: Layout(other))
    assert find_layout(model, torch.rand(1, 3, 2, 2)) is None


def test_quantised_layers_are_not_taken_for_plain_ones() -> None:
    layer = nn.Linear(12, CLASSES)
    layer.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    model = nn.Sequential(nn.Flatten(), torch.ao.nn.qat.Linear.from_float(layer)).train()
    model(torch.rand(8, 3, 2, 2))
    assert find_layout(model.eval(), torch.rand(1, 3, 2, 2)) is None


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize(
    "made",
    [nn.utils.weight_norm, nn.utils.spectral_norm, partial(l1_unstructured, name="weight", amount=0.5)],
    ids=["weight_norm", "spectral_norm", "pruned"],
)
def test_hooks_that_make_weights_are_no_obstacle(made: Callable[[nn.Module], nn.Module]) -> None:
    """What they make is of the weights of the moment, in float64, too."""
    norm = l1_unstructured(nn.BatchNorm2d(3), name="weight", amount=0.5)
    model = nn.Sequential(norm, nn.ReLU(), nn.Flatten(), made(nn.Linear(12, CLASSES))).eval()
    x, y = torch.rand(2, 3, 2, 2), torch.arange(2)
    layout = find_layout(model, x)
    assert layout is not None
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1.5
        bounds = margin_bounds(model, x, y, 0.0, layout=layout)
        logits = model(x)
    expected = logits.gather(1, y[:, None]) - logits
    torch.testing.assert_close(bounds, expected.scatter(1, y[:, None], torch.inf))
    torch.testing.assert_close(Exact.of(model, x).bounds(x, y, 0.0, "crown").float(), bounds, rtol=1e-4, atol=1e-5)


class ByCount(nn.Module):
    """A network whose trace knows how many images there were; of one image alone if it shall."""

    def __init__(self, alone: bool) -> None:
        super().__init__()
        self.alone, self.body, self.head = alone, nn.Conv2d(3, 2, 1), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        z = self.body(x).tanh()
        return self.head(z.view(1, -1) if self.alone else z.view(x.size(0), -1))


@pytest.mark.parametrize("alone", [False, True])
def test_networks_that_know_the_number_of_images_are_bounded(alone: bool) -> None:
    model = ByCount(alone).eval()
    x, y = torch.rand(1 if alone else 3, 3, 2, 2), torch.arange(1 if alone else 3)
    bounds = margin_bounds(model, x, y, EPS)
    model.alone = False  # else it could not be sampled
    assert_sound(bounds, sampled_minima(model, x, y, EPS))
