from rampart.training.loop import Recorder
from rampart.training.recipe import Recipe
from rampart.training.state import State
from rampart.training.train import train

__all__ = ["Recipe", "Recorder", "State", "train"]
