"""Where images come from: scikit-learn's digits, CIFAR-10, a folder of image files."""

from __future__ import annotations

import hashlib
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from filelock import FileLock

from rampart.errors import DataError
from rampart.files import replacing

log = logging.getLogger(__name__)

DIGITS_TEST_FRACTION = 0.25
# Counts what has changed in how images of a folder are decoded: caches from before are not read.
DECODER = 2
HOW_TO_GET_CIFAR10 = (
    "put cifar-10-python.tar.gz into that folder, name another one with data_root=PATH, "
    "use image files with dataset=folder:PATH, or take the embedded images with profile=quick"
)


@dataclass(frozen=True)
class Pools:
    """The images as they come, before train is split: uint8 [N, C, H, W] and int64 [N]."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    classes: tuple[str, ...]


def digits(root: str | None = None) -> Pools:
    """scikit-learn's 8x8 digits, enlarged four times to 3x32x32; every fourth image of a class is a test image."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    grey = np.round(raw.images * (255 / 16)).astype(np.uint8)
    images = np.repeat(grey.repeat(4, axis=1).repeat(4, axis=2)[:, None], 3, axis=1)
    labels = raw.target.astype(np.int64)
    # The test set is the same whatever the split seed, so that two studies with different seeds can be compared.
    test = np.zeros(len(labels), dtype=bool)
    for label in range(10):
        test[np.flatnonzero(labels == label)[:: round(1 / DIGITS_TEST_FRACTION)]] = True
    return Pools(images[~test], labels[~test], images[test], labels[test], tuple(str(d) for d in range(10)))


def cifar10(root: str | None = None) -> Pools:
    """CIFAR-10 through torchvision, from `root` (default `data`); downloaded there if absent."""
    from torchvision.datasets import CIFAR10

    place = str(Path(root or "data").expanduser())

    def found(download: bool) -> list[CIFAR10]:
        return [CIFAR10(place, train=train, download=download) for train in (True, False)]

    try:
        try:
            parts = found(download=False)  # whole, by its MD5 sums; the folder need not be writable
        except RuntimeError:
            Path(place).mkdir(parents=True, exist_ok=True)
            # torchvision checks the archive's MD5 sum before it reads anything, but unpacks it where others may read.
            with FileLock(Path(place) / ".cifar10.lock"):
                parts = found(download=True)
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"CIFAR-10 is not in '{place}' and cannot be downloaded ({reason}): {HOW_TO_GET_CIFAR10}"
        ) from error
    (train, train_labels), (test, test_labels) = (
        (np.ascontiguousarray(part.data.transpose(0, 3, 1, 2)), np.asarray(part.targets, dtype=np.int64))
        for part in parts
    )
    return Pools(train, train_labels, test, test_labels, tuple(parts[0].classes))


def folder(path: str) -> Pools:
    """`path/train/<class>/*` and `path/test/<class>/*`: any image format torchvision reads, all of one size.

    Decoded once into a cache (`$XDG_CACHE_HOME/rampart`), which is made anew when a file's name, size or time changes.
    """
    top = Path(path).expanduser()
    files = {part: _list_images(top / part) for part in ("train", "test")}
    classes = tuple(sorted(files["train"]))
    foreign = sorted(set(files["test"]) - set(classes))
    if foreign:
        raise DataError(f"class '{foreign[0]}' is in {top / 'test'} but not in {top / 'train'}: add it or remove it")
    untested = sorted(set(classes) - set(files["test"]))
    if untested:
        log.warning("%s holds no images of class '%s': rates are over the other classes", top / "test", untested[0])
    cache = _cache_file(top, files)
    if cache.exists():
        try:
            with np.load(cache) as stored:
                return Pools(stored["train"], stored["train_labels"], stored["test"], stored["test_labels"], classes)
        except (OSError, EOFError, KeyError, ValueError, BadZipFile) as error:
            log.warning("the cache %s cannot be read (%s): it is made anew", cache, error)
    size: tuple[int, int] | None = None
    arrays: list[np.ndarray] = []
    for part in ("train", "test"):
        paths = [file for name in classes for file in files[part].get(name, [])]
        labels = [label for label, name in enumerate(classes) for _ in files[part].get(name, [])]
        images, size = _decode(paths, size)
        arrays += [images, np.asarray(labels, dtype=np.int64)]
    pools = Pools(arrays[0], arrays[1], arrays[2], arrays[3], classes)
    _store(cache, pools)
    return pools


def _list_images(part: Path) -> dict[str, list[Path]]:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    def inside(place: Path) -> list[Path]:
        try:
            return sorted(p for p in place.iterdir() if not p.name.startswith("."))
        except OSError as error:
            raise DataError(f"folder '{place}' cannot be read ({error.strerror}): make it readable") from error

    if not part.is_dir():
        raise DataError(f"folder '{part}' is missing: a dataset folder holds train/<class>/* and test/<class>/*")
    found: dict[str, list[Path]] = {}
    for place in inside(part):
        if not place.is_dir():
            raise DataError(f"'{place}' lies beside the class folders: move it into one or remove it")
        if place.name.encode(errors="ignore").decode() != place.name:
            raise DataError(f"the name of class folder {str(place)!a} is not UTF-8: rename it")
        found[place.name] = inside(place)
        for file in found[place.name]:
            if file.suffix.lower() not in IMG_EXTENSIONS:
                raise DataError(f"'{file}' is no image ({', '.join(IMG_EXTENSIONS)}): remove or convert it")
            if not file.is_file():
                raise DataError(f"'{file}' is no file, or a link to none: remove or replace it")
        if not found[place.name]:
            raise DataError(f"class folder '{place}' is empty: put images into it or remove it")
    if not found:
        raise DataError(f"folder '{part}' is empty: it needs a folder of images for each class")
    return found


def _decode(paths: list[Path], size: tuple[int, int] | None) -> tuple[np.ndarray, tuple[int, int]]:
    """uint8 [N, 3, H, W]; every image must have `size` (width, height), or that of the first where it is None."""
    from PIL import Image

    def read(path: Path) -> np.ndarray:
        try:
            with Image.open(path) as image:
                if image.mode.startswith(("I", "F")):  # whose values PIL would cut at 255
                    raise DataError(f"'{path}' has more than 8 bits a channel: save it with 8")
                return np.asarray(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"'{path}' is no readable image ({error}): remove or replace it") from error

    with ThreadPoolExecutor() as pool:
        images = []
        for path, image in zip(paths, pool.map(read, paths), strict=True):
            shape = (image.shape[1], image.shape[0])
            size = size or shape
            if shape != size:
                raise DataError(f"'{path}' is {shape[0]}x{shape[1]}, others {size[0]}x{size[1]}: resize it to match")
            images.append(image)
    assert size is not None
    return np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2)), size


def _cache_file(top: Path, files: dict[str, dict[str, list[Path]]]) -> Path:
    sha = hashlib.sha256(f"{DECODER} {top.resolve()}".encode())
    for part, classes in files.items():
        for name, paths in classes.items():
            for path in paths:
                stat = path.stat()
                # As the system has it: a name need not be text.
                sha.update(os.fsencode(f"{part}/{name}/{path.name} {stat.st_size} {stat.st_mtime_ns}\n"))
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "rampart" / f"folder-{sha.hexdigest()[:24]}.npz"


def _store(cache: Path, pools: Pools) -> None:
    """Written beside its place and moved there, so that two processes can decode the same folder at once."""
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with replacing(cache) as partial, partial.open("wb") as file:
            np.savez(
                file,
                train=pools.train_images,
                train_labels=pools.train_labels,
                test=pools.test_images,
                test_labels=pools.test_labels,
            )
    except OSError as error:
        raise DataError(
            f"cannot write the cache '{cache}' ({error}): set XDG_CACHE_HOME to a folder with room"
        ) from error
