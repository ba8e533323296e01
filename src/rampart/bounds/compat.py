"""Lets auto_LiRPA 0.3 (the package index's) run on today's torch and numpy; does nothing for 0.7 and newer."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
import types
from pathlib import Path
from typing import Any

from rampart.errors import RampartError

INSTALL = "install it with 'make setup' (or pip install --no-deps auto-LiRPA==0.3)"


def is_old() -> bool:
    """Whether the auto_LiRPA that is imported is older than 0.7."""
    found = importlib.util.find_spec("auto_LiRPA")
    if found is None or found.origin is None:
        raise RampartError(f"engine auto_lirpa needs auto_LiRPA: {INSTALL}")
    # Not the version of the installed distribution: a checkout on PYTHONPATH goes before it.
    match = re.search(r"__version__ = ['\"](\d+)\.(\d+)", Path(found.origin).read_text())
    return match is None or (int(match[1]), int(match[2])) < (0, 7)


def import_auto_lirpa() -> types.ModuleType:
    """The package `auto_LiRPA`, patched where it is old."""
    old = is_old()
    if old:
        _patch()
    try:
        import auto_LiRPA
    except ImportError as error:
        raise RampartError(f"engine auto_lirpa needs auto_LiRPA ({error}): {INSTALL}") from error
    if old:
        _patch_members(auto_LiRPA.BoundedModule)
    return auto_LiRPA


def _patch_members(bounded: Any) -> None:
    """(4) torch 2 passes remove_duplicate to _named_members, which 0.3 overrides without it."""
    named_members = bounded._named_members
    if "remove_duplicate" not in inspect.signature(named_members).parameters:

        def wrapped(self: Any, get: Any, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Any:
            return named_members(self, get, prefix, recurse)

        bounded._named_members = wrapped


def _patch() -> None:
    import numpy as np
    import torch
    import torch.onnx.symbolic_helper as helper

    # (1) numpy 2 moved isin out of numpy.lib.arraysetops.
    if "numpy.lib.arraysetops" not in sys.modules:
        sets = types.ModuleType("numpy.lib.arraysetops")
        sets.isin = np.isin  # type: ignore[attr-defined]
        sys.modules["numpy.lib.arraysetops"] = sets
    # (2) torch 2 keeps the opset version in an object of globals.
    if not hasattr(helper, "_set_opset_version"):
        try:
            from torch.onnx._internal.torchscript_exporter._globals import GLOBALS
        except ImportError:
            from torch.onnx._globals import GLOBALS

        def set_opset_version(version: int) -> None:
            GLOBALS.export_onnx_opset_version = version

        helper._set_opset_version = set_opset_version  # type: ignore[attr-defined]
    # (3) torch 2 dropped reading a node's attribute by subscript.
    node: Any = torch._C.Node
    if not hasattr(node, "__getitem__"):
        node.__getitem__ = lambda self, key: getattr(self, self.kindOf(key))(key)
