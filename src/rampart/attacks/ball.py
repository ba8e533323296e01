"""The set of images that an attack may choose from, and how it moves in it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from rampart.kernels import Kernel

Norm = Literal["linf", "l2"]


@dataclass
class Ball:
    """The images within `eps` (pixels) of x [B, C, H, W] in a norm, and in [0, 1].

    No point of it is farther than ε even in float64: its pixels' bounds, `lower` and `upper`, are rounded towards x.
    """

    x: Tensor
    eps: float
    norm: Norm
    lower: Tensor
    upper: Tensor

    @classmethod
    def around(cls, x: Tensor, eps: float, norm: Norm = "linf") -> Ball:
        exact = torch.tensor(eps, dtype=torch.float64)
        near = exact.to(x.dtype)
        near = torch.where(near > exact, torch.nextafter(near, torch.zeros_like(near)), near)
        # In an L2 ball every pixel keeps within ε, too.
        lower, upper = (torch.nextafter(end, x).clamp_(0, 1) for end in (x - near, x + near))
        return cls(x, eps, norm, lower, upper)

    def __getitem__(self, rows: Tensor) -> Ball:
        return replace(self, x=self.x[rows], lower=self.lower[rows], upper=self.upper[rows])

    def random(self, generator: torch.Generator | None) -> Tensor:
        """A point of each ball, uniform before it is cut to [0, 1] for L2, and within it for L∞."""
        if self.norm == "linf":
            draw = torch.rand(self.x.shape, device=self.x.device, generator=generator).to(self.x.dtype)
            return self.clip(self.lower + (self.upper - self.lower) * draw)
        direction = torch.randn(self.x.shape, device=self.x.device, generator=generator).to(self.x.dtype)
        length = torch.rand(len(self.x), device=self.x.device, generator=generator) ** (1 / self.x[0].numel())
        return self.project(self.x + self.eps * _rows(length, self.x) * self.steepest(direction))

    def steepest(self, gradient: Tensor) -> Tensor:
        """The direction of length 1 in which a loss with this gradient rises most; 0 where the gradient is 0."""
        if self.norm == "linf":
            return gradient.sign()
        # The squares of a confident network's gradients are 0 in single precision.
        largest = _rows(gradient.flatten(1).abs().amax(dim=1), gradient)
        scaled = torch.where(largest > 0, gradient / largest, 0)
        return scaled / _length(scaled).clamp(min=1)

    def ascend(self, point: Tensor, gradient: Tensor, step: float | Tensor) -> Tensor:
        """The image of the ball that a step of this length (pixels; one for all, or [B, 1, 1, 1]) up the gradient leads
        to from `point`."""
        if self.norm == "linf":
            if not isinstance(step, Tensor):
                step = torch.full((), step, dtype=point.dtype, device=point.device)
            return _climb(point, gradient, step, self.lower, self.upper)
        return self.project(point + step * self.steepest(gradient))

    def project(self, point: Tensor) -> Tensor:
        """The nearest image of the ball; of an L2 ball the nearest one on the way to x, cut to [0, 1]."""
        if self.norm == "linf":
            return self.clip(point)
        exact = self.x.double()
        offset = point.double() - exact
        offset = offset * (self.eps * (1 - 1e-12) / _length(offset).clamp(min=1e-20)).clamp(max=1)
        near = (exact + offset).to(self.x.dtype)
        farther = (near.double() - exact).abs() > offset.abs()
        return self.clip(torch.where(farther, torch.nextafter(near, self.x), near))

    def clip(self, point: Tensor) -> Tensor:
        return point.clamp(self.lower, self.upper)


@Kernel
def _climb(point: Tensor, gradient: Tensor, step: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    return torch.addcmul(point, step, gradient.sign()).clamp(lower, upper)


def with_gradients(value: Tensor) -> Tensor:
    """The values alone, with which gradients can be taken: of a tensor that was made in inference mode a clone, outside
    of that mode."""
    return value.clone() if value.is_inference() else value.detach()


def gradient(loss: Tensor, point: Tensor) -> Tensor:
    """Of a scalar by an image; 0 where the loss does not depend on it, as behind a model that counts or rounds, and
    where it is not finite: no image of a ball lies in such a direction."""
    if not loss.requires_grad:
        return torch.zeros_like(point)
    (found,) = torch.autograd.grad(loss, point, allow_unused=True)
    return torch.zeros_like(point) if found is None else found.nan_to_num(0.0, 0.0, 0.0)


def _length(x: Tensor) -> Tensor:
    """L2 norm of every image, [B, 1, …]."""
    return _rows(x.flatten(1).norm(dim=1), x)


def _rows(value: Tensor, x: Tensor) -> Tensor:
    return value.view(-1, *(1,) * (x.dim() - 1))
