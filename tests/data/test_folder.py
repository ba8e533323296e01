"""Folders of images: decoded right, once, and anew when they change; a bad one is named with its place."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
import PIL.Image
import pytest
import torch

from rampart.data import Dataset, load_dataset
from rampart.errors import DataError, SettingsError

CLASSES = ("bird", "cat", "ship")
KINDS = ("png", "jpg", "bmp")
HEIGHT, WIDTH = 10, 12


def picture(part: str, label: int, number: int) -> np.ndarray:
    """One colour for each class, brightness by number, so that an image tells its place; not square."""
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    image[:, :, label] = 100 + 10 * number + (5 if part == "test" else 0)
    return image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """train/ with six images a class, test/ with three; each class in all three formats."""
    top = tmp_path / "pictures"
    for part, count in (("train", 6), ("test", 3)):
        for label, name in enumerate(CLASSES):
            (top / part / name).mkdir(parents=True)
            for number in range(count):
                image = PIL.Image.fromarray(picture(part, label, number))
                image.save(top / part / name / f"{number}.{KINDS[number % 3]}", quality=95)
    return top


def load(folder: Path) -> Dataset:
    return load_dataset(f"folder:{folder}", val_fraction=0.5)


def cached(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache" / "rampart").glob("*"))


def undecodable(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: object, **settings: object) -> None:
        raise AssertionError("an image was opened")

    monkeypatch.setattr(PIL.Image, "open", forbidden)


def same(a: Dataset, b: Dataset) -> bool:
    pairs = [(getattr(a, name), getattr(b, name)) for name in ("train", "val", "test")]
    equal = all(torch.equal(x.images, y.images) and torch.equal(x.labels, y.labels) for x, y in pairs)
    return equal and (a.classes, a.digest) == (b.classes, b.digest)


def test_images_of_every_format_get_their_folders_label(folder: Path) -> None:
    data = load(folder)
    assert (data.name, data.classes, data.in_shape) == ("folder", CLASSES, (3, HEIGHT, WIDTH))
    assert (len(data.train), len(data.val), len(data.test)) == (9, 9, 9)
    for split in (data.train, data.val, data.test):
        # The colour is the class: JPEG moves values a little.
        assert torch.equal(split.images.float().mean((2, 3)).argmax(1), split.labels)
    expected = [picture("test", label, number) for label in range(3) for number in range(3)]
    for found, wanted in zip(data.test.images, expected, strict=True):
        assert np.abs(found.permute(1, 2, 0).numpy().astype(int) - wanted.astype(int)).max() <= 8


def test_lossless_formats_are_decoded_to_the_last_bit(folder: Path) -> None:
    images = {image.numpy().tobytes() for image in load(folder).test.images}
    for label in range(3):
        for number in (0, 2):
            assert picture("test", label, number).transpose(2, 0, 1).tobytes() in images


def test_grey_and_transparent_images_become_rgb(folder: Path) -> None:
    grey = PIL.Image.fromarray(np.full((HEIGHT, WIDTH), 77, np.uint8))
    grey.save(folder / "test" / "cat" / "0.png")
    PIL.Image.new("RGBA", (WIDTH, HEIGHT), (1, 2, 3, 0)).save(folder / "test" / "cat" / "3.png")
    images = load(folder).test.images
    assert bool((images == 77).all(dim=(1, 2, 3)).any())
    assert bool((images == torch.tensor([1, 2, 3], dtype=torch.uint8).view(3, 1, 1)).all(dim=(1, 2, 3)).any())


def test_the_second_load_opens_no_image(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(folder)
    assert [path.suffix for path in cached(tmp_path)] == [".npz"]
    undecodable(monkeypatch)
    assert same(load(folder), first)


def _repaint(folder: Path) -> None:
    """Another picture in a file of the same size."""
    file = folder / "train" / "cat" / "2.bmp"
    size = file.stat().st_size
    PIL.Image.new("RGB", (WIDTH, HEIGHT), (9, 9, 9)).save(file)
    assert file.stat().st_size == size
    os.utime(file, ns=(1, 1))


CHANGES: dict[str, Callable[[Path], object]] = {
    "repainted": _repaint,
    "added": lambda top: shutil.copy(top / "test" / "cat" / "0.png", top / "test" / "cat" / "9.png"),
    "removed": lambda top: (top / "train" / "ship" / "5.bmp").unlink(),
    "renamed": lambda top: (top / "train" / "ship" / "5.bmp").rename(top / "train" / "ship" / "a.bmp"),
    "moved to another class": lambda top: (top / "test" / "cat" / "2.bmp").rename(top / "test" / "ship" / "9.bmp"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_folder_is_decoded_anew(change: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(folder)
    CHANGES[change](folder)
    with monkeypatch.context() as patched:
        undecodable(patched)
        with pytest.raises(AssertionError, match="opened"):
            load(folder)
    second = load(folder)
    # A new name keeps the images, whatever their order.
    assert (second.digest == first.digest) == (change == "renamed")


def test_an_image_that_changes_its_class_and_nothing_else_is_noticed(tmp_path: Path) -> None:
    """Neither its name, nor its size, nor its time, nor its place in the order of all images tells."""
    names = {"bird": "abc", "cat": "de"}
    for part in ("train", "test"):
        for label, (name, letters) in enumerate(names.items()):
            (tmp_path / part / name).mkdir(parents=True)
            for number, letter in enumerate(letters):
                PIL.Image.fromarray(picture(part, label, number)).save(tmp_path / part / name / f"{letter}.bmp")
    assert load(tmp_path).test.labels.tolist() == [0, 0, 0, 1, 1]
    (tmp_path / "test" / "bird" / "c.bmp").rename(tmp_path / "test" / "cat" / "c.bmp")
    assert load(tmp_path).test.labels.tolist() == [0, 0, 1, 1, 1]


def test_two_folders_have_caches_of_their_own(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copy2)
    assert load(folder).digest == load(tmp_path / "copy").digest
    assert len(cached(tmp_path)) == 2


def test_hidden_files_are_left_out(folder: Path) -> None:
    first = load(folder)
    (folder / "train" / ".DS_Store").write_bytes(b"x")
    (folder / "train" / "cat" / ".thumbnails").write_bytes(b"x")
    assert same(load(folder), first)


def test_a_class_without_test_images_is_allowed(folder: Path) -> None:
    shutil.rmtree(folder / "test" / "bird")
    data = load(folder)
    assert data.classes == CLASSES
    assert data.test.labels.unique().tolist() == [1, 2]


def _empty(place: Path) -> Path:
    shutil.rmtree(place)
    place.mkdir()
    return place


def _other_size(top: Path) -> Path:
    file = top / "test" / "ship" / "1.jpg"
    PIL.Image.new("RGB", (WIDTH + 1, HEIGHT)).save(file)
    return file


def _written(place: Path, content: bytes) -> Path:
    place.parent.mkdir(exist_ok=True)
    place.write_bytes(content)
    return place


def _saved(place: Path, dtype: type) -> Path:
    PIL.Image.fromarray(np.ones((HEIGHT, WIDTH), dtype)).save(place)
    return place


def _linked(place: Path) -> Path:
    place.unlink()
    place.symlink_to("nowhere.png")
    return place


def _cut(place: Path) -> Path:
    return _written(place, place.read_bytes()[: place.stat().st_size // 2])


def _gone(place: Path) -> Path:
    shutil.rmtree(place)
    return place


def _new_class(top: Path) -> str:
    shutil.copytree(top / "test" / "cat", top / "test" / "dog")
    return "'dog'"


# What is done to the folder; it returns what the message has to name.
BAD: dict[str, Callable[[Path], object]] = {
    "missing": _gone,
    "a file": lambda top: _written(_gone(top), b"x") / "train",
    "train missing": lambda top: _gone(top / "train"),
    "test missing": lambda top: _gone(top / "test"),
    "train empty": lambda top: _empty(top / "train"),
    "test empty": lambda top: _empty(top / "test"),
    "class empty": lambda top: _empty(top / "train" / "cat"),
    "file beside classes": lambda top: _written(top / "train" / "notes.txt", b"x"),
    "text among images": lambda top: _written(top / "train" / "cat" / "notes.txt", b"x"),
    "folder among images": lambda top: _written(top / "train" / "cat" / "more" / "x.png", b"x").parent,
    "truncated png": lambda top: _cut(top / "test" / "bird" / "0.png"),
    "truncated jpg": lambda top: _cut(top / "train" / "bird" / "1.jpg"),
    "truncated bmp": lambda top: _cut(top / "train" / "bird" / "2.bmp"),
    "text named png": lambda top: _written(top / "train" / "cat" / "0.png", b"no picture\nat all"),
    "empty png": lambda top: _written(top / "train" / "cat" / "0.png", b""),
    "link to nothing": lambda top: _linked(top / "train" / "cat" / "0.png"),
    "sixteen bits": lambda top: _saved(top / "train" / "cat" / "0.png", np.uint16),
    "floats": lambda top: _saved(top / "train" / "cat" / "9.tiff", np.float32),
    "another size": _other_size,
    "class not in train": _new_class,
}


def test_names_that_are_no_utf8(folder: Path) -> None:
    (folder / "train" / "cat" / "0.png").rename(folder / "train" / "cat" / os.fsdecode(b"caf\xe9.png"))
    assert len(load(folder).train) == 9
    (folder / "train" / "cat").rename(folder / "train" / os.fsdecode(b"c\xe9t"))
    with pytest.raises(DataError, match=r"c\\udce9t' is not UTF-8"):
        load(folder)


@pytest.mark.parametrize("case", BAD)
def test_a_bad_folder_is_refused_in_one_line_that_names_the_place(case: str, folder: Path, tmp_path: Path) -> None:
    place = BAD[case](folder)
    with pytest.raises(DataError) as raised:
        load(folder)
    assert str(place) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not cached(tmp_path), "nothing of a bad folder is kept"


def test_a_folder_without_a_path_is_refused() -> None:
    with pytest.raises(SettingsError, match="folder:PATH"):
        load_dataset("folder")


def test_a_cache_that_cannot_be_written_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "occupied").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "occupied"))
    with pytest.raises(DataError, match="XDG_CACHE_HOME") as raised:
        load(folder)
    assert str(tmp_path / "occupied") in str(raised.value)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_of_a_cache_that_was_not_finished(
    error: BaseException, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(file: IO[bytes], **arrays: np.ndarray) -> None:
        file.write(b"half")
        raise error

    monkeypatch.setattr(np, "savez", fails)
    with pytest.raises((DataError, KeyboardInterrupt)):
        load(folder)
    assert not [file for file in tmp_path.rglob("*.npz") if folder not in file.parents]


def test_an_image_too_large_to_be_one_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 4)
    with pytest.raises(DataError, match="is no readable image"):
        load(folder)


def test_a_broken_cache_is_made_anew(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = load(folder)
    (file,) = cached(tmp_path)
    whole = file.read_bytes()
    for content in (whole[:100], whole[:-9], b""):
        file.write_bytes(content)
        assert same(load(folder), first)
        assert "cannot be read" in caplog.text
        caplog.clear()
    assert same(load(folder), first)
    assert not caplog.text
