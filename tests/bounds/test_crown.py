"""CROWN's pieces: bounds of the neurons inside, and slopes that are optimised without ever doing harm."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rampart.bounds import alpha, crown, ibp
from rampart.bounds.box import Box, pixel_box
from rampart.bounds.margins import margin_spec
from rampart.models import Chain, Layout
from tests.nets import CLASSES, NETS, points_in_ball, run_chain, small_net, values_of

EPS = 0.05


def parts(name: str) -> tuple[Chain, Box, Tensor, Tensor]:
    """(chain, ball, images, specification of the margins)."""
    model, x, y = small_net(name)
    with torch.no_grad():
        return Layout(model).resolve(x), pixel_box(x, EPS), x, margin_spec(y, CLASSES)


def interval_inputs(chain: Chain, box: Box) -> ibp.Intervals:
    return ibp.inputs(chain, ibp.intervals(chain, box))


@pytest.mark.parametrize("propagate", [interval_inputs, crown.preactivations], ids=["ibp", "crown"])
@pytest.mark.parametrize("name", NETS)
def test_the_input_of_every_relu_stays_within_its_bounds(name: str, propagate) -> None:
    chain, box, x, _ = parts(name)
    with torch.no_grad():
        inputs = propagate(chain, box)
        assert sorted(inputs) == chain.relus
        for image in range(len(x)):
            values = values_of(chain, points_in_ball(x[image], EPS, 1000))
            for place in chain.relus:
                seen = values[chain.sources[place][0]]
                assert bool((seen >= inputs[place].lower[image] - 1e-5).all())
                assert bool((seen <= inputs[place].upper[image] + 1e-5).all())


@pytest.mark.parametrize("name", ["dense", "strided"])
def test_a_learning_rate_that_is_too_high_does_no_harm(name: str) -> None:
    """What counts is the best iterate, not the last."""
    chain, box, _, spec = parts(name)
    with torch.no_grad():
        boxes = crown.preactivations(chain, box)
        plain = crown.backward(chain, boxes, box, spec)
    assert bool((alpha.optimise(chain, boxes, box, spec, steps=1, lr=100.0) >= plain - 1e-5).all())
    few, many = (alpha.optimise(chain, boxes, box, spec, steps=steps, lr=1.0) for steps in (3, 10))
    assert bool((many >= few).all())


def test_optimisation_stops_where_the_target_is_reached() -> None:
    chain, box, _, spec = parts("strided")
    with torch.no_grad():
        boxes = crown.preactivations(chain, box)
        plain = crown.backward(chain, boxes, box, spec)
    reached = alpha.optimise(chain, boxes, box, spec, target=plain.min().item() - 1)
    assert torch.allclose(reached, plain)
    assert bool((alpha.optimise(chain, boxes, box, spec) > plain).any())


@pytest.mark.parametrize("slope", [0.0, 0.3, 1.0])
def test_any_slope_between_0_and_1_gives_sound_bounds(slope: float) -> None:
    chain, box, x, spec = parts("dense")
    with torch.no_grad():
        boxes = crown.preactivations(chain, box)
        alphas = {place: torch.full((2, CLASSES, *b.lower.shape[1:]), slope) for place, b in boxes.items()}
        bounds = crown.backward(chain, boxes, box, spec, slopes=alphas)
        for image in range(2):
            values = run_chain(chain, points_in_ball(x[image], EPS, 1000))
            assert bool((bounds[image] <= (values @ spec[image].T).amin(0) + 1e-5).all())


def test_the_rows_of_a_specification_are_margins() -> None:
    logits = torch.randn(3, CLASSES)
    labels = torch.tensor([2, 0, 3])
    found = (margin_spec(labels, CLASSES) @ logits[:, :, None]).squeeze(2)
    assert torch.allclose(found, logits.gather(1, labels[:, None]) - logits)


def test_a_network_of_dead_neurons_is_bounded_by_its_bias() -> None:
    """Every ReLU is off on the whole ball: bounds are exact, by every way."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    with torch.no_grad():
        model[1].bias.fill_(-100.0)
        chain, box = Layout(model).resolve(torch.rand(2, 1, 2, 2)), pixel_box(torch.rand(2, 1, 2, 2), 0.1)
        spec = margin_spec(torch.tensor([0, 1]), 2)
        expected = spec @ model[3].bias
        boxes = crown.preactivations(chain, box)
        assert torch.allclose(crown.backward(chain, boxes, box, spec), expected, atol=1e-6)
        assert torch.allclose(ibp.lower_bounds(chain, ibp.intervals(chain, box), spec), expected, atol=1e-6)
