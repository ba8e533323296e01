"""A tuning as a step: its trials, what it leaves in MLflow, and what becomes of it after kills and beside others."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import optuna
import psutil
import pytest
import torch
import yaml
from mlflow import MlflowClient
from optuna.trial import TrialState

from rampart.data import Dataset
from rampart.errors import RampartError, SettingsError, TrainingDiverged
from rampart.models import Classifier, build_model
from rampart.settings import TrainSettings, TuneSettings, resolve
from rampart.study.identity import IDLE, code_version
from rampart.study.steps import run_step
from rampart.tracking import fetch_model
from rampart.tracking.queries import find_runs, read_text, run_tags
from rampart.training import Recorder, State
from rampart.tuning import tuned_texts
from rampart.tuning.publish import tuned_profile
from rampart.tuning.storage import RUN, WHAT, Seeded

SMALL = {"width": "0.125", "threads": "1"}
AT = State("train", 1, 0, 0, 1, 0.0, {})


def curve(settings: TrainSettings, epoch: int) -> float:
    """An accuracy that rises with the epochs and is best at lr 0.002."""
    return (1 - 50 * abs(settings.lr - 0.002)) * epoch / settings.epochs


@pytest.fixture
def quick_training(monkeypatch: pytest.MonkeyPatch) -> list[TrainSettings]:
    """Trainings that say what `curve` says, and do nothing; the list of their settings."""
    begun: list[TrainSettings] = []

    def train(settings: TrainSettings, data: Dataset, recorder: Recorder, *_: object) -> Classifier:
        begun.append(settings)
        model = build_model("paper-cnn", data.in_shape, len(data.classes), 0.125).eval()
        recorder.checkpoint(model, AT)
        for epoch in range(1, settings.epochs + 1):
            recorder.metrics({"val/accuracy": curve(settings, epoch)}, step=epoch)
            recorder.checkpoint(model, AT)
        recorder.metrics({"train/best_epoch": settings.epochs}, step=settings.epochs)
        return model

    monkeypatch.setattr("rampart.tuning.trials.train", train)
    return begun


@pytest.fixture
def unpublished(monkeypatch: pytest.MonkeyPatch) -> None:
    """No exported models and no plots, which one test has looked at: they take longer than all else here."""
    monkeypatch.setattr("rampart.tracking.Run.model", lambda *_: "")
    for name in ("register", "_plots"):
        monkeypatch.setattr(f"rampart.tuning.publish.{name}", lambda *_: None)


def study_of(folder: Path, name: str = "quick digits normal s0") -> optuna.Study:
    return optuna.load_study(study_name=name, storage=f"sqlite:///{folder}/tuning.db")


def points(study: optuna.Study) -> list[tuple[object, ...]]:
    return [tuple(trial.params.values()) for trial in study.trials]


def test_trials_are_nested_runs_and_the_best_becomes_a_profile_and_a_model(
    store: Path, quick_training: list[TrainSettings]
) -> None:
    home = run_step("tune", {"method": "normal", "trials": "4", "epochs": "3", "pruner": "none", **SMALL})
    trials = find_runs("0", {"step": "trial"})
    assert len(trials) == 4
    assert set(trials["tags.mlflow.parentRunId"]) == {home}
    assert set(trials["tags.rampart.trial_state"]) == {"complete"}
    best = trials.loc[trials["metrics.objective/val_accuracy"].idxmax()]
    assert run_tags(home)["best_run"] == best["run_id"]
    assert MlflowClient().get_run(home).data.metrics["best/val_accuracy"] == best["metrics.objective/val_accuracy"]
    # The settings as they are without tuning are the first trial.
    assert (quick_training[0].lr, quick_training[0].batch_size) == (0.005, 64)
    profile = f"runs:/{home}/profile.yaml"
    tuned = resolve("train", {"profile": profile, "method": "normal"})
    assert tuned == replace(
        resolve("train", {"method": "normal", "width": "0.125", "epochs": "3"}),
        profile=profile,
        lr=float(best["params.lr"]) if abs(float(best["params.lr"]) - tuned.lr) > 1e-6 else tuned.lr,
        batch_size=int(best["params.batch_size"]),
    )
    other = resolve("train", {"profile": profile, "method": "normal", "augment": "True"})
    assert (other.lr, other.epochs) == (0.005, 10)
    assert tuned_texts(home) == {"lr": repr(tuned.lr), "batch_size": str(tuned.batch_size)}
    found, logged = fetch_model("models:/rampart-normal@tuned"), fetch_model(f"runs:/{best['run_id']}/model")
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), logged.parameters(), strict=True))
    files = {file.path for file in MlflowClient().list_artifacts(home, "plots")}
    for plot in ("history", "importance", "slice", "parallel_coordinates", "intermediate_values"):
        assert {f"plots/{plot}.html", f"plots/{plot}.png"} <= files
    assert len((read_text(home, "trials.csv") or "").splitlines()) == 5


def test_the_split_of_the_trials_is_that_of_the_profile_whatever_its_rules(tmp_path: Path) -> None:
    given = {"profile": "best", "method": "normal", "augment": "True", "contrastive": "none", "val_fraction": "0.1"}
    settings = resolve("tune", {"profile": "best", "method": "normal", "augment": "True", "val_fraction": "0.1"})
    assert isinstance(settings, TuneSettings)
    trial = optuna.create_trial(value=1.0, user_attrs={RUN: "r"})
    file = tmp_path / "tuned.yaml"
    file.write_text(yaml.safe_dump(tuned_profile(settings, given, trial)))
    for method in ("normal", "adversarial"):
        found = resolve("train", {"profile": str(file), "method": method, "augment": "True"})
        assert isinstance(found, TrainSettings)
        assert found.val_fraction == 0.1


@pytest.mark.usefixtures("unpublished")
def test_started_again_it_goes_on_under_the_same_run(store: Path, quick_training: list[TrainSettings]) -> None:
    """And an interrupted study has the trials of one that was not."""
    given = {"method": "normal", "epochs": "2", "pruner": "none", **SMALL}
    home = run_step("tune", {**given, "trials": "2"})
    second = run_step("tune", {**given, "trials": "5"})
    assert len(quick_training) == 5
    assert run_tags(second)["tuning"] == home
    assert set(find_runs("0", {"step": "trial"})["tags.mlflow.parentRunId"]) == {home}
    assert MlflowClient().get_run(home).info.status == "FINISHED"
    run_step("tune", {**given, "trials": "5"})
    assert len(quick_training) == 5, "nothing was missing"
    run_step("tune", {**given, "trials": "5", "study_name": "at once"})
    assert points(study_of(store, "at once")) == points(study_of(store))
    assert len(set(points(study_of(store)))) == 5


@pytest.mark.usefixtures("unpublished")
def test_who_may_not_name_the_model_has_the_point_nevertheless(
    quick_training: list[TrainSettings], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def forbidden(*_: object) -> None:
        raise RampartError("the tracking store does not let you do this")

    monkeypatch.setattr("rampart.tuning.publish.register", forbidden)
    run = run_step("tune", {"method": "normal", "trials": "2", "epochs": "1", "pruner": "none", **SMALL})
    assert "its model has no name in the Model Registry: the tracking store does not let you do this" in caplog.text
    assert MlflowClient().get_run(run).info.status == "FINISHED"
    assert set(tuned_texts(run)) == {"lr", "batch_size"}


@pytest.mark.usefixtures("unpublished")
def test_a_study_that_was_begun_with_other_code_goes_on_and_says_so(
    quick_training: list[TrainSettings], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    given = {"method": "normal", "epochs": "1", "pruner": "none", **SMALL}
    before = run_step("tune", {**given, "trials": "1"})
    run_step("tune", {**given, "trials": "2"})
    assert "other code" not in caplog.text
    monkeypatch.setattr("rampart.tuning.driver.code_version", lambda _: "of other code")
    after = run_step("tune", {**given, "trials": "3"})
    assert caplog.text.count("study 'quick digits normal s0' was begun with other code, whose trials count") == 1
    assert len(quick_training) == 3
    # It is none of the other code alone.
    assert [run_tags(run)["identity"].partition(".")[2] for run in (before, after)] == 2 * [code_version("train")]


@pytest.mark.usefixtures("unpublished")
def test_bad_trials_are_stopped(store: Path, quick_training: list[TrainSettings]) -> None:
    given = {"method": "normal", "epochs": "6", "trials": "12", "sampler": "random", **SMALL}
    home = run_step("tune", given)
    runs = find_runs("0", {"step": "trial"})
    pruned = runs[runs["tags.rampart.trial_state"] == "pruned"]
    assert len(pruned) >= 1
    assert (pruned["tags.rampart.trial"].astype(int) >= 5).all(), "the first ones have nothing to be compared with"
    assert (pruned["metrics.trial/epochs"] < 6).all()
    would = [1 - 50 * abs(float(lr) - 0.002) for lr in pruned["params.lr"]]
    assert max(would) < runs["metrics.objective/val_accuracy"].max(), "the best of them is not among those"
    assert MlflowClient().get_run(home).data.metrics["trials/pruned"] == len(pruned)
    run_step("tune", {**given, "pruner": "hyperband", "study_name": "hyperband"})
    assert any(trial.state is TrialState.PRUNED for trial in study_of(store, "hyperband").trials)


def test_several_objectives_keep_their_front(store: Path, few_digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """With real trainings: the numbers are those of the models that were kept."""
    monkeypatch.setattr("rampart.tuning.driver.data_of", lambda _: few_digits)
    given = {"method": "normal", "trials": "3", "epochs": "3", "objective_eps": "2/255", "batch_size": "20", **SMALL}
    objective = "val_accuracy,val_robust_accuracy,val_certified_accuracy"
    home = run_step("tune", {**given, "objective": objective, "sampler": "nsga-ii"})
    study = study_of(store)
    front = {trial.number for trial in study.best_trials}
    profiles = {file.path for file in MlflowClient().list_artifacts(home)}
    assert all(len(front) == 1 or f"profile-{number}.yaml" in profiles for number in front)
    best = max(study.best_trials, key=lambda trial: sum(trial.values))
    rule = yaml.safe_load(read_text(home, "profile.yaml") or "")["arms"][-1]
    assert rule["set"]["lr"] == best.params["lr"]
    model = fetch_model(f"runs:/{best.user_attrs['run']}/model")
    from rampart.attacks import pgd
    from rampart.bounds import margin_bounds
    from rampart.data import to_pixels

    x, y = to_pixels(few_digits.val.images), few_digits.val.labels
    accuracy = (model(x).argmax(1) == y).float().mean()
    attack = pgd(model, x, y, 2 / 255, 10, generator=torch.Generator().manual_seed(0))
    certified = (margin_bounds(model, x, y, 2 / 255, "crown-ibp") > 0).all(1).float().mean()
    assert best.values == pytest.approx(
        [accuracy.item(), (~attack.success[0]).float().mean().item(), certified.item()], abs=1e-6
    )
    assert "plots/pareto_front.png" in {file.path for file in MlflowClient().list_artifacts(home, "plots")}


@pytest.mark.parametrize("sampler", ["tpe", "nsga-ii", "gp", "random"])
def test_every_seed_that_a_setting_may_be_gives_a_sampler(sampler: str) -> None:
    settings = resolve("tune", {"seed": str(2**31 - 1), "sampler": sampler})
    assert isinstance(settings, TuneSettings)
    assert Seeded(settings)


def test_of_several_objectives_a_trial_worse_in_all_is_stopped() -> None:
    from rampart.tuning.trials import worse_in_all

    study = optuna.create_study(directions=["maximize", "maximize"])
    for score in range(5):
        trial = study.ask()
        for epoch in (1, 2):
            trial.set_user_attr(f"epoch/{epoch}", (score / 10, 1 - score / 10))
        study.tell(trial, (score / 10, 1 - score / 10))
    trial = study.ask()
    trial.set_user_attr("epoch/1", (0.0, 0.0))
    assert not worse_in_all(trial, 1, (0.0, 0.0), 1), "an epoch to warm up"
    trial.set_user_attr("epoch/2", (0.0, 0.0))
    assert worse_in_all(trial, 2, (0.1, 0.7), 1)
    assert not worse_in_all(trial, 2, (0.0, 0.9), 1), "good at one thing"
    assert not worse_in_all(trial, 3, (0.0, 0.0), 1), "nothing to compare with"


@pytest.mark.usefixtures("unpublished")
def test_the_test_images_are_never_read(sealed_digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rampart.tuning.driver.data_of", lambda _: sealed_digits)
    given = {"method": "normal", "trials": "2", "epochs": "1", **SMALL}
    home = run_step("tune", {**given, "objective": "val_robust_accuracy,val_certified_accuracy"})
    inputs = MlflowClient().get_run(home).inputs.dataset_inputs
    assert {tag.value for entry in inputs for tag in entry.tags} == {"train", "val"}


@pytest.mark.usefixtures("unpublished")
def test_a_trial_that_fails_is_told_and_another_takes_its_place(
    store: Path, quick_training: list[TrainSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rampart.tuning import trials

    works = trials.train

    def diverging(settings: TrainSettings, *given: object) -> Classifier:
        if len(quick_training) == 1:
            quick_training.append(settings)
            raise TrainingDiverged("the loss became nan in epoch 1: lower lr")
        return works(settings, *given)

    monkeypatch.setattr(trials, "train", diverging)
    run_step("tune", {"method": "normal", "trials": "3", "epochs": "1", **SMALL})
    assert [trial.state.name for trial in study_of(store).trials] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    (failed,) = find_runs("0", {"step": "trial"}, status="FAILED").to_dict("records")
    assert failed["tags.rampart.trial_state"] == "failed"
    assert "lower lr" in failed["tags.rampart.error"]


@pytest.mark.usefixtures("unpublished")
def test_trials_that_all_fail_end_the_tuning(
    quick_training: list[TrainSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverging(*_: object) -> Classifier:
        raise TrainingDiverged("the loss became nan")

    monkeypatch.setattr("rampart.tuning.trials.train", diverging)
    with pytest.raises(RampartError, match="3 trials failed, the last with: the loss became nan"):
        run_step("tune", {"method": "normal", "trials": "20", **SMALL})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trials": "0"}, "trials must be 1 or more"),
        ({"objective": "val_acuracy"}, "did you mean 'val_accuracy'"),
        ({"objective": "val_accuracy,val_robust_accuracy", "pruner": "hyperband"}, "one objective alone"),
        ({"storage": "sqlite:////no/such/folder/tuning.db"}, "storage of Optuna studies cannot be reached"),
        ({"storage": "postgresql://user:secret@127.0.0.1:1/none"}, "storage of Optuna studies cannot be reached"),
        (
            {"storage": "postgresql://user@host:port/none?password=secret"},
            "storage of Optuna studies cannot be reached",
        ),
        ({"storage": "nonsense"}, "storage of Optuna studies cannot be reached"),
        ({"space": "/no/such/space.yaml"}, "cannot be read"),
    ],
)
def test_bad_input_ends_before_any_training(
    change: dict[str, str], message: str, quick_training: list[TrainSettings]
) -> None:
    with pytest.raises(SettingsError, match=message) as raised:
        run_step("tune", {"method": "normal", **SMALL, **change})
    assert "\n" not in str(raised.value)
    assert not quick_training
    (run,) = find_runs("0", {"step": "tune"}, status=None).to_dict("records")
    assert run["status"] == "FAILED"
    assert "secret" not in str(run)


@pytest.mark.usefixtures("unpublished")
def test_a_study_of_the_same_name_about_something_else_is_refused(
    store: Path, quick_training: list[TrainSettings], tmp_path: Path
) -> None:
    given = {"method": "normal", "trials": "1", "epochs": "1", "study_name": "mine", **SMALL}
    run_step("tune", given)
    settings = study_of(store, "mine").user_attrs[WHAT]["settings"]
    assert IDLE.keys().isdisjoint(settings), "one that was begun before there were such settings goes on"
    (tmp_path / "other.yaml").write_text("lr: {low: 0.001, high: 0.01}")
    for change, what in (
        ({"space": str(tmp_path / "other.yaml")}, "space"),
        ({"objective": "val_robust_accuracy"}, "objective"),
        ({"epochs": "2"}, "settings"),
        ({"val_fraction": "0.3"}, "settings"),
        ({"dropout": "0.1"}, "settings"),
    ):
        with pytest.raises(SettingsError, match=f"already with another {what}") as error:
            run_step("tune", {**given, "trials": "2", **change})
        if what == "settings":
            (name,) = change
            assert f'({{"{name}": ' in str(error.value), "what differs is named, and nothing else"
    assert len(quick_training) == 1


@pytest.mark.usefixtures("unpublished")
def test_trials_say_what_they_were_trained_on_and_a_split_of_the_tunings_own_is_one_thing(
    store: Path, quick_training: list[TrainSettings], tmp_path: Path
) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("train: {val_fraction: 0.4}\ntune: {val_fraction: 0.25}")
    given = {"profile": str(file), "method": "normal", "trials": "1", "epochs": "1", **SMALL}
    run_step("tune", given)
    (trial,) = find_runs("0", {"step": "trial"}).to_dict("records")
    assert quick_training[0].val_fraction == 0.25
    assert (trial["params.val_fraction"], trial["params.dataset"]) == ("0.25", "digits")
    file.write_text("train: {val_fraction: 0.4}\ntune: {val_fraction: 0.6}")
    with pytest.raises(SettingsError, match=r"already with another settings .*val_fraction"):
        run_step("tune", {**given, "trials": "2"})


COMMAND = [sys.executable, "-m", "rampart", "tune", "--method", "normal", "--width", "0.125", "--threads", "1"]


def environment(folder: Path) -> dict[str, str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    source = str(Path(__file__).parents[2] / "src")
    return env | {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", "PYTHONPATH": source}


def wait_for(ready: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 180
    while not ready():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_killed_tuning_is_gone_on_with(store: Path) -> None:
    command = [*COMMAND, "--trials", "4", "--epochs", "3", "--pruner", "none"]
    first = subprocess.Popen(command, cwd=store, env=environment(store), stderr=subprocess.PIPE, text=True)

    def in_the_third() -> bool:
        """Or, where this process was kept waiting, in the fourth."""
        try:
            trials = study_of(store).trials
        except Exception:  # there is no database, or no study in it, so far
            return False
        return len(trials) >= 3 and trials[-1].state == TrialState.RUNNING and "run" in trials[-1].user_attrs

    wait_for(in_the_third, first)
    first.send_signal(signal.SIGKILL)
    first.wait()
    done = subprocess.run(command, cwd=store, env=environment(store), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    trials = study_of(store).trials
    assert sum(trial.state in (TrialState.COMPLETE, TrialState.PRUNED) for trial in trials) == 4
    assert [trial.state for trial in trials].count(TrialState.FAIL) == 1
    assert len({tuple(trial.params.values()) for trial in trials}) == 5
    runs = find_runs("0", {}, status=None)
    assert set(runs["status"]) == {"FINISHED", "FAILED"}
    nested = runs[runs["tags.rampart.step"] == "trial"]
    assert len(nested) == 5
    (home,) = set(nested["tags.mlflow.parentRunId"])
    assert set(runs[runs["tags.rampart.step"] == "tune"]["tags.rampart.tuning"]) == {home}
    killed = nested[nested["status"] == "FAILED"].iloc[0]
    assert "its worker ended" in killed["tags.rampart.error"]


@pytest.mark.slow
def test_two_processes_share_a_study_on_postgresql(store: Path, postgres: str) -> None:
    command = [*COMMAND, "--trials", "5", "--epochs", "1", "--storage", postgres, "--study_name", "shared"]
    environ = environment(store)
    workers = [subprocess.Popen(command, cwd=store, env=environ, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [worker.communicate(timeout=300)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said
    trials = optuna.load_study(study_name="shared", storage=postgres).trials
    done = [trial for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    assert len(done) == 5
    assert len({tuple(trial.params.values()) for trial in done}) == 5
    assert len({trial.user_attrs["process"] for trial in done}) == 2, "both had a share"
    runs = find_runs("0", {}, status=None)
    assert set(runs["status"]) == {"FINISHED"}
    nested = runs[runs["tags.rampart.step"] == "trial"]
    assert sorted(nested["run_id"]) == sorted(trial.user_attrs["run"] for trial in done)
    assert nested["tags.mlflow.parentRunId"].nunique() == 1


@pytest.mark.slow
def test_helpers_share_the_trials(store: Path) -> None:
    command = [*COMMAND, "--trials", "3", "--epochs", "1", "--workers", "2"]
    done = subprocess.run(command, cwd=store, env=environment(store), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sum(trial.state is TrialState.COMPLETE for trial in study_of(store).trials) == 3
    assert set(find_runs("0", {}, status=None)["status"]) == {"FINISHED"}
    assert not multiprocessing.active_children()


class Endless:
    """A worker whose trials do not end."""

    def data(self) -> None:
        pass

    def study(self, data: None, home: str) -> None:
        pass

    def work(self, study: None, data: None, home: str) -> None:
        print("begun", flush=True)
        time.sleep(600)


def test_helpers_end_with_their_parent(tmp_path: Path) -> None:
    script = """
import time
from rampart.tuning.driver import _helpers
from tests.tuning.test_tuning import Endless
if __name__ == "__main__":
    with _helpers(Endless(), "home", 1):
        time.sleep(600)
"""
    (tmp_path / "parent.py").write_text(script)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(["src", "."])}
    command, top = [sys.executable, str(tmp_path / "parent.py")], Path(__file__).parents[2]
    parent = subprocess.Popen(command, cwd=top, env=env, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "begun\n"
    family = psutil.Process(parent.pid).children(recursive=True)
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive


def test_a_starting_point_that_was_lost_is_tried_again_but_not_one_that_failed() -> None:
    from rampart.tuning.storage import keep_start

    start = {"lr": 0.005}
    for error, waiting in ((None, 1), ("the loss became nan", 0)):
        study = optuna.create_study()
        study.enqueue_trial(start)
        trial = study.ask()
        trial.suggest_float("lr", 0.001, 0.1)
        keep_start(study, start)
        assert len(study.trials) == 1, "it is being tried"
        if error:
            trial.set_user_attr("error", error)
        study.tell(trial, state=TrialState.FAIL)
        keep_start(study, start)
        keep_start(study, start)
        assert [t.state for t in study.trials].count(TrialState.WAITING) == waiting


def test_trials_without_process_or_heartbeat_are_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from rampart.tuning import storage

    lost: list[int] = []
    study = optuna.create_study()
    study.ask()
    storage.retire(study, lambda _: True, lambda trial: lost.append(trial.number))
    assert not lost
    monkeypatch.setattr(storage, "GRACE", -1)
    storage.retire(study, lambda _: True, lambda trial: lost.append(trial.number))
    assert lost == [0]
    assert study.trials[0].state is TrialState.FAIL
    other = study.ask()
    other.set_user_attr("process", "1:2@elsewhere")
    for alive, found in ((True, [0]), (None, [0]), (False, [0, 1])):
        storage.retire(study, lambda _, alive=alive: alive, lambda trial: lost.append(trial.number))
        assert lost == found
