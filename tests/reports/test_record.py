"""Evidence in files gives the tables that the tracking server gave; documents hold them; commands repeat runs."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from rampart.errors import Contradiction, RampartError, SettingsError
from rampart.reports import document
from rampart.reports.baseline import read_baseline
from rampart.reports.evidence import collect
from rampart.reports.record import keep, read
from rampart.reports.repeating import command, way
from rampart.reports.sections import Material, material_of, sections
from rampart.settings import CompareSettings, as_text, names, resolve
from tests.conftest import Study
from tests.reports.made import evaluation, finished, verification


def exported(folder: Path) -> None:
    """Exports all evidence that there is."""
    keep(material_of(collect("0", CompareSettings())), folder)


def tables_of(material: Material) -> dict[str, pd.DataFrame]:
    return {s.name: s.table for s in sections(material) if s.table is not None}


@pytest.mark.parametrize("published", [True, False])
def test_evidence_in_files_gives_the_same_tables(published: bool, study: Study, tmp_path: Path) -> None:
    figures = {"test_accuracy": 79.2, "pgd_asr": {"8/255": 14.9}, "abcrown_20_images": {"timeout": 12, "safe": 8}}
    baseline = tmp_path / "baseline.json"
    baseline.write_text(json.dumps({"eps_space": "pixel", "models": {"plain/normal": figures}}))
    material = material_of(collect("0", CompareSettings()), read_baseline(str(baseline))[0] if published else None)
    keep(material, tmp_path / "kept")
    tables, again = tables_of(material), tables_of(read(tmp_path / "kept"))
    assert {"accuracy", "attack_success", "verdicts", "claims", "costs", "commands", "trust", "geometry"} <= set(tables)
    assert ("published" in tables) == published
    assert set(again) == set(tables)
    for name, table in tables.items():
        pd.testing.assert_frame_equal(again[name], table, check_dtype=False, obj=name)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("accuracy,,0.75", "accuracy,,0.99", r"metric accuracy is 0.99, but its ledger says 0.75"),
        ("robust_accuracy,0.1,0.5", "robust_accuracy,0.1,0.6", r"metric robust_accuracy/0.1 is 0.6, but"),
        ("robust_accuracy,0.1,", "robust_accuracy,0.2,", "lack robust_accuracy/0.1, which its ledger gives"),
        ("unsafe,0.1,1.0", "unsafe,0.1,0.0", r"metric verdicts/unsafe is 0, but its ledger says 1"),
        ("RUN", "0123", "values.csv has numbers of run 0123, which runs.csv does not have"),
        ("False,normal,none,normal,native,0", "False,sabr,none,normal,native,0", "of another arm, seed or step"),
        (",native,0,verify", ",native,1,verify", "of another arm, seed or step"),
        (",evaluate,accuracy", ",verify,accuracy", "of another arm, seed or step"),
        ("timeout,0.1", "timeout,0.2", "at another ε than its ledger says"),
        ("accuracy,,0.75", "images,,0.75", "lack accuracy, which its ledger gives"),
        ("asr,0.1", "afr,0.1", "stand there twice"),
    ],
)
def test_numbers_that_their_ledgers_do_not_give_are_refused(old: str, new: str, says: str, tmp_path: Path) -> None:
    run = finished("evaluate", evaluation("1110", "0100"))
    finished("verify", verification({0: "safe", 1: "unsafe"}))
    exported(tmp_path)
    values = tmp_path / "values.csv"
    text = values.read_text().replace(run.id, "RUN")
    assert old in text
    values.write_text(text.replace(old, new).replace("RUN", run.id))
    with pytest.raises(Contradiction, match=f"evidence in '{tmp_path}': .*{says}"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("values.csv", "metric", "metrics"),
        ("values.csv", "accuracy,,0.75", ",,0.75"),
        ("runs.csv", "weights", "weight"),
        ("runs.csv", "arm", "arms"),
        ("about.json", "classes", "class"),
    ],
)
def test_evidence_that_lacks_something_is_refused_in_one_line(file: str, old: str, new: str, tmp_path: Path) -> None:
    finished("evaluate", evaluation("1110", "0100"))
    exported(tmp_path)
    text = (tmp_path / file).read_text()
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new, 1))
    with pytest.raises(RampartError, match=str(tmp_path)) as raised:
        read(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_ledger_without_images_is_refused(tmp_path: Path) -> None:
    run = finished("evaluate", evaluation("1110", "0100"))
    exported(tmp_path)
    ledger = tmp_path / "ledgers" / f"{run.id}.parquet"
    whole = pd.read_parquet(ledger)
    for broken in (whole.head(0), whole.drop(columns="correct"), pd.concat([whole, whole])):
        broken.to_parquet(ledger)
        with pytest.raises(RampartError, match=str(tmp_path)):
            read(tmp_path)


def test_ledgers_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    run = finished("evaluate", evaluation("1110", "0100"))
    finished("verify", verification({0: "safe", 1: "unsafe"}))
    exported(tmp_path)
    ledger = tmp_path / "ledgers" / f"{run.id}.parquet"
    # The rates stay as they are: another image is broken.
    evaluation("1110", "1000").to_parquet(ledger)
    with pytest.raises(Contradiction, match=r"image 0 was proved robust at .* and broken"):
        read(tmp_path)


@pytest.mark.parametrize("place", ["/home/ann/images", "/home/ann/my images"])
def test_what_is_kept_tells_no_folder(place: str, tmp_path: Path) -> None:
    with_folder = {"profile": "quick", "dataset": f"folder:{place}", "model": "runs:/x/model"}
    run = finished("evaluate", evaluation("1110", "0100"))
    run.params(as_text(resolve("evaluate", with_folder), with_folder))
    folder = tmp_path / "kept"
    exported(folder)
    assert "-P dataset=folder:PATH" in (folder / "runs.csv").read_text()
    told = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert b"/home/ann" not in told
    assert b"images'" not in told


def test_what_is_kept_takes_the_place_of_what_was_kept_before(tmp_path: Path) -> None:
    run = finished("evaluate", evaluation("1110", "0100"))
    (tmp_path / "ledgers").mkdir()
    (tmp_path / "ledgers" / "0123.parquet").touch()
    exported(tmp_path)
    assert [file.stem for file in (tmp_path / "ledgers").iterdir()] == [run.id]


def test_files_do_not_depend_on_the_order_in_which_the_server_gives_columns(tmp_path: Path) -> None:
    finished("evaluate", evaluation("1110", "0100"))
    evidence = collect("0", CompareSettings())
    keep(material_of(evidence), tmp_path / "one")
    keep(material_of(replace(evidence, runs=evidence.runs[evidence.runs.columns[::-1]])), tmp_path / "other")
    one, other = ((tmp_path / name / "runs.csv").read_text() for name in ("one", "other"))
    assert one == other


@pytest.mark.parametrize("name", ["null", "1"])
def test_a_models_name_may_be_any_word(name: str, tmp_path: Path) -> None:
    finished("evaluate", evaluation("1110", "0100"), arm=None, method=None, model=f"{name}.npz")
    material = material_of(collect("0", CompareSettings()))
    keep(material, tmp_path)
    assert tables_of(read(tmp_path)).keys() == tables_of(material).keys()
    assert set(read(tmp_path).evidence.values["arm"]) == {name}


def test_evidence_that_cannot_be_written_or_read_is_named(tmp_path: Path) -> None:
    finished("evaluate", evaluation("1110", "0100"))
    material = material_of(collect("0", CompareSettings()))
    (tmp_path / "file").write_text("")
    with pytest.raises(RampartError, match="cannot be written"):
        keep(material, tmp_path / "file")
    with pytest.raises(SettingsError, match=r"no evidence in .*: let compare export it there"):
        read(tmp_path / "nowhere")
    keep(material, tmp_path / "kept")
    next((tmp_path / "kept" / "ledgers").iterdir()).unlink()
    with pytest.raises(SettingsError, match="no evidence in"):
        read(tmp_path / "kept")


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A folder with evidence in `kept` and a document."""
    finished("evaluate", evaluation("1110", "0100"))
    keep(material_of(collect("0", CompareSettings())), tmp_path / "kept")
    (tmp_path / "speed.csv").write_text("row,ratio\na,1.50\n")
    place = "<!-- table: speed.csv -->"
    text = f"# Ours\n\n<!-- table: kept accuracy -->\n\n| old |\n| --- |\n| 3 |\n\nAnd\n\n{place}\n\nmore\n"
    (tmp_path / "OURS.md").write_text(text)
    return tmp_path


def test_a_document_gets_its_tables_and_keeps_its_words(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = kept / "OURS.md"
    monkeypatch.setattr("sys.argv", ["document", str(path)])
    assert document.main() == 0
    text = path.read_text()
    assert "75.00" in text
    assert "old" not in text
    assert "| row   | ratio   |" in text
    assert "1.50" in text
    assert text.startswith("# Ours\n")
    assert "|\n\nAnd\n\n" in text
    assert text.endswith("|\n\nmore\n")
    assert document.main() == 0
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("kept acuracy", "accuracy"),
        ("nowhere accuracy", "no evidence in"),
        ("nothing.csv", "cannot be read"),
    ],
)
def test_a_table_that_is_not_there_is_named(
    kept: Path, place: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = kept / "OURS.md"
    path.write_text(f"<!-- table: {place} -->\n")
    monkeypatch.setattr("sys.argv", ["document", str(path)])
    assert document.main() == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("step", ["train", "evaluate", "verify"])
@pytest.mark.parametrize("profile", ["quick", "paper", "best"])
def test_a_command_repeats_a_run(step: str, profile: str) -> None:
    arm = {"method": "certified", "augment": "True", "contrastive": "double", "lr": "0.0005", "jitter": "0.1,0,0,0"}
    given = {"profile": profile, "seed": "3", "dataset": "folder:/a b/c", "threads": "2"}
    given |= arm if step == "train" else {"model": "runs:/0123/model", "eps": "1/255", "eps_space": "pixel"}
    settings = resolve(step, given)
    words = shlex.split(command(step, {**as_text(settings, given), "of_an_older_version": "1"}))
    assert words[:5] == ["mlflow", "run", ".", "-e", step]
    parsed = dict(text.split("=", 1) for text in words[6::2])
    assert (
        resolve(step, {**parsed, "threads": "2", **({} if step == "train" else {"model": given["model"]})}) == settings
    )
    assert len(parsed) <= len(given) + 1  # what the profile says already is not said again


def test_a_command_names_the_data_where_the_profile_has_others() -> None:
    given = {"profile": "quick", "method": "normal"}
    assert "dataset" not in command("train", as_text(resolve("train", given), given))
    given |= {"dataset": "cifar10"}
    assert "-P dataset=cifar10" in command("train", as_text(resolve("train", given), given))


def test_settings_of_the_other_kind_of_training_make_no_other_way() -> None:
    start = "mlflow run . -e train -P profile=best"
    assert way(f"{start} -P encoder_epochs=12 -P seed=0") == way(start) != way(f"{start} -P epochs=16")
    double = f"{start} -P contrastive=double"
    assert way(f"{double} -P epochs=16") == way(double) != way(f"{double} -P head_epochs=4")


def test_a_command_whose_profile_is_gone_is_not_told(store: Path) -> None:
    assert (
        command("train", {"profile": "runs:/0123456789abcdef0123456789abcdef/profile.yaml", "method": "normal"}) == "-"
    )


def test_a_command_with_settings_of_another_version_is_not_told() -> None:
    assert command("train", {"profile": "quick", "method": "gone"}) == "-"
    assert "gone" not in names("train")
