"""Linear bounds of a reduced problem over parts of the ball, and their optimisation (α- and β-CROWN)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from rampart.bounds.reduced import Reduced, Rows

# Of float32, as a share of the terms that the multipliers add.
ROUNDING = 1e-6


class Sweep(NamedTuple):
    """What a pass back finds of each of D rows.

    Args:
        bound: [D].
        relu: [D, U] coefficients of ReLU(v) on the way.
        x: [D, I] the point of the ball where the linear bound is smallest.
    """

    bound: Tensor
    relu: Tensor
    x: Tensor


@dataclass
class Parts:
    """D parts of the ball, by what is known of v in each.

    Args:
        signs: [D, U] of 1 (v >= 0), -1 (v <= 0) and 0 (either).
        lower, upper: bounds [D, U] of v; what is known by its sign has no need of them.
    """

    signs: Tensor
    lower: Tensor
    upper: Tensor

    def __len__(self) -> int:
        return len(self.signs)

    def at(self, which: Tensor) -> Parts:
        return Parts(self.signs[which], self.lower[which], self.upper[which])

    @classmethod
    def whole(cls, net: Reduced, count: int) -> Parts:
        """The whole ball, `count` times."""
        shape = count, len(net.lower)
        return cls(net.lower.new_zeros(shape), net.lower.expand(shape), net.upper.expand(shape))

    @cached_property
    def above(self) -> tuple[Tensor, Tensor]:
        """(slopes, intercepts) of the upper side of each neuron's relaxation, each [D, U]."""
        slope = self.upper / (self.upper - self.lower)
        free = self.signs == 0
        return torch.where(free, slope, (self.signs > 0).to(slope.dtype)), torch.where(free, -self.lower * slope, 0.0)

    def below(self, slopes: Tensor) -> Tensor:
        """Slopes of the lower side: those given, [D, U] in [0, 1], where nothing is known."""
        return torch.where(self.signs == 0, slopes, (self.signs > 0).to(slopes.dtype))


@dataclass
class Domains:
    """Rows over parts of the ball, and what their bounds are made with.

    Args:
        rows: D of them.
        parts: the part for each.
        slopes: [D, U] in [0, 1], below the neurons of unknown sign.
        multipliers: β >= 0 of the known signs, [D, U].
    """

    rows: Rows
    parts: Parts
    slopes: Tensor
    multipliers: Tensor

    def __len__(self) -> int:
        return len(self.slopes)

    def at(self, which: Tensor) -> Domains:
        return Domains(self.rows.at(which), self.parts.at(which), self.slopes[which], self.multipliers[which])

    @classmethod
    def over(cls, rows: Rows, parts: Parts) -> Domains:
        """With CROWN's slopes, and without multipliers."""
        slopes = (parts.upper > -parts.lower).to(parts.upper.dtype)
        return cls(rows, parts, slopes, torch.zeros_like(slopes))

    @classmethod
    def roots(cls, net: Reduced, rows: Rows) -> Domains:
        """The whole ball for each row."""
        return cls.over(rows, Parts.whole(net, len(rows.constant)))


def back(net: Reduced, domains: Domains) -> Sweep:
    """Lower bounds of the domains' rows (β-CROWN: Wang et al. 2021, theorem 3.1)."""
    (upper_slope, intercept), lower_slope = domains.parts.above, domains.parts.below(domains.slopes)
    shift = domains.multipliers * domains.parts.signs
    relu = domains.rows.of_relu.clone()
    pulled = torch.empty_like(relu)
    for start, stop in reversed(net.layers):
        part = slice(start, stop)
        negative = relu[:, part].clamp(max=0)
        own = (relu[:, part] - negative) * lower_slope[:, part]
        pulled[:, part] = torch.addcmul(own, negative, upper_slope[:, part]).sub_(shift[:, part])
        if start:
            relu[:, :start] += pulled[:, part] @ net.neurons.of_relu[part, :start]
    weights = torch.addmm(domains.rows.of_input, pulled, net.neurons.of_input)
    constant = domains.rows.constant + pulled @ net.neurons.constant + (relu.clamp(max=0) * intercept).sum(1)
    bound = weights @ net.center - weights.abs() @ net.half + constant
    return Sweep(bound, relu, net.center - weights.sign() * net.half)


def forth(net: Reduced, domains: Domains, found: Sweep) -> Tensor:
    """v [D, U] at the minimisers, where each ReLU before it is the side of its relaxation that the bound has taken.

    It gives the bound's derivatives: relu+ * v by a slope, -sign * v by a multiplier.
    """
    (upper_slope, intercept), lower_slope = domains.parts.above, domains.parts.below(domains.slopes)
    rising = found.relu >= 0
    taken, offset = torch.where(rising, lower_slope, upper_slope), intercept.masked_fill(rising, 0)
    v = torch.addmm(net.neurons.constant, found.x, net.neurons.of_input.T)
    after = torch.empty_like(v)
    for start, stop in net.layers:
        part = slice(start, stop)
        if start:
            v[:, part] += after[:, :start] @ net.neurons.of_relu[part, :start].T
        after[:, part] = torch.addcmul(offset[:, part], taken[:, part], v[:, part])
    return v


class Optimised(NamedTuple):
    """The best bounds [D] seen, the domains with what gave them, and the sweep [D] and v [D, U] seen last."""

    bound: Tensor
    domains: Domains
    last: Sweep
    v: Tensor


def optimise(
    net: Reduced, domains: Domains, steps: int, lr: float = 0.1, target: float | Tensor = float("inf")
) -> Optimised:
    """Raises the bounds by Adam on slopes (Xu et al. 2021) and multipliers (Wang et al. 2021).

    The first bound is that of the domains as given; a domain above `target` (one, or [D]) is not worked on further.
    """
    parts = domains.parts
    bound = domains.slopes.new_full((len(domains),), -torch.inf)
    slopes, multipliers = domains.slopes.clone(), domains.multipliers.clone()
    relu, x, v = torch.zeros_like(slopes), domains.rows.of_input.new_empty(domains.rows.of_input.shape), slopes.clone()
    target = torch.as_tensor(target, device=bound.device).expand(len(domains))
    active, now = torch.arange(len(domains), device=bound.device), domains
    reach = torch.maximum(parts.lower.abs(), parts.upper.abs())
    # Adam's two averages for either.
    averages = [torch.zeros_like(slopes) for _ in range(4)]
    for step in range(steps + 1):
        found = back(net, now)
        ahead = forth(net, now, found)
        relu[active], x[active], v[active] = found.relu, found.x, ahead
        # Large multipliers of what should be 0 leave their rounding behind.
        proven = found.bound - ROUNDING * (now.multipliers * now.parts.signs.abs() * reach).sum(1)
        better = (proven > bound[active]) & proven.isfinite()
        bound[active[better]] = proven[better]
        slopes[active[better]], multipliers[active[better]] = now.slopes[better], now.multipliers[better]
        left = bound[active] <= target[active]
        if step == steps or not bool(left.any()):
            break
        if 4 * int(left.sum()) < 3 * len(left):
            active, now, ahead, reach = active[left], now.at(left), ahead[left], reach[left]
            found = Sweep(*(tensor[left] for tensor in found))
            averages = [average[left] for average in averages]
        gradients = found.relu.clamp(min=0).mul_(ahead), -ahead * now.parts.signs
        values = []
        for number, (value, gradient) in enumerate(zip((now.slopes, now.multipliers), gradients, strict=True)):
            mean, square = averages[2 * number : 2 * number + 2]
            mean.lerp_(gradient, 0.1)
            square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            deviation = (square / (1 - 0.999 ** (step + 1))).sqrt_().add_(1e-8)
            values.append(torch.addcdiv(value, mean, deviation, value=lr * 0.98**step / (1 - 0.9 ** (step + 1))))
        now = Domains(now.rows, now.parts, values[0].clamp_(0, 1), values[1].clamp_(min=0))
    return Optimised(bound, Domains(domains.rows, parts, slopes, multipliers), Sweep(bound, relu, x), v)
