"""The benchmarks run and report ratios; how large they are is for their reader."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bounds"])
def test_a_quick_benchmark_ends_with_its_ratios(name: str) -> None:
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    assert rows
    for row in rows.values():
        assert set(row) == {"ours", "baseline", "ratio"}
        assert row["ratio"] > 0
