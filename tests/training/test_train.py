"""Training lowers the loss, chooses its epoch, repeats itself, and keeps off the test images."""

from __future__ import annotations

import importlib
import math
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rampart.attacks import pgd
from rampart.bounds import ibp, margin_bounds
from rampart.bounds.box import pixel_box
from rampart.bounds.margins import chain_bounds, margin_spec
from rampart.data import Augmentation, Dataset, Split, to_pixels
from rampart.errors import TrainingDiverged
from rampart.models import Classifier, Layout, build_model, interval_init
from rampart.training import Recipe, train
from tests.training.conftest import ListRecorder

SMALL = {
    "width": 0.125,
    "batch_size": 50,
    "lr": 3e-3,
    "epochs": 4,
    "encoder_epochs": 4,
    "head_epochs": 4,
    "eps": 2 / 255,
    "attack_steps": 2,
}
METHODS = {
    "normal": {"method": "normal"},
    "adversarial": {"method": "adversarial"},
    "margin": {"method": "certified", "certified_loss": "margin"},
    "fused": {"method": "certified", "certified_loss": "fused"},
    "logit-lower": {"method": "certified", "certified_loss": "logit-lower"},
    "trades": {"method": "trades"},
    "ibp": {"method": "ibp", "embeddings": "worst"},
    "sabr": {"method": "sabr", "embeddings": "attack"},
    "mtl-ibp": {"method": "mtl-ibp", "embeddings": "attack"},
}

# Of each setting that has no part in some training another value than it has here.
OTHERWISE = {
    "epochs": 2,
    "encoder_epochs": 2,
    "head_epochs": 2,
    "temperature": 0.3,
    "supcon_weight": 0.2,
    "encoder_supcon_weight": 0.4,
    "head": "method",
    "eps": 0.1,
    "eps_warmup": 0.5,
    "attack_steps": 3,
    "attack_rel_step": 0.4,
    "attack_rel_eps": 1.3,
    "attack_start": "wide",
    "attack_batchnorm": "train",
    "trades_beta": 2.0,
    "sabr_lambda": 0.3,
    "mtl_alpha": 0.2,
    "certified_loss": "fused",
    "clean_weight": (0.3,),
    "ibp_weight": (0.5,),
    "ibp_regularizer": 0.5,
    "embeddings": "crown-ibp",
}

# Those that have a part in every training.
EVERYWHERE = (
    *("method", "augment", "contrastive", "architecture", "width", "init", "batch_size", "optimizer", "lr", "schedule"),
    *("weight_decay", "l1", "dropout", "sam", "grad_clip", "ema", "bn_batches", "compile", "precision", "select"),
)


def recipe(method: str = "normal", **change: object) -> Recipe:
    return Recipe(**{**SMALL, **METHODS[method], **change})


def same(a: dict[str, Tensor], b: dict[str, Tensor], prefix: str = "") -> bool:
    return all(torch.equal(value, b[name]) for name, value in a.items() if name.startswith(prefix))


@pytest.mark.parametrize("contrastive", ["none", "double", "single"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_lowers_its_loss(
    method: str, contrastive: str, few_digits: Dataset, recorder: ListRecorder
) -> None:
    how = {"batch_size": 20, "lr": 1e-2, "eps": 1 / 255, "epochs": 3, "encoder_epochs": 3, "head_epochs": 3}
    model = train(recipe(method, contrastive=contrastive, **how), few_digits, recorder)
    for stage in ("encoder", "head") if contrastive == "double" else ("train",):
        losses = recorder.series(f"{stage}/loss")
        assert len(losses) == 3
        assert losses[-1] < 0.9 * losses[0], stage
    if method in ("normal", "adversarial"):
        with torch.no_grad():
            predictions = model(to_pixels(few_digits.val.images)).argmax(1)
        # Ten classes: guessing is right on one image in ten.
        assert (predictions == few_digits.val.labels).float().mean() > 0.3


def test_the_same_seed_gives_the_same_weights_and_another_one_does_not(few_digits: Dataset) -> None:
    """With everything that draws numbers: initial weights, order, augmentation, attack starts."""
    how = recipe("adversarial", augment=True, epochs=2)
    first, other, again = (train(how, few_digits, ListRecorder(), seed=seed).state_dict() for seed in (1, 2, 1))
    assert same(first, again)
    assert not same(first, other, "head.weight")


@pytest.mark.parametrize("contrastive", ["none", "double", "single"])
@pytest.mark.parametrize("method", METHODS)
def test_idle_settings_change_nothing(method: str, contrastive: str, few_digits: Dataset) -> None:
    how = recipe(method, contrastive=contrastive, epochs=1, encoder_epochs=1, head_epochs=1)
    changed = {name: value for name, value in OTHERWISE.items() if name in how.idle()}
    if "certified_loss" in changed:
        changed.pop("ibp_weight" if contrastive == "none" else "certified_loss")  # they go together in margins alone
    assert changed
    first, second = (train(one, few_digits, ListRecorder()).state_dict() for one in (how, replace(how, **changed)))
    assert same(first, second)


def test_every_setting_has_a_part_in_all_trainings_or_in_some() -> None:
    """Who adds one says in which."""
    recipes = [recipe(method, contrastive=c) for method in METHODS for c in ("none", "double", "single")]
    idle = [one.idle() for one in recipes]
    assert set().union(*idle) == set(OTHERWISE)
    assert not set.intersection(*idle)
    assert {field.name for field in fields(Recipe)} == {*OTHERWISE, *EVERYWHERE}


def test_the_best_epoch_is_returned_or_the_last(few_digits: Dataset) -> None:
    """On validation labels that are all wrong, so that accuracy falls as the network learns."""
    wrong = replace(few_digits, val=Split(few_digits.val.images, (few_digits.val.labels + 1) % 10))
    how = {"batch_size": 20, "lr": 1e-2, "epochs": 4}
    best, last = ListRecorder(), ListRecorder()
    chosen = train(recipe(**how), wrong, best).state_dict()
    final = train(recipe(**how, select="last"), wrong, last).state_dict()
    scores = best.series("val/accuracy")
    top = max(epoch for epoch, score in enumerate(scores, 1) if score == max(scores))
    assert top < 4, "the last epoch is the best one: this test shows nothing"
    assert same(chosen, best.states[top])
    assert same(final, last.states[4])
    assert best.series("train/best_epoch") == [top]
    assert last.series("train/best_epoch") == [4]


def test_an_encoder_that_supcon_trains_alone_is_its_last_epochs(few_digits: Dataset, recorder: ListRecorder) -> None:
    """On validation labels of chance, whose SupCon rises as the encoder learns."""
    chance = torch.randint(10, few_digits.val.labels.shape, generator=torch.Generator().manual_seed(0))
    data = replace(few_digits, val=Split(few_digits.val.images, chance))
    how = {"batch_size": 20, "lr": 1e-2, "encoder_epochs": 4, "head_epochs": 1}
    model = train(recipe(contrastive="double", **how), data, recorder)
    losses = recorder.series("val/supcon_loss")
    assert min(losses) < losses[-1], "the last epoch is the best one: this test shows nothing"
    assert recorder.series("encoder/best_epoch") == [4]
    assert same(model.state_dict(), recorder.states[4], "encoder.")


def test_of_equal_epochs_the_later_one_is_kept(few_digits: Dataset, recorder: ListRecorder) -> None:
    """A ball of which no image is certified: all epochs score 0."""
    model = train(recipe("margin", eps=1.0, epochs=3), few_digits, recorder)
    assert recorder.series("val/certified_accuracy") == [0.0] * 3
    assert same(model.state_dict(), recorder.states[3])


def test_what_is_returned_is_in_eval_mode_and_can_be_trained_on(few_digits: Dataset, recorder: ListRecorder) -> None:
    model = train(recipe(contrastive="double", encoder_epochs=1, head_epochs=1), few_digits, recorder)
    assert not any(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("head", ["normal", "method"])
@pytest.mark.parametrize("method", ["normal", "adversarial", "margin"])
def test_the_head_stage_of_double_leaves_the_encoder_as_it_is(
    method: str, head: str, few_digits: Dataset, recorder: ListRecorder
) -> None:
    """Weights and running statistics: those of the encoder's chosen epoch."""
    how = recipe(method, contrastive="double", encoder_epochs=2, head_epochs=2, head=head)
    model = train(how, few_digits, recorder)
    before = recorder.states[3]  # the head's stage begins with a checkpoint, after one of the start and two of epochs
    assert same(before, recorder.states[int(recorder.series("encoder/best_epoch")[0])])
    for after in (*recorder.states[4:], model.state_dict()):
        assert same(before, after, "encoder.")
        assert not torch.equal(before["head.weight"], after["head.weight"])


def test_an_encoder_with_a_share_of_cross_entropy_trains_the_head_along(
    few_digits: Dataset, recorder: ListRecorder
) -> None:
    train(
        recipe(contrastive="double", encoder_supcon_weight=0.5, encoder_epochs=1, head_epochs=1), few_digits, recorder
    )
    assert not torch.equal(recorder.states[0]["head.weight"], recorder.states[1]["head.weight"])
    assert recorder.series("val/accuracy"), "with a head there is an accuracy to choose the epoch by"


def test_epochs_count_on_through_the_stages(few_digits: Dataset, recorder: ListRecorder) -> None:
    train(recipe(contrastive="double", encoder_epochs=2, head_epochs=3), few_digits, recorder)
    assert [step for step, values in recorder.told if "encoder/loss" in values] == [1, 2]
    assert [step for step, values in recorder.told if "head/loss" in values] == [3, 4, 5]
    assert 1 <= recorder.series("encoder/best_epoch")[0] <= 2
    assert 3 <= recorder.series("head/best_epoch")[0] <= 5


def test_epsilon_and_learning_rate_follow_their_schedules(few_digits: Dataset, recorder: ListRecorder) -> None:
    train(recipe("margin", eps_warmup=0.5, schedule="cosine"), few_digits, recorder)
    eps, lr = recorder.series("train/epsilon"), recorder.series("train/learning_rate")
    assert 0 < eps[0] < eps[1] < eps[2] == eps[3] == pytest.approx(2 / 255)
    assert all(later < earlier for earlier, later in pairwise([3e-3, *lr]))
    assert lr[-1] < 0.1 * 3e-3


def test_validation_of_certified_training_is_certified_accuracy_at_full_eps(
    few_digits: Dataset, recorder: ListRecorder
) -> None:
    model = train(recipe("margin", eps=1 / 255, select="last", eps_warmup=1.0), few_digits, recorder)
    x, y = to_pixels(few_digits.val.images), few_digits.val.labels
    bounds = margin_bounds(model, x, y, 1 / 255, "crown-ibp")
    share = float((bounds > 0).all(1).float().mean())
    assert 0 < share < 1
    assert recorder.series("val/certified_accuracy")[-1] == pytest.approx(share)


def test_validation_of_adversarial_training_is_robust_accuracy(few_digits: Dataset, recorder: ListRecorder) -> None:
    model = train(recipe("adversarial", eps=8 / 255, attack_steps=10, select="last"), few_digits, recorder)
    x, y = to_pixels(few_digits.val.images), few_digits.val.labels
    attack = pgd(model, x, y, 8 / 255, 10, 2 / 255, generator=torch.Generator().manual_seed(7))
    robust = 1 - float(attack.success.float().mean())
    found, clean = recorder.series("val/robust_accuracy")[-1], recorder.series("val/accuracy")[-1]
    assert found < clean, "an attack that breaks nothing shows nothing"
    # The same attack from another start.
    assert found == pytest.approx(robust, abs=0.05)


@pytest.mark.parametrize("method", ["normal", "adversarial", "margin"])
def test_the_test_images_are_never_read(method: str, sealed_digits: Dataset, recorder: ListRecorder) -> None:
    train(recipe(method, contrastive="double", encoder_epochs=1, head_epochs=1), sealed_digits, recorder)
    assert recorder.states


class Spy(Augmentation):
    """An augmentation that changes nothing and remembers every image that it was given."""

    def __call__(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        seen.extend(keys((x * 255).round().byte()))
        return x


seen: list[bytes] = []


def keys(images: Tensor) -> list[bytes]:
    return [image.numpy().tobytes() for image in images]


@pytest.mark.parametrize("contrastive", ["none", "double"])
def test_training_images_alone_are_augmented(contrastive: str, few_digits: Dataset, recorder: ListRecorder) -> None:
    seen.clear()
    images, others = keys(few_digits.train.images), {*keys(few_digits.val.images), *keys(few_digits.test.images)}
    assert not others & set(images)
    how = recipe(contrastive=contrastive, augment=True, epochs=4, encoder_epochs=2, head_epochs=2)
    train(how, few_digits, recorder, augmentation=Spy())
    assert sorted(seen) == sorted(images * 4)


def test_without_augment_the_augmentation_is_not_used(few_digits: Dataset, recorder: ListRecorder) -> None:
    seen.clear()
    train(recipe(epochs=1), few_digits, recorder, augmentation=Spy())
    assert not seen


def test_the_studys_augmentation_is_the_default(few_digits: Dataset) -> None:
    default, given, without = (
        train(recipe(augment=augment, epochs=1), few_digits, ListRecorder(), augmentation).state_dict()
        for augment, augmentation in ((True, None), (True, Augmentation()), (False, None))
    )
    assert same(default, given)
    assert not same(default, without, "head.weight")


@pytest.mark.parametrize("method", METHODS)
def test_an_absurd_learning_rate_is_reported_with_the_last_checkpoint(
    method: str, few_digits: Dataset, recorder: ListRecorder
) -> None:
    with pytest.raises(TrainingDiverged, match="lower lr") as raised:
        train(recipe(method, lr=1e30), few_digits, recorder)
    assert f"<checkpoint {len(recorder.states) - 1}>" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_checkpoint_that_is_called_good_is_good(few_digits: Dataset, recorder: ListRecorder) -> None:
    """One step an epoch: the epoch whose step ruins the weights has a finite loss itself."""
    with pytest.raises(TrainingDiverged) as raised:
        train(recipe(lr=1e30, batch_size=200), few_digits, recorder)
    named = next(i for i in range(len(recorder.states)) if f"<checkpoint {i}>" in str(raised.value))
    model = fresh(recorder.states[named])
    with torch.no_grad():
        assert bool(model(to_pixels(few_digits.val.images)).isfinite().all())


def fresh(state: dict[str, Tensor]) -> Classifier:
    model = build_model(width=0.125).eval()
    model.load_state_dict(state)
    return model


def test_weights_that_are_nan_are_reported(few_digits: Dataset, recorder: ListRecorder) -> None:
    class NaN(Augmentation):
        def __call__(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
            return x * math.nan

    with pytest.raises(TrainingDiverged, match="nan"):
        train(recipe(augment=True), few_digits, recorder, augmentation=NaN())
    assert len(recorder.states) == 1, "no checkpoint is written after the loss became NaN"


@pytest.mark.parametrize("contrastive", ["none", "double"])
def test_a_network_that_has_died_is_reported(
    contrastive: str, few_digits: Dataset, recorder: ListRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many do at too high a learning rate: no gradient passes a layer of ReLUs that are 0 for every image."""

    def dead(*given: Any) -> Classifier:
        model = build_model(*given)
        with torch.no_grad():
            model.encoder.projection[0].bias.fill_(-1e6)
        return model

    monkeypatch.setattr(importlib.import_module("rampart.training.train"), "build_model", dead)
    with pytest.raises(TrainingDiverged, match=r"ReLUs have died in epoch 1 .*: lower lr .* is <checkpoint 0>"):
        train(recipe(contrastive=contrastive), few_digits, recorder)
    assert len(recorder.states) == 1


def test_a_last_batch_of_one_image_is_left_out(few_digits: Dataset, recorder: ListRecorder) -> None:
    """BatchNorm has no statistics of one image."""
    train(recipe(epochs=1), replace(few_digits, train=few_digits.train[:101]), recorder)
    assert math.isfinite(recorder.series("train/loss")[0])


def test_an_average_of_the_weights_is_what_is_kept(few_digits: Dataset, recorder: ListRecorder) -> None:
    """With weights that move by whole steps it lags behind them; a decay of 0 is no average."""
    plain = train(recipe(epochs=2), few_digits, ListRecorder())
    averaged = train(recipe(epochs=2, ema=0.9), few_digits, recorder)
    difference = [
        float((a - b).detach().abs().max()) for a, b in zip(plain.parameters(), averaged.parameters(), strict=True)
    ]
    assert max(difference) > 1e-4
    assert same(averaged.state_dict(), recorder.states[-1])


def test_averaging_does_not_change_the_training_itself(few_digits: Dataset) -> None:
    """Losses are those of the weights that are trained, not of their average."""
    recorders = [ListRecorder(), ListRecorder()]
    for recorder, ema in zip(recorders, (0.0, 0.9), strict=True):
        train(recipe(epochs=3, ema=ema), few_digits, recorder)
    assert recorders[0].series("train/loss") == pytest.approx(recorders[1].series("train/loss"), rel=1e-4)


def test_l1_draws_weights_to_zero_and_leaves_batch_norm_alone(few_digits: Dataset) -> None:
    plain, sparse = (train(recipe(epochs=4, l1=l1, select="last"), few_digits, ListRecorder()) for l1 in (0.0, 0.05))

    def size(model: Classifier) -> float:
        return sum(
            float(m.weight.detach().abs().sum()) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)
        )

    assert size(sparse) < 0.7 * size(plain)
    norms = [m for m in sparse.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(float(norm.weight.detach().mean()) > 0.9 for norm in norms)


def test_clipped_gradients_are_no_longer_than_allowed(
    few_digits: Dataset, recorder: ListRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = []
    step = torch.optim.Adam.step

    def watched(self: torch.optim.Adam, *given: object) -> object:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        lengths.append(float(torch.stack([g.norm() for g in gradients]).norm()))
        return step(self, *given)

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    train(recipe(epochs=1), few_digits, ListRecorder())
    free = max(lengths)
    lengths.clear()
    train(recipe(epochs=1, grad_clip=free / 4), few_digits, recorder)
    assert max(lengths) <= free / 4 * (1 + 1e-4)


def test_measured_statistics_make_bounds_in_training_and_eval_mode_agree(
    few_digits: Dataset, recorder: ListRecorder
) -> None:
    """Over one batch that holds all training images: eval mode then normalises as training mode does on them."""
    how = {"batch_size": 200, "bn_batches": 1, "epochs": 3}
    model = train(recipe("ibp", **how), few_digits, recorder)
    lagging = train(recipe("ibp", **{**how, "bn_batches": 0}), few_digits, ListRecorder())
    x, y = to_pixels(few_digits.train.images), few_digits.train.labels

    def gap(model: Classifier) -> float:
        spec = margin_spec(y, 10)
        with torch.no_grad():
            evaluated, trained = (
                chain_bounds(Layout(model.train(mode)).resolve(x), pixel_box(x, 2 / 255), spec, "crown-ibp")
                for mode in (False, True)
            )
        return float((evaluated - trained).abs().max() / trained.abs().max())

    assert gap(model) < 0.02
    assert gap(lagging) > 0.1


def test_interval_init_keeps_the_width_of_intervals(few_digits: Dataset) -> None:
    """From layer to layer, where PyTorch's own lets it grow."""
    x = torch.rand(4, 64, 1, 1)

    def growth(init: bool) -> float:
        torch.manual_seed(0)
        layers = [layer for _ in range(4) for layer in (nn.Linear(64, 64), nn.ReLU())]
        model = nn.Sequential(nn.Flatten(), *layers)
        if init:
            interval_init(model)
        chain, box = Layout(model).resolve(x), pixel_box(x, 0.1)
        return float(ibp.intervals(chain, box)[chain.last].half.mean() / box.half.mean())

    assert 0.2 < growth(True) < 5
    assert growth(False) > 10 * growth(True)


def test_a_recipe_asks_for_interval_init(few_digits: Dataset) -> None:
    start = train(recipe(epochs=1, lr=1e-9, init="ibp"), few_digits, ListRecorder())
    weight = start.encoder.projection[0].weight
    assert float(weight.std()) == pytest.approx((2 * math.pi) ** 0.5 / weight.shape[1], rel=0.1)


@pytest.mark.parametrize("architecture", ["cnn5", "cnn7", "resnet"])
def test_other_architectures_are_trained_with_bounds(
    architecture: str, few_digits: Dataset, recorder: ListRecorder
) -> None:
    how = {"architecture": architecture, "width": 1 / 16, "epochs": 2, "eps": 1 / 255, "lr": 1e-2}
    model = train(recipe("ibp", **how), few_digits, recorder)
    losses = recorder.series("train/loss")
    assert losses[-1] < losses[0]
    assert model.architecture.name == architecture
