"""A small network, images, and labels of which it gets four wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.nets import CLASSES, randomised


@pytest.fixture
def network() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, CLASSES)
    )
    return balanced(randomised(model), torch.rand(500, 3, 4, 4))


def balanced(model: nn.Sequential, x: Tensor) -> nn.Sequential:
    """`model` with its last bias moved so that no class has a lead on average."""
    with torch.no_grad():
        model[-1].bias -= model(x).mean(0)
    return model


@pytest.fixture
def images() -> Tensor:
    return torch.rand(40, 3, 4, 4)


@pytest.fixture
def labels(network: nn.Module, images: Tensor) -> Tensor:
    """What the network says, so that it is right on all images but the first four."""
    with torch.no_grad():
        found = network(images).argmax(1)
    found[:4] = (found[:4] + 1) % CLASSES
    return found
