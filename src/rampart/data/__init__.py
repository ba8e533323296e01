from rampart.data.augmentation import Augmentation
from rampart.data.batches import batches, to_pixels
from rampart.data.dataset import Dataset, Split, load_dataset, stratified_order
from rampart.data.parts import in_parts

__all__ = [
    "Augmentation",
    "Dataset",
    "Split",
    "batches",
    "in_parts",
    "load_dataset",
    "stratified_order",
    "to_pixels",
]
