"""The training objectives, by the names that a recipe calls them."""

from rampart.training.methods.attacked import Adversarial, Normal, Trades
from rampart.training.methods.base import Method
from rampart.training.methods.bounded import Certified, Ibp, MtlIbp, Sabr
from rampart.training.recipe import MethodName

METHODS: dict[MethodName, type[Method]] = {
    "normal": Normal,
    "adversarial": Adversarial,
    "trades": Trades,
    "certified": Certified,
    "ibp": Ibp,
    "sabr": Sabr,
    "mtl-ibp": MtlIbp,
}

__all__ = ["METHODS", "Method", "Normal"]
