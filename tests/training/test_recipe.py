"""A recipe refuses what cannot be trained."""

from __future__ import annotations

import pytest

from rampart.errors import SettingsError
from rampart.training import Recipe


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
        ("clean_weight", 2.0),
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
    "name", ["method", "contrastive", "schedule", "head", "certified_loss", "embedding_bound", "select"]
)
def test_a_word_that_is_no_choice_is_named(name: str) -> None:
    """Taken in silence, a misspelt certified loss or schedule would train another arm than its record says."""
    with pytest.raises(SettingsError, match="nonesuch"):
        Recipe(**{name: "nonesuch"})
