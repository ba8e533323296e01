from rampart.models.chain import Chain, Layout
from rampart.models.checkpoints import load_model, read_beside, save_model, weights_digest
from rampart.models.classifier import (
    NO_CLASS,
    Classifier,
    Normalize,
    build_model,
    checked_logits,
    classes_of,
    double_copy,
    interval_init,
    logits_of,
    predict,
    require_fixed,
    require_labels,
    require_tensors,
)
from rampart.models.folded import Folded

__all__ = [
    "NO_CLASS",
    "Chain",
    "Classifier",
    "Folded",
    "Layout",
    "Normalize",
    "build_model",
    "checked_logits",
    "classes_of",
    "double_copy",
    "interval_init",
    "load_model",
    "logits_of",
    "predict",
    "read_beside",
    "require_fixed",
    "require_labels",
    "require_tensors",
    "save_model",
    "weights_digest",
]
