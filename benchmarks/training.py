"""Training and evaluation beside the conventional pipeline: python -m benchmarks.training [--quick] [--json].

Conventional: torchvision's PIL transforms in a DataLoader with workers, fp32, Adam, PGD whose images stay to the end,
one run of it an ε. Ours: the loop and the attack that `train` and `evaluate` run, in fp32 unless a row says otherwise;
rows in bf16 are left out where the hardware does not compute in it. Each contender runs in a process of its own, ours
keeping freed memory as all of Rampart's steps do. Whole epochs are timed, in turn; on a GPU ours are ten, the recording
of a step among them, and the floating-point operations of plain trainings stand beside those of a large product of
matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

from benchmarks.common import BATCH, Row, Silent, apart, in_turn, models_of, options, show
from rampart.data import Augmentation, Dataset, Split, load_dataset, to_pixels
from rampart.evaluation import AttackPlan, evaluate
from rampart.kernels import compiling
from rampart.memory import keep_freed_memory
from rampart.models import Classifier, build_model
from rampart.training import Recipe
from rampart.training.loop import fit
from rampart.training.state import Streams
from rampart.training.train import stages

EPS, STEP, STEPS = 8 / 510, 2 / 510, 10
SIZE = 8192
# The study's list, on its own scale.
RADII = tuple(k / 510 for k in (1, 2, 4, 8, 16))


def noisy(x: Tensor) -> Tensor:
    return (x + 0.025 * torch.randn_like(x)).clamp(0, 1)


PLAIN = [transforms.ToTensor()]
AUGMENTED = [
    transforms.RandomCrop(32, padding=4),
    transforms.RandomHorizontalFlip(),
    transforms.RandomRotation(15),
    transforms.ColorJitter(0.4, 0.4, 0.4, 0.1),
    transforms.ToTensor(),
    transforms.RandomApply([transforms.Lambda(noisy)], 0.5),
]


class PilImages(TorchDataset[tuple[Tensor, int]]):
    """As torchvision's CIFAR10: arrays in memory, an image made of one when it is asked for."""

    def __init__(self, split: Split, steps: Iterable[object]) -> None:
        self.arrays, self.labels = split.images.permute(0, 2, 3, 1).numpy(), split.labels.tolist()
        self.transform = transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(np.ascontiguousarray(self.arrays[index]))), self.labels[index]


def conventional_pgd(model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int, step: float) -> Tensor:
    """The last iterate."""
    moved = (x + eps * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
    for _ in range(steps):
        moved.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(moved), y), moved)
        moved = moved.detach() + step * gradient.sign()
        moved = torch.min(torch.max(moved, x - eps), x + eps).clamp(0, 1)
    return moved.detach()


def loader(split: Split, steps: Iterable[object], workers: int, shuffle: bool) -> DataLoader[tuple[Tensor, int]]:
    # Workers that stay: starting them is not what is compared.
    return DataLoader(PilImages(split, steps), BATCH, shuffle, num_workers=workers, persistent_workers=workers > 0)


class ConventionalTraining:
    def __init__(self, data: Dataset, device: str, workers: int, augment: bool, adversarial: bool) -> None:
        torch.manual_seed(0)
        self.batches = loader(data.train, AUGMENTED if augment else PLAIN, workers, shuffle=True)
        self.model, self.device, self.adversarial = build_model().to(device), device, adversarial
        self.optimizer = torch.optim.Adam(self.model.parameters(), 1e-3)

    def __call__(self) -> None:
        for x, y in self.batches:
            x, y = x.to(self.device), y.to(self.device)
            if self.adversarial:
                self.model.eval()
                x, y = torch.cat([x, conventional_pgd(self.model, x, y, EPS, STEPS, STEP)]), torch.cat([y, y])
            self.model.train()
            loss = F.cross_entropy(self.model(x), y)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            loss.item()  # what every such loop adds up


class OurTraining:
    """Epochs of the loop; the few images that it validates on are the only ones beside those it trains on."""

    def __init__(self, data: Dataset, device: str, recipe: Recipe) -> None:
        keep_freed_memory()
        torch.manual_seed(0)
        self.model, self.data, self.recipe = build_model().to(device), data.to(device), recipe
        (self.stage,) = stages(recipe, self.model)
        self.streams = Streams(torch.Generator().manual_seed(0), torch.Generator(device).manual_seed(0))
        self.augmentation = Augmentation() if recipe.augment else None

    def __call__(self) -> None:
        with compiling(self.recipe.compile):
            fit(self.stage, self.model, self.data, self.recipe, self.augmentation, self.streams, Silent(), 1)


class OurEvaluation:
    def __init__(self, model: Classifier, test: Split, device: str) -> None:
        keep_freed_memory()
        self.model, self.test = model.to(device).eval(), test.to(device)
        self.plan = AttackPlan(eps=RADII, steps=STEPS, rel_step=0.5)

    def __call__(self) -> None:
        evaluate(self.model, self.test, self.plan)


class ConventionalEvaluation:
    def __init__(self, model: Classifier, test: Split, device: str, workers: int) -> None:
        self.model, self.device = model.to(device).eval(), device
        self.batches = loader(test, PLAIN, workers, shuffle=False)

    def __call__(self) -> None:
        for eps in RADII:
            broken = 0
            for x, y in self.batches:
                x, y = x.to(self.device), y.to(self.device)
                with torch.no_grad():
                    right = self.model(x).argmax(1) == y
                moved = conventional_pgd(self.model, x, y, eps, STEPS, eps / 2)
                with torch.no_grad():
                    broken += int(((self.model(moved).argmax(1) != y) & right).sum())


def computes_bf16(device: str) -> bool:
    if device == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    flags = Path("/proc/cpuinfo")
    return flags.exists() and bool({"avx512_bf16", "amx_bf16"} & set(flags.read_text().split()))


def training_rows(data: Dataset, device: str, workers: int, images: dict[str, int], repeats: int) -> list[Row]:
    epochs = 10 if device == "cuda" else 1
    arms = {
        "normal": Recipe(batch_size=BATCH, epochs=epochs),
        "augmented": Recipe(batch_size=BATCH, epochs=epochs, augment=True),
        "adversarial": Recipe(batch_size=BATCH, epochs=epochs, method="adversarial", eps=EPS, attack_steps=STEPS),
    }
    kinds: dict[str, dict[str, Any]] = {"": {}}
    if device == "cpu":  # a GPU's steps are recorded instead
        kinds[", compiled"] = {"compile": True}
    if computes_bf16(device):
        kinds[", bf16"] = {"precision": "bf16"}
    rows = []
    for name, recipe in arms.items():
        part = replace(data, train=data.train[: images[name]], val=data.val[:1])
        ours = {kind: replace(recipe, **change) for kind, change in kinds.items()}
        prepared: dict[str, Callable[[], Callable[[], object]]] = {
            **{kind: partial(OurTraining, part, device, changed) for kind, changed in ours.items()},
            "conventional": partial(
                ConventionalTraining, part, device, workers, recipe.augment, recipe.method == "adversarial"
            ),
        }
        with apart(prepared) as calls:
            seconds = in_turn(calls, repeats)
        conventional = len(part.train) / seconds["conventional"]
        for kind, changed in ours.items():
            speed = len(part.train) * epochs / seconds[kind]
            rows.append(Row(f"{name} training{kind}", "images/s", speed, conventional, speed / conventional))
            if device == "cuda" and recipe.method == "normal":
                rows.append(roofline(f"{name} training{kind}", OurTraining(part, device, changed), speed))
    return rows


def roofline(name: str, training: OurTraining, speed: float) -> Row:
    """A training's floating-point operations a second, at `speed` images a second, beside those of a product of two
    large matrices in the same precision."""
    stage, batch = training.stage, training.data.train[:BATCH]
    with FlopCounterMode(display=False) as counter:
        x, y = to_pixels(batch.images), batch.labels
        stage.method.batch_loss(x, y, stage.criterion, training.recipe.eps, training.streams.device).backward()
    dtype = torch.bfloat16 if training.recipe.precision == "bf16" else torch.float32
    matrix = torch.randn(SIZE, SIZE, device=y.device, dtype=dtype)

    def product() -> None:
        torch.mm(matrix, matrix)
        torch.cuda.synchronize()

    ours = counter.get_total_flops() / BATCH * speed / 1e12
    best = 2 * SIZE**3 / in_turn({"": product}, 5)[""] / 1e12
    return Row(f"{name}, share of a matrix product's speed", "TFLOP/s", ours, best, ours / best)


def evaluation_rows(models: dict[str, Classifier], test: Split, device: str, workers: int, repeats: int) -> list[Row]:
    rows = []
    for name, model in models.items():
        prepared: dict[str, Callable[[], Callable[[], object]]] = {
            "ours": partial(OurEvaluation, model, test, device),
            "conventional": partial(ConventionalEvaluation, model, test, device, workers),
        }
        with apart(prepared) as calls:
            speed = {call: len(test) / seconds for call, seconds in in_turn(calls, repeats).items()}
        ratio = speed["ours"] / speed["conventional"]
        rows.append(Row(f"{name}, {len(RADII)} ε", "images/s", speed["ours"], speed["conventional"], ratio))
    return rows


def main() -> None:
    parser = options(__doc__, quick="few images, one repeat")
    parser.add_argument("--workers", type=int, default=4, help="of the conventional pipeline's DataLoader")
    parser.add_argument("--dataset", default="digits", help="images, as of the other entry points")
    parser.add_argument("--models", nargs="*", default=[], help="files of those evaluated (default: a fresh one)")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each row")
    parser.add_argument("--rows", nargs="+", choices=("training", "evaluation"), default=["training", "evaluation"])
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = load_dataset(given.dataset)
    rows = []
    if "training" in given.rows:
        few = {"normal": 2_560, "augmented": 1_280, "adversarial": 512}
        many = {"normal": 10_240, "augmented": 10_240, "adversarial": 2_560}
        if device == "cuda":
            many = {name: 4 * count for name, count in many.items()}
        rows += training_rows(
            data, device, given.workers, few if given.quick else many, 1 if given.quick else given.repeats
        )
    if "evaluation" in given.rows:
        rows += evaluation_rows(
            models_of(given.models, load_dataset("digits"), Recipe(epochs=1, lr=0.005)),
            data.test[: 200 if given.quick else 2_000],
            device,
            given.workers,
            1 if given.quick else given.repeats,
        )
    show(f"training and evaluation, {given.threads} threads, {device}", rows, given.json)


if __name__ == "__main__":
    main()
