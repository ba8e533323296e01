"""Coefficients in receptive fields give the bounds that full maps give."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rampart.bounds import crown, ibp, margin_bounds, windows
from rampart.bounds.box import Box, pixel_box
from rampart.models import Layout, Normalize
from rampart.models.chain import Link
from tests.nets import randomised, small_net


def both_ways(links: list[Link], box: Box) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(lower, upper) of every output neuron of every image, by windows and by full maps."""
    assert windows.convolutional(links)
    shape = torch.Size(windows.link_shape(links[-1]))
    image, neuron = (
        part.flatten()
        for part in torch.meshgrid(torch.arange(len(box.lower)), torch.arange(shape.numel()), indexing="ij")
    )
    boxes = ibp.preactivations(links, box)
    full = crown._neuron_bounds(links, boxes, box, image, neuron, shape)
    return windows.neuron_bounds(links, boxes, box, image, neuron), full


def assert_same(layers: list[nn.Module], x: Tensor, eps: float = 0.1) -> None:
    with torch.no_grad():
        chain = Layout(randomised(nn.Sequential(*layers))).resolve(x)
        (lower, upper), (full_lower, full_upper) = both_ways(chain.links, pixel_box(x, eps))
    assert torch.allclose(lower, full_lower, rtol=1e-4, atol=1e-5)
    assert torch.allclose(upper, full_upper, rtol=1e-4, atol=1e-5)


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


def test_a_window_is_no_larger_than_the_receptive_field() -> None:
    layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1)]
    links = Layout(nn.Sequential(*layers)).resolve(torch.rand(1, 3, 32, 32)).links
    # 15x15 pixels of 3 channels, 7x7 of 8, 3x3 of 8.
    assert windows.receptive_field(links) == 15 * 15 * 3


def test_dense_links_have_no_windows() -> None:
    model, x, _ = small_net("strided")
    assert not windows.convolutional(Layout(model).resolve(x).links)


def test_bounds_do_not_depend_on_how_many_coefficients_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = small_net("strided")
    at_once = margin_bounds(model, x, y, 0.05, "crown")
    monkeypatch.setattr(crown, "MAX_COEFFICIENTS", 2000)
    assert torch.allclose(margin_bounds(model, x, y, 0.05, "crown"), at_once, rtol=1e-4, atol=1e-5)
