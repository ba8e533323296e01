"""The study's CNN: normalisation, encoder, head. Inputs are pixels in [0, 1]."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rampart.errors import ModelError, require, unknown


class Normalize(nn.Module):
    """(x - mean) / std per channel, so that data and ε stay in pixel space."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != self.mean.shape[1]:  # broadcasting would take a grey image for a coloured one
            raise ModelError(
                f"the model takes images of {self.mean.shape[1]} channels, not {x.shape[1]}: wrong dataset?"
            )
        return (x - self.mean) / self.std


@dataclass(frozen=True)
class Architecture:
    """What it takes to build the same network again; travels with the weights."""

    name: str
    in_shape: tuple[int, int, int]
    classes: int
    width: float = 1.0


class Classifier(nn.Module):
    """`head(encoder(normalize(x)))`: pixels [B, C, H, W] in [0, 1] -> logits [B, K]."""

    def __init__(self, architecture: Architecture, normalize: Normalize, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.architecture = architecture
        self.normalize, self.encoder, self.head = normalize, encoder, head

    def embed(self, x: Tensor) -> Tensor:
        """Pixels [B, C, H, W] -> the encoder's output [B, D] (not normalised to unit length)."""
        return self.encoder(self.normalize(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))


def _paper_cnn(in_shape: tuple[int, int, int], width: float) -> tuple[nn.Module, int]:
    """The study's Figure 2: three strided convolutions instead of pooling (cheaper to verify), then two linear maps."""

    def scaled(size: int) -> int:
        return max(round(size * width), 1)

    channels, rows, columns = in_shape
    layers: list[nn.Module] = []
    for out in (scaled(32), scaled(64), scaled(128)):
        layers += [nn.Conv2d(channels, out, 3, stride=2, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
        channels, rows, columns = out, (rows + 1) // 2, (columns + 1) // 2
    hidden, embedding = scaled(256), scaled(128)
    parts = [
        ("features", nn.Sequential(*layers)),
        ("flatten", nn.Flatten()),
        (
            "projection",
            nn.Sequential(
                nn.Linear(channels * rows * columns, hidden),
                nn.ReLU(),
                nn.Linear(hidden, embedding),
                nn.BatchNorm1d(embedding),
            ),
        ),
    ]
    return nn.Sequential(OrderedDict(parts)), embedding


# name -> ((C, H, W), width factor) -> (encoder, size of its embedding)
ENCODERS: dict[str, Callable[[tuple[int, int, int], float], tuple[nn.Module, int]]] = {"paper-cnn": _paper_cnn}


def build_model(
    name: str = "paper-cnn", in_shape: tuple[int, int, int] = (3, 32, 32), classes: int = 10, width: float = 1.0
) -> Classifier:
    """A fresh network, in training mode, initialised from torch's global random state.

    Args:
        name: of the architecture, one of ENCODERS.
        in_shape: (C, H, W) of the images.
        classes: number of logits K.
        width: factor on the number of channels and hidden neurons of every layer; the study's network is 1.
    """
    require(name in ENCODERS, unknown("architecture", name, ENCODERS))
    if min(in_shape) < 1 or classes < 2 or not width > 0:
        raise ModelError(
            f"a model needs images with a pixel or more, two classes or more and a width above 0, "
            f"not {in_shape}, {classes} and {width}"
        )
    encoder, embedding = ENCODERS[name](in_shape, width)
    normalize = Normalize([0.5] * in_shape[0], [0.5] * in_shape[0])
    return Classifier(Architecture(name, in_shape, classes, width), normalize, encoder, nn.Linear(embedding, classes))
