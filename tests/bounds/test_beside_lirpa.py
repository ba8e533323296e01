"""Our bounds are those of auto_LiRPA, or tighter."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from math import prod

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from torch import nn

from rampart.bounds import crown, ibp, margin_bounds
from rampart.bounds.box import Box, pixel_box
from rampart.bounds.compat import import_auto_lirpa
from rampart.bounds.margins import identity_spec, margin_spec
from rampart.models import Chain, Layout
from tests.bounds.soundness import EPS, assert_close, assert_sound, sampled_minima
from tests.exact import exact_margins, tiny_net
from tests.nets import CLASSES, NETS, randomised, small_net

# auto_LiRPA has no BatchNorm without scale and shift, no average pooling in windows that overlap, and no view in CROWN;
# its intervals do not take arithmetic after the last map as a part of that map.
SHARED_NETS = [name for name in NETS if name not in ("plain-norm", "pooled", "arithmetic")]


@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "crown"])
@pytest.mark.parametrize("name", SHARED_NETS)
def test_native_bounds_equal_those_of_auto_lirpa(name: str, method: str) -> None:
    model, x, y = small_net(name)
    theirs = margin_bounds(model, x, y, EPS, method, engine="auto_lirpa")
    assert_close(margin_bounds(model, x, y, EPS, method), theirs, y)


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
