"""Programs for a GPU compile, which their interpretation in other tests does not show."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is missing: it comes with PyTorch for GPUs")

# In a process of its own: where programs are interpreted, Triton cannot compile.
COMPILE = """
import sys
from importlib import import_module
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

for name in sys.argv[1:]:
    programs = [value for value in vars(import_module(name)).values() if isinstance(value, triton.JITFunction)]
    assert programs, name
    for program in programs:
        kinds = {each.name: "constexpr" if each.is_constexpr else "*fp32" for each in program.params}
        given = {(place,): 4 for place, kind in enumerate(kinds.values()) if kind == "constexpr"}
        made = triton.compile(ASTSource(program, kinds, given), target=GPUTarget("cuda", 90, 32))
        assert "cubin" in made.asm
"""


def test_they_compile() -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    modules = ["rampart.models.pulling", "rampart.bounds.onepass"]
    done = subprocess.run([sys.executable, "-c", COMPILE, *modules], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
