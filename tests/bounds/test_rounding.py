"""Bounds in float32 less what they may have rounded never lie above those in float64, and little below them."""

from __future__ import annotations

from math import prod

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rampart.bounds import crown, ibp, margin_bounds, windows
from rampart.bounds.box import Box, pixel_box
from rampart.bounds.relaxation import relax
from rampart.bounds.rounding import UNIT, Single, _outward, _terms
from rampart.models import Chain, Layout, build_model
from rampart.models.links import Conv, Dense
from rampart.verification import verify
from rampart.verification.verdict import is_counterexample
from tests.nets import NETS, convolutions, points_in_ball, randomised, small_net

KNOWN = ["dense", "strided", "grouped", "dilated"]


def in_float64(model: nn.Module, x: Tensor) -> Chain:
    return Layout(model).double().resolve(x.double())


def of_all_neurons(chain: Chain, box: Box, value: int) -> tuple[Tensor, Tensor, Tensor]:
    """(in float64, in float32 less what is lost, what is lost) of every neuron of a value, from both sides, by the same
    boxes of the neurons before it."""
    found = ibp.intervals(chain, box, value)
    single = Single.of(chain)
    assert single is not None
    single.learn(value, chain, found)
    relaxed = {place: relax(b) for place, b in ibp.inputs(chain, found).items() if place < value}
    count, size = len(box.lower), prod(chain.links[value].out_shape)
    image = torch.arange(count).repeat_interleave(2 * size)
    neuron = torch.arange(size).repeat(2 * count)
    sign = torch.ones(size, dtype=torch.long).repeat(2 * count)
    sign[torch.arange(len(sign)) // size % 2 == 1] = -1
    bound_rows = windows.lower_bounds if windows.receptive_field(chain, value) else crown._neuron_bounds
    exact, nothing = bound_rows(chain, value, relaxed, box, image, neuron, sign)
    assert not bool(nothing.any())
    bounds, lost = bound_rows(chain, value, relaxed, box, image, neuron, sign, single)
    assert bounds.dtype == lost.dtype == torch.float64
    return exact, bounds, lost


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_what_float32_rounds_is_taken_off(name: str, scale: float) -> None:
    """Of weights of any size: rounding is relative."""
    model, x, _ = small_net(name, count=3)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.weight *= scale
        chain = in_float64(model, x)
        box = pixel_box(x.double(), 0.05)
        above = 0
        for place in chain.relus[1:]:
            exact, bounds, lost = of_all_neurons(chain, box, chain.sources[place][0])
            assert bool((bounds <= exact + 1e-12 * exact.abs()).all())
            assert bool((exact - bounds <= 2 * lost + 1e-6 * exact.abs()).all())
            above += int((bounds + lost > exact).sum())
    # What float32 finds by itself is above as often as below.
    assert above > 10


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 200))
def test_a_neuron_whose_bound_is_zero_is_never_shown_to_be_on(seed: int, width: int) -> None:
    """Where float32 by itself cannot tell: terms a million times larger than what is left of them cancel."""
    generator = torch.Generator().manual_seed(seed)
    layers = [nn.Flatten(), nn.Linear(12, width), nn.ReLU(), nn.Linear(width, 3), nn.ReLU(), nn.Linear(3, 2)]
    model = nn.Sequential(*layers).eval()
    with torch.no_grad():
        for layer in layers[1::2]:
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * 100)
        x = torch.rand(1, 3, 2, 2, generator=generator)
        box = pixel_box(x.double(), 0.01)
        layers[3].bias.zero_()
        exact, *_ = of_all_neurons(in_float64(model, x), box, 3)
        model.double()
        layers[3].bias.copy_(-exact[:3])  # from below, as far as float64 goes
        chain = Layout(model).resolve(x.double())
        exact, bounds, _ = of_all_neurons(chain, box, 3)
    assert float(exact[:3].abs().max()) < 1e-9
    assert bool((bounds[:3] <= 0).all())


@pytest.mark.parametrize("name", list(NETS))
def test_inner_bounds_hold_and_are_nearly_as_tight(name: str) -> None:
    model, x, _ = small_net(name, count=3)
    with torch.no_grad():
        chain = in_float64(model, x)
        box = pixel_box(x.double(), 0.05)
        exact, found = (crown.preactivations(chain, box, single=single) for single in (False, True))
        layout = Layout(model).double()
        for image in range(len(x)):
            points = points_in_ball(x[image].double(), 0.05, 200)
            at_points = layout.resolve(points)
            values = ibp.inputs(at_points, ibp.intervals(at_points, Box(points, points)))
            for place, ends in found.items():
                value = values[place].center
                assert bool((value >= ends.lower[image] - 1e-9).all())
                assert bool((value <= ends.upper[image] + 1e-9).all())
    for place in found:
        ends, before = found[place], exact[place]
        width = (before.upper - before.lower) + 1e-9
        both = before.unstable & ends.unstable
        assert bool(((ends.upper - ends.lower)[both] <= (1.05 * width)[both]).all())
        assert int(ends.unstable.sum()) <= 1.05 * int(before.unstable.sum()) + 1


def test_bounds_of_the_study_s_network_are_nearly_as_tight() -> None:
    """And not those of float64, which would take float64's time."""
    model = randomised(build_model("paper-cnn", (3, 32, 32), 10, width=0.5)).double()
    x, y = torch.rand(3, 3, 32, 32, dtype=torch.float64), torch.arange(3)
    exact, found = (margin_bounds(model, x, y, 0.005, single=single) for single in (False, True))
    others = exact.isfinite()
    assert bool((found <= exact)[others].all())
    assert torch.allclose(found[others], exact[others], rtol=0.02, atol=0.02 * float(exact[others].abs().mean()))
    assert not torch.equal(found, exact)


def test_where_much_is_lost_bounds_are_those_of_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, _ = small_net("strided")
    monkeypatch.setattr(crown, "SHARE", 0.0)
    with torch.no_grad():
        chain, box = in_float64(model, x), pixel_box(x.double(), 0.05)
        exact, found = (crown.preactivations(chain, box, single=single) for single in (False, True))
    for place in exact:
        assert torch.equal(exact[place].lower, found[place].lower)
        assert torch.equal(exact[place].upper, found[place].upper)


class Idle(nn.Module):
    """With a layer that leads nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.idle, self.last = nn.Conv2d(3, 2, 3), nn.Conv2d(2, 2, 1), nn.Linear(8, 2)
        self.relu, self.flatten = nn.ReLU(), nn.Flatten()

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.first(x))
        self.idle(h)
        return self.last(self.flatten(h))


def test_of_what_is_not_known_bounds_are_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of branches, scales between layers, ReLUs of the input, products of matrices that may be less exact."""
    x = torch.rand(1, 3, 4, 4)
    for layers in (
        [nn.ReLU(), nn.Conv2d(3, 2, 3)],
        [nn.Conv2d(3, 3, 3), nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 2)],
        [nn.Conv2d(3, 3, 3), nn.ReLU(), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 2)],
    ):
        assert Single.of(in_float64(nn.Sequential(*layers, nn.Flatten()).eval(), x)) is None
    residual, images, _ = small_net("residual")
    assert Single.of(in_float64(residual, images)) is None
    assert Single.of(in_float64(Idle(), x)) is None
    model, images, _ = small_net("strided")
    chain = in_float64(model, images)
    assert Single.of(chain) is not None
    assert Single.of(chain.single()) is None  # in float32 already
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert Single.of(chain) is None


def test_the_upper_side_lies_above_the_relu_as_it_is_rounded() -> None:
    generator = torch.Generator().manual_seed(0)
    lower, upper = (10.0 ** (8 * torch.rand(2, 100_000, generator=generator, dtype=torch.float64) - 4)).unbind()
    box = Box(-lower[None], upper[None])
    slope, intercept = (tensor.double() for tensor in _outward(box))
    assert bool((-lower * slope + intercept >= 0).all())
    assert bool((upper * slope + intercept >= upper).all())
    assert bool((intercept <= relax(box).intercept * (1 + 1e-6) + 8 * UNIT * upper).all())


@settings(max_examples=100, deadline=None)
@given(convolutions(), st.integers(1, 2), st.sampled_from([torch.float32, torch.float64]))
def test_products_pull_as_the_transpose_of_the_convolution(geometry, groups: int, dtype: torch.dtype) -> None:
    weight = torch.randn(4, 3, *geometry.kernel, dtype=dtype)
    conv = Conv(weight, torch.zeros(4, dtype=dtype), geometry, groups)
    a = torch.randn(3, *conv.out_shape, dtype=dtype)
    _, stride, padding, dilation, _ = geometry
    expected = F.conv_transpose2d(a, weight, None, stride, padding, geometry.skipped, groups, dilation)
    for pulled in (conv.products(a), conv.pull(a)):
        assert pulled.shape == expected.shape
        assert torch.allclose(pulled, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["dense", "convolution"])
def test_as_much_is_taken_off_as_a_sum_may_round(kind: str) -> None:
    """n terms t: n roundings of Σ|t| (Higham 2002, eq. 3.5), where sums of random terms round by far less."""
    torch.manual_seed(0)
    if kind == "dense":
        layers = [nn.Flatten(), nn.Linear(27, 300), nn.ReLU(), nn.Linear(300, 4), nn.ReLU(), nn.Linear(4, 2)]
    else:  # of one place: the same sums
        layers = [nn.Conv2d(3, 300, 3), nn.ReLU(), nn.Conv2d(300, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2)]
    x = torch.rand(1, 3, 3, 3, dtype=torch.float64)
    with torch.no_grad():
        chain, box = in_float64(nn.Sequential(*layers), x), pixel_box(x, 0.05)
        (place, first), (value, last), _ = ((p, k) for p, k in enumerate(chain.links) if isinstance(k, Conv | Dense))
        _, _, lost = of_all_neurons(chain, box, value)
        slope = relax(ibp.intervals(chain, box)[place]).upper_slope.flatten()
        for number, sign in enumerate([1] * 4 + [-1] * 4):
            row = sign * last.weight[number % 4].flatten()
            a = torch.where(row < 0, slope, (slope > 0.5).double()).mul(row)
            terms = a.abs()[:, None] * first.weight.flatten(1).abs() * x.flatten()
            assert float(lost[number]) >= UNIT * int((a != 0).sum()) * float(terms.sum())


@settings(max_examples=100, deadline=None)
@given(convolutions())
def test_no_place_is_covered_by_more_of_a_kernel_than_is_counted(geometry) -> None:
    """What is summed up in a place of the input: with a stride and a dilation, kernels meet where these do."""
    conv = Conv(torch.ones(1, 1, *geometry.kernel), torch.zeros(1), geometry)
    covered = conv.products(torch.ones(1, *conv.out_shape))
    assert int(covered.max()) <= _terms(conv, None) - 1  # of one channel


def test_neurons_that_are_0_all_over_the_ball_are_off() -> None:
    """As they are counted."""
    ends = torch.tensor([[-1.0, 0.0, 0.0, 1.0, -1.0]]), torch.tensor([[0.0, 0.0, 1.0, 2.0, 1.0]])
    slope, intercept = _outward(Box(*(end.double() for end in ends)))
    assert slope[0, :4].tolist() == [0, 0, 1, 1]
    assert intercept[0, :4].tolist() == [0, 0, 0, 0]


def dense(*weights: list[list[float]]) -> nn.Sequential:
    """Linear maps, and ReLUs between them."""
    layers: list[nn.Module] = [nn.Flatten()]
    for rows in weights:
        *held, bias = torch.tensor(rows).T
        layer = nn.Linear(len(held), len(rows))
        layer.weight.data, layer.bias.data = torch.stack(held, 1), bias
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval()


def too_large() -> nn.Sequential:
    """Coefficients go through infinity, where their sum is finite."""
    row = [1e19, 1e19, -0.95e19, -1.1e19, -3e16]
    return dense(
        [[1.0, 0.0, -0.4], [0.0, 1.0, 0.0]],
        [*[[3e19, 0.0, 0.0]] * 4, [0.0, 1e19, 0.0]],
        [[*row, 5e35], [*row, 3e36]],
        [[-1e-35, 1e-35, -24.8], [0.0, 0.0, 0.0]],
    )


def too_small() -> nn.Sequential:
    """Coefficients go through numbers that float32 takes for 0."""
    return dense(
        [[1e20, 0.0, 0.0], [0.0, 1.0, 0.0]],
        [[1e-20, 0.0, 0.0], [0.0, 1.0, 0.0]],
        [[-1e-26, -1e-25, 7.8e-26], [-1e-26, -1e-25, 13e-26]],
        [[-1e26, 1e26, -5.1], [0.0, 0.0, 0.0]],
    )


def many_at_0() -> nn.Sequential:
    """A thousand neurons that are 0 all over the ball, of which nothing is left."""
    row = [1.0, *[2.0**-24] * 999, -0.02]
    return dense(
        [[0.0, 1.0], [0.0, 3.0], [1.0, 0.0]],
        [*[[3.0, -1.0, 0.0, 0.0]] * 1000, [0.0, 0.0, 1.0, 0.0]],
        [[*row, 0.0159], [*row, 0.0179]],
        [[-1e4, 1e4, -19.5], [0.0, 0.0, 0.0]],
    )


@pytest.mark.parametrize(
    ("model", "center", "corner"),
    [
        (too_large(), [0.25, 0.5], [0.5, 0.5]),
        (too_small(), [0.25, 0.5], [0.5, 0.75]),
        (many_at_0(), [0.5], [0.8]),
    ],
    ids=["too-large", "too-small", "many-at-0"],
)
def test_numbers_at_the_ends_of_float32_prove_nothing(
    model: nn.Module, center: list[float], corner: list[float]
) -> None:
    image, point = torch.tensor([[center]]), torch.tensor([[corner]])
    eps = float((point - image).abs().max())
    assert int(model(image[None]).argmax()) == 0
    assert is_counterexample(model, point, image, 0, eps)
    assert verify(model, image, 0, eps).status == "unsafe"
