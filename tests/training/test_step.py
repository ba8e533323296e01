"""A step of training asks no tensor for its values: on a GPU that would wait for all work under way."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

from rampart.data import Augmentation, Dataset, to_pixels
from rampart.models import build_model
from rampart.training import Recipe
from rampart.training.state import Streams
from rampart.training.step import Step, _average
from rampart.training.train import stages
from tests.nets import randomised

# Operations whose result, or its shape, depends on values; an index that is a mask is one, too.
ASKING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_consecutive", "_unique2", "bincount")

ARMS: dict[str, dict[str, Any]] = {
    "normal": {},
    "normal, muon": {"optimizer": "muon", "weight_decay": 1e-3},
    "normal, sam": {"sam": 0.05, "grad_clip": 1.0},
    "normal, dropout": {"dropout": 0.5, "sam": 0.05},
    "normal, supcon": {"contrastive": "single"},
    "adversarial": {"method": "adversarial", "attack_steps": 2},
    "adversarial, n-fgsm": {
        "method": "adversarial",
        "attack_steps": 1,
        "attack_start": "wide",
        "attack_batchnorm": "train",
    },
    "trades": {"method": "trades", "attack_steps": 2, "contrastive": "single"},
    "certified": {"method": "certified", "clean_weight": (0.5,), "ibp_weight": (0.5,), "contrastive": "single"},
    "certified, fused": {"method": "certified", "certified_loss": "fused", "grad_clip": 1.0, "l1": 1e-5},
    "certified, study": {"method": "certified", "certified_loss": "logit-lower"},
    "ibp": {"method": "ibp", "ibp_regularizer": 0.5, "eps_warmup": 0.5, "contrastive": "single", "embeddings": "worst"},
    "sabr": {"method": "sabr", "attack_steps": 2},
    "mtl-ibp": {"method": "mtl-ibp", "attack_steps": 1, "contrastive": "single", "embeddings": "attack"},
}


class Asking(TorchDispatchMode):
    """Collects the operations that ask for values."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name == "index" and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if name in ASKING or masks:
            self.asked.append(name)
        return func(*args, **(kwargs or {}))


def streams() -> Streams:
    return Streams(torch.Generator().manual_seed(0), torch.Generator().manual_seed(1))


@pytest.mark.parametrize("arm", ARMS)
def test_no_step_asks_for_a_value(arm: str, few_digits: Dataset) -> None:
    recipe = Recipe(**{"width": 0.125, "eps": 4 / 255, "ema": 0.9, **ARMS[arm]})
    model = build_model("paper-cnn", (3, 32, 32), 10, recipe.width)
    (stage,) = stages(recipe, model)
    step = Step(stage.trained, model.train(), stage.method, stage.criterion, recipe, streams())
    batch = few_digits.train[:16]
    step(to_pixels(batch.images), batch.labels, recipe.eps / 2, 0.1)  # the average begins as a copy
    with Asking() as mode:
        step(to_pixels(batch.images), batch.labels, recipe.eps / 2, 0.1)
    # How many models the average is of, which never lies on a GPU.
    assert mode.asked == ["_local_scalar_dense"]


def test_what_asks_is_seen() -> None:
    with Asking() as mode:
        x = torch.arange(4.0)
        x[x > 1].sum().item()
    assert mode.asked == ["index", "_local_scalar_dense"]


@pytest.mark.parametrize("radius", [0.0, 0.3])
def test_sam_takes_its_gradient_where_the_loss_is_larger(radius: float) -> None:
    torch.manual_seed(0)
    model, x, y = build_model(width=0.125), torch.rand(16, 3, 32, 32), torch.randint(10, (16,))
    twin = copy.deepcopy(model).train()
    recipe = Recipe(width=0.125, sam=radius)
    (stage,) = stages(recipe, model)
    Step(stage.trained, model.train(), stage.method, stage.criterion, recipe, streams())(x, y, 0.0, recipe.lr)

    weights = [*twin.parameters()]
    before = [weight.detach().clone() for weight in weights]
    gradients = torch.autograd.grad(nn.functional.cross_entropy(twin(x), y), weights)
    length = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
    with torch.no_grad():
        for weight, gradient in zip(weights, gradients, strict=True):
            weight += radius * gradient / length
    gradients = torch.autograd.grad(nn.functional.cross_entropy(twin(x), y), weights)
    for ours, kept, gradient in zip(model.parameters(), before, gradients, strict=True):
        assert torch.allclose(ours.grad, gradient, atol=1e-6)
        assert (ours - kept).abs().max() <= 1.01 * recipe.lr, "Adam's first step is no longer than that"
    once = copy.deepcopy(model)
    for module in once.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
    with torch.no_grad():
        for weight, kept in zip(once.parameters(), before, strict=True):
            weight.copy_(kept)
        once(x)
    for (name, ours), expected in zip(model.named_buffers(), once.buffers(), strict=True):
        assert torch.equal(ours, expected), f"{name}: BatchNorm has seen the batch once, by the weights as they were"


def test_dropout_trains_a_thinned_network_for_a_step() -> None:
    """Its gradients, as autograd has them of masked activations; in the first step the weights left out do not move."""
    torch.manual_seed(0)
    model, x, y = build_model(width=0.125), torch.rand(16, 3, 32, 32), torch.randint(10, (16,))
    twin, before = copy.deepcopy(model).train(), copy.deepcopy(model)
    recipe, drawn = Recipe(width=0.125, dropout=0.4), streams()
    (stage,) = stages(recipe, model)
    Step(stage.trained, model.train(), stage.method, stage.criterion, recipe, drawn)(x, y, 0.0, recipe.lr)

    *_, flatten, projection = twin.encoder.children()
    kept = torch.rand(projection[0].in_features, generator=streams().device) >= 0.4
    flatten.register_forward_hook(lambda module, given, output: output * kept / 0.6)
    nn.functional.cross_entropy(twin(x), y).backward()
    for (name, ours), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(ours.grad, expected.grad, atol=1e-6), name
    weight, first = (network.encoder.projection[0].weight for network in (model, before))
    assert torch.equal(weight[:, ~kept], first[:, ~kept])
    assert not torch.equal(weight[:, kept], first[:, kept])


def test_a_frozen_encoder_has_no_dropout() -> None:
    model, recipe = build_model(width=0.125), Recipe(width=0.125, dropout=0.4, contrastive="double")
    for parameter in model.encoder.parameters():
        parameter.requires_grad_(False)
    _, head = stages(recipe, model)
    assert Step(head.trained, model, head.method, head.criterion, recipe, streams()).thinned is None


@pytest.fixture
def held() -> AveragedModel:
    return AveragedModel(randomised(build_model(width=0.125)), multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)


def test_the_average_is_pytorchs(held: AveragedModel) -> None:
    other = AveragedModel(held.module, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(3):
        model = randomised(build_model(width=0.125))
        _average(held, model)
        other.update_parameters(model)
    for (name, value), expected in zip(held.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, expected), name


def test_the_same_stream_the_same_augmentation() -> None:
    x = torch.rand(8, 3, 32, 32)
    first, again, other = (Augmentation()(x, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
