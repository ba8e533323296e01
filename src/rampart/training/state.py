"""Where a training stands between two batches: all that it needs to go on as if it had never stopped."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from rampart.errors import ModelError


@dataclass(frozen=True)
class State:
    """A training's state, to be kept with the weights that it has so far.

    Args:
        stage: the one under way.
        epoch: the one under way, counted over all stages from 1; one more than the stage has: it is finished.
        batch: of that epoch, those that are done.
        seen: images of that epoch, those that are done.
        best: the epoch whose weights are the stage's best so far.
        best_score: theirs.
        tensors: weights (live, the best, the average's), the optimisers' moments, random states, by name.
    """

    stage: str
    epoch: int
    batch: int
    seen: int
    best: int
    best_score: float
    tensors: Mapping[str, Tensor]

    def numbers(self) -> dict[str, Any]:
        """All but the tensors."""
        return {name: value for name, value in self.__dict__.items() if name != "tensors"}


@dataclass
class Streams:
    """Random states: `order` on the CPU, `device` (augmentation and attack starts) where the data are."""

    order: torch.Generator
    device: torch.Generator


@dataclass
class Progress:
    """What changes in a stage as it is trained.

    Args:
        optimizers: of the part that is trained.
        average: of the weights, if there is to be one.
        epoch: under way, as are `batch` and `seen`: as in State.
        loss_sum: of the images that the epoch has seen, on their device.
        best: epoch that is the best so far; `best_score` and `best_weights` are its.
        order: state of `streams.order` at the start of the epoch, from which its batches follow.
    """

    model: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    average: AveragedModel | None
    streams: Streams
    epoch: int
    loss_sum: Tensor
    batch: int = 0
    seen: int = 0
    best: int = field(init=False)
    best_score: float = -math.inf
    best_weights: dict[str, Tensor] = field(init=False)
    order: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.best, self.best_weights = self.epoch, copy.deepcopy(self.model.state_dict())
        self.order = self.streams.order.get_state()

    def count(self, loss: Tensor, images: int) -> None:
        """A batch is done."""
        self.loss_sum += loss.detach() * images
        self.seen += images
        self.batch += 1

    def choose(self, score: float) -> None:
        """The model as it stands, of the epoch under way, is the stage's best so far."""
        self.best, self.best_score = self.epoch, score
        self.best_weights = copy.deepcopy(self.model.state_dict())

    def next_epoch(self) -> None:
        self.epoch, self.batch, self.seen = self.epoch + 1, 0, 0
        self.loss_sum.zero_()
        self.order = self.streams.order.get_state()

    def state(self, stage: str, live: Mapping[str, Tensor] | None = None) -> State:
        """A copy, which later steps leave as it is; `live`: the weights in training, where the model has others."""
        tensors = {name: value.detach().cpu().clone() for name, value in self._tensors(live).items()}
        return State(stage, self.epoch, self.batch, self.seen, self.best, self.best_score, tensors)

    def restore(self, state: State) -> None:
        """Becomes what was kept.

        Raises:
            ModelError: it is of another training.
        """
        try:
            self._restore(state)
        except (IndexError, KeyError, RuntimeError, ValueError) as error:
            raise ModelError(f"the checkpoint is of another architecture or recipe: {str(error)[:200]}") from error

    def _restore(self, state: State) -> None:
        moments: list[dict[int, dict[str, Tensor]]] = [{} for _ in self.optimizers]
        held = self._tensors()
        for name, value in state.tensors.items():
            kind, _, rest = name.partition("/")
            if kind == "optimizer":
                number, index, key = rest.split("/")
                moments[int(number)].setdefault(int(index), {})[key] = value
            elif kind != "random":
                held[name].copy_(value)
        for optimizer, by_weight in zip(self.optimizers, moments, strict=True):
            blank = optimizer.state_dict()
            if not by_weight.keys() <= {weight for group in blank["param_groups"] for weight in group["params"]}:
                raise ValueError("moments of weights that the optimiser does not have")
            optimizer.load_state_dict({**blank, "state": by_weight})
        self.epoch, self.batch, self.seen = state.epoch, state.batch, state.seen
        self.best, self.best_score = state.best, state.best_score
        # A copy: a generator's state must not lie in a file's memory.
        self.order = state.tensors["random/order"].clone()
        self.streams.order.set_state(self.order)
        self.streams.device.set_state(state.tensors["random/device"].clone())

    def _tensors(self, live: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        groups: dict[str, Mapping[str, Tensor]] = {"live": live or self.model.state_dict(), "best": self.best_weights}
        if self.average is not None:
            groups["average"] = self.average.state_dict()
        found = {f"{group}/{name}": value for group, values in groups.items() for name, value in values.items()}
        for number, optimizer in enumerate(self.optimizers):
            for index, moments in optimizer.state_dict()["state"].items():
                found |= {f"optimizer/{number}/{index}/{name}": value for name, value in moments.items()}
        found |= {"random/order": self.order, "random/device": self.streams.device.get_state()}
        return found | {"loss_sum": self.loss_sum}
