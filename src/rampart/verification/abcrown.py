"""The study's verifier, α,β-CROWN (Zhang et al. 2018, Xu et al. 2021, Wang et al. 2021), on the same questions."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import sys
import time
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from rampart.bounds.box import pixel_box
from rampart.bounds.lirpa import plain
from rampart.errors import RampartError
from rampart.verification.verdict import Verdict, confirmed, is_counterexample

log = logging.getLogger(__name__)

INSTALL = (
    "git clone --recursive https://github.com/Verified-Intelligence/alpha-beta-CROWN and pip install it "
    "(December 2025 or newer), or take engine=native"
)
# Its default of 100 steps on α uses up half a minute of a CPU before the first split.
ALPHA_STEPS = 20


def verify(model: nn.Module, image: Tensor, label: int, eps: float, timeout: float) -> Verdict:
    """α,β-CROWN's verdict, its own attack switched off; arguments as in `rampart.verification.verify`.

    Its time limit is soft: `seconds` may be above it. A proof by its bounds alone is `safe-incomplete`, one by branch
    and bound `safe`; what it calls unsafe counts only with a counterexample that the model confirms in float64.

    Raises:
        RampartError: it is not installed.
    """
    library = load()
    started = time.perf_counter()
    with torch.no_grad():
        logits = model(image[None])[0]
    if is_counterexample(model, image, image, label, eps):
        return Verdict("unsafe", -torch.inf, image, 0, time.perf_counter() - started, NAME)
    box = pixel_box(image[None], eps)
    # Properties written with its symbols fail on ten classes. A clause (C, c) is C z <= c; any of them refutes.
    rows = torch.eye(len(logits), device=image.device)
    clauses = [
        ((rows[label] - rows[other])[None], torch.zeros(1, device=image.device))
        for other in range(len(logits))
        if other != label
    ]
    said = io.StringIO()
    random_state = torch.get_rng_state()  # it seeds everything
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            question = library.VerificationSpec.build_from_input_bounds(box.lower, box.upper, clauses)
            config = library.ConfigBuilder.from_defaults().update(_settings(image.device.type, timeout)).to_dict()
            found = library.ABCrownSolver(question, _folded(model), config=config).solve()
        # One entry (image, bound, domains, seconds) for each of its searches.
        searches = [(float(search[1]), int(search[2])) for search in found.stats["bab"]]
    except Exception as error:  # it raises many kinds, here and there
        log.error("verification failed: alpha-beta-CROWN: %s: %s", type(error).__name__, error)
        return Verdict("error", -torch.inf, None, 0, time.perf_counter() - started, NAME)
    finally:
        torch.set_rng_state(random_state)
        log.debug("alpha-beta-CROWN said:\n%s", said.getvalue())
    seconds = time.perf_counter() - started
    domains = sum(count for _, count in searches)
    bound = min((lowest for lowest, _ in searches), default=float("nan"))
    status, example = str(found.status), None
    if status.startswith("unsafe"):
        example = _confirmed(model, found.stats, image, label, eps)
        status = "unsafe" if example is not None else "unknown"
    else:
        status = STATUSES.get(status, "unknown")
        if status == "unknown" and seconds >= timeout:
            status = "timeout"
        if status == "safe" and not searches:
            status = "safe-incomplete"
    return Verdict(status, bound, example, domains, seconds, NAME)


NAME = "abcrown"
STATUSES = {"safe": "safe", "verified": "safe", "safe-incomplete": "safe-incomplete", "timeout": "timeout"}


def load() -> ModuleType:
    """The package `abcrown`; raises RampartError where it or what it needs is missing."""
    words = sys.argv
    try:
        sys.argv = words[:1]  # it reads the command line
        with contextlib.redirect_stdout(io.StringIO()):
            return importlib.import_module("abcrown")
    except (ImportError, AttributeError) as error:  # the latter: it came upon the old auto_LiRPA
        raise RampartError(f"engine=abcrown needs alpha-beta-CROWN ({error}): {INSTALL}") from error
    finally:
        sys.argv = words


def _settings(device: str, timeout: float) -> dict[str, Any]:
    return {
        "general": {
            "device": device,
            "complete_verifier": "bab",
            "enable_incomplete_verification": True,
            "conv_mode": "patches",
        },
        "attack": {"pgd_order": "skip"},
        "solver": {
            "batch_size": 256,
            "auto_enlarge_batch_size": False,
            "bound_prop_method": "alpha-crown",
            "alpha-crown": {"iteration": ALPHA_STEPS},
        },
        "bab": {
            "timeout": timeout,
            "branching": {"method": "kfsb", "input_split": {"enable": False}},
            "cut": {"enabled": False},
        },
    }


def _folded(model: nn.Module) -> nn.Module:
    """A copy with each BatchNorm in the convolution before it, which makes its bounds faster."""
    net = fuse(plain(model))
    return net.requires_grad_(False).eval()


def _confirmed(model: nn.Module, stats: dict[str, Any], image: Tensor, label: int, eps: float) -> Tensor | None:
    examples = stats.get("attack_examples")
    if examples is not None:
        for example in torch.as_tensor(examples).reshape(-1, *image.shape).to(image):
            point = confirmed(model, example, image, label, eps)
            if point is not None:
                return point
    log.warning("alpha-beta-CROWN says unsafe, but its counterexample is missing or wrong: unknown")
    return None
