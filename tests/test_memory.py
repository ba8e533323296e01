"""Tensors' memory is kept for the next ones."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

COUNT = """
import resource, torch
from rampart.memory import keep_freed_memory
from rampart.models import build_model

torch.set_num_threads(1)
model = build_model().train()
x = torch.rand(128, 3, 32, 32)

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        model(x).sum().backward()
        model.zero_grad()
        torch.ones(12_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(faults())
keep_freed_memory()
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_memory_is_not_fetched_again_and_again() -> None:
    # In a process of its own: these tests' keeps its memory as it did.
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before > 1_000
    assert after < before / 10
