"""An arm: one cell of the study."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import product
from typing import get_args

from rampart.training.recipe import Contrastive, MethodName


@dataclass(frozen=True, order=True)
class Arm:
    """Method x augmentation x contrastive; `name` is how tables, runs and figures call it."""

    method: MethodName
    augment: bool
    contrastive: Contrastive

    @property
    def name(self) -> str:
        parts = [self.method, "aug" if self.augment else "", f"supcon-{self.contrastive}"]
        return "+".join(part for part in parts if part and part != "supcon-none")

    @property
    def texts(self) -> dict[str, str]:
        """Its settings as a user gives them and runs are tagged with them."""
        return {name: str(value) for name, value in asdict(self).items()}

    @classmethod
    def called(cls, name: str) -> Arm | None:
        """The arm of that name, if there is one."""
        every = grid(get_args(MethodName), (False, True), get_args(Contrastive))
        return next((arm for arm in every if arm.name == name), None)

    @property
    def slug(self) -> str:
        """The name as a part of a metric's or file's name."""
        return self.name.replace("+", "-")


def grid(methods: tuple[MethodName, ...], augment: tuple[bool, ...], contrastive: tuple[Contrastive, ...]) -> list[Arm]:
    """All arms of a study, in the order of its tables."""
    return [Arm(m, a, c) for a, m, c in product(augment, methods, contrastive)]
