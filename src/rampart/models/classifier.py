"""Classifiers: normalisation, encoder, head. Inputs are pixels in [0, 1]."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rampart.errors import ModelError, is_out_of_memory, require, unknown


class Normalize(nn.Module):
    """(x - mean) / std per channel, so that data and ε stay in pixel space."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def check(self, x: Tensor) -> None:
        """Raises ModelError where x is no batch of images, or has another number of channels."""
        if x.dim() != 4:
            raise ModelError(f"the model takes images [B, C, H, W], not of shape {tuple(x.shape)}")
        if x.shape[1] != self.mean.shape[1]:  # broadcasting would take a grey image for a coloured one
            raise ModelError(
                f"the model takes images of {self.mean.shape[1]} channels, not {x.shape[1]}: wrong dataset?"
            )

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
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


def require_fixed(model: nn.Module, what: str) -> None:
    """Raises ModelError where a part of the model, BatchNorm or Dropout, is in training mode: it is no one network."""
    if any(part.training for part in model.modules()):
        raise ModelError(f"{what} one network: call model.eval() first")


def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    """model(x); raises ModelError where the images do not fit."""
    try:
        return model(x)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        shape = "x".join(str(size) for size in x.shape[1:])
        reason = str(error).splitlines()[0][:120]
        raise ModelError(f"the model does not take images of {shape} ({reason}): wrong dataset or model?") from error


def require_tensors(**values: object) -> None:
    """Raises SettingsError where one of the values, by its name, is no tensor but an array, say, or a list."""
    for name, value in values.items():
        given = type(value).__name__
        require(isinstance(value, Tensor), f"{name} must be a tensor, not {given}: torch.as_tensor makes one of it")


# What float32 loses of a pixel that is normalised and brought back.
ROUNDING = 1e-6


def require_pixels(x: Tensor) -> None:
    """Raises SettingsError where images are not in [0, 1], to which the balls around them are cut."""
    inside = bool(((x >= -ROUNDING) & (x <= 1 + ROUNDING)).all())
    require(inside, "images must lie between 0 and 1: divide bytes by 255, and leave normalisation to the model")


def require_labels(y: Tensor, images: int, classes: int) -> None:
    """Raises SettingsError where y is not one of the model's classes for each image."""
    require(y.shape == (images,), f"{images} images have labels of shape {tuple(y.shape)}: give one for each")
    known = y.dtype == torch.int64 and bool(((y >= 0) & (y < classes)).all())
    require(known, f"labels must be whole numbers (torch.int64) from 0 to {classes - 1}: the model's classes")


def checked_logits(model: nn.Module, x: Tensor) -> Tensor:
    """`logits_of` a copy of the images; errors as `require_pixels`, and ModelError where the model overwrites them,
    which would move the balls around them."""
    require_pixels(x)
    seen = x.clone()
    logits = logits_of(model, seen)
    if not torch.equal(seen, x):
        raise ModelError("the model overwrites the images that it is given: take its first operation out of place")
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] < 2:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(f"the model gives {shape}: it must give logits [images, classes] of two classes or more")
    return logits


# Of an image for which a model gives NaN.
NO_CLASS = -1


def classes_of(logits: Tensor) -> Tensor:
    """The classes [B] that logits [B, K] tell; NO_CLASS, which is no image's, where one of them is NaN."""
    return logits.argmax(1).masked_fill(logits.isnan().any(1), NO_CLASS)


def double_logits(model: nn.Module, x: Tensor) -> Tensor | None:
    """The logits [B, K] of images x computed in float64; None of a model that converts to another type itself."""
    found = _doubled(model, x)
    return found[1] if found else None


def double_copy(model: nn.Module, x: Tensor) -> nn.Module | None:
    """A copy of the model in float64, or itself where it is that; None where `double_logits` of images x are."""
    with torch.no_grad():
        found = _doubled(model, x)
    return found[0] if found else None


def _doubled(model: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor] | None:
    held = [value for value in (*model.parameters(), *model.buffers()) if value.is_floating_point()]
    try:
        copied = model if all(value.dtype == torch.float64 for value in held) else copy.deepcopy(model).double()
        logits = copied(x.double())
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        return None
    return (copied, logits) if logits.dtype == torch.float64 else None


def predict(model: nn.Module, x: Tensor) -> Tensor:
    """The classes [B] that the model gives to images x, as `classes_of`; errors as `logits_of`."""
    with torch.no_grad():
        return classes_of(logits_of(model, x))


def _paper_cnn(in_shape: tuple[int, int, int], width: float) -> tuple[nn.Module, int]:
    """The study's Figure 2: three strided convolutions instead of pooling (cheaper to verify), then two linear maps."""
    channels, rows, columns = in_shape
    *sizes, hidden, embedding = _scaled(width, 32, 64, 128, 256, 128)
    layers: list[nn.Module] = []
    for out in sizes:
        layers += [nn.Conv2d(channels, out, 3, stride=2, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
        channels, rows, columns = out, (rows + 1) // 2, (columns + 1) // 2
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


def _scaled(width: float, *sizes: int) -> list[int]:
    return [max(round(size * width), 1) for size in sizes]


def _stack(in_shape: tuple[int, int, int], convolutions: Sequence[tuple[int, int]], embedding: int) -> nn.Module:
    """3x3 convolutions (channels, stride), then a linear map, each with BatchNorm and ReLU."""
    channels, rows, columns = in_shape
    layers: list[nn.Module] = []
    for out, stride in convolutions:
        layers += [nn.Conv2d(channels, out, 3, stride, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
        channels, rows, columns = out, -(-rows // stride), -(-columns // stride)
    dense = [nn.Linear(channels * rows * columns, embedding), nn.BatchNorm1d(embedding), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), *dense)


def _cnn7(in_shape: tuple[int, int, int], width: float) -> tuple[nn.Module, int]:
    """The network of the certified-training literature (Shi et al. 2021, with BatchNorm): 17 M weights."""
    few, many, embedding = _scaled(width, 64, 128, 512)
    return _stack(in_shape, [(few, 1), (few, 1), (many, 2), (many, 1), (many, 1)], embedding), embedding


def _cnn5(in_shape: tuple[int, int, int], width: float) -> tuple[nn.Module, int]:
    """A shallower cnn7: three convolutions, two of them strided; 4.4 M weights."""
    few, many, embedding = _scaled(width, 64, 128, 512)
    return _stack(in_shape, [(few, 1), (many, 2), (many, 2)], embedding), embedding


class _Block(nn.Module):
    """Two 3x3 convolutions beside a 1x1 one (He et al. 2016), all with BatchNorm."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
            nn.BatchNorm2d(out),
        )
        same = channels == out and stride == 1
        shortcut = [nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)]
        self.shortcut = nn.Identity() if same else nn.Sequential(*shortcut)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.branch(x) + self.shortcut(x))


def _resnet(in_shape: tuple[int, int, int], width: float) -> tuple[nn.Module, int]:
    """A strided convolution, three residual blocks, average pooling, a linear map."""
    stem, first, second, embedding = _scaled(width, 32, 64, 128, 128)
    # On CPUs with AVX2 alone, PyTorch 2.8's gradient of a strided 1x1 convolution by its weights writes past its memory
    # where there are fewer input channels.
    stem, first = max(stem, 8), max(first, 8)
    rows, columns = ((size + 7) // 8 for size in in_shape[1:])
    pool = 2 if rows % 2 == columns % 2 == 0 else 1
    body = nn.Sequential(
        nn.Conv2d(in_shape[0], stem, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(stem),
        nn.ReLU(),
        _Block(stem, first, 2),
        _Block(first, second, 2),
        _Block(second, second, 1),
        nn.AvgPool2d(pool),
        nn.Flatten(),
        nn.Linear(second * (rows // pool) * (columns // pool), embedding),
        nn.BatchNorm1d(embedding),
    )
    return body, embedding


# name -> ((C, H, W), width factor) -> (encoder, size of its embedding)
ENCODERS: dict[str, Callable[[tuple[int, int, int], float], tuple[nn.Module, int]]] = {
    "paper-cnn": _paper_cnn,
    "cnn5": _cnn5,
    "cnn7": _cnn7,
    "resnet": _resnet,
}


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


def interval_init(model: nn.Module) -> None:
    """Weights under which intervals keep their width from map to map: N(0, 2π / n²) for n inputs a neuron, biases 0
    (Shi et al. 2021, section 3.2)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.normal_(module.weight, std=math.sqrt(2 * math.pi) / module.weight[0].numel())
            if module.bias is not None:
                nn.init.zeros_(module.bias)
