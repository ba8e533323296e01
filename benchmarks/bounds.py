"""Bounds and certified training steps beside auto_LiRPA's: python -m benchmarks.bounds [--quick] [--json].

Training steps are forward, backward and Adam, on random images. Of auto_LiRPA: CROWN-IBP as the study calls it (both
sides of all logits, cross-entropy on the lower ones), with a specification matrix and the lower side alone, and its own
loss fusion (the network wrapped so that its output is the sum of exp(z_j - z_y)). One-shot bounds are those of the
margins of images of the digits, all inner bounds included.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import Row, in_turn, options, peak_memory, show
from rampart.bounds import margin_bounds
from rampart.bounds.compat import import_auto_lirpa
from rampart.bounds.lirpa import plain
from rampart.bounds.margins import margin_spec
from rampart.data import load_dataset, to_pixels
from rampart.kernels import compiling
from rampart.losses import worst_case_logits
from rampart.models import Classifier, build_model, load_model
from rampart.training import Recipe
from rampart.training.train import stages

EPS = 1 / 255
CLASSES = 10
Call = Callable[[], object]


class SumOfExponentials(nn.Module):
    """The sum over j of exp(z_j - z_y): log of its upper bound bounds the cross-entropy (Xu et al. 2020, §3.2)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        logits = self.model(x)
        return torch.exp(logits - torch.gather(logits, 1, labels[:, None])).sum(1, keepdim=True)


def our_step(architecture: str, batch: int, compiled: bool = True, **recipe: object) -> Call:
    """A training step of ours, its kernels compiled or not; `recipe` names the objective."""
    torch.manual_seed(0)
    model = build_model(architecture).train()
    stage = stages(Recipe(architecture=architecture, **recipe), model)[0]  # type: ignore[arg-type]
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
    x, y = to_pixels(torch.randint(256, (batch, 3, 32, 32), dtype=torch.uint8)), torch.arange(batch) % CLASSES

    def step() -> None:
        with compiling(compiled):
            loss = stage.method.batch_loss(x, y, stage.criterion, EPS, None)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return step


def lirpa_step(architecture: str, batch: int, form: str) -> Call:
    """A training step on auto_LiRPA's CROWN-IBP bounds; `form` is study, margin or fusion."""
    library = import_auto_lirpa()
    torch.manual_seed(0)
    model = plain(build_model(architecture)).train()
    x, y = torch.rand(batch, 3, 32, 32), torch.arange(batch) % CLASSES
    with contextlib.redirect_stdout(io.StringIO()):
        if form == "fusion":
            bounded = library.BoundedModule(SumOfExponentials(model), (x, y), bound_opts={"loss_fusion": True})
        else:
            bounded = library.BoundedModule(model, x)
    bounded.train()
    optimizer = torch.optim.Adam(bounded.parameters(), 1e-3)
    ball = library.PerturbationLpNorm(norm=float("inf"), x_L=(x - EPS).clamp(0, 1), x_U=(x + EPS).clamp(0, 1))
    bounded_x = library.BoundedTensor(x, ball)
    spec = margin_spec(y, CLASSES)

    def step() -> None:
        if form == "fusion":
            _, upper = bounded.compute_bounds(x=(bounded_x, y), method="CROWN-IBP", bound_lower=False)
            loss = upper.log().mean()
        elif form == "margin":
            lower, _ = bounded.compute_bounds(x=(bounded_x,), C=spec, method="CROWN-IBP", bound_upper=False)
            loss = F.cross_entropy(worst_case_logits(lower, y), y)
        else:
            lower, _ = bounded.compute_bounds(x=(bounded_x,), method="CROWN-IBP")
            loss = F.cross_entropy(lower, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def one_shot(engine: str, method: str, images: int, file: str, dataset: str) -> Call:
    """Bounds of the margins of `images` test images, by `method`."""
    model = load_model(file) if file else settled(build_model())
    test = load_dataset(dataset).test[:images]
    return partial(margin_bounds, model, to_pixels(test.images), test.labels, EPS, method, engine)  # type: ignore[arg-type]


def settled(model: Classifier) -> Classifier:
    """Fresh weights with BatchNorm's statistics of the digits."""
    torch.manual_seed(0)
    images = to_pixels(load_dataset("digits").train.images[:512])
    with torch.no_grad():
        for _ in range(30):
            model.train()(images)
    return model.eval()


def training_rows(architecture: str, batch: int, repeats: int) -> list[Row]:
    calls = {
        "fused": our_step(architecture, batch, method="certified", certified_loss="fused"),
        "fused, not compiled": our_step(architecture, batch, False, method="certified", certified_loss="fused"),
        "margin": our_step(architecture, batch, method="certified", certified_loss="margin"),
        "ibp": our_step(architecture, batch, method="ibp"),
        "normal": our_step(architecture, batch, method="normal"),
        **{f"its {form}": lirpa_step(architecture, batch, form) for form in ("study", "margin", "fusion")},
    }
    speed = {name: batch / seconds for name, seconds in in_turn(calls, repeats).items()}
    pairs = [
        ("fused / study's call", "fused", "its study"),
        ("fused / margin form", "fused", "its margin"),
        ("fused / its loss fusion", "fused", "its fusion"),
        ("fused, not compiled / its loss fusion", "fused, not compiled", "its fusion"),
        ("margin / margin form", "margin", "its margin"),
        ("ibp / its loss fusion", "ibp", "its fusion"),
        ("fused / plain training", "fused", "normal"),
    ]
    return [
        Row(f"{architecture} {name}", "images/s", speed[ours], speed[theirs], speed[ours] / speed[theirs])
        for name, ours, theirs in pairs
    ]


def one_shot_rows(images: int, alpha_images: int, repeats: int, file: str, dataset: str) -> list[Row]:
    rows = []
    for method, count in (("crown", images), ("alpha-crown", alpha_images)):
        if not count:
            continue
        calls = {engine: one_shot(engine, method, count, file, dataset) for engine in ("native", "auto_lirpa")}
        seconds = in_turn(calls, repeats)
        ours, theirs = seconds["native"], seconds["auto_lirpa"]
        rows.append(Row(f"{method} {count} images", "s", ours, theirs, theirs / ours))
        memory = {engine: peak_memory(one_shot, engine, method, count, file, dataset) for engine in calls}
        ours, theirs = memory["native"], memory["auto_lirpa"]
        rows.append(Row(f"{method} peak memory", "MiB", ours, theirs, theirs / max(ours, 1)))
        bounds = [_mean(call()) for call in calls.values()]  # type: ignore[arg-type]
        print(f"{method}: mean bound {bounds[0]:.5g} (native), {bounds[1]:.5g} (auto_LiRPA)")
    return rows


def _mean(margins: Tensor) -> float:
    """Of all margins but that of a class with itself, which is given as infinite."""
    return margins[margins.isfinite()].mean().item()


def main() -> None:
    parser = options(__doc__, quick="fewer images and repeats, one architecture")
    parser.add_argument("--rows", nargs="+", choices=("training", "one-shot"), default=["training", "one-shot"])
    parser.add_argument("--images", type=int, default=64, help="of the one-shot rows of CROWN")
    # auto_LiRPA 0.3 optimises slopes on dense maps, minutes for a few images.
    parser.add_argument("--alpha-images", type=int, default=4, help="of the one-shot rows of α-CROWN; 0: no such rows")
    parser.add_argument("--model", default="", help="weights for the one-shot rows (default: fresh ones)")
    parser.add_argument("--dataset", default="digits", help="images for the one-shot rows")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows = []
    if "training" in given.rows:
        rows += training_rows("paper-cnn", 128, 1 if given.quick else 7)
        if not given.quick:
            rows += training_rows("cnn7", 8, 3)
    if "one-shot" in given.rows:
        images, alpha_images = (4, 0) if given.quick else (given.images, given.alpha_images)
        rows += one_shot_rows(images, alpha_images, 1 if given.quick else 3, given.model, given.dataset)
    show(f"bounds, {given.threads} threads", rows, given.json)


if __name__ == "__main__":
    main()
