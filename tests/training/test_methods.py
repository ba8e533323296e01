"""The objectives, batch by batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rampart.attacks import AttackResult, perturb, pgd
from rampart.bounds import ibp
from rampart.bounds.box import pixel_box
from rampart.bounds.fusion import fused_cross_entropy
from rampart.bounds.margins import chain_bounds, margin_spec
from rampart.errors import ModelError, UnsupportedLayer
from rampart.losses import supcon_loss, worst_case_logits
from rampart.models import Classifier, Layout
from rampart.training import Recipe
from rampart.training.criterion import Criterion
from rampart.training.methods import METHODS, Method
from rampart.training.methods.base import Attacker
from rampart.training.methods.bounded import worst_corner
from tests.nets import run_chain, small_classifier

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


def test_a_wide_start_with_one_step_is_n_fgsm(model: Classifier, batch: Batch) -> None:
    """x + η + ε sign ∇, η uniform within 2 ε, cut to [0, 1] and to nothing else (de Jorge et al. 2022)."""
    (x, y), eps = batch, 0.05
    recipe = Recipe(method="adversarial", attack_steps=1, attack_rel_step=1.0, attack_start="wide")
    found = Attacker(model.train(), recipe).example(x, y, CROSS_ENTROPY, eps, torch.Generator().manual_seed(3))
    start = (x + 2 * eps * (2 * torch.rand(x.shape, generator=torch.Generator().manual_seed(3)) - 1)).clamp(0, 1)
    start.requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(copy.deepcopy(model).eval()(start), y), start)
    torch.testing.assert_close(found, (start.detach() + eps * gradient.sign()).clamp(0, 1))
    assert (found - x).abs().max() > 2 * eps


def test_attacked_images_are_normalised_as_the_setting_says(model: Classifier, batch: Batch) -> None:
    """By the running statistics or by the batch's; neither moves what the network has gathered."""
    x, y = batch
    model.train()
    before = statistics(model)
    found = {}
    for kind in ("eval", "train"):
        recipe = Recipe(method="adversarial", attack_steps=1, attack_rel_step=1.0, attack_batchnorm=kind)
        attacker = Attacker(model, recipe)
        found[kind] = attacker.example(x, y, CROSS_ENTROPY, 0.05, torch.Generator().manual_seed(0))
        assert all(torch.equal(value, before[name]) for name, value in statistics(model).items())
        assert all(module.training for module in model.modules())
        twin = copy.deepcopy(model).train(kind == "train")
        expected = perturb(
            lambda moved, twin=twin: F.cross_entropy(twin(moved), y),
            x, 0.05, 1, 0.05, torch.Generator().manual_seed(0),
        )  # fmt: skip
        torch.testing.assert_close(found[kind], expected)
    assert not torch.equal(found["eval"], found["train"])


@pytest.mark.parametrize("method", ["normal", "adversarial", "trades"])
def test_in_bf16_the_encoder_computes_and_nothing_else(method: str, model: Classifier, batch: Batch) -> None:
    seen: dict[str, set[torch.dtype]] = {"conv": set(), "head": set()}
    model.train()
    conv = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    conv.register_forward_hook(lambda _m, _i, out: seen["conv"].add(out.dtype))
    model.head.register_forward_hook(lambda _m, _i, out: seen["head"].add(out.dtype))
    exact = loss_of(made(method, copy.deepcopy(model)), batch, BOTH, 0.05)
    seen["conv"].clear()
    found = loss_of(made(method, model, precision="bf16"), batch, BOTH, 0.05)
    assert seen["head"] == {torch.float32}
    assert torch.bfloat16 in seen["conv"]
    assert found.dtype == torch.float32
    assert found.item() != exact.item()
    assert found.item() == pytest.approx(exact.item(), rel=0.1)
    found.backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())


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
        "fused": fused_cross_entropy(chain, box, ibp.intervals(chain, box), spec).mean(),
        "logit-lower": F.cross_entropy(chain_bounds(chain, box, logits, "crown-ibp"), y),
    }
    for certified_loss, value in expected.items():
        found = loss_of(made("certified", model, certified_loss=certified_loss), batch, CROSS_ENTROPY, 0.02)
        assert found.item() == pytest.approx(value.item(), rel=1e-4), certified_loss
    assert len({round(value.item(), 3) for value in expected.values()}) == 3


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_moves_the_running_statistics_once(method: str, model: Classifier, batch: Batch) -> None:
    """Attack steps and bounds do not move them."""
    model.train()
    before = statistics(model)
    loss_of(made(method, model), batch, CROSS_ENTROPY, 0.05)
    for name, value in statistics(model).items():
        if name.endswith("num_batches_tracked"):
            assert int(value - before[name]) == 1, name


# What BatchNorm sees of a batch, given the model as it was.
SEEN: dict[str, Callable[[Classifier, Batch], Tensor]] = {
    "normal": lambda _, batch: batch[0],
    "adversarial": lambda m, batch: torch.cat([batch[0], adversarial_half(m, batch, CROSS_ENTROPY, 0.05)]),
    "trades": lambda m, batch: torch.cat([batch[0], diverging_half(m, batch[0], 0.05)]),
    "ibp": lambda _, batch: batch[0],
    "certified": lambda _, batch: batch[0],
    # SABR's examples keep its box in the ball.
    "sabr": lambda m, batch: adversarial_half(m, batch, CROSS_ENTROPY, 0.045),
    "mtl-ibp": lambda m, batch: adversarial_half(m, batch, CROSS_ENTROPY, 0.05),
}


@pytest.mark.parametrize("method", METHODS)
def test_running_statistics_follow_what_a_forward_pass_on_the_batch_says(
    method: str, model: Classifier, batch: Batch
) -> None:
    twin = copy.deepcopy(model).train()
    loss_of(made(method, model.train()), batch, CROSS_ENTROPY, 0.05)
    after = statistics(model)
    seen = SEEN[method](twin, batch)
    twin.train()(seen)
    for name, value in statistics(twin).items():
        # In a pixel without a gradient to speak of, rounding decides which way an attack steps.
        assert torch.allclose(after[name].double(), value.double(), atol=5e-4), name


def diverging_half(model: Classifier, x: Tensor, eps: float) -> Tensor:
    """Examples that ascend KL(output on the image || output on the example)."""
    fixed = copy.deepcopy(model).eval()
    p = fixed(x).softmax(1).detach()

    def divergence(moved: Tensor) -> Tensor:
        return (p * (p.log() - fixed(moved).log_softmax(1))).sum(1).mean()

    return perturb(divergence, x, eps, 3, eps / 4, torch.Generator().manual_seed(0))


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
        return run_chain(chain, moved)

    bound = loss_of(made("certified", model, certified_loss=certified_loss), batch, CROSS_ENTROPY, eps)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        moved = perturb(lambda z: F.cross_entropy(network(z), y), x, eps, 6, eps / 3, generator)
        assert F.cross_entropy(network(moved), y) <= bound + 1e-5
    assert bound > F.cross_entropy(network(x), y)


def test_the_clean_share_mixes_the_clean_loss_in(model: Classifier, batch: Batch) -> None:
    worst, mixed, clean = (
        loss_of(made("certified", model, clean_weight=(share,)), batch, CROSS_ENTROPY, 0.05).item()
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
    found = loss_of(made("certified", model, embeddings=bound), batch, SUPCON, 0.02)
    assert found.item() == pytest.approx(supcon_loss(lower, y, 0.1).item(), rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_an_image_that_is_misclassified_does_not_survive(method: str, model: Classifier, batch: Batch) -> None:
    x, _ = batch
    with torch.no_grad():
        predictions = model(x).argmax(1)
    survivors = made(method, model).survives(x, (predictions + 1) % 3, 0.01, None)
    assert not bool(survivors.any())
    assert bool(made(method, model).survives(x, predictions, 0.0, None).all())


@pytest.mark.parametrize("steps", [1, 3])
def test_epochs_of_single_step_training_are_compared_by_more_steps(
    steps: int, model: Classifier, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, float | None]] = []

    def watched(*given: Any, **named: Any) -> AttackResult:
        seen.append(given[4:6])
        return pgd(*given, **named)

    monkeypatch.setattr("rampart.training.methods.attacked.pgd", watched)
    model.eval()
    made("adversarial", model, attack_steps=steps, attack_rel_step=0.5).survives(*batch, 0.1, None)
    assert seen == [(10, None) if steps == 1 else (3, 0.05)]


def test_the_trades_loss_adds_the_divergence_on_examples_that_ascend_it(model: Classifier, batch: Batch) -> None:
    x, y = batch
    moved = diverging_half(model, x, 0.05)
    p, q = model(x).softmax(1), model(moved).softmax(1)
    expected = F.cross_entropy(model(x), y) + 4.0 * (p * (p / q).log()).sum(1).mean()
    found = loss_of(made("trades", model, trades_beta=4.0), batch, CROSS_ENTROPY, 0.05)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)


def test_trades_with_supcon_sees_images_and_examples(model: Classifier, batch: Batch) -> None:
    x, y = batch
    views = model.embed(torch.cat([x, diverging_half(model, x, 0.05)]))
    plain = loss_of(made("trades", model), batch, CROSS_ENTROPY, 0.05)
    expected = 0.3 * supcon_loss(views, torch.cat([y, y]), 0.1) + 0.7 * plain
    assert loss_of(made("trades", model), batch, BOTH, 0.05).item() == pytest.approx(expected.item(), rel=1e-4)


def interval_loss(model: Classifier, center: Tensor, half: float, y: Tensor) -> Tensor:
    """Cross-entropy on interval bounds of the margins, all maps behind the last ReLU merged by hand."""
    chain, box = Layout(model).resolve(center), pixel_box(center, half)
    *_, linear, norm = model.encoder.projection
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    weight = model.head.weight @ (linear.weight * scale[:, None])
    bias = model.head.weight @ ((linear.bias - norm.running_mean) * scale + norm.bias) + model.head.bias
    last = ibp.intervals(chain, box)[chain.relus[-1]]
    spec = margin_spec(y, 3)
    rows = spec @ weight
    center, half_width = (last.lower + last.upper) / 2, (last.upper - last.lower) / 2
    margins = (rows @ center[..., None] - rows.abs() @ half_width[..., None]).squeeze(2) + spec @ bias
    return F.cross_entropy(worst_case_logits(margins, y), y)


def test_the_ibp_loss_is_on_interval_bounds(model: Classifier, batch: Batch) -> None:
    x, y = batch
    found = loss_of(made("ibp", model), batch, CROSS_ENTROPY, 0.03)
    assert found.item() == pytest.approx(interval_loss(model, x, 0.03, y).item(), rel=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 0.2, 1.0])
def test_the_mtl_ibp_loss_mixes_that_of_examples_and_of_intervals(
    model: Classifier, batch: Batch, alpha: float
) -> None:
    x, y = batch
    moved = adversarial_half(model, batch, CROSS_ENTROPY, 0.04)
    expected = (1 - alpha) * F.cross_entropy(model(moved), y) + alpha * interval_loss(model, x, 0.02, y)
    method = made("mtl-ibp", model, mtl_alpha=alpha, attack_rel_eps=2.0)
    assert loss_of(method, batch, CROSS_ENTROPY, 0.02).item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_the_sabr_loss_is_on_a_small_box_around_an_example(model: Classifier, batch: Batch, share: float) -> None:
    """At λ = 1 the box is the ball, and the loss that of ibp."""
    x, y = batch
    center = adversarial_half(model, batch, CROSS_ENTROPY, 0.04 * (1 - share))
    expected = interval_loss(model, center, 0.04 * share, y)
    found = loss_of(made("sabr", model, sabr_lambda=share), batch, CROSS_ENTROPY, 0.04)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    assert bool(((center - x).abs() <= 0.04 * (1 - share) + 1e-6).all())


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_interval_bounds_mix_with_those_of_crown_ibp(model: Classifier, batch: Batch, share: float) -> None:
    x, y = batch
    chain, box = Layout(model).resolve(x), pixel_box(x, 0.02)
    found = ibp.intervals(chain, box)
    spec = margin_spec(y, 3)
    intervals = ibp.lower_bounds(chain, found, spec, ibp.tail(chain))
    margins = share * intervals + (1 - share) * chain_bounds(chain, box, spec, "crown-ibp")
    expected = F.cross_entropy(worst_case_logits(margins, y), y)
    made_loss = loss_of(made("certified", model, ibp_weight=(share,)), batch, CROSS_ENTROPY, 0.02)
    assert made_loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_shares_follow_eps_as_it_rises(model: Classifier, batch: Batch) -> None:
    """At half of the recipe's ε halfway between their two values."""
    for name in ("clean_weight", "ibp_weight"):
        rising = made("certified", model, eps=0.04, **{name: (0.8, 0.2)})
        halfway = made("certified", model, eps=0.04, **{name: (0.5,)})
        assert loss_of(rising, batch, CROSS_ENTROPY, 0.02).item() == pytest.approx(
            loss_of(halfway, batch, CROSS_ENTROPY, 0.02).item(), rel=1e-5
        )


@pytest.mark.parametrize("method", ["certified", "ibp", "sabr", "mtl-ibp"])
def test_the_regularizer_fades_as_eps_rises(method: str, model: Classifier, batch: Batch) -> None:
    plain, regular = (made(method, model, eps=0.04, ibp_regularizer=weight) for weight in (0.0, 2.0))
    excess = {
        eps: loss_of(regular, batch, CROSS_ENTROPY, eps) - loss_of(plain, batch, CROSS_ENTROPY, eps)
        for eps in (0.01, 0.04)
    }
    assert excess[0.01] > 0
    assert excess[0.04] == 0


@pytest.mark.parametrize("method", ["certified", "ibp", "sabr", "mtl-ibp"])
def test_the_regularizer_does_not_see_rounding_while_eps_is_tiny(method: str, model: Classifier, batch: Batch) -> None:
    """Its value and gradient at the first steps of a smooth warm-up are those where float32 still has the widths."""
    found = {}
    for eps in (1e-5, 1e-8, 1e-9, 1e-10, 0.0):
        model.zero_grad()
        losses = [
            loss_of(made(method, model, eps=0.04, ibp_regularizer=w), batch, CROSS_ENTROPY, eps) for w in (0.0, 2.0)
        ]
        (losses[1] - losses[0]).backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found[eps] = (losses[1] - losses[0]).item(), gradient
    value, gradient = found.pop(1e-5)
    assert value > 0
    for other, its in found.values():
        assert other == pytest.approx(value, rel=0.01)
        assert float((its - gradient).norm()) < 0.05 * float(gradient.norm())


@pytest.mark.parametrize("method", ["certified", "ibp", "mtl-ibp"])
def test_supcon_on_worst_embeddings_sees_the_embedding_and_a_corner_of_its_box(
    method: str, model: Classifier, batch: Batch
) -> None:
    x, y = batch
    chain = Layout(nn.Sequential(model.normalize, model.encoder)).resolve(x)
    box = ibp.intervals(chain, pixel_box(x, 0.02))[chain.last]
    views = torch.cat([model.embed(x), worst_corner(box, y, 0.1)])
    found = loss_of(made(method, model, embeddings="worst"), batch, SUPCON, 0.02)
    assert found.item() == pytest.approx(supcon_loss(views, torch.cat([y, y]), 0.1).item(), rel=1e-4)


def test_the_worst_corner_is_one_of_the_box(model: Classifier, batch: Batch) -> None:
    x, y = batch
    chain, ball = Layout(nn.Sequential(model.normalize, model.encoder)).resolve(x), pixel_box(x, 0.001)
    box = ibp.intervals(chain, ball)[chain.last]
    corner = worst_corner(box, y, 0.1)
    at_corner = torch.isclose(corner, box.lower, rtol=0, atol=1e-6) | torch.isclose(
        corner, box.upper, rtol=0, atol=1e-6
    )
    assert bool(at_corner.all())
    others = [supcon_loss(torch.where(torch.rand_like(corner) < 0.5, box.lower, box.upper), y, 0.1) for _ in range(20)]
    assert supcon_loss(corner, y, 0.1) > max(others)
    corner.sum().backward()
    assert float(model.encoder.features[0].weight.grad.abs().sum()) > 0


@pytest.mark.parametrize("method", ["sabr", "mtl-ibp"])
def test_supcon_on_attacks_sees_images_and_examples(method: str, model: Classifier, batch: Batch) -> None:
    x, y = batch
    moved = adversarial_half(model, batch, SUPCON, 0.02 if method == "mtl-ibp" else 0.018)
    expected = supcon_loss(model.embed(torch.cat([x, moved])), torch.cat([y, y]), 0.1)
    method = made(method, model, embeddings="attack", contrastive="double")
    assert loss_of(method, batch, SUPCON, 0.02).item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_head_that_is_no_single_linear_map_is_refused(model: Classifier) -> None:
    model.head = nn.Sequential(model.head, nn.ReLU())
    with pytest.raises(ModelError, match="one linear map"):
        made("certified", model)


def test_a_layer_without_bounds_is_named_before_training(model: Classifier) -> None:
    model.encoder.features[2] = nn.Tanh()
    with pytest.raises(UnsupportedLayer, match=r"features\.2"):
        made("ibp", model)
