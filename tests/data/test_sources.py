"""Image folders and CIFAR-10: what is read, cached, and refused."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rampart.data import load_dataset
from rampart.data import sources as module
from rampart.errors import DataError


def write(path: Path, value: int, size: tuple[int, int] = (6, 4)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), value, np.uint8)).save(path)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes in three formats; an image's colour is 100 * class + its number."""
    top = tmp_path / "images"
    for part, count in (("train", 4), ("test", 2)):
        for label, name in enumerate(("ant", "bee")):
            for i in range(count):
                write(top / part / name / f"{i}.{('png', 'bmp', 'tiff')[i % 3]}", 100 * label + i)
    return top


def test_a_folder_gives_its_images_with_the_labels_of_their_folders(images: Path) -> None:
    data = load_dataset(f"folder:{images}")
    assert data.classes == ("ant", "bee")
    assert data.test.images.shape == (4, 3, 4, 6)
    for split in (data.train, data.val, data.test):
        colours = split.images[:, 0, 0, 0].long()
        assert torch.equal(colours // 100, split.labels)


def test_a_folder_is_decoded_once_and_again_when_a_file_changes(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_dataset(f"folder:{images}")

    def refuse(*args: object) -> None:
        raise AssertionError("decoded again")

    with monkeypatch.context() as patched:
        patched.setattr(module, "_decode", refuse)
        again = load_dataset(f"folder:{images}")
        assert torch.equal(again.train.images, first.train.images)
        assert again.digest == first.digest
        write(images / "test" / "bee" / "0.png", 150)
        os.utime(images / "test" / "bee" / "0.png", ns=(1, 1))
        with pytest.raises(AssertionError, match="decoded again"):
            load_dataset(f"folder:{images}")
    changed = load_dataset(f"folder:{images}")
    assert changed.digest != first.digest
    assert 150 in changed.test.images


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda top: (top / "test").rename(top / "tset"), "test"),
        (lambda top: [file.unlink() for file in (top / "train" / "bee").iterdir()], "bee"),
        (lambda top: (top / "train" / "ant" / "notes.txt").write_text("x"), "notes.txt"),
        (lambda top: (top / "train" / "ant" / "0.png").write_bytes(b"no image"), "0.png"),
        (lambda top: write(top / "test" / "ant" / "9.png", 9, (5, 5)), "9.png"),
        (lambda top: write(top / "test" / "cow" / "0.png", 9), "cow"),
        (lambda top: (top / "train" / "stray.png").write_bytes(b""), "stray.png"),
        (lambda top: [file.unlink() for file in list((top / "train" / "ant").iterdir())[1:]], "ant"),
    ],
)
def test_a_bad_folder_is_refused_in_one_line_that_names_the_place(images: Path, damage, named: str) -> None:  # type: ignore[no-untyped-def]
    damage(images)
    with pytest.raises(DataError) as error:
        load_dataset(f"folder:{images}")
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_one_class_is_nothing_to_tell_apart(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for i in range(3):
            write(tmp_path / part / "ant" / f"{i}.png", i)
    with pytest.raises(DataError, match="one class only"):
        load_dataset(f"folder:{tmp_path}")


def test_cifar10_without_network_names_the_alternatives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from urllib.error import URLError

    def offline(*args: object, **kwargs: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", offline)
    with pytest.raises(DataError) as error:
        load_dataset("cifar10", root=str(tmp_path))
    for alternative in ("cifar-10-python.tar.gz", "data_root=", "folder:PATH", "profile=quick"):
        assert alternative in str(error.value)
