"""Linear bounds of a reduced problem over parts of the ball, and their optimisation (α- and β-CROWN)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from rampart.bounds.reduced import Reduced, Rows

# Of float32, as a share of the terms that the multipliers add.
ROUNDING = 1e-6
# Multiplier that float16 keeps.
LARGEST = 6e4


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

    def at(self, which: Tensor | slice) -> Parts:
        return Parts(self.signs[which], self.lower[which], self.upper[which])

    def up_to(self, count: int) -> Parts:
        """What is known of the first `count` neurons."""
        return Parts(self.signs[:, :count], self.lower[:, :count], self.upper[:, :count])

    @classmethod
    def whole(cls, net: Reduced, count: int) -> Parts:
        """The whole ball, `count` times."""
        shape = count, len(net.lower)
        return cls(net.lower.new_zeros(shape), net.lower.expand(shape), net.upper.expand(shape))

    @cached_property
    def free(self) -> Tensor:
        """[D, U] of neurons of unknown sign."""
        return self.signs == 0

    @cached_property
    def passing(self) -> Tensor:
        """[D, U]: 1 of those that are known to pass, else 0."""
        return (self.signs > 0).to(self.signs.dtype)

    def single(self) -> Parts:
        return Parts(self.signs.float(), self.lower.float(), self.upper.float())

    @cached_property
    def above(self) -> tuple[Tensor, Tensor]:
        """(slopes, intercepts) of the upper side of each neuron's relaxation, each [D, U]."""
        # Both ends may be too small for float32.
        slope = self.upper / (self.upper - self.lower).clamp(min=torch.finfo(self.upper.dtype).tiny)
        return torch.where(self.free, slope, self.passing), torch.where(self.free, -self.lower * slope, 0.0)


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

    @cached_property
    def below(self) -> Tensor:
        """Slopes [D, U] of the lower side of each neuron's relaxation."""
        return torch.where(self.parts.free, self.slopes, self.parts.passing)

    def at(self, which: Tensor) -> Domains:
        return Domains(self.rows.at(which), self.parts.at(which), self.slopes[which], self.multipliers[which])

    def single(self) -> Domains:
        """In float32."""
        return Domains(self.rows.single(), self.parts.single(), self.slopes.float(), self.multipliers.float())

    def start(self, which: int | slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Slopes and multipliers in float16, for smaller parts of the ball to start from: no part of a proof."""
        return self.slopes[which].half(), self.multipliers[which].clamp(max=LARGEST).half()

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
    (upper_slope, intercept), lower_slope = domains.parts.above, domains.below
    shift = domains.multipliers * domains.parts.signs
    relu = domains.rows.of_relu.clone()
    pulled = torch.empty_like(relu)
    of_input, of_relu = net.bands
    for (start, stop), before in zip(reversed(net.layers), reversed(of_relu), strict=True):
        part = slice(start, stop)
        negative = relu[:, part].clamp(max=0)
        own = (relu[:, part] - negative) * lower_slope[:, part]
        pulled[:, part] = torch.addcmul(own, negative, upper_slope[:, part]).sub_(shift[:, part])
        before.add(relu[:, :start], pulled[:, part])
    weights = domains.rows.of_input.clone()
    of_input.add(weights, pulled)
    constant = domains.rows.constant + pulled @ net.neurons.constant + (relu.clamp(max=0) * intercept).sum(1)
    bound = weights @ net.center - weights.abs() @ net.half + constant
    return Sweep(bound, relu, net.center - weights.sign() * net.half)


def forth(net: Reduced, domains: Domains, found: Sweep) -> Tensor:
    """v [D, U] at the minimisers, where each ReLU before it is the side of its relaxation that the bound has taken.

    It gives the bound's derivatives: relu+ * v by a slope, -sign * v by a multiplier.
    """
    (upper_slope, intercept), lower_slope = domains.parts.above, domains.below
    rising = found.relu >= 0
    taken, offset = torch.where(rising, lower_slope, upper_slope), intercept.masked_fill(rising, 0)
    of_input, of_relu = net.bands
    v = net.neurons.constant.repeat(len(domains), 1)
    of_input.add_transposed(v, found.x)
    after = torch.empty_like(v)
    for (start, stop), before in zip(net.layers, of_relu, strict=True):
        part = slice(start, stop)
        before.add_transposed(v[:, part], after[:, :start])
        after[:, part] = torch.addcmul(offset[:, part], taken[:, part], v[:, part])
    return v


class Optimised(NamedTuple):
    """The best bounds [D] seen, in the problem's precision, the domains with what gave them, and in float32 the last
    sweep [D] (with the best bounds) and v [D, U]."""

    bound: Tensor
    domains: Domains
    last: Sweep
    v: Tensor


def optimise(
    net: Reduced, domains: Domains, steps: int, lr: float = 0.1, target: float | Tensor = float("inf")
) -> Optimised:
    """Raises the bounds by Adam on slopes (Xu et al. 2021) and multipliers (Wang et al. 2021).

    The first bound is that of the domains as given; a domain above `target` (one, or [D]) is not worked on further.
    Slopes and multipliers are looked for in float32. A bound by whichever of them holds, so that it is the last pass,
    in the problem's own precision, which proves.
    """
    problem, asked = net, domains
    net, domains = net.single, domains.single()
    parts = domains.parts
    bound = domains.slopes.new_full((len(domains),), -torch.inf)
    slopes, multipliers = domains.slopes.clone(), domains.multipliers.clone()
    relu, x, v = torch.empty_like(slopes), torch.empty_like(domains.rows.of_input), torch.empty_like(slopes)
    target = torch.as_tensor(target, device=bound.device).expand(len(domains))
    active, now = torch.arange(len(domains), device=bound.device), domains
    # Few neurons are of a known sign in any domain, and have a multiplier.
    known = (~parts.free).any(0).nonzero().squeeze(1)
    signs = parts.signs[:, known]
    reach = signs.abs() * torch.maximum(parts.lower[:, known].abs(), parts.upper[:, known].abs())
    # Adam's two averages for either.
    averages = [torch.zeros_like(value) for value in (slopes, slopes, signs, signs)]
    for step in range(steps + 1):
        found = back(net, now)
        ahead = forth(net, now, found)
        # Large multipliers of what should be 0 leave their rounding behind.
        proven = found.bound - ROUNDING * (now.multipliers[:, known] * reach).sum(1)
        better = (proven > bound[active]) & proven.isfinite()
        bound[active[better]] = proven[better]
        slopes[active[better]], multipliers[active[better]] = now.slopes[better], now.multipliers[better]
        left = bound[active] <= target[active]
        last = step == steps or not bool(left.any())
        fewer = 4 * int(left.sum()) < 3 * len(left)
        if last or fewer:
            relu[active], x[active], v[active] = found.relu, found.x, ahead
        if last:
            break
        if fewer:
            active, now, ahead, reach, signs = active[left], now.at(left), ahead[left], reach[left], signs[left]
            found = Sweep(*(tensor[left] for tensor in found))
            averages = [average[left] for average in averages]
        moved = []
        for number, (value, gradient) in enumerate(
            ((now.slopes, found.relu.clamp(min=0).mul_(ahead)), (now.multipliers[:, known], -ahead[:, known] * signs))
        ):
            mean, square = averages[2 * number : 2 * number + 2]
            mean.lerp_(gradient, 0.1)
            square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            deviation = (square / (1 - 0.999 ** (step + 1))).sqrt_().add_(1e-8)
            moved.append(torch.addcdiv(value, mean, deviation, value=lr * 0.98**step / (1 - 0.9 ** (step + 1))))
        betas = now.multipliers.index_copy(1, known, moved[1].clamp_(min=0))
        now = Domains(now.rows, now.parts, moved[0].clamp_(0, 1), betas)
    best = replace(asked, slopes=slopes.to(asked.slopes), multipliers=multipliers.to(asked.slopes))
    proven = bound if problem is net else back(problem, best).bound
    # What overflows proves nothing.
    proven = proven.masked_fill(proven.isnan() | (proven == torch.inf), -torch.inf)
    return Optimised(proven, best, Sweep(bound, relu, x), v)
