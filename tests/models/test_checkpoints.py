"""Weights on disk: the same outputs after a round trip, no pickle, one line about what is wrong with a file."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from rampart.errors import ModelError
from rampart.models import build_model, load_model, save_model, weights_digest
from tests.nets import randomised


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers_are_refused(value: float, tmp_path: Path) -> None:
    """No attack would break an image: of NaN argmax makes a class."""
    model = build_model(width=0.125)
    with torch.no_grad():
        model.head.weight[0, 0] = value
    save_model(model, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="NaN or infinite"):
        load_model(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    "how", [{}, {"in_shape": (1, 9, 14), "classes": 3, "width": 0.125}], ids=["the study's", "another shape"]
)
def test_a_round_trip_gives_the_same_outputs(how: dict[str, object], tmp_path: Path) -> None:
    model = randomised(build_model(**how))
    save_model(model, tmp_path / "model.safetensors")
    loaded = load_model(tmp_path / "model.safetensors")
    x = torch.rand(4, *model.architecture.in_shape)
    assert torch.equal(loaded(x), model(x))
    assert loaded.architecture == model.architecture
    assert not loaded.training
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_no_pickle_is_written_or_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: object, **settings: object) -> None:
        raise AssertionError("pickle")

    for owner, name in [(pickle, "load"), (pickle, "loads"), (pickle, "dump"), (pickle, "dumps"), (torch, "load")]:
        monkeypatch.setattr(owner, name, forbidden)
    save_model(build_model(width=0.125), tmp_path / "model.safetensors")
    load_model(tmp_path / "model.safetensors")


def test_an_array_file_that_runs_code_when_unpickled_is_refused(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(tmp_path / "trapped"),)

    np.savez(tmp_path / "model.npz", **{"classifier.classifier.weight": np.array([Trap()], dtype=object)})
    with pytest.raises(ModelError):
        load_model(tmp_path / "model.npz")
    assert not (tmp_path / "trapped").exists()


def test_a_save_that_fails_leaves_the_file_before_it_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, model = tmp_path / "model.safetensors", build_model(width=0.125).eval()
    save_model(model, file)

    def full_disk(tensors: object, path: str, metadata: object) -> None:
        Path(path).write_bytes(b"half a fi")
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_model(build_model(width=0.25), file)
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(load_model(file)(x), model(x))


def test_a_published_model_computes_what_its_arrays_say(study_models: dict[str, Path]) -> None:
    """Layer by layer, with plain functions on the arrays as the study names them."""
    x = torch.rand(5, 3, 32, 32)
    assert len(study_models) == 6
    for path in study_models.values():
        with np.load(path) as arrays:
            w = {name: torch.from_numpy(arrays[name]) for name in arrays.files}

        def norm(z: torch.Tensor, at: str, w: dict[str, torch.Tensor] = w) -> torch.Tensor:
            names = ("running_mean", "running_var", "weight", "bias")
            return F.batch_norm(z, *(w[f"{at}.{name}"] for name in names))

        z = 2 * x - 1
        for layer in (0, 3, 6):
            name = f"encoder.encoder.{layer}"
            z = F.conv2d(z, w[f"{name}.weight"], w[f"{name}.bias"], stride=2, padding=1)
            z = F.relu(norm(z, f"encoder.encoder.{layer + 1}"))
        z = F.relu(F.linear(z.flatten(1), w["encoder.proj.0.weight"], w["encoder.proj.0.bias"]))
        z = norm(F.linear(z, w["encoder.proj.2.weight"], w["encoder.proj.2.bias"]), "encoder.proj.3")
        model = load_model(path)
        assert not model.training
        assert torch.allclose(model.embed(x), z, rtol=1e-4, atol=1e-5)
        logits = F.linear(z, w["classifier.classifier.weight"], w["classifier.classifier.bias"])
        assert torch.allclose(model(x), logits, rtol=1e-4, atol=1e-4)


def study_like(**change: np.ndarray | None) -> dict[str, np.ndarray]:
    """The arrays of a file of the study, with some replaced or (None) left out."""
    state = build_model().state_dict()
    renamed = {
        name.replace("encoder.features", "encoder.encoder")
        .replace("encoder.projection", "encoder.proj")
        .replace("head.", "classifier.classifier."): value.numpy()
        for name, value in state.items()
        if not name.startswith("normalize") and not name.endswith("num_batches_tracked")
    }
    return {name: value for name, value in {**renamed, **change}.items() if value is not None}


def test_study_like_arrays_load(tmp_path: Path) -> None:
    """Otherwise the broken ones below show nothing."""
    np.savez(tmp_path / "model.npz", **study_like())
    load_model(tmp_path / "model.npz")


def _safetensors(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> bytes:
    return safetensors.torch.save(tensors, metadata)


def _npz(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def _saved() -> bytes:
    save_model(build_model(width=0.125), "whole.safetensors")
    return Path("whole.safetensors").read_bytes()


WIDE = '{"name": "paper-cnn", "in_shape": [3, 32, 32], "classes": 10, "width": 0.25}'
BROKEN: dict[str, tuple[str, Callable[[], bytes]]] = {
    "truncated": ("model.safetensors", lambda: _saved()[:-100]),
    "truncated early": ("model.safetensors", lambda: _saved()[:20]),
    "empty": ("model.safetensors", lambda: b""),
    "of another library": ("model.safetensors", lambda: _safetensors({"weight": torch.zeros(3)})),
    "of another width": (
        "model.safetensors",
        lambda: _safetensors(build_model(width=0.125).state_dict(), {"architecture": WIDE}),
    ),
    "of no known architecture": (
        "model.safetensors",
        lambda: _safetensors({"weight": torch.zeros(3)}, {"architecture": WIDE.replace("paper-cnn", "resnet")}),
    ),
    "with garbled metadata": (
        "model.safetensors",
        lambda: _safetensors({"weight": torch.zeros(3)}, {"architecture": "{"}),
    ),
    "with incomplete metadata": (
        "model.safetensors",
        lambda: _safetensors({"weight": torch.zeros(3)}, {"architecture": '{"name": "paper-cnn"}'}),
    ),
    "a pickle in disguise": ("model.safetensors", lambda: pickle.dumps({"weight": [1.0]})),
    "no zip": ("model.npz", lambda: b"these are no arrays"),
    "empty arrays": ("model.npz", lambda: b""),
    "foreign arrays": ("model.npz", lambda: _npz(weights=np.zeros(3))),
    "an array missing": ("model.npz", lambda: _npz(**study_like(**{"encoder.proj.0.weight": None}))),
    "an array too many": ("model.npz", lambda: _npz(**study_like(extra=np.zeros(3)))),
    "an array of another shape": (
        "model.npz",
        lambda: _npz(**study_like(**{"encoder.encoder.0.weight": np.zeros((32, 1, 3, 3), np.float32)})),
    ),
    "another kind of file": ("model.pt", lambda: pickle.dumps({"weight": [1.0]})),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_is_no_model_is_named_in_one_line(case: str, tmp_path: Path) -> None:
    name, content = BROKEN[case]
    file = tmp_path / name
    file.write_bytes(content())
    with pytest.raises(ModelError) as raised:
        load_model(file)
    assert str(file) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert "allow_pickle" not in str(raised.value)  # NumPy's advice


def test_a_model_in_bfloat16_can_be_kept(tmp_path: Path) -> None:
    model = build_model(width=0.125).bfloat16()
    save_model(model, tmp_path / "m.safetensors")
    kept = load_model(tmp_path / "m.safetensors")
    for value, ours in zip(kept.parameters(), model.parameters(), strict=True):
        assert torch.equal(value, ours.float())
    assert weights_digest(model) != weights_digest(kept)


def test_a_path_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    save_model(build_model(width=0.125), tmp_path / "m.safetensors")
    assert load_model("~/m.safetensors")


@pytest.mark.parametrize("name", ["nowhere.safetensors", "nowhere.npz", "."])
def test_a_missing_file_is_named_in_one_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as raised:
        load_model(tmp_path / name)
    assert str(tmp_path / name) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_weights_that_float32_rounds_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A verdict is of the network that was loaded: who saved another one is told."""
    model = build_model(width=0.125).double()
    save_model(model, tmp_path / "exact.safetensors")  # float32's values, kept in float64
    assert load_model(tmp_path / "exact.safetensors").head.weight.dtype == torch.float32
    assert not caplog.records
    with torch.no_grad():
        model.head.weight += 1e-12
    save_model(model, tmp_path / "finer.safetensors")
    assert torch.equal(load_model(tmp_path / "finer.safetensors").head.weight, model.head.weight.float())
    assert "rounded" in caplog.text
