"""What a person sees: the report and the MLflow UI, in a real browser."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from rampart.tracking.queries import find_runs
from rampart.tracking.ui import address
from tests.conftest import Study, mlflow_server

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt-get install chromium)")


def browse(address: str, folder: Path, *flags: str) -> tuple[str, str]:
    """(the page's DOM after its scripts have run, what it wrote to the console); no host but this machine is found."""
    assert CHROMIUM is not None
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    quiet += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={folder}/chromium"]
    quiet += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--enable-logging=stderr", "--log-level=0"]
    command = [CHROMIUM, *quiet, "--virtual-time-budget=60000", *flags, "--dump-dom", address]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if ":CONSOLE" in line)


def page_with(text: str, *asked: Any) -> str:
    """The page, as `browse` takes it, once it shows a text: on a busy machine the server may answer later than the
    browser waits, whose time is not the clock's."""
    for _ in range(4):
        page, _ = browse(*asked)
        if text in page:
            return page
    raise AssertionError(f"the page does not show '{text}': {page[-2000:]}")


# Run in the page when all is drawn; its answer becomes the title.
PROBE = """
<script>
const asked = performance.getEntriesByType("resource").filter(entry => !entry.name.startsWith("data:")).length;
setTimeout(() => {
  const [table] = document.querySelectorAll("#robust_accuracy table");
  const column = () => [...table.tBodies[0].rows].map(row => row.cells[3].textContent);
  table.tHead.rows[0].cells[3].click();
  const up = column();
  table.tHead.rows[0].cells[3].click();
  const [verdicts] = document.querySelectorAll("#verdicts table");
  const radii = () => [...verdicts.tBodies[0].rows].map(row => row.cells[3]);
  ["2/255", "-", "1/255", "1/510"].forEach((text, i) => radii()[i].textContent = text);
  verdicts.tHead.rows[0].cells[3].click();
  const panels = [...document.querySelectorAll(".panel")];
  document.title = JSON.stringify({
    asked, up, down: column(), radii: radii().map(cell => cell.textContent), panels: panels.length,
    drawn: panels.filter(panel => panel.querySelector("svg")?.getBoundingClientRect().width > 100).length,
    pictures: [...document.images].filter(image => image.naturalWidth > 100).length,
    figures: document.querySelectorAll("[data-figure]").length,
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  });
}, 20000);
</script>
"""


@pytest.mark.parametrize("width", [1280, 400])
def test_the_report_is_one_page_that_needs_nothing_else(study: Study, tmp_path: Path, width: int) -> None:
    compare = find_runs("0", {"step": "compare"})["run_id"].iloc[-1]
    page = Path(MlflowClient().download_artifacts(compare, "report.html"))
    copy = tmp_path / "report.html"
    before, end, after = page.read_text().rpartition("</body>")
    copy.write_text(before + PROBE + end + after)
    dom, console = browse(copy.as_uri(), tmp_path, f"--window-size={width},1000")
    found = re.search(r"<title>(.*?)</title>", dom)
    assert found is not None
    seen = json.loads(html.unescape(found[1]))
    assert console == ""
    assert seen["asked"] == 0, "the page has fetched something"
    assert seen["panels"] == seen["drawn"] >= seen["figures"] >= 9
    assert seen["pictures"] == 1  # the images most often broken
    assert seen["overflow"] <= 0, "the page is wider than the window: a table or figure does not scroll by itself"
    numbers = [float(text.split()[0]) for text in seen["up"]]
    assert numbers == sorted(numbers)
    assert seen["down"] == seen["up"][::-1]
    assert seen["radii"] == ["1/510", "1/255", "2/255", "-"]
    for text in ("Robust accuracy", "Verdicts", "What may be claimed", compare[:8]):
        assert text in dom


@pytest.fixture
def server(study: Study) -> Iterator[str]:
    """`make ui`'s server on the study's store."""
    uri = f"sqlite:///{study.folder}/mlflow.db"
    words = ["ui", "--no-serve-artifacts", "--backend-store-uri", uri]
    with mlflow_server(words, study.folder, {**os.environ, "MLFLOW_TRACKING_URI": uri}) as address:
        yield address


def test_the_mlflow_ui_shows_the_study_and_compares_its_arms(server: str, tmp_path: Path) -> None:
    """Side by side at the address that `make ui` prints."""
    page_with("study quick", f"{server}/#/experiments/0/runs", tmp_path)
    path = address().partition("/#/")[2]
    page = page_with("Comparing 4 Runs", f"{server}/#/{path}", tmp_path, "--window-size=1600,1400")
    for arm in ("normal", "certified", "normal+supcon-double", "certified+supcon-double"):
        assert f"evaluate {arm} s0" in page
