"""CROWN's passes back in float32, less all that they may have rounded.

A pass back through a chain in float64 takes twice the time that it takes in float32, whose bounds by themselves prove
nothing. They do when the errors of its sums and products are taken off: n roundings of terms t move their sum by no
more than γ_n Σ|t|, in whatever order it is taken (Higham 2002, section 3.1). Where the pass replaces a · (W h + b) by
(a W) · h + a · b, what it rounds is at most γ Σ |a| (|W| m + |b|) for |h| <= m, which intervals give.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil, gcd, prod

import torch
from torch import Tensor

from rampart.bounds.box import Box, lower_on
from rampart.bounds.relaxation import Relaxation, through_relu
from rampart.models.chain import Chain
from rampart.models.links import Affine, Conv, Dense, Flatten, ReLU, Scale

# Of one operation in float32: half a unit in the last place.
UNIT = 2.0**-24
# What bounds of errors round themselves, in sums of up to half a million terms, and what is of second order in them.
MORE = 1.05
# Below it a number may be taken for 0.
TINY = 2.0**-126
# Up to where values and coefficients may grow: no sum of theirs overflows, and what of them is taken for 0 is, in sum,
# less than SMALL a link.
VALUES, COEFFICIENTS, SMALL = 2.0**40, 2.0**80, 2.0**-50


@dataclass
class Single:
    """A chain in float64 as it is bounded in float32: the rest is filled in by `learn`, in the chain's order.

    Args:
        chain: its weights rounded.
        relaxed: of its ReLUs.
        lost: by the place of each convolution or linear map, what it rounds for each unit of a coefficient of its
            output [B, *shape].
        alone: the same, where a row has a coefficient of 1 or -1 alone: no sum is rounded.
        share: by the place of each ReLU, what a sum over its intercepts rounds of itself.
        largest: by the place of each convolution or linear map, the largest of the values that it reads and makes.
        growth: by how much it may make coefficients grow.
        learned: the first link of which not all is known.
    """

    chain: Chain
    relaxed: dict[int, Relaxation] = field(default_factory=dict)
    lost: dict[int, Tensor] = field(default_factory=dict)
    alone: dict[int, Tensor] = field(default_factory=dict)
    share: dict[int, float] = field(default_factory=dict)
    largest: dict[int, float] = field(default_factory=dict)
    growth: dict[int, float] = field(default_factory=dict)
    learned: int = 0

    @classmethod
    def of(cls, chain: Chain) -> Single | None:
        """None where this module does not know what is rounded."""
        # Products of matrices may be set to be less exact than float32.
        exact = torch.get_float32_matmul_precision() == "highest"
        known = all(_known(chain, place) for place in range(len(chain.links)))
        return cls(chain.single()) if known and exact and chain.output.dtype == torch.float64 else None

    @property
    def fits(self) -> bool:
        """Whether no value or coefficient may be too large for what is `lost`; of NaN that is not so."""
        values = all(largest <= VALUES for largest in self.largest.values())
        return values and prod(self.growth.values()) <= COEFFICIENTS

    def of_unit(self, place: int, value: int) -> Tensor:
        """What a convolution or linear map rounds for each unit of a coefficient, in passes back from `value`."""
        return (self.alone if place == value else self.lost)[place]

    def learn(self, value: int, chain: Chain, found: dict[int, Box]) -> None:
        """What is lost at the links up to a value of the chain in float64, by the boxes of its values."""
        for place in range(self.learned, value + 1):
            self._learn(place, chain, found)
        self.learned = value  # once more, when its own box is tighter

    def _learn(self, place: int, chain: Chain, found: dict[int, Box]) -> None:
        link, source = chain.links[place], found[chain.sources[place][0]]
        if isinstance(link, ReLU):
            self.relaxed[place] = _outward(source)
            self.share[place] = MORE * UNIT * (int(source.unstable.flatten(1).sum(1).max()) + 2)
        elif isinstance(link, Conv | Dense):
            weight, reach = link.weight.abs(), torch.maximum(source.lower.abs(), source.upper.abs())
            read = link.radius(reach)
            bias = link.bias.abs().view(-1, *(1,) * (read.dim() - 2))
            read_most, inputs = float(reach.max()), weight[0].numel()
            # One rounding is the weights' own, one that of a slope before, one to spare.
            self.alone[place] = MORE * (3 * UNIT * (read + bias) + TINY * (inputs * read_most + 1))
            rectified = place < chain.last and isinstance(chain.links[place + 1], ReLU)
            terms, places = _terms(link, found[place] if rectified else None), prod(link.out_shape[1:])
            self.lost[place] = self.alone[place] + MORE * UNIT * (terms * read + (places + len(bias)) * bias)
            self.growth[place] = max(float(weight.transpose(0, 1).flatten(1).sum(1).max()), 1.0)
            self.largest[place] = max(float((read + bias).max()), read_most)


def backward(single: Single, box: Box, image: Tensor, a: Tensor, value: int) -> tuple[Tensor, Tensor]:
    """CROWN's lower bounds [B, K], in float64, of a · value, and what they may have rounded.

    Args:
        box: of B images, in float64.
        image: [B] their places in what `single` holds.
        a: [B, K, *shape of the value] in float32, one coefficient of 1 or -1 a row.
    """
    batch, rows = a.shape[:2]
    bound, lost = (torch.zeros(batch, rows, dtype=torch.float64, device=a.device) for _ in range(2))
    for place in reversed(single.chain.before(value)):
        link = single.chain.links[place]
        if isinstance(link, ReLU):
            a, constant = through_relu(a, Relaxation(*(tensor[image] for tensor in single.relaxed[place])))
            bound += constant
            lost += single.share[place] * constant.abs()
            continue
        assert isinstance(link, Affine)
        flat = a.flatten(0, 1)
        if isinstance(link, Scale):  # of the input, in float64
            flat = flat.double()
        elif isinstance(link, Conv | Dense):
            of_each = single.of_unit(place, value)[image]
            lost += (a.abs().flatten(2) @ of_each.to(a.dtype).flatten(1)[:, :, None]).squeeze(2) + SMALL
        bound += link.offset(flat).view(batch, rows)
        a = link.products(flat).view(batch, rows, *link.in_shape)
    return lower_on(box, a.double()) + bound - lost, lost


def _known(chain: Chain, place: int) -> bool:
    """Whether it is known what a link rounds: where each reads the one before it."""
    link = chain.links[place]
    if chain.sources[place] != (place - 1,):
        return False
    if isinstance(link, ReLU):
        return place > 0 and isinstance(chain.links[place - 1], Conv | Dense)
    return isinstance(link, Conv | Dense | Flatten) or (isinstance(link, Scale) and place == 0)


def _terms(link: Conv | Dense, value: Box | None) -> int:
    """Roundings of the sum that makes each coefficient of the input (`products`); what is off has coefficients of 0."""
    channels = len(link.weight) if value is None else int((value.upper > 0).sum(1).max())
    if isinstance(link, Dense):
        return channels
    kernel, stride, _, dilation, _ = link.geometry
    # Places of a kernel that cover one place of the input lie as far apart as stride and dilation meet.
    overlaps = prod(ceil(k * gcd(s, d) / s) for k, s, d in zip(kernel, stride, dilation, strict=True))
    return min(channels, len(link.weight) // link.groups) + overlaps


def _outward(box: Box) -> Relaxation:
    """The relaxation over a box in float64, in float32; its upper side lies as high as it must once it is rounded."""
    low, high = box.lower.clamp(max=0), box.upper.clamp(min=0)
    slope = torch.where(box.lower >= 0, 1.0, high / (high - low).clamp(min=torch.finfo(high.dtype).tiny))
    slope = slope.masked_fill(box.upper <= 0, 0.0).float()
    slope = slope.masked_fill(slope < SMALL, 0.0)
    # It must lie above the ReLU at both ends; between them it does, then.
    needed = torch.maximum(-slope.double() * low, high - slope.double() * high)
    intercept = torch.where(box.unstable, (needed * (1 + 4 * UNIT)).clamp(min=TINY / UNIT), 0.0)
    return Relaxation(slope, intercept.float())
