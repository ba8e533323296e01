"""What a person sees: the report and the MLflow UI, in a real browser."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from rampart.tracking.queries import find_runs
from tests.conftest import Study

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt-get install chromium)")


def browse(address: str, folder: Path, *flags: str) -> str:
    """The page's DOM after its scripts have run."""
    assert CHROMIUM is not None
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    quiet += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={folder}/chromium"]
    command = [CHROMIUM, *quiet, *flags, "--dump-dom", address]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_report_is_one_page_that_needs_nothing_else(study: Study, tmp_path: Path) -> None:
    compare = find_runs("0", {"step": "compare"})["run_id"].iloc[-1]
    page = Path(MlflowClient().download_artifacts(compare, "report.html"))
    source = page.read_text()
    assert "http://" not in source
    assert "https://" not in source
    # The page counts its own pictures, as the browser has drawn them.
    count = "[...document.images].filter(i => i.naturalWidth > 100).length"
    probe = f"<script>onload = () => document.title = {count}</script>"
    copy = tmp_path / "report.html"
    copy.write_text(source.replace("</body>", probe + "</body>"))
    drawn = browse(copy.as_uri(), tmp_path)
    assert "<title>4</title>" in drawn
    for text in ("Robust accuracy", "Verdicts", "certified", compare[:8]):
        assert text in drawn


@pytest.fixture
def server(study: Study) -> Iterator[str]:
    """`make ui`'s server on the study's store."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "ui", "--no-serve-artifacts", "--port", str(port), "--workers", "1"]
    uri = f"sqlite:///{study.folder}/mlflow.db"
    process = subprocess.Popen(
        [*command, "--backend-store-uri", uri],
        cwd=study.folder,
        env={**os.environ, "MLFLOW_TRACKING_URI": uri},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{address}/health")
                break
            except OSError:
                time.sleep(0.5)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def test_the_mlflow_ui_shows_the_studys_runs(server: str, tmp_path: Path) -> None:
    page = browse(f"{server}/#/experiments/0/runs", tmp_path, "--virtual-time-budget=60000")
    assert "study quick" in page
