"""Search spaces are read from YAML and tried against the settings before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from rampart.errors import SettingsError
from rampart.settings import resolve
from rampart.training.recipe import MethodName
from rampart.tuning.space import read_space, starting_point, text

GIVEN = {"method": "sabr"}


def written(tmp_path: Path, yaml: str) -> str:
    (tmp_path / "space.yaml").write_text(yaml)
    return str(tmp_path / "space.yaml")


@pytest.mark.parametrize("method", get_args(MethodName))
def test_every_method_has_a_space_of_learning_rate_and_batch_size(method: str) -> None:
    space = read_space(method, "", {"method": method})
    assert set(space) >= {"lr", "batch_size"}
    assert isinstance(space["lr"], FloatDistribution)
    assert space["lr"].log
    settings = resolve("train", {"method": method})
    assert starting_point(space, {"method": method}) == {name: getattr(settings, name) for name in space}


def test_any_setting_of_the_training_can_be_searched(tmp_path: Path) -> None:
    space = read_space(
        "sabr",
        written(
            tmp_path,
            """
            eps: {choices: [1/255, 8/255, 16/255]}
            eps_warmup: {low: 0, high: 0.9, step: 0.1}
            sabr_lambda: {low: 1e-3, high: 1, log: true}
            epochs: {low: 2, high: 8}
            clean_weight: {choices: [0, [1, 0.5]]}
            temperature: {low: 0.05, high: 0.5}
            rotation: {low: 0, high: 30}
            """,
        ),
        GIVEN,
    )
    assert space["eps"] == CategoricalDistribution(["1/255", "8/255", "16/255"])
    assert space["eps_warmup"] == FloatDistribution(0, 0.9, step=0.1)
    assert space["sabr_lambda"] == FloatDistribution(0.001, 1, log=True)
    assert space["epochs"] == IntDistribution(2, 8)
    assert space["clean_weight"] == CategoricalDistribution([0, "1,0.5"])
    settings = resolve("train", {**GIVEN, "eps": "8/255", "clean_weight": text("1,0.5")})
    assert settings.clean_weight == (1.0, 0.5)


def test_the_start_is_the_settings_as_they_are_on_the_users_scale(tmp_path: Path) -> None:
    path = written(tmp_path, "eps: {choices: [2/255, 16/255]}\nattack_rel_step: {low: 0.1, high: 1}")
    space = read_space("adversarial", path, {"method": "adversarial"})
    assert starting_point(space, {"method": "adversarial"}) == {"eps": "16/255", "attack_rel_step": 0.4}
    assert starting_point(space, {"method": "adversarial", "attack_rel_step": "0.05"}) is None
    path = written(tmp_path, "eps: {low: 0.001, high: 0.2}")
    normalized = {"method": "adversarial", "eps_space": "normalized"}
    space = read_space("adversarial", path, normalized)
    assert starting_point(space, normalized) == {"eps": pytest.approx(32 / 255)}


def test_a_setting_that_is_given_is_not_searched(tmp_path: Path) -> None:
    assert set(read_space("normal", "", {"method": "normal", "lr": "0.01"})) == {"batch_size"}
    with pytest.raises(SettingsError, match="nothing to search"):
        read_space("normal", "", {"method": "normal", "lr": "0.01", "batch_size": "64"})


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("learning_rate: {low: 1, high: 2}", "unknown setting in search space space.yaml 'learning_rate'"),
        ("method: {choices: [ibp, sabr]}", "unknown setting"),
        ("seed: {low: 0, high: 9}", "unknown setting"),
        ("lr: {low: 0.1, high: 0.1}", "range of lr is empty"),
        ("lr: {low: 0.1, high: 0.01}", "range of lr is reversed"),
        ("lr: {low: 0, high: 0.01, log: true}", "range of lr"),
        ("lr: {low: 0, high: 0.01}", "space.yaml: lr must be above 0"),
        ("lr: {low: high, high: 0.01}", "range of lr"),
        ("lr: {low: 0.1, high: .inf}", "needs finite numbers"),
        ("epochs: {low: 2, high: .inf}", "range of epochs"),
        ("epochs: {low: 2.5, high: 8}", "needs finite whole numbers"),
        ("lr: {low: 0.1, high: 0.2, log: 'false'}", "log of lr is true or false"),
        ("lr: {low: 0.1, high: 0.2, step: 1}", "step of lr does not fit"),
        ("epochs: {low: 5, high: 20, step: 1.5}", "step of epochs must be a whole number"),
        ("batch_size: {choices: [64, 64]}", "two choices or more"),
        ("lr: {low: 0.1}", "lr needs low and high, or choices"),
        ("lr: {low: 0.1, hihg: 1}", "did you mean 'high'"),
        ("lr: 0.1", "lr needs a range"),
        ("schedule: {low: 0, high: 1}", "schedule has no order"),
        ("schedule: {choices: [cosine, sine]}", "unknown value 'sine'"),
        ("batch_size: {choices: [64]}", "two choices or more"),
        ("batch_size: {choices: [1, 64]}", "batch_size must be 2 or more"),
        ("", "must name a setting or more"),
        ("lr: [", "cannot be read"),
    ],
)
def test_a_bad_space_is_named_in_one_line(tmp_path: Path, yaml: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message) as raised:
        read_space("sabr", written(tmp_path, yaml), GIVEN)
    assert "\n" not in str(raised.value)


def test_a_space_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be read"):
        read_space("sabr", str(tmp_path / "none.yaml"), GIVEN)
