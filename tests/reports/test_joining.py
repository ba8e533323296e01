"""Evidence in files beside that of a store: as if all runs were in one."""

from __future__ import annotations

import html
import io
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
from mlflow import MlflowClient

from rampart.errors import Contradiction, SettingsError
from rampart.reports.evidence import Evidence, NothingToCompare, collect
from rampart.reports.joining import gathered
from rampart.reports.record import keep, read
from rampart.reports.sections import material_of, sections
from rampart.settings import CompareSettings, resolve
from rampart.study.steps import run_step
from rampart.tracking import Run
from rampart.tracking.queries import find_runs, run_page
from tests.reports.made import evaluation, finished, verification

SPLIT = "3/1/4 by 0.2, 42"


def collected() -> Evidence:
    return collect("0", CompareSettings())


def beside(*folders: str) -> Evidence:
    """The store's evidence and that of the folders."""
    return gathered("0", CompareSettings(evidence=folders))[0]


def moved(run: Run, folder: Path) -> str:
    """Exports all evidence that there is and takes the run out of the store."""
    keep(material_of(collected()), folder)
    MlflowClient().delete_run(run.id)
    return str(folder)


def tables(evidence: Evidence) -> dict[str, pd.DataFrame]:
    return {s.name: s.table for s in sections(material_of(evidence)) if s.table is not None}


def test_runs_are_compared_wherever_they_are(tmp_path: Path) -> None:
    finished("evaluate", evaluation("1110", "0100"), seed=1)
    elsewhere = finished("evaluate", evaluation("1100", "0100"))
    proved = finished("verify", verification({0: "safe", 1: "unsafe"}))
    together = tables(collected())
    folder = moved(elsewhere, tmp_path / "kept")
    MlflowClient().delete_run(proved.id)
    joined = beside(folder)
    for name, table in together.items():
        pd.testing.assert_frame_equal(tables(joined)[name], table, check_dtype=False, obj=name)
    assert "± " in tables(joined)["accuracy"]["accuracy %"].iloc[0]
    # Once more it changes nothing.
    again = beside(folder, shutil.copytree(folder, str(tmp_path / "again")))
    pd.testing.assert_frame_equal(tables(again)["accuracy"], tables(joined)["accuracy"])


def test_a_run_of_another_store_has_no_link(tmp_path: Path) -> None:
    elsewhere = finished("evaluate", evaluation("1100", "0100"))
    folder = moved(elsewhere, tmp_path / "kept")
    here = finished("evaluate", evaluation("1110", "0100"), seed=1)
    run = run_step("compare", {"evidence": folder})
    page = Path(MlflowClient().download_artifacts(run, "report.html")).read_text()
    assert f'<a href="{run_page("0", here.id)}"' in page
    assert f'<code title="{elsewhere.id}">' in page
    assert run_page("0", elsewhere.id) not in page


def test_the_newest_run_counts_and_the_others_are_told_of(tmp_path: Path) -> None:
    old = finished("evaluate", evaluation("1000"))
    folder = moved(old, tmp_path / "kept")
    new = finished("evaluate", evaluation("1110", "0100"))
    joined = beside(folder)
    assert set(joined.values["run"]) == set(joined.ledgers) == {new.id}
    assert "1 older run(s) of the same arm and seed left out" in [note.text for note in joined.notes]
    later = moved(new, tmp_path / "later")
    finished("evaluate", evaluation("1111"), seed=1)
    assert set(beside(later, folder).values["value"]) >= {0.75, 1.0}


def test_curves_of_a_training_that_another_store_has_replaced_are_left_out(tmp_path: Path) -> None:
    for home in ("there", "here"):
        run = finished("train", None, weights=home)
        given = {"profile": "quick", "method": "normal", "seed": "0", "lr": "0.1" if home == "here" else "0.2"}
        run.params(given)
        run.metrics({"train/loss": 1.0}, step=1)
        done = finished("evaluate", evaluation("1110"), weights=home, model_run=run.id)
        if home == "there":
            newest = (run.id, done.id)
            start = MlflowClient().get_run(done.id).info.start_time
            keep(material_of(collected()), tmp_path / "kept")
            for gone in newest:
                MlflowClient().delete_run(gone)
    runs = pd.read_csv(tmp_path / "kept" / "runs.csv")
    runs.assign(start_time=str(pd.Timestamp(start + 3_600_000, unit="ms", tz="UTC"))).to_csv(
        tmp_path / "kept" / "runs.csv", index=False
    )
    assert len(collected().curves) == 1
    joined = beside(str(tmp_path / "kept"))
    assert set(joined.of("train")["run_id"]) == {newest[0]}
    assert len(joined.curves) == 0


def test_trainings_in_two_stores_that_differ_are_told_of(tmp_path: Path) -> None:
    for seed, lr in enumerate(("0.1", "0.2")):
        run = finished("train", None, seed=seed)
        run.params({"profile": "quick", "method": "normal", "seed": str(seed), "lr": lr})
        last = finished("evaluate", evaluation("1110"), seed=seed, model_run=run.id)
        if seed == 0:
            folder = moved(last, tmp_path / "kept")
    joined = beside(folder)
    assert [note.text for note in joined.notes if "trained differently" in note.text] == [
        f"seeds of one arm were trained differently: train normal s1 (run {run.id}) with lr=0.2 instead of lr=0.1"
    ]


def test_runs_on_another_model_than_the_newest_are_left_out(tmp_path: Path) -> None:
    embedded = finished("embed", None, weights="before", split=SPLIT)
    proved = finished("verify", verification({0: "safe", 1: "unsafe"}), weights="before", split=SPLIT)
    folder = moved(proved, tmp_path / "kept")
    MlflowClient().delete_run(embedded.id)
    pd.DataFrame({"image": [0]}).to_parquet(tmp_path / "kept" / "places" / "normal.parquet")
    finished("evaluate", evaluation("1110", "0100"))
    joined = beside(folder)
    assert "verify" not in set(joined.values["step"])
    assert joined.places == {}
    assert any("other models than the newest evaluation" in note.text for note in joined.notes)


def test_folders_are_compared_by_themselves_where_the_store_has_nothing(tmp_path: Path) -> None:
    done = finished("evaluate", evaluation("1110", "0100"))
    published = pd.read_csv(io.StringIO(PUBLISHED)).assign(suspect=False)
    keep(material_of(collected(), published), tmp_path / "kept")
    MlflowClient().delete_run(done.id)
    folder = str(tmp_path / "kept")
    finished("evaluate", evaluation("1111")).params({"norm": "l2"})
    notes = [note.text for note in beside(folder).notes]
    told = f"all this is from {folder}: this store has nothing of profile 'quick' to compare"
    assert notes == [told, "1 run(s) in another norm than L∞ left out"]
    again = tmp_path / "again"
    run = run_step("compare", {"evidence": folder, "export": str(again)})
    page = Path(MlflowClient().download_artifacts(run, "report.html")).read_text()
    assert told in html.unescape(page)
    assert "rampart.arms" not in MlflowClient().get_run(run).data.tags
    for name in ("values.csv", "published.csv", "about.json"):
        assert (again / name).read_bytes() == (tmp_path / "kept" / name).read_bytes()
    with pytest.raises(NothingToCompare, match="experiment 0 has no finished evaluation of profile 'quick'"):
        beside()


PUBLISHED = """\
augment,method,contrastive,arm,engine,seed,step,metric,eps,value,run
False,normal,none,normal,published,-,published,accuracy,,0.5,published
"""


def test_folders_of_another_profile_are_refused(tmp_path: Path) -> None:
    folder = moved(finished("evaluate", evaluation("1110", "0100")), tmp_path / "kept")
    with pytest.raises(SettingsError, match="is of profile 'quick', not of 'best': give profile=quick"):
        gathered("0", CompareSettings(profile="best", evidence=(folder,)))


def test_other_images_and_contradictions_are_refused(tmp_path: Path) -> None:
    proved = finished("verify", verification({0: "safe", 1: "safe"}), split=SPLIT)
    folder = moved(proved, tmp_path / "kept")
    finished("evaluate", evaluation("1110", "0100"))
    with pytest.raises(Contradiction, match=r"was proved robust at .* and broken"):
        beside(folder)
    finished("evaluate", evaluation("1110"), dataset_digest="other")
    with pytest.raises(SettingsError, match=r"is of .*\(digest d\), not of .*\(digest other\)"):
        beside(folder)
    with pytest.raises(SettingsError, match="no evidence in"):
        beside(str(tmp_path / "nowhere"))


def test_arms_may_split_the_same_images_differently(tmp_path: Path) -> None:
    more, fewer = "49500/500/4 by 0.01, 42", "47500/2500/4 by 0.05, 42"
    folder = moved(finished("evaluate", evaluation("1100"), split=fewer), tmp_path / "kept")
    finished("evaluate", evaluation("1110"), method="adversarial", arm="adversarial", split=more)
    joined = beside(folder)
    assert set(joined.values["arm"]) == {"normal", "adversarial"}
    assert set(joined.splits) == {more, fewer}
    run = run_step("compare", {"evidence": folder})
    page = Path(MlflowClient().download_artifacts(run, "report.html")).read_text()
    assert re.search(f"Dataset: .*, split ({more} or {fewer}|{fewer} or {more})\\.", page)


def test_a_study_and_what_another_store_knows_of_it(own: Path, tmp_path: Path) -> None:
    before = run_step("compare", {"export": str(tmp_path / "kept")})
    both = run_step("compare", {"evidence": f"{tmp_path / 'kept'}", "export": str(tmp_path / "again")})
    for name in ("accuracy", "verdicts", "geometry", "claims"):
        first, second = (
            (Path(MlflowClient().download_artifacts(run, f"{name}.csv"))).read_text() for run in (before, both)
        )
        assert first == second
    linked = [Path(MlflowClient().download_artifacts(run, "report.html")).read_text() for run in (before, both)]
    assert ["exported (kept)" in page for page in linked] == [False, True]
    kept, again = (read(tmp_path / name).evidence for name in ("kept", "again"))
    assert set(kept.places) == set(again.places) == set(find_runs("0", {"step": "embed"})["tags.rampart.arm"])
    assert set(kept.runs["run_id"]) == set(again.runs["run_id"])


def test_several_folders_are_given_by_commas() -> None:
    settings = resolve("compare", {"evidence": "results/paper,results/best"})
    assert isinstance(settings, CompareSettings)
    assert settings.evidence == ("results/paper", "results/best")
