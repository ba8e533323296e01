"""A chain computes what its network computes, in eval and in training mode, and its maps are exact."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rampart.errors import ModelError, UnsupportedLayer
from rampart.models import Layout
from rampart.models.geometry import Geometry
from rampart.models.links import Add, Affine, Conv, Dense, Flatten, ReLU, Scale
from tests.nets import NETS, convolutions, randomised, run_chain, small_classifier, small_net


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("name", NETS)
def test_a_chain_gives_the_networks_output_and_updates_its_statistics_as_a_forward_pass_does(
    name: str, training: bool
) -> None:
    model, x, _ = small_net(name, count=4)
    model.train(training)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()  # has no chain in training mode
    twin = copy.deepcopy(model)
    chain, expected = Layout(model).resolve(x), twin(x)
    assert torch.allclose(chain.output, expected, atol=1e-6)
    assert torch.allclose(run_chain(chain, x), expected, rtol=1e-4, atol=1e-5)
    for (key, value), other in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.allclose(value, other, rtol=1e-5, atol=1e-6), key


def test_eval_mode_folds_batch_norm_for_any_other_input() -> None:
    model, x, _ = small_net("strided")
    chain, other = Layout(model).resolve(x), torch.rand_like(x)
    assert torch.allclose(run_chain(chain, other), model(other), rtol=1e-4, atol=1e-5)
    assert sum(isinstance(link, Scale) for link in chain.links) == 1, "the normalisation alone stands by itself"


@pytest.mark.parametrize("name", ["strided", "unfolded", "plain-norm"])
def test_gradients_flow_through_a_chain_as_through_the_network(name: str) -> None:
    """In training mode: through the batch's statistics, too."""
    model, x, y = small_net(name, count=5)
    model.double().train()
    x = x.double().requires_grad_()
    wanted = [x, *model.parameters()]
    expected = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), wanted)
    found = torch.autograd.grad(nn.functional.cross_entropy(run_chain(Layout(model).resolve(x), x), y), wanted)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("affine", [True, False])
def test_the_derivatives_of_batch_statistics_are_exact(affine: bool) -> None:
    """Of a network's output by way of the chain's folded maps alone."""
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3, affine=affine, momentum=None)).double().train()
    x, other = torch.rand(3, 2, 3, 3).double(), torch.rand(2, 2, 3, 3).double()

    def folded(x: Tensor) -> Tensor:
        return run_chain(Layout(model).resolve(x), other)

    assert torch.autograd.gradcheck(folded, x.requires_grad_())


def test_a_layout_serves_as_weights_change() -> None:
    model, x, _ = small_net("strided")
    layout = Layout(model)
    layout.resolve(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1
    assert torch.allclose(run_chain(layout.resolve(x), x), model(x), rtol=1e-4, atol=1e-5)


def test_a_layout_serves_in_both_modes() -> None:
    model, x, _ = small_net("strided", count=4)
    layout = Layout(model.train())
    layout.resolve(x)
    model.eval()
    assert torch.allclose(run_chain(layout.resolve(x), x), model(x), rtol=1e-4, atol=1e-5)


def test_the_places_of_the_relus() -> None:
    model = small_classifier()
    chain = Layout(model).resolve(torch.rand(2, 3, 8, 8))
    assert [isinstance(link, ReLU) for link in chain.links] == [i in chain.relus for i in range(len(chain.links))]
    assert len(chain.relus) == 4


def test_batch_norm_in_training_mode_needs_more_than_one_image() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.BatchNorm1d(4)).train()
    with pytest.raises(ModelError, match=r"'2'.*batch of one"):
        Layout(model).resolve(torch.rand(1, 3, 2, 2))


def assert_exact(link: Affine) -> None:
    """pull and offset are the transpose, radius is |L| r, scaled is a scale and shift after the map."""
    link_in, link_out = tuple(link.in_shape), tuple(link.out_shape)
    x = torch.randn(2, *link_in, dtype=torch.float64)
    out = link.apply(x)
    assert tuple(out.shape[1:]) == link_out
    a = torch.randn(3, *link_out, dtype=torch.float64)
    by_output = a.flatten(1) @ out.flatten(1).T
    by_input = link.pull(a).flatten(1) @ x.flatten(1).T + link.offset(a)[:, None]
    assert torch.allclose(by_output, by_input, rtol=0, atol=1e-9)

    jacobian = torch.autograd.functional.jacobian(lambda z: link.apply(z[None])[0], x[0])
    matrix = jacobian.reshape(out[0].numel(), x[0].numel())
    r = torch.rand(2, *link_in, dtype=torch.float64)
    assert torch.allclose(link.radius(r).flatten(1), r.flatten(1) @ matrix.abs().T, rtol=0, atol=1e-9)
    assert torch.allclose(link.pull(a).flatten(1), a.flatten(1) @ matrix, rtol=0, atol=1e-9)


def assert_scaled(link: Affine) -> None:
    x = torch.randn(2, *link.in_shape, dtype=torch.float64)
    scale, shift = torch.randn(2, link.out_shape[0], dtype=torch.float64)
    shape = (1, -1, *(1,) * (len(link.out_shape) - 1))
    expected = link.apply(x) * scale.view(shape) + shift.view(shape)
    assert torch.allclose(link.scaled(scale, shift).apply(x), expected, rtol=0, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(convolutions(), st.sampled_from([1, 2]))
def test_convolutions_are_exact(geometry: Geometry, groups: int) -> None:
    kernel, stride, padding, dilation, size = geometry
    module = nn.Conv2d(2, 4, kernel, stride, padding, dilation, groups).double()
    x = torch.rand(1, 2, *size).double()
    (link,) = Layout(nn.Sequential(module)).resolve(x).links
    assert isinstance(link, Conv)
    assert torch.allclose(link.apply(x), module(x))
    assert_exact(link)
    assert_scaled(link)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.booleans())
def test_dense_maps_are_exact(inputs: int, outputs: int, bias: bool) -> None:
    module = nn.Linear(inputs, outputs, bias=bias).double()
    x = torch.rand(1, inputs).double()
    (link,) = Layout(nn.Sequential(module)).resolve(x).links
    assert isinstance(link, Dense)
    assert torch.allclose(link.apply(x), module(x))
    assert_exact(link)
    assert_scaled(link)


@pytest.mark.parametrize("shape", [(3,), (3, 2, 5)])
def test_scales_and_flattens_are_exact(shape: tuple[int, ...]) -> None:
    scale = Scale(torch.randn(3).double(), torch.randn(3).double(), shape)
    assert_exact(scale)
    assert_scaled(scale)
    assert_exact(Flatten(shape))


class Forward(nn.Module):
    """A network around one function of its layers."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x


UNSUPPORTED: dict[str, tuple[nn.Module, str]] = {
    "activation": (nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh())), "1.1"),
    "pooling": (nn.Sequential(nn.Conv2d(3, 3, 1), nn.MaxPool2d(2)), "1"),
    "padding by reflection": (nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")), "0"),
    "padding in words": (nn.Sequential(nn.ReLU(), nn.Conv2d(3, 3, 3, padding="same")), "1"),
    "batch statistics in eval mode": (nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)), "0"),
    "partial flatten": (nn.Sequential(nn.Flatten(2)), "0"),
    "flatten of the first axes": (nn.Sequential(nn.Flatten(1, 2)), "0"),
    "flatten of the batch": (nn.Sequential(nn.Flatten(0)), "0"),
    "partial flatten as a function": (Forward(lambda m, x: torch.flatten(x, 2)), "flatten"),
    "flatten of the first axes as a function": (Forward(lambda m, x: torch.flatten(x, 1, 2)), "flatten"),
    "flatten of the first axes as a method": (Forward(lambda m, x: x.flatten(start_dim=1, end_dim=2)), "flatten"),
    "activation as a function": (Forward(lambda m, x: torch.tanh(x)), "tanh"),
    "sum with a factor": (Forward(lambda m, x: torch.add(m.hidden(x), x, alpha=2), hidden=nn.Linear(4, 4)), "add"),
    "concatenation": (Forward(lambda m, x: torch.cat([m.hidden(x), x], 1), hidden=nn.Linear(4, 4)), "cat"),
    "value overwritten that is read again": (
        Forward(
            lambda m, x: m.hidden(nn.functional.relu(h := m.first(x), inplace=True)) + h,
            first=nn.Linear(4, 4),
            hidden=nn.Linear(4, 4),
        ),
        "relu",
    ),
    "value overwritten by a second argument": (
        Forward(lambda m, x: nn.functional.relu(h := m.first(x), True) + h, first=nn.Linear(4, 4)),
        "relu",
    ),
    "value overwritten by a method": (
        Forward(lambda m, x: (h := m.first(x)).relu_() + h, first=nn.Linear(4, 4)),
        "relu_",
    ),
    "pooling with a ragged edge": (nn.Sequential(nn.AvgPool2d(2, ceil_mode=True)), "0"),
    "pooling that does not count its border": (nn.Sequential(nn.AvgPool2d(3, 1, 1, count_include_pad=False)), "0"),
    "division by a value": (Forward(lambda m, x: 1 / m.hidden(x), hidden=nn.Linear(4, 4)), "truediv"),
    "difference of two values": (Forward(lambda m, x: m.hidden(x) - x, hidden=nn.Linear(4, 4)), "sub"),
    "constant in place of a value that is read again": (
        Forward(lambda m, x: (h := m.hidden(x)).add_(1) * 2 + h, hidden=nn.Linear(4, 4)),
        "add_",
    ),
    "mean over channels": (Forward(lambda m, x: x.mean(1)), "mean"),
    "view of a fixed batch": (Forward(lambda m, x: x.view(2, -1)), "view"),
    "call in a layer of ours": (nn.Sequential(nn.Linear(4, 4), Forward(lambda m, x: x.sort(1).values)), "1.sort"),
    "early exit": (Forward(lambda m, x: m.hidden(x) if x.sum() > 0 else x, hidden=nn.Linear(4, 4)), "model"),
    "layer beside the chain": (Forward(lambda m, x: (m.hidden(x), x)[1], hidden=nn.Linear(4, 4)), "model"),
    "two inputs": (TwoInputs(), "model"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_what_is_no_chain_is_named_with_its_place(case: str) -> None:
    model, place = UNSUPPORTED[case]
    with pytest.raises(UnsupportedLayer) as raised:
        Layout(model.eval())
    assert place in (raised.value.path or "model")
    assert f"'{raised.value.path or 'model'}'" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("shape", [(3, 2, 2), (2,), (1, 2), (1, 2, 1, 1)])
def test_arithmetic_is_with_one_number_a_channel(shape: tuple[int, ...]) -> None:
    """[2] stands beside columns, [1, 2] beside them too, [3, 2, 2] beside pixels; [1, 2, 1, 1] has too few channels."""
    model = Forward(lambda m, x: x + m.constant)
    model.register_buffer("constant", torch.rand(shape))
    with pytest.raises(UnsupportedLayer, match="number a channel") as raised:
        Layout(model).resolve(torch.rand(1, 3, 2, 2) if shape != (1, 2, 1, 1) else torch.rand(1, 1, 2, 2))
    assert "add" in raised.value.path


def test_tracing_leaves_a_module_as_it_was() -> None:
    model, x, _ = small_net("arithmetic")
    before = set(vars(model)), dict(model.state_dict())
    layout = Layout(model)
    assert (set(vars(model)), set(model.state_dict())) == (before[0], set(before[1]))
    # Constants that the module holds are those of the moment.
    model.double().mean += 0.1
    assert torch.allclose(run_chain(layout.resolve(x.double()), x.double()), model(x.double()))


def test_torchvisions_normalisation_is_a_layer() -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    x = torch.rand(2, 3, 4, 4)
    model = nn.Sequential(transforms.Normalize([0.5, 0.4, 0.3], [0.5, 0.25, 0.2]), nn.Conv2d(3, 2, 3))
    links = Layout(model).resolve(x).links
    assert [type(link) for link in links] == [Scale, Conv]
    assert torch.allclose(run_chain(Layout(model).resolve(x), x), model(x), atol=1e-6)


def aliased(name: str) -> nn.Module:
    """A value with two readers, of which one reads it under another name."""
    layers = {"first": nn.Linear(6, 6), "second": nn.Linear(6, 6), "norm": randomised(nn.BatchNorm1d(6))}
    nothing = {"dropout": nn.Dropout(0.1), "identity": nn.Identity(), "flatten": nn.Flatten()}[name]

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = m.first(x)
        return h + m.second(torch.relu(m.norm(m.nothing(h))))

    return Forward(forward, nothing=nothing, **layers).eval()


@pytest.mark.parametrize("name", ["dropout", "identity", "flatten"])
def test_a_value_that_is_read_under_two_names_is_not_folded_into(name: str) -> None:
    model, x = aliased(name), torch.rand(3, 6)
    chain, other = Layout(model).resolve(x), torch.rand(3, 6)
    assert torch.allclose(run_chain(chain, other), model(other), atol=1e-6)


@pytest.mark.parametrize(
    "nothing", [nn.Dropout(0.1), nn.Identity(), nn.Flatten(), nn.Sequential(nn.Flatten(), nn.Dropout())]
)
def test_a_value_that_is_overwritten_under_another_name_is_refused(nothing: nn.Module) -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = m.first(x)
        return m.relu(m.nothing(h)) + h

    model = Forward(forward, first=nn.Linear(6, 6), nothing=nothing, relu=nn.ReLU(inplace=True)).eval()
    with pytest.raises(UnsupportedLayer, match="overwrites"):
        Layout(model)
    alone = nn.Sequential(nn.Linear(6, 6), nothing, nn.ReLU(inplace=True), nn.Linear(6, 4)).eval()
    assert len(Layout(alone).resolve(torch.rand(2, 6)).links) >= 3


def test_dropout_has_no_chain_in_training_mode_and_leaves_no_trace_in_eval_mode() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Identity(), nn.ReLU())
    with pytest.raises(UnsupportedLayer, match=r"'1'.*training"):
        Layout(model.train())
    links = Layout(model.eval()).resolve(torch.rand(2, 4)).links
    assert [type(link) for link in links] == [Dense, ReLU]
    # In place it does nothing either.
    alone = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Dropout(0.5, inplace=True)).eval()
    assert [type(link) for link in Layout(alone).resolve(torch.rand(2, 4)).links] == [Dense, ReLU]


def test_a_dense_map_over_the_last_axis_of_a_map_is_no_chain() -> None:
    """Dense stands for a map of vectors; on [C, H, W] it would stand for something else than the layer."""
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2)).eval()
    with pytest.raises(UnsupportedLayer, match="'0'"):
        Layout(model).resolve(torch.rand(2, 3, 3, 5))


@pytest.mark.parametrize(("size", "output"), [((5, 6), 2), ((6, 6), (4, 3))])
def test_pooling_into_windows_of_unequal_sizes_is_no_chain(size: tuple[int, int], output: object) -> None:
    with pytest.raises(UnsupportedLayer, match=r"'0'.*divide"):
        Layout(nn.Sequential(nn.AdaptiveAvgPool2d(output))).resolve(torch.rand(1, 2, *size))


@pytest.mark.parametrize("kernel", [2, 3, (2, 1)])
@pytest.mark.parametrize("padding", [0, 1])
def test_average_pooling_is_exact(kernel: object, padding: int) -> None:
    module = nn.AvgPool2d(kernel, stride=2, padding=padding if kernel != (2, 1) else 0)
    x = torch.rand(1, 3, 6, 5).double()
    (link,) = Layout(nn.Sequential(module)).resolve(x).links
    assert torch.allclose(link.apply(x), module(x))
    assert_exact(link)


def test_a_value_is_not_scaled_where_another_layer_reads_it_too() -> None:
    """BatchNorm on one branch of a map that a shortcut reads as it was."""
    model = Forward(lambda m, x: m.norm(h := m.first(x)) + h, first=nn.Linear(4, 4), norm=nn.BatchNorm1d(4)).eval()
    with torch.no_grad():
        model.norm.running_var.fill_(9.0)
    x = torch.rand(3, 4)
    chain = Layout(model).resolve(x)
    assert [type(link) for link in chain.links] == [Dense, Scale, Add]
    assert torch.allclose(run_chain(chain, x), model(x), atol=1e-6)
    assert chain.before(1) == [0, 1]
    assert chain.before(2) == [0, 1, 2]


@pytest.mark.parametrize("pool", [nn.AvgPool2d([2, 2]), nn.AvgPool2d([2, 2], [1, 1]), nn.AdaptiveAvgPool2d([1, 1])])
def test_sizes_may_be_lists(pool: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 1), pool)
    x = torch.rand(2, 3, 4, 4)
    assert torch.allclose(Layout(model).resolve(x).output, model(x), atol=1e-6)


class ByName(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(input=torch.relu(input=x), start_dim=1)


def test_a_call_without_places_is_no_chain_and_said() -> None:
    with pytest.raises(UnsupportedLayer, match="relu"):
        Layout(ByName())
