"""What every step begins with: its device and its data."""

from __future__ import annotations

import logging
from functools import lru_cache

import torch

from rampart.data import Dataset, load_dataset
from rampart.errors import SettingsError
from rampart.memory import keep_freed_memory
from rampart.settings import Common
from rampart.tracking import Run

log = logging.getLogger(__name__)


def prepare(settings: Common) -> torch.device:
    """Threads, memory and device of this process; raises SettingsError where the device is not there."""
    keep_freed_memory()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    name = settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:  # cuda:00
        raise SettingsError(f"there is no device '{name}': give cpu, cuda or cuda:N") from None
    if device.type == "cuda" and int(name.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise SettingsError(f"device '{name}' is not there ({torch.cuda.device_count()} GPUs): use device=auto or cpu")
    return device


def data_of(settings: Common) -> Dataset:
    return _load(settings.dataset, settings.data_root, settings.val_fraction, settings.split_seed)


# A study's worker runs several arms on the same data.
_load = lru_cache(maxsize=1)(load_dataset)


def open_data(run: Run, settings: Common) -> Dataset:
    """The dataset, logged as an input of the run."""
    data = data_of(settings)
    run.dataset(data, settings.dataset, settings.val_fraction, settings.split_seed)
    log.info(
        "profile %s, dataset %s (%d train, %d validation, %d test images)%s",
        settings.profile,
        settings.dataset,
        len(data.train),
        len(data.val),
        len(data.test),
        "; for CIFAR-10: profile=paper" if settings.dataset == "digits" else "",
    )
    return data
