"""Verifies chosen images of a split into a ledger."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from rampart.bounds.crown import memory_on
from rampart.bounds.exact import Exact
from rampart.data import Split, to_pixels
from rampart.errors import Contradiction, require, require_choices, unknown
from rampart.ledger import PROVED
from rampart.models import double_copy, predict
from rampart.verification import exchange
from rampart.verification.answers import read_results
from rampart.verification.cascade import ENGINES, STAGES, attack, verify
from rampart.verification.selection import Selection, choose
from rampart.verification.splitting import Branching
from rampart.verification.verdict import Verdict

COLUMNS = (
    *("image", "label", "prediction", "correct", "eps", "verdict", "stage", "lower_bound", "domains", "seconds"),
    *("counterexample_prediction", "radius"),
    *(f"seconds/{stage}" for stage in STAGES),
)
# An image's row, and its counterexample.
Settled = tuple[dict[str, object], Tensor | None]
# Halvings of the interval in which an image's radius lies.
RADIUS_STEPS = 6
# Images that PGD attacks together: single ones make poor use of a machine.
TOGETHER = 256


@dataclass(frozen=True, kw_only=True)
class VerificationPlan:
    """What is verified.

    Args:
        eps: radius in pixels.
        images: how many.
        selection: `common` (the same images for every model) or `survivors` (those that the model classifies
            correctly and on which PGD fails at survive_eps: the study's way).
        survive_eps: radius in pixels of that PGD.
        selection_seed: of the order in which images are taken.
        attack_first: whether PGD looks for a counterexample before bounds are computed.
        timeout: seconds an image after which no further stage, or batch of domains, is begun.
        memory: MiB that the bounds' coefficients take at once; 0: 16 on a CPU, 4,096 on a GPU.
        complete: whether branch and bound follows where bounds do not settle an image.
        branching: which neuron it splits: `kfsb`, `babsr` or `gap` (`branch_and_bound`).
        max_domains: that it bounds at most, for one image.
        engine: `native`; `abcrown` (α,β-CROWN, where it is installed); or the path of a results.csv in which any other
            verifier has written down what it made of the exported instances, its counterexamples beside it.
        radius: 0, or the radius in pixels up to which the largest ε that can be proved is looked for in every image,
            by bisection within `timeout` more seconds (`eps` at least, where the image is proved at it).
        images_at_once: in work side by side, each on its share of the threads (engine=native alone).
        export: folder that gets the questions as ONNX and VNN-LIB files, for other verifiers.
    """

    eps: float = 2 / 255
    images: int = 20
    selection: Selection = "common"
    survive_eps: float = 4 / 255
    selection_seed: int = 0
    attack_first: bool = False
    timeout: float = 180.0
    memory: int = 0
    complete: bool = True
    branching: Branching = "kfsb"
    max_domains: int = 1_000_000
    engine: str = "native"
    radius: float = 0.0
    images_at_once: int = 1
    export: str = ""

    def __post_init__(self) -> None:
        require_choices(self)
        for name in ("eps", "survive_eps", "radius"):
            require(0 <= getattr(self, name) <= 1, f"{name} must lie between 0 and 1, not {getattr(self, name):g}")
        for name in ("images", "max_domains", "images_at_once"):
            require(getattr(self, name) >= 1, f"{name} must be 1 or more, not {getattr(self, name)}")
        require(self.memory >= 0, f"memory must be 0 or more MiB, not {self.memory}")
        require(self.timeout > 0, f"timeout must be above 0 seconds, not {self.timeout:g}")
        known = self.engine in ENGINES or self.engine.endswith(".csv")
        require(known, unknown("verification engine", self.engine, [*ENGINES, "PATH/results.csv"]))
        require(self.engine == "native" or not self.radius, "radius is looked for by engine=native alone")


@dataclass
class Progress:
    """What is known so far: a ledger's rows and counterexamples by image, kept by whoever wants to go on from there.

    Args:
        rows, examples: of images that an interrupted verification of the same plan has finished.
        keep: called after each image that is finished.
    """

    rows: list[dict[str, object]] = field(default_factory=list)
    examples: dict[int, Tensor] = field(default_factory=dict)
    keep: Callable[[Progress], None] = lambda _: None

    @property
    def ledger(self) -> pd.DataFrame:
        return pd.DataFrame(self.rows, columns=list(COLUMNS)).astype({"counterexample_prediction": "Int64"})


def verify_split(
    model: nn.Module,
    split: Split,
    plan: VerificationPlan,
    progress: Progress | None = None,
    part: tuple[int, int] = (0, 1),
) -> tuple[pd.DataFrame, dict[int, torch.Tensor]]:
    """The ledger (COLUMNS; an image that the model gets wrong has no verdict) and counterexamples by image.

    `radius` is the largest ε proved (missing unless the plan asks for it; 0 where nothing could be proved).

    Args:
        part: (i, n): of the plan's images only each n-th, from the i-th on.

    Raises:
        Contradiction: PGD breaks an image that was proved.
    """
    progress = progress or Progress()
    chosen = choose(model, split, plan.images, plan.selection, plan.survive_eps, plan.selection_seed)
    if plan.export:
        exchange.export(model, split, chosen, plan.eps, plan.timeout, Path(plan.export))
    first = to_pixels(split.images[:1])
    exact = Exact.of(model, first) if plan.engine == "native" else None
    double = exact.model if exact else double_copy(model, first) or model
    whole, chosen = chosen, chosen[part[0] :: part[1]]
    done = {row["image"] for row in progress.rows}
    left = [image for image in chosen if image not in done]
    known: dict[int, Verdict] = {}
    if plan.engine.endswith(".csv"):
        known = read_results(Path(plan.engine), model, split, chosen, plan.eps)
    elif plan.attack_first:
        known = _attacked(model, double, split, whole, set(left), plan)

    def settle(index: int) -> Settled:
        return _settle(model, exact, split, plan, index, known.get(index))

    # Neither auto_LiRPA nor another verifier is made for threads.
    at_once = plan.images_at_once if exact and exact.layout else 1
    counts = Counter(progress.ledger["verdict"].fillna("misclassified"))
    with tqdm(total=len(chosen), initial=len(done), desc="verify", unit="image", disable=None, leave=False) as bar:
        for row, example in _side_by_side(settle, left, at_once):
            progress.rows.append(row)
            if example is not None:
                progress.examples[int(str(row["image"]))] = example
            counts[str(row.get("verdict", "misclassified"))] += 1
            bar.set_postfix(counts)
            bar.update()
            progress.keep(progress)
    place = {index: number for number, index in enumerate(chosen)}
    ledger = progress.ledger.sort_values("image", key=lambda images: images.map(place), ignore_index=True)
    _attack_the_proved(model, double, split, ledger, plan)
    return ledger, progress.examples


def _attacked(
    model: nn.Module, double: nn.Module, split: Split, whole: list[int], left: set[int], plan: VerificationPlan
) -> dict[int, Verdict]:
    """Verdicts on those images left that PGD breaks. An image's starts depend on its batch, which therefore is one of
    the whole plan, whatever part of it is asked for or done."""
    found: dict[int, Verdict] = {}
    for start in range(0, len(whole), TOGETHER):
        part = whole[start : start + TOGETHER]
        if left.isdisjoint(part):
            continue
        started = time.perf_counter()
        batch = split[torch.tensor(part, device=split.labels.device)]
        examples = attack(model, double, to_pixels(batch.images), batch.labels, plan.eps)
        seconds = (time.perf_counter() - started) / len(part)
        for index, example in zip(part, examples, strict=True):
            if example is not None and index in left:
                found[index] = Verdict("unsafe", -torch.inf, example, 0, seconds, "attack", {"attack": seconds})
    return found


def _settle(
    model: nn.Module,
    exact: Exact | None,
    split: Split,
    plan: VerificationPlan,
    index: int,
    known: Verdict | None,
) -> Settled:
    image, label = to_pixels(split.images[index]), int(split.labels[index])
    prediction = int(predict(model, image[None]))
    row: dict[str, object] = {"image": index, "label": label, "prediction": prediction, "correct": prediction == label}
    row["eps"] = plan.eps
    if prediction != label:
        return row, None

    def ask(eps: float, timeout: float, attack_first: bool = False) -> Verdict:
        return verify(
            model,
            image,
            label,
            eps,
            timeout,
            attack_first,
            plan.engine,
            memory=memory_on(split.labels.device, plan.memory),
            complete=plan.complete,
            branching=plan.branching,
            max_domains=plan.max_domains,
            exact=exact,
        )

    found = known or ask(plan.eps, plan.timeout)
    row |= {"verdict": found.status, "stage": found.stage, "lower_bound": found.lower_bound}
    row |= {"domains": found.domains, "seconds": found.seconds}
    row |= {f"seconds/{stage}": seconds for stage, seconds in found.stage_seconds.items()}
    if found.counterexample is not None:
        row["counterexample_prediction"] = int(predict(model, found.counterexample[None]))
    if plan.radius:
        row["radius"] = _radius(ask, found.status, plan)
    return row, found.counterexample


def _radius(ask: Callable[[float, float, bool], Verdict], status: str, plan: VerificationPlan) -> float:
    """The largest ε up to plan.radius that bisection finds proved, given what became of the image at plan.eps."""
    low, high = (plan.eps, plan.radius) if status in PROVED else (0.0, min(plan.eps, plan.radius))
    if low >= high:
        return low
    for _ in range(RADIUS_STEPS):
        middle = (low + high) / 2
        proved = ask(middle, plan.timeout / RADIUS_STEPS, True).status in PROVED
        low, high = (middle, high) if proved else (low, middle)
    return low


def _side_by_side(settle: Callable[[int], Settled], images: list[int], count: int) -> Iterator[Settled]:
    """The images' rows as they are finished. PyTorch leaves Python's lock while it computes: threads are enough."""
    if count == 1:
        yield from map(settle, images)
        return
    left = iter(images)
    with _threads(max(torch.get_num_threads() // count, 1)), ThreadPoolExecutor(count) as pool:
        # No more at a time than there are threads: after an error nothing is begun, and what runs is still kept.
        running = {pool.submit(settle, image) for image in islice(left, count)}
        failed: list[Future[Settled]] = []
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            failed += [future for future in done if future.exception()]
            if not failed:
                running |= {pool.submit(settle, image) for image in islice(left, len(done))}
            yield from (future.result() for future in done if not future.exception())
        if failed:
            failed[0].result()  # raises its error


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """PyTorch's threads for each of ours that starts meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _attack_the_proved(
    model: nn.Module, double: nn.Module, split: Split, ledger: pd.DataFrame, plan: VerificationPlan
) -> None:
    proved = torch.tensor(ledger.loc[ledger["verdict"].isin(PROVED), "image"].tolist(), dtype=torch.long)
    for part in proved.split(TOGETHER):
        batch = split[part.to(split.labels.device)]
        # From other starts than those of attack_first.
        examples = attack(model, double, to_pixels(batch.images), batch.labels, plan.eps, seed=1)
        for index, example in zip(part.tolist(), examples, strict=True):
            if example is not None:
                raise Contradiction(
                    f"image {index} was proved robust at ε {plan.eps:.6g}, but PGD breaks it there: "
                    "the bounds or the attack are wrong, no verdict of this run can be trusted"
                )
