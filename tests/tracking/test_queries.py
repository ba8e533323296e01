"""What is asked of the server, and what becomes of it where the server does not answer."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.parse import parse_qs, unquote, urlparse

import pandas as pd
import pytest
import torch
from mlflow import MlflowClient

from rampart.__main__ import main
from rampart.data import Dataset
from rampart.errors import RampartError
from rampart.models import build_model
from rampart.tracking import open_run, queries, store
from rampart.tracking.queries import compare_page, find_models, find_runs, metric_history, run_page, runs_by_id
from rampart.tracking.ui import address


def test_runs_are_found_by_tags_status_and_id() -> None:
    ids = []
    for arm in ("normal", "certified", "normal"):
        with open_run("evaluate") as run:
            run.tags({"arm": arm})
        ids.append(run.id)
    MlflowClient().set_terminated(ids[0], "FAILED")
    assert find_runs("0", {"arm": "normal"})["run_id"].tolist() == [ids[2]]
    assert find_runs("0", {"arm": "normal"}, status="!FINISHED")["run_id"].tolist() == [ids[0]]
    assert find_runs("0", {"arm": "normal"}, status=None)["run_id"].tolist() == [ids[2], ids[0]]
    assert runs_by_id("0", [ids[1], ids[0], ids[1]])["run_id"].tolist() == [ids[1], ids[0]]
    assert runs_by_id("0", []).empty
    with pytest.raises(RampartError, match="no experiment has the id 'quick'"):
        find_runs("quick", {})


def test_many_ids_are_asked_for_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queries, "AT_ONCE", 2)
    ids = []
    for _ in range(5):
        with open_run("evaluate") as run:
            ids.append(run.id)
    assert set(runs_by_id("0", ids)["run_id"]) == set(ids)


def test_numbers_are_tied_to_model_and_dataset(digits: Dataset) -> None:
    with open_run("train") as trained:
        model_id = trained.model(build_model(width=0.125).eval(), torch.rand(2, 3, 32, 32))
    with open_run("evaluate") as run:
        run.dataset(digits, "digits", 0.2, 42)
        run.about(model_id, "test")
        run.uses([model_id])
        run.uses([model_id])  # a second time says nothing new
        run.metrics({"accuracy": 0.5, "asr/0.1": 0.25})
    (found,) = find_models("0").to_dict("records")
    assert (found["model_id"], found["run_id"]) == (model_id, trained.id)
    assert (found["metrics.accuracy"], found["metrics.asr/0.1"]) == (0.5, 0.25)
    (metric,) = (m for m in MlflowClient().get_logged_model(model_id).metrics if m.key == "accuracy")
    assert (metric.run_id, metric.dataset_name, metric.dataset_digest) == (run.id, "digits-test", digits.digest)
    inputs = MlflowClient().get_run(run.id).inputs
    assert [entry.model_id for entry in inputs.model_inputs] == [model_id]


def test_an_experiment_without_models_has_none() -> None:
    assert find_models("0").empty
    assert list(find_models("0").columns) == ["model_id", "run_id", "created"]


def test_curves_are_tidy() -> None:
    with open_run("train") as run:
        for epoch in (1, 2):
            run.metrics({"train/loss": 1 / epoch, "val/accuracy": epoch / 10}, step=epoch)
    found = metric_history(run.id, ["train/loss", "val/accuracy"])
    expected = [("train/loss", 1, 1.0), ("train/loss", 2, 0.5), ("val/accuracy", 1, 0.1), ("val/accuracy", 2, 0.2)]
    assert list(found.itertuples(index=False, name=None)) == expected
    assert isinstance(metric_history(run.id, []), pd.DataFrame)


def test_addresses_lead_to_the_ui(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "5050")
    assert run_page("3", "abc") == "http://127.0.0.1:5050/#/experiments/3/runs/abc"
    asked = parse_qs(urlparse(compare_page("3", ["a", "b"]).replace("#/", "")).query)
    assert {name: json.loads(unquote(value[0])) for name, value in asked.items()} == {
        "runs": ["a", "b"], "experiments": ["3"],
    }  # fmt: skip
    assert address() == "http://127.0.0.1:5050"
    with open_run("compare") as run:
        run.tags({"arms": "a b"})
    with open_run("compare"):  # of other stores' runs alone
        pass
    assert address() == compare_page(run.experiment, ["a", "b"])
    monkeypatch.setattr("mlflow.get_tracking_uri", lambda: "https://tracking.example/")
    assert run_page("3", "abc") == "https://tracking.example/#/experiments/3/runs/abc"


@pytest.fixture
def failing(request: pytest.FixtureRequest) -> Iterator[tuple[str, list[str]]]:
    """A server that answers everything with 500 (or what the test says), and what it was asked."""
    asked: list[str] = []
    status = getattr(request, "param", 500)

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"the database is on fire")

        do_GET = do_POST = answer  # noqa: N815 (http.server looks for these names)

        def log_message(self, *given: object) -> None:
            """Nothing on stderr."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize("down", [False, True])
def test_a_server_that_does_not_answer_is_asked_again_and_then_named(
    down: bool, failing: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    uri, asked = failing
    if down:
        uri = "http://127.0.0.1:9"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    store._make_ready.cache_clear()
    assert main(["compare"]) == 2
    said = capfd.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"error: the tracking store {uri} does not answer (")
    assert "check MLFLOW_TRACKING_URI, which is" in said
    if not down:
        assert len(asked) == 3


def test_a_server_that_fails_half_way_is_named(failing: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", failing[0])
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(store, "_make_ready", lambda uri: None)
    for ask in (
        lambda: find_runs("0", {}),
        lambda: find_models("0"),
        lambda: queries.run_tags("a" * 32),
        lambda: queries.read_table("a" * 32, "x.parquet"),
        lambda: metric_history("a" * 32, ["loss"]),
    ):
        with pytest.raises(RampartError, match="does not answer"):
            ask()


@pytest.mark.parametrize("failing", [401, 403], indirect=True)
def test_a_server_that_knows_no_such_user(
    failing: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", failing[0])
    store._make_ready.cache_clear()
    assert main(["compare"]) == 2
    assert "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in capfd.readouterr().err.splitlines()[-1]
    assert len(failing[1]) == 1


def test_no_message_tells_a_password(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://ada:swordfish@127.0.0.1:9/none")
    store._make_ready.cache_clear()
    monkeypatch.setattr(store.time, "sleep", lambda _: None)
    assert main(["compare"]) == 2
    said = capfd.readouterr().err
    assert "postgresql://ada:***@127.0.0.1:9/none does not answer" in said
    assert "swordfish" not in said


def test_an_experiment_that_does_not_exist_is_named(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "nobody's")
    assert main(["compare"]) == 2
    assert "no experiment 'nobody's'" in capfd.readouterr().err
    assert MlflowClient().get_experiment_by_name("nobody's") is None
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "77")
    assert main(["compare"]) == 2
    assert "no experiment with id '77'" in capfd.readouterr().err
