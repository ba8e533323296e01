"""A recipe refuses what cannot be trained."""

from __future__ import annotations

from typing import Any

import pytest

from rampart.errors import SettingsError
from rampart.models import build_model
from rampart.training import Recipe
from rampart.training.train import stages


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("architecture", "paper-cn"),
        ("epochs", 0),
        ("encoder_epochs", 0),
        ("head_epochs", 0),
        ("attack_steps", 0),
        ("batch_size", 1),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("temperature", 0.0),
        ("attack_rel_step", 0.0),
        ("width", -1.0),
        ("weight_decay", -0.1),
        ("supcon_weight", 1.1),
        ("encoder_supcon_weight", -0.1),
        ("clean_weight", (2.0,)),
        ("clean_weight", (0.5, -0.1)),
        ("ibp_weight", (0.1, 0.2, 0.3)),
        ("eps_warmup", 1.5),
        ("mtl_alpha", 1.1),
        ("sabr_lambda", 0.0),
        ("trades_beta", -1.0),
        ("l1", -1e-5),
        ("sam", -0.05),
        ("grad_clip", -1.0),
        ("ema", 1.0),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("bn_batches", -1),
        ("attack_rel_eps", 0.0),
        ("eps_warmup", -0.5),
        ("eps", -0.1),
        ("eps", 8.0),
        ("eps", float("nan")),
    ],
)
def test_a_value_out_of_range_is_named(name: str, value: object) -> None:
    with pytest.raises(SettingsError) as raised:
        Recipe(**{name: value})
    assert str(value) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "name", ["method", "contrastive", "schedule", "head", "certified_loss", "embeddings", "init", "select"]
)
def test_a_word_that_is_no_choice_is_named(name: str) -> None:
    """Taken in silence, a misspelt certified loss or schedule would train another arm than its record says."""
    with pytest.raises(SettingsError, match="nonesuch"):
        Recipe(**{name: "nonesuch"})


def test_a_warmup_longer_than_the_training_is_called_that() -> None:
    with pytest.raises(SettingsError, match="longer than the training"):
        Recipe(eps_warmup=2.0)


def test_embeddings_of_attacks_need_a_method_that_attacks() -> None:
    with pytest.raises(SettingsError, match=r"certified.*embeddings=worst"):
        Recipe(method="certified", contrastive="double", embeddings="attack")
    # A study may have a method without bounds beside one with: it does not look at them.
    for method in ("mtl-ibp", "normal", "adversarial", "trades"):
        Recipe(method=method, contrastive="double", embeddings="attack")


def test_a_head_that_nothing_trains_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"head .*contrastive=double"):
        Recipe(contrastive="single", supcon_weight=1.0)


@pytest.mark.parametrize(
    ("method", "settings", "said"),
    [
        ("certified", {"ibp_regularizer": 0.5}, True),
        ("certified", {"clean_weight": (1.0, 0.5)}, True),
        ("certified", {"ibp_weight": (1.0, 0.0)}, True),
        ("certified", {"ibp_weight": (1.0, 0.0), "eps_warmup": 0.5}, False),
        ("certified", {"clean_weight": (0.5,)}, False),
        ("ibp", {"clean_weight": (1.0, 0.5)}, True),
        ("ibp", {"ibp_weight": (1.0, 0.0)}, False),
        ("sabr", {"ibp_regularizer": 0.5}, True),
        ("sabr", {"clean_weight": (1.0, 0.5)}, False),
        ("mtl-ibp", {"ibp_weight": (1.0, 0.0)}, False),
    ],
)
def test_what_works_while_eps_rises_says_that_it_does_not(
    method: Any, settings: dict[str, Any], said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    stages(Recipe(method=method, width=0.125, **settings), build_model(width=0.125))
    assert ("take eps_warmup above 0" in caplog.text) == said


def test_the_boxes_of_sabr_keep_within_its_balls() -> None:
    with pytest.raises(SettingsError, match=r"attack_rel_eps=1\.5 .*sabr"):
        Recipe(method="sabr", attack_rel_eps=1.5)


@pytest.mark.parametrize("method", ["certified", "ibp", "sabr", "mtl-ibp"])
def test_bounds_are_never_in_half_precision(method: str) -> None:
    with pytest.raises(SettingsError, match=rf"bf16.*{method}.*fp32"):
        Recipe(method=method, precision="bf16")
