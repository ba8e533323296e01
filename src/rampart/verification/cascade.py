"""Proves or refutes the robustness of one image: IBP, then CROWN, then α-CROWN.

Branch and bound continues where `unknown` stands: with the classes that are left, their boxes and slopes.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rampart.attacks import pgd
from rampart.bounds import alpha, crown, margin_bounds
from rampart.bounds.box import pixel_box
from rampart.bounds.margins import PROVED, chain_bounds, check, margin_spec
from rampart.errors import ModelError, RampartError, UnsupportedLayer, require, unknown
from rampart.models import Layout

log = logging.getLogger(__name__)

ENGINES = ("native",)
ALPHA_STEPS = 40


@dataclass(frozen=True)
class Verdict:
    """What is known of one image.

    Args:
        status: `safe-incomplete`, `unsafe`, `unknown` or `error`.
        lower_bound: the best proven lower bound of min over j of z_y - z_j.
        counterexample: [C, H, W] for `unsafe`, checked in float64.
        domains: of branch and bound; 0 where bounds or an attack settled it.
        seconds: spent on the image.
        stage: what settled it: `attack`, `ibp`, `crown`, `alpha-crown`; the last one tried for `unknown`.
    """

    status: str
    lower_bound: float
    counterexample: Tensor | None
    domains: int
    seconds: float
    stage: str


def verify(
    model: nn.Module,
    image: Tensor,
    label: int,
    eps: float,
    timeout: float = 180.0,
    attack_first: bool = False,
    engine: str = "native",
    memory: int = crown.MEMORY,
) -> Verdict:
    """Whether the model gives `label` on the whole L∞ ball of radius eps (pixels) around `image`, cut to [0, 1].

    Args:
        model: pixels -> logits, in eval mode; an architecture beyond the native engine is bounded by auto_LiRPA.
        image: [C, H, W] in [0, 1]. One that is misclassified as it stands is its own counterexample (`unsafe`).
        timeout: seconds after which no further stage is begun.
        attack_first: whether PGD looks for a counterexample first.
        memory: MiB that the native engine's coefficients take at once.

    Raises:
        SettingsError: a bad ε, label, time limit or engine. UnsupportedLayer: no engine can bound the model.
    """
    require(engine in ENGINES, unknown("verification engine", engine, ENGINES))
    require(timeout > 0, f"timeout must be above 0 seconds, not {timeout:g}")
    require(0 <= eps <= 1, f"eps must lie between 0 and 1 (pixels), not {eps:g}")
    if model.training:
        raise ModelError("a verdict is on one network: call model.eval() first")
    started = time.perf_counter()
    x, y = image[None], torch.tensor([label], device=image.device)
    with torch.no_grad():
        logits = model(x)
    require(0 <= label < logits.shape[1], f"label {label} is not one of the model's {logits.shape[1]} classes")

    def verdict(status: str, bound: float, stage: str, example: Tensor | None = None) -> Verdict:
        return Verdict(status, bound, example, 0, time.perf_counter() - started, stage)

    if not bool(logits.isfinite().all()):
        log.error("verification failed: the network's output is NaN or infinite on the image itself")
        return verdict("error", -torch.inf, "")
    refuted = _refute(model, image, label, eps, attack_first)
    if refuted is not None:
        return verdict("unsafe", -torch.inf, "attack", refuted)
    best = torch.full_like(logits[0], -torch.inf)
    stage = ""
    try:
        for stage, bounds in _stages(model, x, y, eps, memory):
            if bool(bounds.isnan().any()):
                raise RampartError(f"{stage} gave NaN: the network's weights or activations overflow")
            best = torch.maximum(best, bounds)
            if bool((best > PROVED).all()):
                return verdict("safe-incomplete", best.min().item(), stage)
            if time.perf_counter() - started > timeout:
                break
    except UnsupportedLayer:
        raise
    except (RampartError, RuntimeError) as error:
        log.error("verification failed: %s", error)
        return verdict("error", -torch.inf, stage)
    return verdict("unknown", best.min().item(), stage)


def _stages(model: nn.Module, x: Tensor, y: Tensor, eps: float, memory: int) -> Iterator[tuple[str, Tensor]]:
    """(stage, lower bounds [K] of the margins, +inf at the label); each stage works on the classes not yet proved."""
    try:
        with torch.no_grad():
            chain = Layout(model).resolve(x)
    except UnsupportedLayer:
        for method in ("ibp", "crown", "alpha-crown"):
            yield method, margin_bounds(model, x, y, eps, method, "auto_lirpa")[0]
        return
    with torch.no_grad():
        box = pixel_box(x, eps)
        spec = margin_spec(y, chain.output.shape[1]).to(x.dtype)
        bounds = chain_bounds(chain, box, spec, "ibp")[0]
        bounds[y] = torch.inf
        yield "ibp", bounds
        inputs = crown.preactivations(chain, box, memory)
        check(inputs)
        # Out of place: the caller has seen the stage before.
        left = (bounds <= PROVED).nonzero().squeeze(1)
        bounds = bounds.index_put((left,), crown.backward(chain, inputs, box, spec[:, left])[0])
        yield "crown", bounds
        left = (bounds <= PROVED).nonzero().squeeze(1)
        tightened = alpha.optimise(chain, inputs, box, spec[:, left], ALPHA_STEPS, target=PROVED, memory=memory)[0]
        yield "alpha-crown", bounds.index_put((left,), tightened)


def _refute(model: nn.Module, image: Tensor, label: int, eps: float, attack: bool) -> Tensor | None:
    """A checked counterexample [C, H, W]: the image itself, or one that PGD finds."""
    if is_counterexample(model, image, image, label, eps):
        return image
    if attack:
        found = pgd(model, image[None], torch.tensor([label], device=image.device), eps, 20, restarts=3)
        if bool(found.success[0, 0]) and is_counterexample(model, found.adversarial[0, 0], image, label, eps):
            return found.adversarial[0, 0]
    return None


def is_counterexample(model: nn.Module, example: Tensor, image: Tensor, label: int, eps: float) -> bool:
    """Whether `example` lies in the ball (to float32's rounding) and in [0, 1], and the model in float64 errs on it."""
    inside = (example.double() - image.double()).abs().max() <= eps + 1e-6
    in_range = bool((example >= 0).all() and (example <= 1).all())
    if not (bool(inside) and in_range):
        return False
    with torch.no_grad():
        return int(copy.deepcopy(model).double()(example[None].double()).argmax()) != label
