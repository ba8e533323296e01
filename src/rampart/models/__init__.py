from rampart.models.chain import Chain, Layout
from rampart.models.checkpoints import load_model, save_model
from rampart.models.classifier import Classifier, Normalize, build_model

__all__ = ["Chain", "Classifier", "Layout", "Normalize", "build_model", "load_model", "save_model"]
