"""The documents say what results/ says (make results)."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from rampart.ledger import attack_rates, eps_key, verdict_counts
from rampart.reports.document import PLACE, filled
from rampart.reports.record import read
from rampart.reports.repeating import trained_by
from rampart.settings import as_text, resolve

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
PROFILES = sorted(path.parent.name for path in RESULTS.glob("*/runs.csv"))
DOCUMENTS = ["RESULTS.md", "README.md", "docs/recipes.md", "docs/speed.md"]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_tables_are_those_of_the_evidence(name: str) -> None:
    path = ROOT / name
    text = path.read_text(encoding="utf-8")
    assert PLACE.search(text)
    assert filled(text, path.parent) == text


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if name != "README.md"])
def test_every_table_has_its_evidence(name: str) -> None:
    assert "\n|" not in PLACE.sub("", (ROOT / name).read_text(encoding="utf-8"))


def test_every_table_of_results_is_shown() -> None:
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS)
    assert [path.name for path in (RESULTS / "tables").iterdir() if f"results/tables/{path.name} " not in text] == []


@pytest.mark.parametrize("profile", PROFILES)
def test_numbers_are_those_of_the_ledgers(profile: str) -> None:
    evidence = read(RESULTS / profile).evidence
    assert {path.stem for path in (RESULTS / profile / "ledgers").iterdir()} == set(evidence.ledgers)
    told = evidence.values.assign(key=evidence.values["eps"].map(eps_key)).set_index(["run", "metric", "key"])["value"]
    for run in evidence.of("evaluate", "verify").to_dict("records"):
        ledger = evidence.ledgers[run["run_id"]]
        found = attack_rates(ledger) if run["step"] == "evaluate" else verdict_counts(ledger)
        checked = 0
        for name, value in found.items():
            metric, _, rest = name.partition("/")
            eps = float(rest) if run["step"] == "evaluate" and rest else float("nan")
            if run["step"] == "verify":
                metric, eps = rest, float(ledger["eps"].dropna().iloc[0])
            if (run["run_id"], metric, eps_key(eps)) in told.index:
                assert told[run["run_id"], metric, eps_key(eps)] == pytest.approx(value), (run["run_id"], name)
                checked += 1
        assert checked > 5


@pytest.mark.parametrize("profile", PROFILES)
def test_a_command_still_trains_as_the_run_was_trained(profile: str) -> None:
    """Who changes a profile says in `command` what the runs before it had instead."""
    runs = read(RESULTS / profile).evidence.of("train")
    for text, trained in zip(runs["command"], runs["trained"], strict=True):
        words = [word.partition("=") for word in shlex.split(text)]
        params = as_text(resolve("train", {name: value for name, equals, value in words if equals}), {})
        assert trained_by(params) == json.loads(trained), text


def test_results_are_small() -> None:
    """A reader downloads them with the code."""
    files = [path for path in RESULTS.rglob("*") if path.is_file() and "models" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 5e6
    assert sum(path.stat().st_size for path in (RESULTS / "models").glob("*")) < 20e6
