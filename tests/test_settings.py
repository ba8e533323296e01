"""Profiles, overrides, and the conversion of ε."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rampart.errors import SettingsError
from rampart.settings import (
    STEPS,
    EvaluateSettings,
    StudySettings,
    TrainSettings,
    VerifySettings,
    as_text,
    eps_text,
    nested,
    resolve,
)


def train_settings(**given: str) -> TrainSettings:
    settings = resolve("train", given)
    assert isinstance(settings, TrainSettings)
    return settings


@pytest.mark.parametrize("profile", ["quick", "paper", "best"])
@pytest.mark.parametrize("step", STEPS)
def test_every_profile_gives_every_entry_point_its_settings(profile: str, step: str) -> None:
    given = {"profile": profile} | ({"model": "x.npz"} if step in ("evaluate", "verify", "embed") else {})
    assert resolve(step, given).profile == profile


def test_paper_profile_is_the_studys_protocol() -> None:
    plain = train_settings(profile="paper")
    assert (plain.epochs, plain.lr, plain.batch_size, plain.temperature) == (30, 1e-3, 128, 0.07)
    adversarial = train_settings(profile="paper", method="adversarial", contrastive="double")
    assert (adversarial.epochs, adversarial.encoder_epochs, adversarial.head_epochs) == (10, 40, 10)
    assert (adversarial.temperature, adversarial.attack_steps, adversarial.attack_rel_step) == (0.1, 10, 0.25)
    # 8/255 and 2/255 on the study's scale.
    assert adversarial.eps == pytest.approx(4 / 255)
    certified = train_settings(profile="paper", method="certified")
    assert certified.eps == pytest.approx(1 / 255)
    assert certified.certified_loss == "logit-lower"
    assert train_settings(method="certified").certified_loss == "margin"


def test_arm_rules_apply_to_the_arm_that_the_user_names_and_yield_to_what_he_gives() -> None:
    assert train_settings(profile="paper", method="adversarial").epochs == 10
    assert train_settings(profile="paper", method="normal").epochs == 30
    assert train_settings(profile="paper", method="adversarial", epochs="7").epochs == 7


@pytest.mark.parametrize("text", ["True", "true", "yes", "on", "1"])
def test_arm_rules_apply_however_a_setting_is_spelt(text: str, tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("arms: [{when: {augment: True, width: 0.5}, set: {epochs: 7}}]")
    assert train_settings(profile=str(file), augment=text, width="0.50").epochs == 7
    assert train_settings(profile=str(file), augment=text).epochs != 7


def test_an_arm_rule_sees_what_those_before_it_have_set_and_the_user_given(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("arms: [{when: {method: normal}, set: {width: 0.5}}, {when: {width: 0.5}, set: {epochs: 7}}]")
    assert train_settings(profile=str(file)).epochs == 7
    assert train_settings(profile=str(file), width="0.25").epochs != 7
    assert train_settings(profile=str(file), method="ibp").epochs != 7


def test_normalized_eps_are_halved_once_and_both_values_are_logged() -> None:
    given = {"model": "x.npz", "eps_space": "normalized", "eps": "1/255,2/255,0.5"}
    settings = resolve("evaluate", given)
    assert isinstance(settings, EvaluateSettings)
    assert settings.eps == pytest.approx((1 / 510, 1 / 255, 0.25))
    texts = as_text(settings, given)
    assert texts["eps"] == "1/255,2/255,0.5"
    assert texts["eps_pixel"] == "1/510,1/255,0.25"


def test_a_users_eps_space_speaks_of_his_eps_not_of_the_profiles() -> None:
    given = {"model": "x.npz", "eps_space": "normalized", "eps": "2/255"}
    pixel = resolve("verify", {"model": "x.npz"})
    settings = resolve("verify", given)
    assert isinstance(settings, VerifySettings)
    assert isinstance(pixel, VerifySettings)
    assert settings.eps == pytest.approx(1 / 255)
    assert settings.survive_eps == pixel.survive_eps


def test_l2_radii_may_exceed_1() -> None:
    given = {"model": "x.npz", "norm": "l2", "certify": "none"}
    settings = resolve("evaluate", given | {"eps": "128/255,3"})
    assert isinstance(settings, EvaluateSettings)
    assert settings.eps == pytest.approx((128 / 255, 3.0))
    for eps, norm in (("3", "linf"), ("inf", "l2"), ("-1", "l2")):
        with pytest.raises(SettingsError, match="eps must lie between"):
            resolve("evaluate", given | {"eps": eps, "norm": norm})


def test_logged_names_do_not_depend_on_what_was_given() -> None:
    assert set(as_text(resolve("train", {}), {})) == set(as_text(resolve("train", {"lr": "1e-2"}), {"lr": "1e-2"}))
    assert as_text(resolve("train", {"lr": "1e-2"}), {"lr": "1e-2"})["lr"] == "1e-2"


def test_numbers_are_logged_as_they_are() -> None:
    """Those of a tuned profile have all digits that there are."""
    for lr, text in ((0.00123456789, "0.00123456789"), (0.002, "0.002"), (1e-5, "1e-05"), (1.0, "1")):
        assert as_text(replace(resolve("train", {}), lr=lr), {})["lr"] == text


@pytest.mark.parametrize(
    ("eps", "text"),
    [
        *((8 / 255, "8/255"), (1 / 510, "1/510"), (0.0, "0"), (0.3, "0.3"), (0.00392157, "1/255"), (1.0, "1")),
        (1e-7, "1e-07"),
    ],
)
def test_eps_are_written_as_people_write_them(eps: float, text: str) -> None:
    assert eps_text(eps) == text


def test_eps_of_metrics_names_are_written_as_people_write_them() -> None:
    for count in range(1, 255):
        if count % 51:  # 51/255 is 0.2
            assert eps_text(float(f"{count / 255:.6g}")) == f"{count}/255"


@pytest.mark.parametrize(
    ("step", "given", "message"),
    [
        ("train", {"method": "certifed"}, "did you mean 'certified'"),
        ("train", {"epohs": "1"}, "did you mean 'epochs'"),
        ("train", {"train.epochs": "1"}, "train is the step itself, say 'epochs'"),
        ("train", {"train.epohs": "1"}, "did you mean 'epochs'"),
        ("train", {"certify": "crown"}, "unknown setting 'certify' of train: it is one of evaluate"),
        ("evaluate", {"model": "x", "epochs": "1"}, "it is one of train"),
        ("train", {"profile": "papr"}, "did you mean 'paper'"),
        ("train", {"profile": "missing.yaml"}, "cannot be read"),
        ("train", {"eps": "-0.1"}, "between 0 and 1"),
        ("train", {"eps": "1.5"}, "between 0 and 1"),
        ("train", {"eps": "nan"}, "between 0 and 1"),
        ("train", {"eps": "8"}, "between 0 and 1 (pixels), not '8': 8/255, say"),
        ("train", {"eps": "much"}, "number or a fraction"),
        ("train", {"eps": "1/0"}, "number or a fraction"),
        ("train", {"eps": "1/255,2/255"}, "one value"),
        ("train", {"eps_space": "unit"}, "unknown eps_space"),
        ("train", {"lr": "fast"}, "valid number"),
        ("train", {"lr": "0"}, "above 0"),
        ("train", {"lr": "inf"}, "must be a finite number"),
        ("train", {"jitter": "0.1,0.1,nan,0"}, "nan"),
        ("train", {"jitter": "0.2"}, "takes 4 values"),
        ("train", {"jitter": "0.2,0.2,0,0,0"}, "takes 4 values"),
        ("train", {"threads": "100000"}, "threads must lie between"),
        ("train", {"split_seed": "-1"}, "split_seed must lie between"),
        ("train", {"seed": "99999999999999999999999"}, "seed must lie between"),
        ("verify", {"model": "x", "selection_seed": "-1"}, "selection_seed must lie between"),
        ("main", {"seeds": "1000000"}, "seeds must lie between"),
        ("main", {"force": "kep"}, "unknown value 'kep': did you mean 'keep'? (valid: keep, redo)"),
        ("train", {"batch_size": "1"}, "2 or more"),
        ("train", {"epochs": "0"}, "1 or more"),
        ("train", {"device": "tpu"}, "device must be"),
        ("train", {"architecture": "paper-cn"}, "did you mean 'paper-cnn'"),
        ("evaluate", {}, "model is missing"),
        ("evaluate", {"model": "x", "steps": "0"}, "1 or more"),
        ("verify", {"model": "x", "selection": "commn"}, "did you mean 'common'"),
        ("verify", {"model": "x", "timeout": "0"}, "above 0"),
        ("embed", {"model": "x", "points": "3"}, "10 or more"),
        ("main", {"methods": "normal,robust"}, "unknown value 'robust'"),
        ("main", {"seeds": "0"}, "seeds must lie between"),
        ("main", {"train.epohs": "1"}, "did you mean 'train.epochs'"),
    ],
)
def test_bad_settings_are_refused_in_one_line(step: str, given: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsError) as error:
        resolve(step, given)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("step", "section", "named"),
    [
        ("main", "{epochs: 1}", "epochs"),
        ("main", "{train.width: 0.5}", "train.width"),
        ("main", "{val_fraction: 0.5}", "val_fraction"),
        ("tune", "{epochs: 1}", "epochs"),
    ],
)
def test_a_section_may_not_set_what_it_would_not_tell(step: str, section: str, named: str, tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(f"{step}: {section}")
    with pytest.raises(SettingsError, match=f"'{named}' in section {step} .* belongs to the steps"):
        resolve(step, {"profile": str(file)})
    resolve("train", {"profile": str(file)})  # which has nothing to do with it
    file.write_text("main: {device: cpu, seed: 3, threads: 2, methods: normal}")
    assert resolve("main", {"profile": str(file)}).seed == 3


def test_a_bad_value_of_a_profile_names_it_and_one_of_the_user_does_not(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("train: {lr: fast}")
    with pytest.raises(SettingsError, match=r"^profile '.*own.yaml': lr: .* number.*, not 'fast'$"):
        resolve("train", {"profile": str(file), "epochs": "2"})
    with pytest.raises(SettingsError, match=r"^lr: .* number.*, not 'slow'$"):
        resolve("train", {"profile": str(file), "lr": "slow"})
    file.write_text("train: {width: 1}")
    with pytest.raises(SettingsError, match=r"^lr: "):
        resolve("train", {"profile": str(file), "lr": "slow"})


def test_a_profile_with_an_unknown_setting_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("train: {learning_rate: 1}")
    with pytest.raises(SettingsError, match="learning_rate"):
        resolve("train", {"profile": str(file)})
    file.write_text("trainn: {}")
    with pytest.raises(SettingsError, match="did you mean 'train'"):
        resolve("train", {"profile": str(file)})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {1: 2}", "unknown setting in section train .* '1'"),
        ("common: {1: 2}", "unknown setting in section common .* '1'"),
        ("common: {train.lr: 1}", "'train.lr' in section common .* put lr into section train"),
        ("arms: [{when: {1: 2}, set: {lr: 0.1}}]", "unknown setting in a rule .* '1'"),
        ("train: 3", "section train .* mapping"),
        ("arms: 3", "section arms .* list"),
        ("arms: [3]", "'when' and 'set'"),
        ("arms: [{when: 3, set: {}}]", "'when' and 'set'"),
        ("arms: [{when: {method: norml}, set: {lr: 0.1}}]", "method in a rule .* did you mean 'normal'"),
        ("arms: [{when: {method: [normal, foo]}, set: {lr: 0.1}}]", "unknown method in a rule"),
        ("train: {lr: 1}\ntrain: {epochs: 2}", "'train' stands there twice"),
        ("train: {lr: 1, epochs: 2, lr: 3}", "'lr' stands there twice"),
        ("train: {epochs: yes}", "epochs takes no truth value"),
        ("train: {eps_space: [normalized]}", "unknown eps_space"),
        ("arms: [{when: {augment: Ture}, set: {lr: 0.1}}]", "augment in a rule .* cannot be 'Ture'"),
        ("arms: [{when: {batch_size: many}, set: {lr: 0.1}}]", "batch_size in a rule .* cannot be 'many'"),
        ("arms: [{when: {eps: 8/255}, set: {lr: 0.1}}]", "cannot depend on 'eps'"),
        ("arms: [{when: {jitter: [0, 0, 0, 0]}, set: {lr: 0.1}}]", "cannot depend on 'jitter'"),
    ],
)
def test_a_profile_of_another_form_is_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(text)
    with pytest.raises(SettingsError, match=message):
        resolve("train", {"profile": str(file)})
    file.write_bytes(b"about: \xff\xfe")
    with pytest.raises(SettingsError, match="cannot be read"):
        resolve("train", {"profile": str(file)})


def test_what_is_merged_into_a_mapping_may_stand_there_again(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    rule = "arms:\n- when: {method: ibp}\n  set: &n {<<: &o {lr: 0.1, epochs: 2}, lr: 0.2}\n"
    file.write_text(f"{rule}train: {{<<: *n, epochs: 3}}")
    settings = train_settings(profile=str(file), method="normal")
    assert (settings.lr, settings.epochs) == (0.2, 3)


def test_each_part_of_a_profile_speaks_of_eps_on_its_own_scale(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("common: {eps_space: normalized, eps: 8/255}\ntrain: {eps_space: pixel}")
    assert train_settings(profile=str(file)).eps == pytest.approx(4 / 255)
    rules = (
        "[{when: {method: certified}, set: {eps_space: normalized, lr: 0.1}}, {when: {method: ibp}, set: {eps: 2/255}}]"
    )
    file.write_text(f"train: {{eps: 8/255}}\narms: {rules}")
    assert train_settings(profile=str(file), method="certified").eps == pytest.approx(8 / 255)
    assert train_settings(profile=str(file), method="ibp").eps == pytest.approx(2 / 255)
    file.write_text(f"train: {{eps: 8/255, eps_space: normalized}}\narms: {rules}")
    assert train_settings(profile=str(file), method="ibp").eps == pytest.approx(1 / 255)


def test_own_profile_file(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("common: {eps_space: normalized}\ntrain: {eps: 4/255, jitter: [0, 0, 0, 0]}")
    settings = train_settings(profile=str(file))
    assert settings.eps == pytest.approx(2 / 255)
    assert settings.jitter == (0, 0, 0, 0)


def test_one_file_is_one_profile_however_it_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.yaml").write_text("train: {epochs: 7}")
    for name in ("own.yaml", "./own.yaml", ".//own.yaml"):
        assert train_settings(profile=name).profile == "own.yaml"
    with pytest.raises(SettingsError, match=r"profile 'other.yaml' cannot be read"):
        train_settings(profile="./other.yaml")


def test_a_bad_radius_of_a_profile_is_told_from_a_users(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("train: {eps: 8}")
    with pytest.raises(SettingsError, match=f"^profile '{file}': eps"):
        train_settings(profile=str(file))
    with pytest.raises(SettingsError, match=r"^eps"):
        train_settings(profile="quick", eps="8")


def test_a_study_hands_bare_names_to_every_step_and_dotted_ones_to_one() -> None:
    given = {"eps": "8/255", "verify.eps": "2/255", "epochs": "3", "seed": "5", "methods": "normal"}
    assert isinstance(resolve("main", given), StudySettings)
    assert nested(given, "train") == {"eps": "8/255", "epochs": "3"}
    assert nested(given, "evaluate") == {"eps": "8/255"}
    assert nested(given, "verify") == {"eps": "2/255"}


def test_lists_and_booleans_from_text() -> None:
    settings = resolve("main", {"methods": "normal, certified", "augment": "False", "contrastive": "none,single"})
    assert isinstance(settings, StudySettings)
    assert settings.methods == ("normal", "certified")
    assert settings.augment == (False,)
    assert settings.contrastive == ("none", "single")
    assert train_settings(augment="True").augment is True
