"""A training that was stopped goes on as if it had never stopped."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Mapping
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor

from rampart.data import Augmentation, Dataset
from rampart.errors import ModelError
from rampart.training import Recipe, loop, train
from rampart.training.stopping import SIGNALS, stoppable
from tests.training.conftest import ListRecorder

ARMS: dict[str, dict[str, Any]] = {
    "normal": {"augment": True, "ema": 0.9, "schedule": "cosine", "sam": 0.05},
    "adversarial": {"contrastive": "double", "attack_steps": 2, "bn_batches": 2, "optimizer": "muon"},
    "certified": {"eps_warmup": 0.5, "clean_weight": (1.0, 0.5), "ibp_regularizer": 0.5, "l1": 1e-5, "grad_clip": 1.0},
    "mtl-ibp": {
        "contrastive": "double",
        "embeddings": "attack",
        "encoder_supcon_weight": 0.5,
        "head": "method",
        "dropout": 0.2,
    },
}


def recipe(method: Any, **changes: Any) -> Recipe:
    short = {"epochs": 3, "encoder_epochs": 2, "head_epochs": 2, "width": 0.125, "batch_size": 64, "eps": 4 / 255}
    return Recipe(method=method, **{**short, **changes})


def told(recorder: ListRecorder) -> list[tuple[int, Mapping[str, float]]]:
    """All but the speed."""
    return [(step, {k: v for k, v in values.items() if "per_second" not in k}) for step, values in recorder.told]


@pytest.mark.parametrize("method", ARMS)
def test_from_every_checkpoint_to_the_same_weights_and_curves(method: str, few_digits: Dataset) -> None:
    how, whole = recipe(method, **ARMS[method]), ListRecorder()
    model = train(how, few_digits, whole, seed=3)
    for before, state in whole.kept:
        rest = ListRecorder()
        again = train(how, few_digits, rest, seed=3, before=state)
        for (name, value), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
            assert torch.equal(value, other), (state.stage, state.epoch, name)
        assert told(rest) == told(whole)[before:]


class Alarm(Augmentation):
    """Sends this process a signal with the tenth batch."""

    def __init__(self, number: int) -> None:
        super().__init__()
        object.__setattr__(self, "number", number)
        object.__setattr__(self, "calls", count(1))

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        if next(self.calls) == 10:
            os.kill(os.getpid(), self.number)
        return super().__call__(x, generator)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_at_the_next_batch_with_a_checkpoint(number: int, few_digits: Dataset) -> None:
    how, whole, stopped, rest = recipe("normal", augment=True), ListRecorder(), ListRecorder(), ListRecorder()
    model = train(how, few_digits, whole)
    handlers = [signal.getsignal(n) for n in SIGNALS]
    with pytest.raises(KeyboardInterrupt):
        train(how, few_digits, stopped, Alarm(number))
    assert [signal.getsignal(n) for n in SIGNALS] == handlers
    steps = math.ceil(len(few_digits.train) / how.batch_size)
    _, last = stopped.kept[-1]
    assert (last.epoch - 1) * steps + last.batch == 10
    assert 0 < last.batch < steps
    again = train(how, few_digits, rest, before=last)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert told(stopped) + told(rest) == told(whole)


@pytest.mark.parametrize("stage", ["encoder", "head"])
def test_a_signal_before_a_stages_first_batch_is_no_lost_one(
    stage: str, few_digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the network is made, or compiled, or between two stages."""
    how, recorder, made, calls = recipe("normal", contrastive="double"), ListRecorder(), loop.Step, count()

    def interrupted(*given: Any) -> Any:
        if next(calls) == ("encoder", "head").index(stage):
            signal.raise_signal(signal.SIGTERM)
        return made(*given)

    monkeypatch.setattr(loop, "Step", interrupted)
    with stoppable(), pytest.raises(KeyboardInterrupt):
        train(how, few_digits, recorder)
    _, last = recorder.kept[-1]
    assert (last.stage, last.batch) == (stage, 0)


def test_a_second_ctrl_c_does_not_wait_and_a_second_sigterm_does() -> None:
    with stoppable() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_stop_in_validation_loses_no_epoch(few_digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    how, whole, stopped, rest = (recipe("adversarial", bn_batches=2, ema=0.9), *(ListRecorder() for _ in range(3)))
    model = train(how, few_digits, whole)
    measure, calls = loop.measure_statistics, count(1)

    def interrupted(*given: Any) -> None:
        if next(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        measure(*given)

    monkeypatch.setattr(loop, "measure_statistics", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(how, few_digits, stopped)
    monkeypatch.setattr(loop, "measure_statistics", measure)
    _, last = stopped.kept[-1]
    assert (last.epoch, last.batch) == (2, math.ceil(len(few_digits.train) / how.batch_size))
    again = train(how, few_digits, rest, before=last)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert told(stopped) + told(rest) == told(whole)


def test_a_checkpoint_of_another_training_is_refused(few_digits: Dataset) -> None:
    recorder = ListRecorder()
    train(recipe("normal", epochs=1), few_digits, recorder)
    _, state = recorder.kept[-1]
    others: list[dict[str, Any]] = [{"width": 0.25}, {"architecture": "cnn5"}, {"optimizer": "muon"}]
    for how in (recipe("normal", **other) for other in others):
        with pytest.raises(ModelError, match="another architecture"):
            train(how, few_digits, ListRecorder(), before=state)
    with pytest.raises(ModelError, match="'train', which this training does not have"):
        train(recipe("normal", contrastive="double"), few_digits, ListRecorder(), before=state)
