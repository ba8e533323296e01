"""The network of one image as a problem in its unstable neurons alone.

Over a ball most ReLUs are stable: always on or always off, hence linear. What is left is

    v = M x + N ReLU(v) + c,    margins = M' x + N' ReLU(v) + c'

with v the inputs of the U unstable ReLUs, in the network's order, so that N is strictly lower triangular. It is worked
out once an image; every linear bound, of α-CROWN's steps and of branch and bound's domains, is then a few products of
matrices over U neurons in the place of convolutions over all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from rampart.bounds import crown, ibp
from rampart.bounds.box import Box
from rampart.models.chain import Chain
from rampart.models.links import Add, ReLU

# Bytes of one image's matrices beyond which they are not made: some 18,000 unstable neurons of CIFAR-10's pixels.
LIMIT = 3 << 29


# Of float32, as a share of the terms that the multipliers add.
ROUNDING = 1e-6


class Rows(NamedTuple):
    """Affine forms in x and ReLU(v): coefficients [R, I] and [R, U], and constants [R]."""

    of_input: Tensor
    of_relu: Tensor
    constant: Tensor

    def at(self, rows: Tensor | slice) -> Rows:
        return Rows(*(tensor[rows] for tensor in self))

    def double(self) -> Rows:
        return Rows(*(tensor.double() for tensor in self))

    @classmethod
    def joined(cls, parts: list[Rows]) -> Rows:
        return cls(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


@dataclass
class Reduced:
    """One image's problem.

    Args:
        layers: (first, last + 1) of v's neurons by ReLU layer.
        neurons: v as rows [U].
        outputs: the specification as rows [K].
        lower, upper: bounds [U] of v.
        center, half: the ball [I].
    """

    layers: list[tuple[int, int]]
    neurons: Rows
    outputs: Rows
    lower: Tensor
    upper: Tensor
    center: Tensor
    half: Tensor

    @property
    def slope(self) -> Tensor:
        """Of the upper side of each neuron's relaxation, [U]."""
        return self.upper / (self.upper - self.lower)

    def substituted(self, signs: Tensor) -> tuple[Rows, Rows]:
        """(neurons, outputs) where the neurons of sign [U] 1 pass and those of -1 give 0: neither is read any more."""
        on, kept = (signs > 0).to(self.lower.dtype), (signs == 0).to(self.lower.dtype)
        done = Rows(*(tensor.clone() for tensor in self.neurons))

        def put_in(rows: Rows, count: int) -> Rows:
            """Rows that read the first `count` neurons, with what these amount to."""
            read = rows.of_relu[:, :count]
            linear, of_relu = read * on[:count], rows.of_relu.clone()
            of_relu[:, :count] = read * kept[:count] + linear @ done.of_relu[:count, :count]
            return Rows(
                rows.of_input + linear @ done.of_input[:count], of_relu, rows.constant + linear @ done.constant[:count]
            )

        for start, stop in self.layers[1:]:
            for tensor, new in zip(done, put_in(done.at(slice(start, stop)), start), strict=True):
                tensor[start:stop] = new
        return done, put_in(self.outputs, len(signs))

    def relaxation(self, signs: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(lower slopes, upper slopes, intercepts), each [D, U], of domains: a neuron that is split is linear.

        Args:
            signs: [D, U] of 1 (v >= 0), -1 (v <= 0) and 0 (not split).
            slopes: [D, U] lower slopes in [0, 1] of the neurons that are not split.
        """
        free, on = signs == 0, (signs > 0).to(slopes.dtype)
        upper = torch.where(free, self.slope, on)
        return torch.where(free, slopes, on), upper, torch.where(free, -self.lower * self.slope, 0.0)


def size_of(inputs: ibp.Intervals, box: Box, image: int) -> int:
    """Bytes of the matrices of `reduce`."""
    unstable = sum(int(bounds.unstable[image].sum()) for bounds in inputs.values())
    return 4 * unstable * (unstable + prod(box.lower.shape[1:]))


def reduce(
    chain: Chain, inputs: ibp.Intervals, box: Box, spec: Tensor, image: int = 0, memory: int = crown.MEMORY
) -> Reduced:
    """The problem of one image of a batch.

    Args:
        inputs: bounds of each ReLU's input, by its place.
        spec: [B, K, out]: what is bounded is spec @ output.
        memory: MiB of coefficients that are pulled back at once.
    """
    puller = _Puller(chain, inputs, box, image, max(crown.rows_at_once(crown.widest(chain), memory), 1))
    kinds = []
    for place, which in puller.unstable.items():
        ones = spec.new_zeros(len(which), inputs[place].lower[image].numel())
        ones[torch.arange(len(which), device=which.device), which] = 1
        kinds.append(puller.rows(chain.sources[place][0], ones.view(-1, *inputs[place].lower.shape[1:])))
    none = spec.new_zeros(0)
    lower, upper = (
        torch.cat([none, *(getattr(inputs[p], end)[image].flatten()[which] for p, which in puller.unstable.items())])
        for end in ("lower", "upper")
    )
    return Reduced(
        [(part.start, part.stop) for part in puller.columns.values()],
        Rows.joined(kinds) if kinds else puller.none(),
        puller.rows(chain.last, spec[image]),
        lower,
        upper,
        box.center[image].flatten(),
        box.half[image].flatten(),
    )


class _Puller:
    """Pulls rows of a value back to the input and to the unstable ReLUs, `size` at a time."""

    def __init__(self, chain: Chain, inputs: ibp.Intervals, box: Box, image: int, size: int) -> None:
        self.chain, self.size, self.count = chain, size, 0
        self.like, self.input_shape = box.lower, box.lower.shape[1:]
        self.on: dict[int, Tensor] = {}
        self.unstable: dict[int, Tensor] = {}
        self.columns: dict[int, slice] = {}
        for place in chain.relus:
            if place in inputs:
                self.on[place] = (inputs[place].lower[image] >= 0).to(box.lower.dtype)
                which = inputs[place].unstable[image].flatten().nonzero().squeeze(1)
                if len(which):
                    self.unstable[place] = which
                    self.columns[place] = slice(self.count, self.count + len(which))
                    self.count += len(which)

    def rows(self, value: int, a: Tensor) -> Rows:
        """The rows a [R, *shape of the value]."""
        return Rows.joined([self._pull(value, part) for part in a.split(self.size)])

    def none(self) -> Rows:
        return Rows(self.like.new_zeros(0, prod(self.input_shape)), self.like.new_zeros(0, 0), self.like.new_zeros(0))

    def _pull(self, value: int, a: Tensor) -> Rows:
        of_relu, constant = a.new_zeros(len(a), self.count), a.new_zeros(len(a))
        coefficients = {value: a}
        for place in range(value, -1, -1):
            if place not in coefficients:
                continue
            a, link = coefficients.pop(place), self.chain.links[place]
            if isinstance(link, ReLU):
                if place in self.unstable:
                    of_relu[:, self.columns[place]] = a.flatten(1)[:, self.unstable[place]]
                a = a * self.on[place]
            elif not isinstance(link, Add):
                constant = constant + link.offset(a)
                a = link.pull(a)
            for source in self.chain.sources[place]:
                coefficients[source] = coefficients[source] + a if source in coefficients else a
        return Rows(coefficients[-1].flatten(1), of_relu, constant)


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
class Domains:
    """D parts of the ball: the row that is bounded over each, the signs of v in it, and what its bound is made with.

    Args:
        rows: D of them.
        signs: [D, U] of 1 (v >= 0), -1 (v <= 0) and 0 (not split).
        slopes: [D, U] in [0, 1], below the neurons that are not split.
        multipliers: β >= 0 of the splits, [D, U].
    """

    rows: Rows
    signs: Tensor
    slopes: Tensor
    multipliers: Tensor

    def __len__(self) -> int:
        return len(self.signs)

    def at(self, which: Tensor) -> Domains:
        return Domains(self.rows.at(which), self.signs[which], self.slopes[which], self.multipliers[which])

    @classmethod
    def roots(cls, net: Reduced, rows: Rows) -> Domains:
        """The whole ball for each row, with CROWN's slopes."""
        none = net.lower.new_zeros(len(rows.constant), len(net.lower))
        return cls(rows, none, none + (net.slope > 0.5), none)


def back(net: Reduced, domains: Domains) -> Sweep:
    """Lower bounds of the domains' rows (β-CROWN: Wang et al. 2021, theorem 3.1)."""
    lower_slope, upper_slope, intercept = net.relaxation(domains.signs, domains.slopes)
    shift = domains.multipliers * domains.signs
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
    lower_slope, upper_slope, intercept = net.relaxation(domains.signs, domains.slopes)
    rising = found.relu >= 0
    taken, offset = torch.where(rising, lower_slope, upper_slope), intercept.masked_fill_(rising, 0)
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
    bound = domains.signs.new_full((len(domains),), -torch.inf)
    slopes, multipliers = domains.slopes.clone(), domains.multipliers.clone()
    relu, x, v = torch.zeros_like(slopes), domains.rows.of_input.new_empty(domains.rows.of_input.shape), slopes.clone()
    target = torch.as_tensor(target, device=bound.device).expand(len(domains))
    reach = torch.maximum(net.lower.abs(), net.upper.abs())
    active, now = torch.arange(len(domains), device=bound.device), domains
    # Adam's two averages for either.
    averages = [torch.zeros_like(slopes) for _ in range(4)]
    for step in range(steps + 1):
        found = back(net, now)
        ahead = forth(net, now, found)
        relu[active], x[active], v[active] = found.relu, found.x, ahead
        # Large multipliers of what should be 0 leave their rounding behind.
        proven = found.bound - ROUNDING * ((now.multipliers * now.signs).abs() @ reach)
        better = (proven > bound[active]) & proven.isfinite()
        bound[active[better]] = proven[better]
        slopes[active[better]], multipliers[active[better]] = now.slopes[better], now.multipliers[better]
        left = bound[active] <= target[active]
        if step == steps or not bool(left.any()):
            break
        if 4 * int(left.sum()) < 3 * len(left):
            active, now, ahead = active[left], now.at(left), ahead[left]
            found = Sweep(*(tensor[left] for tensor in found))
            averages = [average[left] for average in averages]
        gradients = found.relu.clamp(min=0).mul_(ahead), -ahead * now.signs
        values = []
        for number, (value, gradient) in enumerate(zip((now.slopes, now.multipliers), gradients, strict=True)):
            mean, square = averages[2 * number : 2 * number + 2]
            mean.lerp_(gradient, 0.1)
            square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            deviation = (square / (1 - 0.999 ** (step + 1))).sqrt_().add_(1e-8)
            values.append(torch.addcdiv(value, mean, deviation, value=lr * 0.98**step / (1 - 0.9 ** (step + 1))))
        now = Domains(now.rows, now.signs, values[0].clamp_(0, 1), values[1].clamp_(min=0))
    return Optimised(bound, Domains(domains.rows, domains.signs, slopes, multipliers), Sweep(bound, relu, x), v)
