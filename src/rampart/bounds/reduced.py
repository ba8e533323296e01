"""The network of one image as a problem in its unstable neurons alone.

Over a ball most ReLUs are stable: always on or always off, hence linear. What is left is

    v = M x + N ReLU(v) + c,    margins = M' x + N' ReLU(v) + c'

with v the inputs of the U unstable ReLUs, in the network's order, so that N is strictly lower triangular. It is worked
out once an image; every linear bound, of α-CROWN's steps and of branch and bound's domains, is then a few products of
matrices over U neurons in the place of convolutions over all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from rampart.bounds import crown, ibp, windows
from rampart.bounds.banded import Banded
from rampart.bounds.box import Box
from rampart.models.chain import Chain
from rampart.models.links import Add, ReLU

# Bytes of one image's matrices beyond which they are not made: some 12,000 unstable neurons of CIFAR-10's pixels, in
# float64 and float32.
LIMIT = 2 << 30
# Half the width of an output as a neuron.
OUTPUT_SCALE = 0.3


class Rows(NamedTuple):
    """Affine forms in x and ReLU(v): coefficients [R, I] and [R, U], and constants [R]."""

    of_input: Tensor
    of_relu: Tensor
    constant: Tensor

    def at(self, rows: Tensor | slice) -> Rows:
        return Rows(*(tensor[rows] for tensor in self))

    @property
    def terms(self) -> int:
        return self.of_input.numel() + self.of_relu.numel()

    def times(self, factor: Tensor) -> Rows:
        """Each by its own factor [R]."""
        return Rows(self.of_input * factor[:, None], self.of_relu * factor[:, None], self.constant * factor)

    def reading(self, count: int) -> Rows:
        """The same of rows that read none but the first `count` neurons."""
        return Rows(self.of_input, self.of_relu[:, :count], self.constant)

    def double(self) -> Rows:
        return Rows(*(tensor.double() for tensor in self))

    def single(self) -> Rows:
        return Rows(*(tensor.float() for tensor in self))

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

    @cached_property
    def single(self) -> Reduced:
        """The same in float32, in which bounds are looked for: half the time of a pass, and half its memory."""
        if self.lower.dtype == torch.float32:
            return self
        ends = (self.lower, self.upper, self.center, self.half)
        return Reduced(self.layers, self.neurons.single(), self.outputs.single(), *(end.float() for end in ends))

    @cached_property
    def bands(self) -> tuple[Banded, list[Banded]]:
        """What v reads of the input, [U, I], and each layer of the neurons before it."""
        of_relu = [self.neurons.of_relu[start:stop, :start] for start, stop in self.layers]
        return Banded(self.neurons.of_input), [Banded(matrix) for matrix in of_relu]

    def followed_by_outputs(self, bounds: Tensor, target: float) -> Reduced:
        """The same problem with each output less `target` as one more neuron, which nothing reads.

        With a sign of -1 it says that the output is no more than the target: what is left of the ball to prove.

        Args:
            bounds: lower ones [K] of the outputs.
        """
        count = len(bounds)

        def wider(rows: Rows, less: float = 0.0) -> Rows:
            of_relu = torch.cat([rows.of_relu, rows.of_relu.new_zeros(len(rows.of_relu), count)], 1)
            return Rows(rows.of_input, of_relu, rows.constant - less)

        layers = [*self.layers, (len(self.lower), len(self.lower) + count)]
        # On a scale on which the steps of `optimise` suit multipliers between rows of a width of 1.
        gap = (target - bounds).clamp(min=1e-3)
        last = wider(self.outputs, target).times(OUTPUT_SCALE / gap)
        end = torch.full_like(gap, OUTPUT_SCALE)
        lower, upper = torch.cat([self.lower, -end]), torch.cat([self.upper, end])
        neurons = Rows.joined([wider(self.neurons), last])
        return Reduced(layers, neurons, wider(self.outputs), lower, upper, self.center, self.half)

    def up_to(self, layer: int) -> Reduced:
        """The problem of the neurons before a layer."""
        stop = self.layers[layer][0]
        neurons, outputs = (rows.reading(stop) for rows in (self.neurons.at(slice(0, stop)), self.outputs.at(slice(0))))
        lower, upper = self.lower[:stop], self.upper[:stop]
        return Reduced(self.layers[:layer], neurons, outputs, lower, upper, self.center, self.half)

    def without(self, signs: Tensor, lower: Tensor, upper: Tensor) -> Reduced:
        """The problem of the neurons of sign [U] 0 alone, with bounds [U]; the other signs hold all over the ball."""
        neurons, outputs = self.substituted(signs)
        kept = signs == 0
        counts = [int(kept[start:stop].sum()) for start, stop in self.layers]
        ends = [0, *accumulate(counts)]

        def left(rows: Rows) -> Rows:
            return Rows(rows.of_input, rows.of_relu[:, kept], rows.constant)

        return Reduced(
            [(ends[i], ends[i + 1]) for i, count in enumerate(counts) if count],
            left(neurons.at(kept)),
            left(outputs),
            lower[kept],
            upper[kept],
            self.center,
            self.half,
        )

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


def size_of(inputs: ibp.Intervals, box: Box, image: int) -> int:
    """Bytes of the matrices of `reduce`, and of those of `single`."""
    unstable = sum(int(bounds.unstable[image].sum()) for bounds in inputs.values())
    size = sum({box.lower.dtype.itemsize, torch.float32.itemsize})
    return size * unstable * (unstable + prod(box.lower.shape[1:]))


def reduce(
    chain: Chain, inputs: ibp.Intervals, box: Box, spec: Tensor, image: int = 0, memory: int = crown.MEMORY
) -> Reduced:
    """The problem of one image of a batch.

    Args:
        inputs: bounds of each ReLU's input, by its place.
        spec: [B, K, out]: what is bounded is spec @ output.
        memory: MiB of coefficients that are pulled back at once.
    """
    puller = _Puller(chain, inputs, box, image, memory)
    kinds = [puller.neurons(place) for place in puller.unstable]
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


def _by_place(unstable: Tensor) -> Tensor:
    """Places [N] of the neurons, those of a map by its lines: neighbours read the same pixels (`Banded`)."""
    which = unstable.flatten().nonzero().squeeze(1)
    if unstable.dim() < 3:
        return which
    line = which % unstable[0].numel() // unstable.shape[-1]
    return which[line.argsort(stable=True)]


class _Puller:
    """Pulls rows of a value back to the input and to the unstable ReLUs, as many at a time as `memory` (MiB) holds."""

    def __init__(self, chain: Chain, inputs: ibp.Intervals, box: Box, image: int, memory: int) -> None:
        self.chain, self.memory, self.count = chain, memory, 0
        self.like, self.input_shape = box.lower, box.lower.shape[1:]
        # Maps [1, *shape] by places of ReLUs: which neurons pass on, and the columns of the unstable ones, counted from
        # 1; at -1 those of the input.
        self.on: dict[int, Tensor] = {}
        numbers = torch.arange(1, 1 + prod(self.input_shape), device=self.like.device)
        self.numbers = {-1: numbers.view(1, *self.input_shape)}
        self.unstable: dict[int, Tensor] = {}
        self.columns: dict[int, slice] = {}
        for place in chain.relus:
            if place in inputs:
                bounds = crown.at(inputs[place], slice(image, image + 1))
                self.on[place] = (bounds.lower >= 0).to(box.lower.dtype)
                which = _by_place(bounds.unstable[0])
                if len(which):
                    self.unstable[place] = which
                    self.columns[place] = slice(self.count, self.count + len(which))
                    self.count += len(which)
                    numbers = which.new_zeros(bounds.lower.numel())
                    numbers[which] = torch.arange(self.count - len(which), self.count, device=which.device) + 1
                    self.numbers[place] = numbers.view(bounds.lower.shape)

    def rows(self, value: int, a: Tensor) -> Rows:
        """The rows a [R, *shape of the value]."""
        return Rows.joined([self._pull(value, part) for part in a.split(self._at_once(crown.widest(self.chain)))])

    def neurons(self, place: int) -> Rows:
        """The unstable inputs of a ReLU."""
        value, shape = self.chain.sources[place][0], self.on[place].shape[1:]
        length, windowed = crown.row(self.chain, value)
        parts = self.unstable[place].split(self._at_once(length))
        if windowed:
            pulled = partial(windows.pulled, self.chain, value, passing=self.on, numbers=self.numbers, count=self.count)
            return Rows.joined([Rows(*pulled(which)) for which in parts])
        found = []
        for which in parts:
            ones = self.like.new_zeros(len(which), prod(shape))
            ones[torch.arange(len(which), device=which.device), which] = 1
            found.append(self._pull(value, ones.view(-1, *shape)))
        return Rows.joined(found)

    def _at_once(self, length: int) -> int:
        return max(crown.rows_at_once(length, self.memory, self.like.dtype), 1)

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
