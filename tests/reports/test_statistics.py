"""Claims: what differs, by how much, and what may be said of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from rampart.errors import SettingsError
from rampart.reports.baseline import put_beside, read_baseline
from rampart.reports.evidence import Evidence, collect
from rampart.reports.record import keep, read
from rampart.reports.sections import material_of
from rampart.reports.statistics import bootstrap, claim_table, claims
from rampart.settings import CompareSettings
from tests.conftest import SHARED
from tests.reports.made import evaluation, finished, verification

ARMS = {
    "normal": {"arm": "normal", "method": "normal", "contrastive": "none"},
    "supcon": {"arm": "normal+supcon-double", "method": "normal", "contrastive": "double"},
    "certified": {"arm": "certified", "method": "certified", "contrastive": "none"},
    "augmented": {"arm": "normal+aug", "method": "normal", "contrastive": "none", "augment": True},
}


def ledger(rng: np.random.Generator, accuracy: float, robust: float, size: int = 300) -> pd.DataFrame:
    right, held = rng.random(size) < accuracy, rng.random(size) < robust
    return evaluation("".join("01"[int(r)] for r in right), "".join("10"[int(h)] for h in held))


def evidence(seeds: int, **accuracies: float) -> Evidence:
    rng = np.random.default_rng(0)
    for seed in range(seeds):
        for arm, accuracy in accuracies.items():
            finished("evaluate", ledger(rng, accuracy, 0.5), seed=seed, **ARMS[arm])
    return collect("0", CompareSettings())


def test_every_pair_that_differs_in_one_thing_is_a_claim() -> None:
    found = claims(evidence(1, normal=0.8, supcon=0.7, certified=0.6, augmented=0.8), 0.1)
    pairs = set(found[["factor", "arm", "other"]].itertuples(index=False, name=None))
    assert pairs == {
        ("SupCon", "normal+supcon-double", "normal"),
        ("augmentation", "normal+aug", "normal"),
        ("method", "certified", "normal"),
    }
    assert set(found["metric"]) == {"accuracy", "robust accuracy"}


def test_intervals_and_tests_are_those_of_the_textbooks() -> None:
    given = evidence(4, normal=0.8, supcon=0.7)
    found = claims(given, 0.1)
    row = found[found["metric"] == "accuracy"].iloc[0]
    runs = given.of("evaluate").set_index(["arm", "seed"])["run_id"]
    assert set(row["runs"].split()) == set(runs)
    correct = {
        (arm, seed): given.ledgers[runs[arm, str(seed)]]["correct"].to_numpy()
        for arm in ("normal", "normal+supcon-double")
        for seed in range(4)
    }
    ours = np.array([correct["normal+supcon-double", s].mean() for s in range(4)])
    theirs = np.array([correct["normal", s].mean() for s in range(4)])
    assert row["difference"] == pytest.approx((ours - theirs).mean())
    test = stats.ttest_rel(ours, theirs)
    interval = test.confidence_interval(0.95)
    assert (row["seed_low"], row["seed_high"]) == pytest.approx((interval.low, interval.high))
    # Holm, of two claims: the smaller p-value twice, the larger one as it is, never below the smaller.
    robust = found[found["metric"] == "robust accuracy"].iloc[0]
    held = {key: mask & ~given.ledgers[runs[key[0], str(key[1])]]["attacked/0.1"] for key, mask in correct.items()}
    raw = [
        stats.ttest_rel(
            *([counted[arm, s].mean() for s in range(4)] for arm in ("normal+supcon-double", "normal"))
        ).pvalue
        for counted in (correct, held)
    ]
    small, large = sorted(raw)
    assert sorted([row["seed_p"], robust["seed_p"]]) == pytest.approx([min(2 * small, 1), max(2 * small, large)])
    # McNemar's exact test is a binomial one on the images that only one of the two gets right.
    one, two = correct["normal+supcon-double", 0], correct["normal", 0]
    discordant = stats.binomtest(int((one & ~two).sum()), int((one != two).sum()))
    others = [robust["image_p"], row["image_p"]]
    assert any(p == pytest.approx(min(k * discordant.pvalue, 1)) for p in others for k in (1, 2))


def test_the_bootstrap_is_scipys() -> None:
    values = np.random.default_rng(1).choice([-1.0, 0.0, 0.5, 1.0], size=200, p=[0.1, 0.5, 0.2, 0.2])
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=10_000, rng=2).confidence_interval
    assert bootstrap(values) == pytest.approx((theirs.low, theirs.high), abs=0.01)


def trained(arm: str, seed: int, **params: str) -> None:
    """A training of an arm, and the evaluation of its model."""
    tags = ARMS[arm]
    run = finished("train", None, seed=seed, **tags)
    named = {name: str(tags.get(name, False)) for name in ("method", "augment", "contrastive")}
    run.params({"profile": "quick", "seed": str(seed), **named, **params})
    weights = f"{arm} {seed}"
    finished("evaluate", evaluation("1110"), seed=seed, model_run=run.id, weights=weights, **tags)


def test_what_else_two_trainings_differ_in_is_said() -> None:
    """But not what has no part in one of them."""
    trained("normal", 0, lr="0.01", crop_padding="3", trades_beta="2", epochs="7", compile="True")
    trained("supcon", 0, lr="0.02", head_epochs="3", encoder_epochs="3", temperature="0.3")
    trained("augmented", 0, lr="0.01", crop_padding="4", epochs="7", sam="0.1")
    found = claims(collect("0", CompareSettings()), None)
    assert found.set_index("factor")["also"].to_dict() == {"SupCon": "epochs, lr", "augmentation": "sam"}
    texts = claim_table(found, pd.DataFrame(columns=["arm", "step", "metric", "eps", "value"]))
    assert texts["differs also in"].tolist() == ["epochs, lr", "sam"]


def test_what_else_any_seeds_trainings_differ_in_is_said() -> None:
    for seed, rate in enumerate(("0.01", "0.02")):
        trained("normal", seed, lr="0.01", epochs="6")
        trained("supcon", seed, lr=rate, encoder_epochs="4", head_epochs="2")
    assert claims(collect("0", CompareSettings()), None)["also"].tolist() == ["lr"]


def test_nothing_else_is_said_of_trainings_that_are_alike_and_of_unknown_ones_that_they_are() -> None:
    for arm in ("normal", "augmented"):
        trained(arm, 0, lr="0.01")
    finished("evaluate", evaluation("1110"), **ARMS["certified"])
    found = claims(collect("0", CompareSettings()), None)
    assert found.set_index("factor")["also"].to_dict() == {"augmentation": "", "method": "?"}
    texts = claim_table(found, pd.DataFrame(columns=["arm", "step", "metric", "eps", "value"]))
    assert texts["differs also in"].tolist() == ["-", "?"]


def test_what_a_training_was_does_not_change_with_its_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evidence is read long after it was kept; that of older exports says that it does not know."""
    for arm, rate in (("normal", "0.01"), ("supcon", "0.02")):
        trained(arm, 0, lr=rate, epochs="6", encoder_epochs="4", head_epochs="2")
    keep(material_of(collect("0", CompareSettings()), pd.DataFrame(columns=["arm", "step", "metric", "eps"])), tmp_path)

    def gone(*_: object) -> None:
        raise SettingsError("its profile is gone")

    monkeypatch.setattr("rampart.settings.resolving.load_profile", gone)
    assert claims(read(tmp_path).evidence, None)["also"].tolist() == ["lr"]
    runs = pd.read_csv(tmp_path / "runs.csv", dtype=str)
    runs.drop(columns="trained").to_csv(tmp_path / "runs.csv", index=False)
    assert claims(read(tmp_path).evidence, None)["also"].tolist() == ["?"]


def test_no_p_value_is_0() -> None:
    for arm, right in (("normal", "1" * 2000), ("supcon", "0" * 2000)):
        finished("evaluate", evaluation(right), **ARMS[arm])
    found = claims(collect("0", CompareSettings()), None)
    texts = claim_table(found, pd.DataFrame(columns=["arm", "step", "metric", "eps", "value"]))
    assert texts["p (McNemar)"].tolist() == ["<1e-300"]


def test_too_few_seeds_are_said() -> None:
    found = claims(evidence(2, normal=0.9, supcon=0.4), 0.1)
    row = found[found["metric"] == "accuracy"].iloc[0]
    assert np.isnan(row["seed_p"])
    assert row["finding"] == "not enough seeds; these models: lower"
    text = claim_table(found, pd.DataFrame(columns=["arm", "step", "metric", "eps", "value"])).iloc[0]
    assert text["95 % over seeds"] == "-"
    assert text["n"] == "2 seeds, 300 images"
    assert "published" not in text


def test_a_test_that_speaks_for_the_other_direction_shows_nothing() -> None:
    """Of two seeds the first is worse beyond doubt, and the mean better."""
    for seed, (normal, supcon) in enumerate((("1" * 60, "1" * 45), ("1" * 20, "1" * 60))):
        for arm, right in (("normal", normal), ("supcon", supcon)):
            finished("evaluate", evaluation(right.ljust(100, "0")), seed=seed, **ARMS[arm])
    row = claims(collect("0", CompareSettings()), None).iloc[0]
    assert row["difference"] == pytest.approx((-0.15 + 0.4) / 2)
    assert row["image_p"] < 0.01
    assert row["finding"] == "not enough seeds; these models: no difference shown"


def test_a_clear_difference_is_found_and_none_is_not() -> None:
    found = claims(evidence(5, normal=0.9, supcon=0.5, augmented=0.9), 0.1).query("metric == 'accuracy'")
    finding = dict(zip(found["factor"], found["finding"], strict=True))
    assert finding == {"SupCon": "lower", "augmentation": "no difference shown"}


def test_a_finding_that_rests_on_an_attack_that_failed_a_check_is_marked() -> None:
    rng = np.random.default_rng(0)
    for arm, tags in (("normal", {}), ("certified", {"trust": "suspect: one_step"})):
        finished("evaluate", ledger(rng, 0.8, 0.5), **ARMS[arm], **tags)
    found = claims(collect("0", CompareSettings()), 0.1)
    assert found.set_index("metric")["suspect"].to_dict() == {"accuracy": False, "robust accuracy": True}
    table = claim_table(found, pd.DataFrame(columns=["step", "eps", "arm", "metric", "value"]))
    assert [text.endswith("†") for text in table["finding"]] == [False, True]


def test_the_first_common_seed_is_the_smallest_number() -> None:
    rng = np.random.default_rng(0)
    for seed in (10, 9):
        for arm in ("normal", "supcon"):
            finished("evaluate", ledger(rng, 0.8, 0.5), seed=seed, **ARMS[arm])
    given = collect("0", CompareSettings())
    assert given.first("evaluate")["seed"].tolist() == ["9", "9"]
    found = claims(given, 0.1)
    row = found[found["metric"] == "accuracy"].iloc[0]
    runs = given.of("evaluate").set_index(["arm", "seed"])["run_id"]
    ours, theirs = (given.ledgers[runs[arm, "9"]]["correct"].mean() for arm in ("normal+supcon-double", "normal"))
    assert row["first"] == pytest.approx(ours - theirs)


def test_certified_accuracy_is_compared_on_the_images_that_both_have() -> None:
    for arm, verdicts in (("normal", {0: "unknown", 1: "safe", 2: "safe"}), ("supcon", {1: "safe", 2: "unknown"})):
        finished("verify", verification(verdicts), **ARMS[arm])
    finished("verify", verification({7: "safe"}), **ARMS["certified"])  # on no image of theirs
    (row,) = claims(collect("0", CompareSettings()), 0.1).to_dict("records")
    assert (row["arm"], row["metric"]) == ("normal+supcon-double", "certified accuracy")
    assert row["images"] == 2
    assert row["difference"] == pytest.approx(1 / 2 - 1)


def test_images_that_each_arm_has_survived_are_not_compared() -> None:
    for arm in ("normal", "supcon"):
        run = finished("verify", verification({1: "safe"}), **ARMS[arm])
        run.params({"selection": "survivors"})
    assert claims(collect("0", CompareSettings()), 0.1).empty


def test_a_difference_without_any_spread_is_not_tested_over_seeds() -> None:
    for seed in range(3):
        for arm, right in (("normal", "1" * 20), ("supcon", "1" * 19 + "0")):
            finished("evaluate", evaluation(right), seed=seed, **ARMS[arm])
    row = claims(collect("0", CompareSettings()), None).iloc[0]
    assert row["difference"] == pytest.approx(-0.05)
    assert np.isnan(row["seed_p"])
    assert row["finding"] == "the same in every seed; these models: no difference shown"


def test_a_published_difference_stands_beside_ours(tmp_path: Path) -> None:
    file = tmp_path / "b.json"
    models = {"plain/normal": {"test_accuracy": 70.0}, "plain/normal-contrastive": {"test_accuracy": 67.5}}
    file.write_text(json.dumps({"models": models}))
    published, _ = read_baseline(str(file))
    table = claim_table(claims(evidence(1, normal=0.8, supcon=0.7), 0.1), published)
    assert table["published"].tolist() == ["-2.50", "-"]


def test_the_studys_figures_can_be_read() -> None:
    file = SHARED / "data" / "paper-results.json"
    if not file.exists():
        pytest.skip("the study's published figures are not beside this checkout (../shared/data)")
    published, notes = read_baseline(str(file))
    assert "half is meant in pixels" in notes[0].text
    assert published["arm"].nunique() == 12
    row = published[(published["arm"] == "normal+aug") & (published["metric"] == "asr")].sort_values("eps").iloc[0]
    assert row["eps"] == pytest.approx(1 / 510, rel=1e-5)  # its 1/255 is on [-1, 1]
    assert row["value"] == pytest.approx(0.1623)
    # With augmentation 79.7 % x (1 - 16.23 %): the number that its figure got wrong.
    robust = published[(published["arm"] == "normal+aug") & (published["metric"] == "robust_accuracy")]
    assert robust.sort_values("eps")["value"].iloc[0] == pytest.approx(0.797 * (1 - 0.1623))
    verdicts = published[(published["arm"] == "normal+aug") & (published["step"] == "verify")]
    assert verdicts.set_index("metric").loc["timeout", "value"] == 8


@pytest.mark.parametrize(
    ("methods", "arm", "notes"),
    [
        ({"normal", "mtl-ibp"}, "mtl-ibp+aug+supcon-double", 1),
        ({"certified", "mtl-ibp"}, "certified+aug+supcon-double", 0),
        ({"sabr", "mtl-ibp"}, "certified+aug+supcon-double", 0),
    ],
)
def test_certified_figures_stand_beside_the_one_other_method_with_bounds(
    methods: set[str], arm: str, notes: int, tmp_path: Path
) -> None:
    file = tmp_path / "b.json"
    models = {"plain/normal": {"test_accuracy": 70.0}, "augmented/certified-contrastive": {"test_accuracy": 34.0}}
    file.write_text(json.dumps({"models": models}))
    published, said = put_beside(read_baseline(str(file))[0], methods)
    assert set(published["arm"]) == {"normal", arm}
    assert set(published["method"]) == {"normal", arm.partition("+")[0]}
    assert len(said) == notes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("[]", "must be a JSON object with 'models'"),
        ('{"models": {"augmented/norml": {}}}', "did you mean 'augmented/normal'"),
        ('{"models": {"plain/normal": {"test_accuracy": 123}}}', "123 is no percentage"),
        ('{"models": {"plain/normal": {"pgd_asr": {"x/255": 3}}}}', "pgd_asr must be a number or a fraction"),
        ('{"models": {"plain/normal": {"abcrown_20_images": {"save": 3}}}}', "has verdicts other than"),
        ('{"models": {"plain/normal": 3}}', "arm 'plain/normal'"),
        ('{"eps_space": "pixels", "models": {}}', "did you mean 'pixel'"),
        ('{"eps_space": ["a"], "models": {}}', "unknown eps_space"),
        ('{"models": {}}', "has no figures"),
        ('{"models": {"plain/normal": {"abcrown_20_images": {}, "abcrown_100_images": {}}}}', "more than one set"),
    ],
)
def test_a_baseline_that_is_wrong_is_said(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "b.json"
    file.write_text(text)
    with pytest.raises(SettingsError, match=message):
        read_baseline(str(file))
