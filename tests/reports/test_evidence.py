"""Which runs a comparison takes, and what it finds wrong with them."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from mlflow import MlflowClient

from rampart.errors import BrokenArtifact, Contradiction, RampartError
from rampart.reports import derived
from rampart.reports.evidence import Evidence, collect
from rampart.reports.registry import name_best
from rampart.settings import CompareSettings
from rampart.tracking import open_run
from rampart.tracking.queries import find_runs
from rampart.tracking.runs import class_text
from tests.conftest import Study
from tests.reports.made import evaluation, finished, verification


def collected(**settings: str) -> Evidence:
    return collect("0", CompareSettings(**settings))


def said(evidence: Evidence) -> str:
    return "\n".join(note.text for note in evidence.notes)


def test_the_newest_finished_run_of_an_arm_and_seed_counts() -> None:
    finished("evaluate", evaluation("1000"))
    newest = finished("evaluate", evaluation("1110"))
    other = finished("evaluate", evaluation("1111"), seed=1)
    evidence = collected()
    assert set(evidence.values["run"]) == {newest.id, other.id}
    assert "1 older run(s) of the same arm and seed left out" in said(evidence)


def test_runs_on_another_dataset_or_in_another_norm_are_left_out_and_said() -> None:
    finished("evaluate", evaluation("1100"), dataset_digest="old")
    kept = finished("evaluate", evaluation("1110"), seed=1)
    finished("evaluate", evaluation("1111"), seed=2).params({"norm": "l2"})
    evidence = collected()
    assert set(evidence.values["run"]) == {kept.id}
    assert "another dataset" in said(evidence)
    assert "1 run(s) in another norm than L∞ left out" in said(evidence)
    # What is not of the study asked for is not told of.
    with open_run("main") as study:
        study.table(pd.DataFrame({"run": [kept.id]}), "members.parquet")
    assert said(collected(study=study.id)) == ""


def test_an_evaluation_on_other_data_hides_none_on_the_newest_ones() -> None:
    kept = finished("evaluate", evaluation("1110"))
    finished("evaluate", evaluation("1000"), dataset_digest="shifted")
    newest = finished("evaluate", evaluation("1100"), arm="trades", method="trades")
    assert set(collected().values["run"]) == {kept.id, newest.id}


def test_a_look_at_other_images_or_a_released_model_hides_no_study() -> None:
    kept = finished("evaluate", evaluation("1110"), model_run="trained")
    finished("evaluate", evaluation("1100"), dataset_digest="other", dataset="folder", arm="released")
    finished("embed", None, dataset_digest="other", dataset="folder", model_run="trained")
    evidence = collected()
    assert set(evidence.values["run"]) == {kept.id}
    assert "2 run(s) on another dataset than made (digest d) left out" in said(evidence)


def test_classes_may_have_any_name_and_more_than_a_tag_holds() -> None:
    names = ("big, black", 'a "dog"', "ship")
    for cut, known in ((None, names), (-3, (*names[:2], "2"))):
        finished("evaluate", evaluation("1110"), class_names=class_text(names)[:cut])
        evidence = collected()
        assert evidence.classes == known
        assert set(derived.confusion(evidence)["taken for"]) == set(known)


def test_embeddings_are_joined_with_what_is_known_of_their_own_seed() -> None:
    finished("evaluate", evaluation("1110"))
    finished("embed", None, seed=1)
    assert len(derived.statuses(collected(), "normal", 0.1)) == 0
    finished("evaluate", evaluation("0011", "0001"), seed=1)
    finished("verify", verification({2: "safe"}), seed=1)
    found = derived.statuses(collected(), "normal", 0.1)
    assert found.to_dict() == {0: "misclassified", 1: "misclassified", 2: "proved", 3: "broken"}


def test_half_finished_runs_are_named() -> None:
    done = finished("evaluate", evaluation("1110", "0100"))
    without = finished("evaluate", None, arm="certified", method="certified", split="3/1/4 by 0.2, 42")
    short = finished("evaluate", evaluation("11"), arm="sabr", method="sabr", split="3/1/4 by 0.2, 42")
    failed = finished("evaluate", evaluation("1110"), arm="trades", method="trades")
    MlflowClient().set_terminated(failed.id, "FAILED")
    later = finished("evaluate", evaluation("1110"))
    MlflowClient().set_terminated(later.id, "KILLED")
    evidence = collected()
    assert set(evidence.values["run"]) == {done.id}
    notes = said(evidence)
    assert f"(run {without.id}) is left out, for it is half finished: it has no ledger" in notes
    assert f"(run {short.id}) is left out, for it is half finished: its ledger has 2 of 4 images" in notes
    assert f"evaluate trades s0: run {failed.id} is FAILED: left out" in notes
    assert f"run {later.id} is KILLED: the finished one before it is shown" in notes


def test_a_training_that_failed_and_was_repeated_is_no_news() -> None:
    failed = finished("train", None)
    MlflowClient().set_terminated(failed.id, "FAILED")
    tuned = finished("tune", None)
    MlflowClient().set_terminated(tuned.id, "FAILED")
    finished("evaluate", evaluation("1110"))
    lost = finished("train", None, arm="sabr", method="sabr")
    MlflowClient().set_terminated(lost.id, "FAILED")
    assert said(collected()) == f"train sabr s0: run {lost.id} is FAILED: left out"


def test_an_older_failure_is_no_news() -> None:
    failed = finished("evaluate", evaluation("1110"))
    MlflowClient().set_terminated(failed.id, "FAILED")
    finished("evaluate", evaluation("1110"))
    assert failed.id not in said(collected())


def test_a_run_of_another_split_is_named() -> None:
    for seed in (0, 1):
        finished("evaluate", evaluation("1110"), seed=seed)
    odd = finished("evaluate", evaluation("1110"), seed=2, split="2/2/4 by 0.5, 7")
    note = next(text for _, text in collected().notes if "split" in text)
    assert odd.id in note
    assert "2/2/4 by 0.5, 7" in note


def test_other_settings_of_the_attack_are_named() -> None:
    for arm, steps in (("normal", "10"), ("trades", "10"), ("sabr", "40")):
        run = finished("evaluate", evaluation("1110"), arm=arm, method=arm)
        run.params({"steps": steps, "attack": "pgd"})
    (note,) = collected().notes
    assert note.step == "evaluate"
    assert note.text == f"runs differ in steps: 10 in most, 40 in evaluate sabr s0 (run {run.id})"


def test_other_radii_are_named() -> None:
    for seed, radii in enumerate(("2/255,8/255", "2/255,8/255", "8/255")):
        run = finished("evaluate", evaluation("1110"), seed=seed)
        run.params({"eps_pixel": radii})
    (note,) = collected().notes
    assert note.text == f"runs differ in eps_pixel: 2/255,8/255 in most, 8/255 in evaluate normal s2 (run {run.id})"


def test_the_same_setting_typed_otherwise_is_no_difference() -> None:
    for seed, (steps, space) in enumerate((("10", "pixel"), ("10.0", "pixel"))):
        finished("evaluate", evaluation("1110"), seed=seed).params({"steps": steps, "eps_space": space})
    for seed, complete in enumerate(("True", "true")):
        finished("verify", verification({0: "safe"}), seed=seed, split="3/1/4 by 0.2, 42").params(
            {"complete": complete}
        )
    assert collected().notes == []


def trained(seed: int, **params: str) -> str:
    """A training whose model was evaluated."""
    run = finished("train", None, seed=seed, split="3/1/4 by 0.2, 42")
    known = {
        "profile": "quick",
        "dataset": f"folder:/copy {seed}",
        "method": "normal",
        "augment": "False",
        "contrastive": "none",
        "seed": str(seed),
    }
    run.params({**known, **params})
    finished("evaluate", evaluation("1110"), seed=seed, model_run=run.id, weights=str(seed))
    return run.id


def test_seeds_that_were_trained_otherwise_are_named_and_how_to_repeat_them() -> None:
    trained(0)
    trained(1, augment="no")
    assert collected().notes == []
    assert len(derived.commands(collected())) == 2
    odd = trained(2, lr="0.5", epochs="1")
    evidence = collected()
    (note,) = evidence.notes
    assert note.text == (
        f"seeds of one arm were trained differently: train normal s2 (run {odd}) with epochs=1, lr=0.5 "
        "instead of the defaults"
    )
    commands = derived.commands(evidence)
    commands = commands.loc[commands["step"] == "train", "command"].tolist()
    assert ["-P seed=0" in text for text in commands] == [True, False]
    assert all(words in commands[1] for words in ("-P seed=2", "-P epochs=1", "-P lr=0.5"))


def test_the_best_of_several_seeds_is_that_on_the_images_that_all_share(monkeypatch: pytest.MonkeyPatch) -> None:
    named: dict[str, str] = {}
    monkeypatch.setattr(
        "rampart.reports.registry.register", lambda run, name, alias, said: named.__setitem__(alias, run)
    )
    models = [trained(seed) for seed in (0, 1)]
    for seed, proved in enumerate(("1100", "1---")):
        finished("evaluate", proved_of(proved), seed=seed, model_run=models[seed], weights=str(seed))
    name_best(collected(), "quick", models)
    assert named["best-certified"] == models[0]  # 2 of 4 and 1 of 1: on the one that both share they tie


def test_all_steps_of_an_arm_and_seed_look_at_one_model() -> None:
    """An arm that was trained anew and evaluated, but only verified by another tool since: what the old model's
    verification says is not the new one's. An older run of the right model counts."""
    right = finished("verify", verification({0: "safe"}), weights="new")
    wrong = finished("verify", verification({0: "unknown"}), weights="old")
    new = finished("evaluate", evaluation("1110", "0100"), weights="new")
    evidence = collected()
    assert set(evidence.values["run"]) == {new.id, right.id}
    assert f"other models than the newest evaluation of their arm and seed: verify normal s0 (run {wrong.id})" in said(
        evidence
    )


def test_checkpoints_and_models_without_an_arm_are_no_arms() -> None:
    def evaluated(right: str, model: str, weights: str, **tags: object) -> str:
        return finished("evaluate", evaluation(right), model=model, weights=weights * 32, **tags).id

    none = {"arm": None, "contrastive": None}
    arm = evaluated("1110", "runs:/a/model", "1")
    checkpoint = evaluated("1100", "runs:/a/checkpoints/even.safetensors", "2")
    # A tuning's trial has a method, but is no arm; files may be called like one, and like each other.
    tuned = evaluated("1000", "models:/rampart-x@tuned", "3", **none)
    files = [evaluated("1111", f"{name}/normal.npz", weights, **none, method=None) for name, weights in ("a4", "b5")]
    values = collected().values.query("metric == 'accuracy'").set_index("run")
    names = ["normal", "normal (checkpoint)", "rampart-x@tuned", "normal (44444444)", "normal (55555555)"]
    assert values.loc[[arm, checkpoint, tuned, *files], "arm"].tolist() == names
    assert values["method"].value_counts().to_dict() == {"other": 4, "normal": 1}


def test_swapped_ledgers_are_found() -> None:
    """Even where both give the same rates."""
    one = finished("evaluate", evaluation("1110", "0100"))
    two = finished("evaluate", evaluation("1101", "0100"), arm="certified", method="certified")
    collected()
    for run, ledger in ((one, "1101"), (two, "1110")):
        evaluation(ledger, "0100").to_parquet("ledger.parquet", index=False)
        run.file(Path("ledger.parquet"))
    with pytest.raises(Contradiction, match=f"run {one.id}.*is not the ledger that the run has logged") as error:
        collected()
    assert "evaluate normal s0" in str(error.value)


@pytest.mark.parametrize(
    ("step", "metric", "truth"),
    [
        ("evaluate", "accuracy", "0.75"),
        ("evaluate", "asr/0.1", "0.333333"),
        ("evaluate", "robust_accuracy/0.2", "knows nothing"),
        ("evaluate", "corrupted/blur", "knows nothing"),
        ("evaluate", "corrupted_accuracy", "knows nothing"),
        ("verify", "verdicts/safe", "1"),
    ],
)
def test_an_edited_metric_is_found(step: str, metric: str, truth: str) -> None:
    ledger = evaluation("1110", "0100") if step == "evaluate" else verification({0: "safe", 1: "unknown"})
    run = finished(step, ledger)
    collected()
    run.metrics({metric: 0.9})
    with pytest.raises(Contradiction, match=f"metric {metric} is 0.9, but its ledger.*{truth}") as error:
        collected()
    assert run.id in str(error.value)


def test_a_model_that_is_proved_and_broken_stops_the_comparison() -> None:
    """Whichever runs say so: here an evaluation and a verification."""
    finished("evaluate", evaluation("1111", "0001"))
    proved = finished("verify", verification({3: "safe"}))
    with pytest.raises(Contradiction, match=f"image 3 was proved robust at ε 0.1 .run {proved.id}. and broken"):
        collected()


def proved_of(proved: str, broken: str = "") -> pd.DataFrame:
    """An evaluation of images, all of them right: 1 where one was proved at ε 0.1, 0 where it was not, - where it was
    not to be."""
    ledger = evaluation("1" * len(proved), broken)
    values = [None if c == "-" else c == "1" for c in proved]
    return ledger.assign(**{"certified/0.1": pd.array(values, dtype="boolean")})


def test_proofs_of_several_seeds_are_compared_on_the_images_that_all_share() -> None:
    whole = finished("evaluate", proved_of("110000", "000011"), weights="v")
    part = finished("evaluate", proved_of("-101--", "001000"), seed=1)
    evidence = collected()
    key = {"metric": ["certified_accuracy", "attacked_accuracy"], "step": ["evaluate"] * 2}

    def rates(values: pd.DataFrame, run: str) -> list[float]:
        rows = values[values["run"] == run].set_index("metric")["value"]
        return [round(float(rows[name]), 6) for name in key["metric"]]

    assert rates(evidence.values, whole.id) == [round(2 / 6, 6), round(4 / 6, 6)]
    values = derived.on_common_images(evidence)
    assert rates(values, whole.id) == [round(1 / 3, 6), 1.0]
    assert rates(values, part.id) == rates(evidence.values, part.id) == [round(2 / 3, 6), round(2 / 3, 6)]
    assert list(derived.of_whole_set(evidence)["run"].unique()) == [whole.id]
    # Other numbers are those of all images.
    others = ~values["metric"].isin(key["metric"])
    assert values[others].equals(evidence.values[others])


def test_proofs_of_one_set_of_images_stay_as_they_are() -> None:
    for seed, proved in enumerate(("11-", "10-")):
        finished("evaluate", proved_of(proved), seed=seed, weights=str(seed))
    evidence = collected()
    assert derived.on_common_images(evidence).equals(evidence.values)
    assert derived.of_whole_set(evidence).empty


def test_a_run_that_is_no_study_is_refused() -> None:
    run = finished("evaluate", evaluation("11"))
    with pytest.raises(RampartError, match="no study"):
        collected(study=run.id)


def test_nothing_to_compare_says_what_there_is() -> None:
    failed = finished("evaluate", evaluation("1110"))
    MlflowClient().set_terminated(failed.id, "FAILED")
    with pytest.raises(RampartError, match=f"nothing to compare: .*profile 'quick'.*{failed.id} is FAILED.*run main"):
        collected()
    with pytest.raises(RampartError, match="profile 'best'"):
        collected(profile="best")


def test_a_studys_evidence_has_all_that_the_report_draws(study: Study) -> None:
    main = find_runs("0", {"step": "main"})["run_id"].iloc[-1]
    evidence = collected(study=main)
    arms = {"normal", "certified", "normal+supcon-double", "certified+supcon-double"}
    for known in (evidence.points, evidence.places, evidence.examples):
        assert set(known) == arms
    assert evidence.classes == tuple("0123456789")
    assert all(len(points) == 30 for points in evidence.points.values())
    assert set(evidence.of("train")["arm"]) == arms
    curves = evidence.curves[(evidence.curves["arm"] == "normal") & (evidence.curves["metric"] == "loss")]
    assert curves["epoch"].tolist() == [1, 2]
    assert evidence.notes == []
    assert len(evidence.ledgers) == 8


def test_values_are_in_the_same_order_whenever_they_are_collected(study: Study) -> None:
    one, two = (collected().values for _ in range(2))
    pd.testing.assert_frame_equal(one, two)


@pytest.mark.parametrize("damage", ["cut", "a page that does not unpack"])
def test_a_ledger_that_cannot_be_read_is_named(damage: str) -> None:
    run = finished("evaluate", evaluation("1110"))
    evaluation("1110" * 100).to_parquet("ledger.parquet")
    whole = Path("ledger.parquet").read_bytes()
    half = whole[: len(whole) // 2] if damage == "cut" else whole[:40] + bytes(200) + whole[240:]
    Path("ledger.parquet").write_bytes(half)
    run.file(Path("ledger.parquet"))
    with pytest.raises(BrokenArtifact, match=f"ledger.parquet of run {run.id} cannot be read"):
        collected()
