"""Coefficients in receptive fields give the bounds that full maps give."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rampart.bounds import crown, ibp, margin_bounds, reduced, windows
from rampart.bounds.box import Box, pixel_box
from rampart.bounds.relaxation import relax
from rampart.models import Chain, Layout, Normalize, build_model
from tests.nets import CLASSES, randomised, small_net


def both_ways(chain: Chain, box: Box) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(lower, upper) of every output neuron of every image, by windows and by full maps."""
    assert windows.receptive_field(chain, chain.last) is not None
    image, neuron = (
        part.flatten()
        for part in torch.meshgrid(
            torch.arange(len(box.lower)), torch.arange(prod(chain.links[-1].out_shape)), indexing="ij"
        )
    )
    relaxed = {p: relax(b) for p, b in ibp.inputs(chain, ibp.intervals(chain, box)).items()}
    given = (chain, chain.last, relaxed, box, image, neuron)
    up = torch.ones_like(neuron)
    return tuple(
        (bound_rows(*given, up)[0], -bound_rows(*given, -up)[0])
        for bound_rows in (windows.lower_bounds, crown._neuron_bounds)
    )


def forms_both_ways(chain: Chain, box: Box) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Every output neuron of the second image, read from the input and the unstable neurons, as `both_ways`."""
    shape = chain.links[-1].out_shape
    puller = reduced._Puller(chain, ibp.inputs(chain, ibp.intervals(chain, box)), box, 1, 1)
    ones = torch.eye(prod(shape), dtype=box.lower.dtype).view(-1, *shape)
    given = (puller.on, puller.numbers, puller.count)
    return windows.pulled(chain, chain.last, torch.arange(prod(shape)), *given), puller._pull(chain.last, ones)


def assert_same(layers: list[nn.Module], x: Tensor, eps: float = 0.1) -> None:
    model = randomised(nn.Sequential(*layers))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
        with torch.no_grad():
            chain, box = Layout(model.to(dtype)).resolve(x.to(dtype)), pixel_box(x.to(dtype), eps)
            for parts, whole in (both_ways(chain, box), forms_both_ways(chain, box)):
                for part, full in zip(parts, whole, strict=True):
                    assert torch.allclose(part, full, rtol=10 * tolerance, atol=tolerance)


convolution = st.fixed_dictionaries(
    {
        "kernel_size": st.tuples(st.integers(1, 3), st.integers(1, 3)),
        "stride": st.tuples(st.integers(1, 3), st.integers(1, 3)),
        "padding": st.tuples(st.integers(0, 3), st.integers(0, 3)),
        "dilation": st.tuples(st.integers(1, 2), st.integers(1, 2)),
        "groups": st.sampled_from([1, 2]),
    }
)


@settings(max_examples=40, deadline=None)
@given(st.tuples(convolution, convolution), st.integers(3, 7), st.integers(3, 7))
def test_windows_equal_full_maps_for_any_two_convolutions(kinds, height: int, width: int) -> None:
    layers = [nn.Conv2d(2, 4, **kinds[0]), nn.ReLU(), nn.Conv2d(4, 2, **kinds[1])]
    x = torch.rand(2, 2, height, width)
    try:
        nn.Sequential(*layers)(x)
    except RuntimeError:
        assume(False)  # the kernel is larger than the padded map
    assert_same(layers, x)


@pytest.mark.parametrize(
    "layers",
    [
        # A normalisation moves the padding's zeros: it has to be told from the map.
        [Normalize([0.4] * 3, [0.2] * 3), nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1)],
        [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3, padding=2)],
        [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)],
        [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 2), nn.ReLU(), nn.Conv2d(4, 3, 2, stride=2)],
        [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(4)],
    ],
    ids=["normalised", "scaled-between", "two-in-a-row", "three", "scaled-last"],
)
def test_windows_equal_full_maps_behind_other_links(layers: list[nn.Module]) -> None:
    assert_same(layers, torch.rand(2, 3, 6, 5))


class Joined(nn.Module):
    """A branch of convolutions joined with another, or with what it came from."""

    def __init__(self, branch: list[nn.Module], shortcut: list[nn.Module]) -> None:
        super().__init__()
        self.stem, self.branch, self.shortcut = nn.Conv2d(3, 4, 3), nn.Sequential(*branch), nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.branch(x) + self.shortcut(x)


odd = st.sampled_from([1, 3, 5])


@settings(max_examples=30, deadline=None)
@given(st.tuples(odd, odd), st.tuples(odd, odd), st.integers(1, 2), st.tuples(st.integers(3, 8), st.integers(3, 8)))
def test_windows_equal_full_maps_where_branches_join(first, second, stride: int, size) -> None:
    """Branches whose windows differ in size and in where they start."""
    layers = [
        [nn.Conv2d(4, 4, k, stride, k // 2), nn.ReLU(), nn.Conv2d(4, 3, last, 1, last // 2)]
        for k, last in (first, second)
    ]
    assert_same([Joined(*layers)], torch.rand(2, 3, *size))


def test_windows_equal_full_maps_around_a_block_and_through_pooling() -> None:
    x = torch.rand(2, 3, 8, 8)
    branch = [nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)]
    assert_same([Joined(branch, []), nn.ReLU(), nn.AvgPool2d(2, 1, 1), nn.Conv2d(4, 2, 3, padding=1)], x)


def test_branches_that_walk_the_map_at_different_paces_have_no_windows() -> None:
    model = Joined([nn.Conv2d(4, 4, 1, stride=2)], [nn.Conv2d(4, 4, 4)])
    chain = Layout(model).resolve(torch.rand(1, 3, 8, 8))
    assert windows.receptive_field(chain, chain.last) is None
    assert windows.receptive_field(chain, 0) == 3 * 3 * 3


def test_a_window_is_no_larger_than_the_receptive_field() -> None:
    layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1)]
    chain = Layout(nn.Sequential(*layers)).resolve(torch.rand(1, 3, 32, 32))
    # 15x15 pixels of 3 channels, 7x7 of 8, 3x3 of 8.
    assert windows.receptive_field(chain, chain.last) == 15 * 15 * 3


def test_dense_links_have_no_windows() -> None:
    model, x, _ = small_net("strided")
    chain = Layout(model).resolve(x)
    assert windows.receptive_field(chain, chain.last) is None


def test_windows_that_outgrow_the_maps_give_way_to_these(monkeypatch: pytest.MonkeyPatch) -> None:
    """A neuron k convolutions deep sees 2k + 1 pixels each way, of a map of 8."""
    used: list[int] = []
    lower_bounds = windows.lower_bounds

    def watched(chain: Chain, value: int, *given: object) -> Tensor:
        used.append(value)
        return lower_bounds(chain, value, *given)

    monkeypatch.setattr(windows, "lower_bounds", watched)
    layers = [layer for _ in range(6) for layer in (nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())]
    x = torch.rand(2, 4, 8, 8)
    with torch.no_grad():
        chain = Layout(randomised(nn.Sequential(*layers))).resolve(x)
        crown.preactivations(chain, pixel_box(x, 0.1))
    # The first map's intervals are exact; the second and third look at 5x5 and 7x7 pixels, the fourth at 9x9.
    assert set(used) == {2, 4}


@pytest.mark.parametrize("name", ["strided", "residual", "pooled"])
@pytest.mark.parametrize("method", ["crown-ibp", "crown", "alpha-crown"])
def test_bounds_do_not_depend_on_how_many_coefficients_are_held_at_once(
    name: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, y = small_net(name, count=5)
    at_once = margin_bounds(model, x, y, 0.05, method)
    monkeypatch.setattr(crown, "rows_at_once", lambda count, memory, dtype: 3 * CLASSES)
    assert torch.allclose(margin_bounds(model, x, y, 0.05, method), at_once, rtol=1e-4, atol=1e-5)


def test_the_cap_on_memory_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """No coefficients of more than a third of it: the ReLU step holds three such tensors."""
    largest = 0
    gather, backward = windows._gather, crown.backward_relaxed

    def watched_gather(*given: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, given[-1].numel())
        return gather(*given)

    def watched_backward(chain, relaxed, box, a, *rest, **named):
        nonlocal largest
        largest = max(largest, a.shape[0] * a.shape[1] * crown.widest(chain))
        return backward(chain, relaxed, box, a, *rest, **named)

    monkeypatch.setattr(windows, "_gather", watched_gather)
    monkeypatch.setattr(crown, "backward_relaxed", watched_backward)
    model = randomised(build_model("paper-cnn", (3, 32, 32), 10, width=0.25))
    x, y = torch.rand(16, 3, 32, 32), torch.arange(16) % 10
    for memory in (1, 8):
        largest = 0
        margin_bounds(model, x, y, 0.02, "crown", memory=memory)
        assert (memory << 20) / 24 < 4 * largest <= (memory << 20) / 3
