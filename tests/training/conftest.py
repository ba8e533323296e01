"""A batch, and a recorder that keeps what training tells it."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from rampart.models import Classifier


class ListRecorder:
    """What a training told: metrics by step, and a copy of the weights at every checkpoint."""

    def __init__(self) -> None:
        self.told: list[tuple[int, dict[str, float]]] = []
        self.states: list[dict[str, Tensor]] = []

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self.told.append((step, dict(values)))

    def checkpoint(self, model: Classifier) -> str:
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
