"""A batch, and a recorder that keeps what training tells it."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from rampart.models import Classifier
from rampart.training import State


class ListRecorder:
    """What a training told: metrics by step, and at every checkpoint a copy of the weights, and the state with
    the number of metrics' reports before it."""

    def __init__(self) -> None:
        self.kept: list[tuple[int, State]] = []
        self.told: list[tuple[int, dict[str, float]]] = []
        self.states: list[dict[str, Tensor]] = []

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self.told.append((step, dict(values)))

    def checkpoint(self, model: Classifier, state: State) -> str:
        self.kept.append((len(self.told), state))
        self.states.append({name: value.clone() for name, value in model.state_dict().items()})
        return f"<checkpoint {len(self.states) - 1}>"

    def series(self, name: str) -> list[float]:
        return [values[name] for _, values in self.told if name in values]


@pytest.fixture
def recorder() -> ListRecorder:
    return ListRecorder()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    """(x, y): 12 images of 3 classes for `small_classifier`."""
    return torch.rand(12, 3, 8, 8), torch.arange(12) % 3
