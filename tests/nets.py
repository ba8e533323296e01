"""Small networks of every kind that the native bound engine knows, and points of the balls around their inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from rampart.attacks import Ball
from rampart.data import Dataset, to_pixels
from rampart.models import Chain, Classifier, Normalize, build_model
from rampart.models.geometry import Geometry
from rampart.models.links import Affine, ReLU

CLASSES = 4
M = TypeVar("M", bound=nn.Module)


def convolutions() -> st.SearchStrategy[Geometry]:
    """Small ones of one group, whose kernels fit into their padded images."""
    pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))
    paddings, sizes = st.tuples(*[st.integers(0, 3)] * 2), st.tuples(*[st.integers(1, 8)] * 2)
    drawn = st.builds(Geometry, pairs, pairs, paddings, pairs, sizes)
    return drawn.filter(lambda g: all(n + 2 * p >= s for n, p, s in zip(g.in_size, g.padding, g.spans, strict=True)))


def randomised(model: M) -> M:
    """`model` in eval mode, with BatchNorm constants that are far from the identity (some scales are negative)."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.3, 1.5)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias, 0, 0.3)
    return model.eval()


def _dense() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 8, bias=False), nn.ReLU(), nn.Linear(8, CLASSES)
    )


def _strided() -> nn.Module:
    """As the study's: strided convolutions with BatchNorm, dense layers with BatchNorm1d."""
    return nn.Sequential(
        Normalize([0.5, 0.4, 0.3], [0.5, 0.25, 0.2]),
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, 10),
        nn.BatchNorm1d(10),
        nn.ReLU(),
        nn.Linear(10, CLASSES),
    )


def _deep() -> nn.Module:
    """Three convolutions of stride 1 on maps that are not square, without padding and with a wide one."""
    return nn.Sequential(
        nn.Conv2d(2, 3, 2),
        nn.ReLU(),
        nn.Conv2d(3, 4, 3, padding=2),
        nn.ReLU(),
        nn.Conv2d(4, 3, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(3 * 6 * 8, CLASSES),
    )


def _grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(54, CLASSES),
    )


def _dilated() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=2, dilation=2),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, stride=3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, CLASSES),
    )


def _unfolded() -> nn.Module:
    """BatchNorm where no affine map stands before it: after a ReLU, and after the flatten."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.BatchNorm1d(36),
        nn.Linear(36, 8),
        nn.ReLU(),
        nn.Linear(8, CLASSES),
    )


def _maps_in_a_row() -> nn.Module:
    """Affine maps that follow one another, before the first ReLU and after it."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.Conv2d(4, 4, 3, stride=2),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Conv2d(4, 4, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4, 6),
        nn.Linear(6, CLASSES),
    )


def _plain_norm() -> nn.Module:
    """BatchNorm without scale and shift of its own."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2),
        nn.BatchNorm2d(4, affine=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 8, bias=False),
        nn.BatchNorm1d(8, affine=False),
        nn.ReLU(),
        nn.Linear(8, CLASSES),
    )


class Functional(nn.Module):
    """Layers as functions and methods, and layers that do nothing in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.hidden, self.head = nn.Conv2d(3, 4, 3, stride=2), nn.Linear(16, 8), nn.Linear(8, CLASSES)
        self.same, self.dropout = nn.Identity(), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.flatten(torch.relu(self.conv(x)), 1)
        return self.head(self.dropout(nn.functional.relu(self.hidden(self.same(x)))))


def _rectangular() -> nn.Module:
    """Kernel, stride and padding that differ between rows and columns."""
    return nn.Sequential(
        nn.Conv2d(1, 3, (3, 2), stride=(2, 1), padding=(1, 0)),
        nn.ReLU(),
        nn.Conv2d(3, 3, (1, 3), stride=(1, 2), padding=(0, 2)),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(48, CLASSES),
    )


class Residual(nn.Module):
    """Blocks that join with a convolution of the input of the block, and with the input itself."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 3, 3, padding=1)
        self.first = nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)
        )
        self.shortcut = nn.Sequential(nn.Conv2d(3, 4, 1, stride=2), nn.BatchNorm2d(4))
        self.second = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.head = nn.Linear(36, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.first(x) + self.shortcut(x))
        x = torch.relu(torch.add(self.second(x), x))
        return self.head(x.flatten(1))


class Densely(nn.Module):
    """Additions of vectors: of a value with itself, and of the input with what is made of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        x = torch.relu(self.first(x)) + x
        x = torch.relu(self.second(x + x))
        return self.head(x) + self.head(x)


def _pooled() -> nn.Module:
    """Average pooling in windows that overlap and hang over the border, and over the whole map."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(3, stride=2, padding=1),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(4, 6, 2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, CLASSES),
    )


class Arithmetic(nn.Module):
    """Constants before, between and after the layers; a mean over the map and a view in place of layers."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.5, 0.4, 0.3])[:, None, None])
        self.std = [0.5, 0.25, 0.2]
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.first, self.second = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.hidden, self.head = nn.Linear(6, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean) / torch.tensor(self.std).view(1, 3, 1, 1).to(self.mean)
        x = torch.relu(1 - self.first(x))
        x = torch.relu(self.second(x * 2 - 1)).mean((2, 3))
        x = torch.relu(self.hidden(x.view(x.shape[0], -1)))
        return self.scale * self.head(x.reshape(x.size(0), -1)) + 0.1


def _averaged() -> nn.Module:
    """Average pooling in windows side by side."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(4, 4, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4, CLASSES),
    )


# name -> (shape of an image, factory)
NETS: dict[str, tuple[tuple[int, int, int], Callable[[], nn.Module]]] = {
    "dense": ((3, 2, 2), _dense),
    "strided": ((3, 8, 8), _strided),
    "deep": ((2, 5, 7), _deep),
    "grouped": ((4, 6, 6), _grouped),
    "dilated": ((3, 7, 7), _dilated),
    "unfolded": ((3, 6, 6), _unfolded),
    "maps-in-a-row": ((3, 5, 5), _maps_in_a_row),
    "plain-norm": ((3, 6, 6), _plain_norm),
    "functional": ((3, 6, 6), Functional),
    "rectangular": ((1, 8, 7), _rectangular),
    "residual": ((2, 6, 6), Residual),
    "densely": ((3, 2, 2), Densely),
    "pooled": ((3, 8, 8), _pooled),
    "averaged": ((3, 6, 6), _averaged),
    "arithmetic": ((3, 6, 6), Arithmetic),
}


def small_net(name: str, count: int = 2) -> tuple[nn.Module, Tensor, Tensor]:
    """(network in eval mode, `count` images in [0, 1], labels)."""
    shape, factory = NETS[name]
    return randomised(factory()), torch.rand(count, *shape), torch.randint(CLASSES, (count,))


def small_classifier(classes: int = CLASSES, in_shape: tuple[int, int, int] = (3, 8, 8)) -> Classifier:
    """The study's architecture at a tiny width, in eval mode."""
    return randomised(build_model("paper-cnn", in_shape, classes, width=0.0625))


def undecided_classifier(classes: int = 3) -> Classifier:
    """A small classifier of random images [3, 8, 8] that gives every class to some of them, and is easily changed."""
    torch.manual_seed(1)
    model = small_classifier(classes)
    with torch.no_grad():
        model.head.weight *= 300
        model.head.bias.zero_()
        model.head.bias -= model(torch.rand(100, 3, 8, 8)).mean(0)
    return model


def values_of(chain: Chain, x: Tensor) -> dict[int, Tensor]:
    """x through the links: every value, by the place of the link that makes it; -1 is x."""
    values = {-1: x}
    for place, link in enumerate(chain.links):
        read = [values[source] for source in chain.sources[place]]
        if isinstance(link, Affine):
            assert tuple(read[0].shape[1:]) == tuple(link.in_shape)
            values[place] = link.apply(read[0])
        else:
            values[place] = read[0].relu() if isinstance(link, ReLU) else read[0] + read[1]
        assert tuple(values[place].shape[1:]) == tuple(link.out_shape)
    return values


def run_chain(chain: Chain, x: Tensor) -> Tensor:
    return values_of(chain, x)[chain.last]


def points_in_ball(image: Tensor, eps: float | Tensor, count: int) -> Tensor:
    """[count, C, H, W] of the ball around `image` cut to [0, 1]: a third inside, a third corners, a third on faces."""
    lower, upper = (image - eps).clamp(0, 1), (image + eps).clamp(0, 1)
    share = torch.rand(count, *image.shape, dtype=image.dtype)
    corner = share.round()
    kind = torch.arange(count).view(-1, 1, 1, 1) % 3
    on_face = torch.where(torch.rand_like(share) < 0.5, corner, share)
    share = torch.where(kind == 0, share, torch.where(kind == 1, corner, on_face))
    return lower + (upper - lower) * share


def margins(model: nn.Module, x: Tensor, label: int) -> Tensor:
    """z_y - z_j of images x, [B, K], +inf at the label."""
    with torch.no_grad():
        logits = model(x)
    found = logits[:, label, None] - logits
    found[:, label] = torch.inf
    return found


def linear_classifier(data: Dataset) -> nn.Module:
    """A linear classifier of `data`, in eval mode: right on most images, easily attacked on some."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(192, 10))
    return fitted(model, data, lr=0.02, steps=60)


def fitted(model: M, data: Dataset, lr: float, steps: int) -> M:
    """`model` after `steps` of Adam on all training images at once, in eval mode and without gradients."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    x = to_pixels(data.train.images)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), data.train.labels).backward()
        optimizer.step()
    model.zero_grad()
    return model.eval()


def wrong_in_a_corner(image: Tensor, eps: float) -> tuple[nn.Sequential, Tensor]:
    """(model, point): it gives an image label 0 but for the last hundredth of the ball before one of its corners, the
    point, where a neuron that is off elsewhere is on: there by a ten-thousandth of the logits the label is 1."""
    first, last = nn.Linear(image.numel(), 1), nn.Linear(1, 2)
    model = nn.Sequential(nn.Flatten(), first, nn.ReLU(), last).eval()
    weight = torch.where(torch.arange(image.numel()) % 3 > 0, 1000.0, -1000.0)
    ball, top = Ball.around(image[None], eps), float(weight.abs().sum()) * eps
    corner = torch.where(weight.view(image.shape) > 0, ball.upper[0], ball.lower[0])
    with torch.no_grad():
        first.weight[0] = weight
        first.bias[0] = -float(weight.double() @ image.flatten().double()) - 0.99 * top
        last.weight.copy_(torch.tensor([[-100 / top], [0.0]]))
        last.bias.zero_()
        logits = copy.deepcopy(model).double()(corner[None].double())[0]
        last.bias[0] = float(logits[1] - logits[0]) * (1 - 1e-4)
    return model, corner
