"""Attacks beside the reference libraries': python -m benchmarks.attacks [--quick] [--json].

PGD beside foolbox's and APGD beside pyautoattack's, the same budget each, on the images that a model gets right: the
share that each breaks, and seconds. Either library's rows are left out where it is not installed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from benchmarks.common import Row, models_of, options, show
from rampart.data import load_dataset, stratified_order, to_pixels
from rampart.evaluation import AttackPlan
from rampart.evaluation.attacked import Attack as OurAttack
from rampart.models import predict
from rampart.settings import parse_eps

Attack = Callable[[nn.Module, Tensor, Tensor, float], Tensor]  # -> whether each image is broken


def ours(plan: AttackPlan) -> Attack:
    def attack(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
        return OurAttack(model, plan, x)(x, y, (eps,), torch.Generator().manual_seed(0)).success[0]

    return attack


def foolbox_pgd(steps: int, restarts: int) -> Attack:
    def attack(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
        from foolbox.attacks import LinfPGD
        from foolbox.models.pytorch import PyTorchModel

        torch.manual_seed(0)
        wrapped = PyTorchModel(model, bounds=(0, 1), device="cpu")
        one = LinfPGD(rel_stepsize=1 / 4, steps=steps, random_start=True)
        found: Tensor = one.repeat(restarts)(wrapped, x.contiguous(), y, epsilons=eps)[2]
        return found

    return attack


def their_apgd(steps: int) -> Attack:
    def attack(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
        from pyautoattack.autopgd_base import APGDAttack

        attack = APGDAttack(model, n_iter=steps, eps=eps, seed=0, loss="ce", device="cpu")
        return predict(model, attack.perturb(x.contiguous(), y)) != y

    return attack


def rows_of(
    name: str, model: nn.Module, x: Tensor, y: Tensor, eps: float, pairs: dict[str, tuple[Attack, Attack]]
) -> list[Row]:
    def tried(attack: Attack) -> tuple[float, float]:
        started = time.perf_counter()
        return 100 * float(attack(model, x, y, eps).float().mean()), time.perf_counter() - started

    rows = []
    for kind, (ours, theirs) in pairs.items():
        (broken, seconds), (reference, longer) = tried(ours), tried(theirs)
        rows += [
            Row(f"{name}: {kind}", "ASR %", broken, reference, broken / max(reference, 1e-9)),
            Row(f"{name}: {kind}, time", "s", seconds, longer, longer / seconds),
        ]
    return rows


def main() -> None:
    parser = options(__doc__, quick="few images, small budgets")
    parser.add_argument("--dataset", default="digits", help="images, as of the other entry points")
    parser.add_argument("--images", type=int, default=300, help="class by class")
    parser.add_argument("--eps", default="2/255", help="radius in pixels")
    parser.add_argument("--models", nargs="+", default=[], help="files; none: one that is trained on the images")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    steps, restarts, longer = (10, 2, 20) if given.quick else (50, 10, 100)
    eps = parse_eps("eps", given.eps, "pixel")
    plan = AttackPlan(eps=(eps,), steps=steps, rel_step=0.25, restarts=restarts)
    pairs = {}
    if find_spec("foolbox"):
        pairs[f"PGD {restarts} x {steps}"] = ours(plan), foolbox_pgd(steps, restarts)
    if find_spec("pyautoattack"):
        pairs[f"APGD {longer}"] = ours(replace(plan, attack="apgd", steps=longer, restarts=1)), their_apgd(longer)
    data = load_dataset(given.dataset)
    test = data.test
    chosen = test[torch.tensor(stratified_order(test, 0)[: 20 if given.quick else given.images])]
    rows = []
    for name, model in models_of(given.models, data).items():
        x = to_pixels(chosen.images)
        right = predict(model, x) == chosen.labels
        if not right.any():
            raise SystemExit(f"{name} gets none of the images right: nothing to attack")
        rows += rows_of(name, model, x[right], chosen.labels[right], eps, pairs)
    show(f"attacks at ε {given.eps}, {given.threads} threads", rows, given.json)


if __name__ == "__main__":
    main()
