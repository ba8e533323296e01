from rampart.data.augmentation import Augmentation
from rampart.data.batches import batches, to_pixels
from rampart.data.dataset import Dataset, Split, load_dataset

__all__ = ["Augmentation", "Dataset", "Split", "batches", "load_dataset", "to_pixels"]
