"""The objectives, batch by batch."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rampart.attacks import perturb
from rampart.bounds.box import pixel_box
from rampart.bounds.fusion import fused_cross_entropy
from rampart.bounds.margins import chain_bounds, margin_spec
from rampart.losses import supcon_loss, worst_case_logits
from rampart.models import Classifier, Layout
from rampart.models.chain import ReLU
from rampart.training import Recipe
from rampart.training.criterion import Criterion
from rampart.training.methods import METHODS, Method
from tests.nets import small_classifier

Batch = tuple[Tensor, Tensor]
CROSS_ENTROPY, SUPCON, BOTH = Criterion(0.0, 0.1), Criterion(1.0, 0.1), Criterion(0.3, 0.1)
CERTIFIED_LOSSES = ("margin", "fused", "logit-lower")


@pytest.fixture
def model() -> Classifier:
    return small_classifier(classes=3)


def made(method: str, model: Classifier, **change: object) -> Method:
    return METHODS[method](model, Recipe(method=method, **{"attack_steps": 3, **change}))


def loss_of(method: Method, batch: Batch, criterion: Criterion, eps: float) -> Tensor:
    return method.batch_loss(*batch, criterion, eps, torch.Generator().manual_seed(0))


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.named_buffers()}


def clean_loss(model: Classifier, batch: Batch, criterion: Criterion) -> Tensor:
    """The equation: a * SupCon + (1 - a) * cross-entropy."""
    x, y = batch
    z = model.embed(x)
    share, temperature = criterion.supcon_weight, criterion.temperature
    return share * supcon_loss(z, y, temperature) + (1 - share) * F.cross_entropy(model.head(z), y)


@pytest.mark.parametrize("criterion", [CROSS_ENTROPY, SUPCON, BOTH], ids=["none", "double", "single"])
def test_the_normal_loss_mixes_supcon_and_cross_entropy(model: Classifier, batch: Batch, criterion: Criterion) -> None:
    expected = clean_loss(copy.deepcopy(model).train(), batch, criterion)
    found = loss_of(made("normal", model.train()), batch, criterion, 0.1)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("criterion", [CROSS_ENTROPY, SUPCON, BOTH], ids=["none", "double", "single"])
@pytest.mark.parametrize("certified_loss", CERTIFIED_LOSSES)
def test_at_eps_0_the_certified_loss_is_the_plain_one(
    model: Classifier, batch: Batch, criterion: Criterion, certified_loss: str, training: bool
) -> None:
    """In training mode with the batch's own statistics; value and gradient."""
    model.train(training)
    twin = copy.deepcopy(model)
    found = loss_of(made("certified", model, certified_loss=certified_loss), batch, criterion, 0.0)
    expected = clean_loss(twin, batch, criterion)
    assert found.item() == pytest.approx(expected.item(), rel=1e-3)
    found.backward()
    expected.backward()
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        # A loss without cross-entropy leaves the head alone.
        ours = torch.zeros_like(other) if parameter.grad is None else parameter.grad
        atol = 1e-2 * float(other.grad.abs().max()) + 1e-4
        assert torch.allclose(ours, other.grad, rtol=0, atol=atol), name


def test_each_certified_loss_is_the_one_that_its_name_says(model: Classifier, batch: Batch) -> None:
    x, y = batch
    with torch.no_grad():
        model.head.weight.mul_(20)  # apart enough to be told apart
    chain, box = Layout(model).resolve(x), pixel_box(x, 0.02)
    spec, logits = margin_spec(y, 3), torch.eye(3).expand(len(x), -1, -1)
    expected = {
        "margin": F.cross_entropy(worst_case_logits(chain_bounds(chain, box, spec, "crown-ibp"), y), y),
        "fused": fused_cross_entropy(chain, box, spec).mean(),
        "logit-lower": F.cross_entropy(chain_bounds(chain, box, logits, "crown-ibp"), y),
    }
    for certified_loss, value in expected.items():
        found = loss_of(made("certified", model, certified_loss=certified_loss), batch, CROSS_ENTROPY, 0.02)
        assert found.item() == pytest.approx(value.item(), rel=1e-4), certified_loss
    assert len({round(value.item(), 3) for value in expected.values()}) == 3


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_moves_the_running_statistics_once(method: str, model: Classifier, batch: Batch) -> None:
    """Attack steps and bounds do not move them: they follow what a forward pass on the batch says."""
    model.train()
    before = statistics(model)
    loss_of(made(method, model), batch, CROSS_ENTROPY, 0.05)
    after = statistics(model)
    for name, value in after.items():
        if name.endswith("num_batches_tracked"):
            assert int(value - before[name]) == 1, name
    twin = copy.deepcopy(model).train()
    twin.load_state_dict({**twin.state_dict(), **before})
    x = batch[0]
    if method == "adversarial":
        x = torch.cat([x, adversarial_half(twin, batch, CROSS_ENTROPY, 0.05)])
    twin.train()(x)
    for name, value in statistics(twin).items():
        assert torch.allclose(after[name].double(), value.double(), atol=1e-5), name


def adversarial_half(model: Classifier, batch: Batch, criterion: Criterion, eps: float) -> Tensor:
    fixed = copy.deepcopy(model).eval()
    generator = torch.Generator().manual_seed(0)
    return perturb(lambda moved: clean_loss(fixed, (moved, batch[1]), criterion), batch[0], eps, 3, eps / 4, generator)


@pytest.mark.parametrize("criterion", [CROSS_ENTROPY, SUPCON, BOTH], ids=["none", "double", "single"])
def test_the_adversarial_loss_is_that_of_the_batch_doubled_with_examples_that_ascend_it(
    model: Classifier, batch: Batch, criterion: Criterion
) -> None:
    x, y = batch
    doubled = torch.cat([x, adversarial_half(model, batch, criterion, 0.05)]), torch.cat([y, y])
    expected = clean_loss(copy.deepcopy(model).train(), doubled, criterion)
    found = loss_of(made("adversarial", model.train()), batch, criterion, 0.05)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_attack_gives_every_module_its_own_mode_back(model: Classifier, batch: Batch) -> None:
    """As in the head's stage: the encoder stands in eval mode, the head in training mode."""
    model.eval()
    model.head.train()
    loss_of(made("adversarial", model), batch, CROSS_ENTROPY, 0.05)
    assert model.head.training
    assert not any(module.training for module in [model, *model.encoder.modules()])


@pytest.mark.parametrize("certified_loss", ["margin", "fused"])
@pytest.mark.parametrize("eps", [0.005, 0.05])
def test_the_certified_loss_bounds_that_of_every_attack(
    model: Classifier, batch: Batch, certified_loss: str, eps: float
) -> None:
    """In training mode the network is the one with the clean batch's statistics."""
    model.train()
    x, y = batch
    chain = Layout(copy.deepcopy(model)).resolve(x)

    def network(moved: Tensor) -> Tensor:
        for link in chain.links:
            moved = moved.relu() if isinstance(link, ReLU) else link.apply(moved)
        return moved

    bound = loss_of(made("certified", model, certified_loss=certified_loss), batch, CROSS_ENTROPY, eps)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        moved = perturb(lambda z: F.cross_entropy(network(z), y), x, eps, 6, eps / 3, generator)
        assert F.cross_entropy(network(moved), y) <= bound + 1e-5
    assert bound > F.cross_entropy(network(x), y)


def test_the_clean_share_mixes_the_clean_loss_in(model: Classifier, batch: Batch) -> None:
    worst, mixed, clean = (
        loss_of(made("certified", model, clean_weight=share), batch, CROSS_ENTROPY, 0.05).item()
        for share in (0.0, 0.3, 1.0)
    )
    assert clean == pytest.approx(F.cross_entropy(model(batch[0]), batch[1]).item(), rel=1e-5)
    assert worst > clean
    assert mixed == pytest.approx(0.3 * clean + 0.7 * worst, rel=1e-5)


@pytest.mark.parametrize("bound", ["crown-ibp", "ibp"])
def test_a_certified_supcon_loss_is_that_of_lower_bounds_of_the_embedding(
    model: Classifier, batch: Batch, bound: str
) -> None:
    """Each of them below every embedding in the ball, and crown-ibp's not the same as ibp's."""
    x, y = batch
    chain = Layout(nn.Sequential(model.normalize, model.encoder)).resolve(x)
    spec = torch.eye(chain.output.shape[1]).expand(len(x), -1, -1)
    lower = chain_bounds(chain, pixel_box(x, 0.02), spec, bound)
    for _ in range(50):
        moved = (x + 0.02 * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
        assert bool((lower <= model.embed(moved) + 1e-5).all())
    found = loss_of(made("certified", model, embedding_bound=bound), batch, SUPCON, 0.02)
    assert found.item() == pytest.approx(supcon_loss(lower, y, 0.1).item(), rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_an_image_that_is_misclassified_does_not_survive(method: str, model: Classifier, batch: Batch) -> None:
    x, _ = batch
    with torch.no_grad():
        predictions = model(x).argmax(1)
    survivors = made(method, model).survives(x, (predictions + 1) % 3, 0.01, None)
    assert not bool(survivors.any())
    assert bool(made(method, model).survives(x, predictions, 0.0, None).all())
