"""The command line as a user meets it: bad input ends in one line, exit code 2 and a FAILED run."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image

from rampart.__main__ import ABOUT, defaults, main
from rampart.errors import SettingsError
from rampart.models import build_model, save_model


def _folder(top: Path, classes: tuple[str, ...] = ("cat", "dog"), size: int = 8) -> Path:
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in classes:
            (top / part / name).mkdir(parents=True)
            for i in range(4):
                Image.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(
                    top / part / name / f"{i}.png"
                )
    return top


def test_bad_input_ends_in_one_line_exit_code_2_and_a_failed_run(
    store: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", offline)
    empty = store / "empty"
    (empty / "train").mkdir(parents=True)
    (empty / "test").mkdir()
    text = _folder(store / "text")
    (text / "train" / "cat" / "note.txt").write_text("no image")
    foreign = _folder(store / "foreign")
    (foreign / "test" / "cow").mkdir()
    Image.new("RGB", (8, 8)).save(foreign / "test" / "cow" / "0.png")
    (store / "broken.npz").write_bytes(b"no weights")
    save_model(build_model(classes=2, width=0.125), store / "two.safetensors")
    cases = [
        (["train", "--method", "certifed"], "certified"),
        (["train", "--profile", "quik"], "quick"),
        (["train", "--dataset", "digit"], "digits"),
        (["train", "--epoch", "1"], "epochs"),
        (["train", "--eps", "-1"], "eps"),
        (["evaluate", "--model", "x.npz", "--eps", "2"], "eps"),
        (["train", "--eps", "nan"], "eps"),
        (["train", "--dataset", f"folder:{store}/nowhere"], "missing"),
        (["train", "--dataset", f"folder:{empty}"], "empty"),
        (["train", "--dataset", f"folder:{text}"], "note.txt"),
        (["train", "--dataset", f"folder:{foreign}"], "cow"),
        (["train", "--dataset", "cifar10"], "folder:PATH"),
        (["evaluate", "--model", "nowhere.npz"], "no model file"),
        (["evaluate", "--model", str(store / "broken.npz")], "is no .npz file"),
        (["evaluate", "--model", "runs:/0123456789abcdef0123456789abcdef/model"], "no "),
        (["evaluate", "--model", "models:/nothing/1"], "no model"),
        (["evaluate", "--model", str(store / "two.safetensors"), "--certify", "none"], "2 classes"),
        (["train", "--width", "1e6"], "memory"),
        (["main", "--methods", "normal", "--verify.eps", "2"], "verify of normal: eps must lie"),
        (["compare"], "nothing to compare"),
        (["train", "--epochs"], "'--epochs' requires an argument"),
        (["verify", "model.npz"], "unexpected extra argument (model.npz)"),
        (["compare", "--study", "0123456789abcdef0123456789abcdef"], "no run"),
    ]
    for words, expected in cases:
        assert main(words) == 2, words
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, words
        assert expected in lines[0], words
    runs = MlflowClient().search_runs(["0"], max_results=100)
    assert len(runs) == len(cases)
    assert {run.info.status for run in runs} == {"FAILED"}
    assert all(run.data.tags["rampart.error"] for run in runs)


def test_a_loss_that_becomes_nan_names_the_last_good_checkpoint_which_loads(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rampart.tracking import fetch_model

    assert main(["train", "--epochs", "3", "--lr", "1e30", "--width", "0.125"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "lower lr" in error
    uri = error.rsplit(" ", 1)[1]
    assert uri.endswith(("/even.safetensors", "/odd.safetensors"))
    model = fetch_model(uri)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    (run,) = MlflowClient().search_runs(["0"])
    assert run.info.status == "FAILED"


def test_images_of_a_size_that_a_model_does_not_take(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(build_model(in_shape=(3, 8, 8), width=0.125), store / "small.safetensors")
    assert main(["evaluate", "--model", str(store / "small.safetensors")]) == 2
    assert "takes images of 3x8x8; dataset=digits has such of 3x32x32" in capsys.readouterr().err


def test_help_lists_settings_with_their_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--lr" in shown
    assert "Adam's learning rate, and Muon's, whose steps are as large. [0.005]" in " ".join(shown.split())


@pytest.mark.parametrize("step", [*ABOUT])
def test_help_of_every_step_shows_its_defaults(step: str, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert main([step, "--help"]) == 0
        assert capsys.readouterr().out.count("[quick]") == 1
    assert defaults(step)["profile"] == "quick"


def test_help_does_not_need_the_profile(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(step: str) -> dict[str, str]:
        raise SettingsError("profile 'quick': broken")

    monkeypatch.setattr("rampart.__main__.defaults", broken)
    assert main(["train", "--help"]) == 0
    assert "Adam's learning rate" in capsys.readouterr().out


def test_an_entry_point_that_is_none_is_said_so(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["frobnicate", "--epochs", "1"]) == 2
    assert capsys.readouterr().err == "error: No such command 'frobnicate'.\n"
    assert not MlflowClient().search_runs(["0"])


def test_without_a_step_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert capsys.readouterr().err.startswith("Usage: rampart")


@pytest.mark.parametrize(("words", "expected"), [([], "double"), (["--contrastive", "single"], "single")])
def test_contrastive_is_train_with_supcon(store: Path, words: list[str], expected: str) -> None:
    short = ["--encoder_epochs", "1", "--head_epochs", "1", "--epochs", "1", "--width", "0.125"]
    assert main(["contrastive", *short, *words]) == 0
    (run,) = MlflowClient().search_runs(["0"])
    assert (run.data.tags["rampart.step"], run.data.params["contrastive"]) == ("train", expected)
    assert main(["contrastive", "--encoder_epoch", "1"]) == 2


def test_options_of_mlflow_run_are_told_from_ours(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "-P", "method=normal"]) == 2
    assert capsys.readouterr().err == "error: -P name=value is for `mlflow run`: here it is --name value\n"
    (run,) = MlflowClient().search_runs(["0"])
    assert run.info.status == "FAILED"


def test_a_run_that_mlflow_started_is_gone_on_with(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`mlflow run` logs what was given and passes the run's id; all other settings are added, none twice."""
    client = MlflowClient()
    from rampart.tracking import initialise

    initialise()
    started = client.create_run("0")
    client.log_param(started.info.run_id, "lr", "5e-3")
    monkeypatch.setitem(os.environ, "MLFLOW_RUN_ID", started.info.run_id)
    assert main(["train", "--epochs", "1", "--lr", "5e-3", "--width", "0.125"]) == 0
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    assert main(["train", "--epochs", "1", "--lr", "5e-3", "--width", "0.125"]) == 0
    own, resumed = client.search_runs(["0"])
    assert resumed.info.run_id == started.info.run_id
    assert resumed.info.status == "FINISHED"
    assert resumed.data.params == own.data.params
    assert resumed.data.tags["mlflow.runName"] == "normal s0"
    # The same seed gave the same model.
    assert resumed.data.metrics["train/loss"] == own.data.metrics["train/loss"]


@pytest.mark.usefixtures("store")
def test_a_run_to_go_on_in_that_is_none_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(os.environ, "MLFLOW_RUN_ID", "abc")
    assert main(["train"]) == 2
    assert "no run 'abc' in sqlite" in capsys.readouterr().err


@pytest.mark.usefixtures("store")
def test_a_deleted_run_is_not_gone_on_in(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from rampart.tracking import initialise

    initialise()
    client = MlflowClient()
    run = client.create_run("0").info.run_id
    client.delete_run(run)
    monkeypatch.setitem(os.environ, "MLFLOW_RUN_ID", run)
    assert main(["train"]) == 2
    assert f"run '{run}' is deleted" in capsys.readouterr().err


@pytest.mark.usefixtures("store")
def test_an_empty_name_of_an_experiment_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from rampart.tracking import initialise
    from rampart.tracking.store import experiment_id

    initialise()
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "")
    assert experiment_id(create=True) == "0"


@pytest.mark.usefixtures("store")
def test_settings_of_a_tuning_that_is_not_asked_for_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("trials", "tune.trials"):
        assert main(["main", f"--{name}", "5", "--dry_run", "true"]) == 2
        assert "give tuned=true" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_said_in_one_line_and_by_the_exit_code(
    number: signal.Signals, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rampart.study.run_step", lambda *given: signal.raise_signal(number))
    # A shell starts what runs in its background without Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(["train"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err.split("\n") == ["", "interrupted: what was finished is kept", ""]
