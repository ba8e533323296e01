from rampart.data.augmentation import Augmentation
from rampart.data.batches import batches, to_pixels
from rampart.data.dataset import Dataset, Split, load_dataset, stratified_order

__all__ = ["Augmentation", "Dataset", "Split", "batches", "load_dataset", "stratified_order", "to_pixels"]
