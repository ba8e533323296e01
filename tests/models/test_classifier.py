"""The study's network: its layers, its shapes, its inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rampart.errors import ModelError, SettingsError
from rampart.models import Normalize, build_model


def test_the_papers_network_has_the_papers_layers() -> None:
    model = build_model()
    shapes = [tuple(p.shape) for p in model.parameters() if p.dim() > 1]
    assert shapes == [(32, 3, 3, 3), (64, 32, 3, 3), (128, 64, 3, 3), (256, 2048), (128, 256), (10, 128)]
    convolutions = (3 * 32 + 32 * 64 + 64 * 128) * 9 + 3 * (32 + 64 + 128)
    dense = 2048 * 256 + 256 + 256 * 128 + 128 + 2 * 128
    assert sum(p.numel() for p in model.parameters()) == convolutions + dense + 128 * 10 + 10


def test_the_layers_have_the_shapes_of_the_published_ones(study_models: dict[str, Path]) -> None:
    parameters = [tuple(p.shape) for p in build_model().parameters()]
    for path in study_models.values():
        with np.load(path) as arrays:
            learned = [name for name in arrays.files if name.endswith(("weight", "bias"))]
            assert sorted(arrays[name].shape for name in learned) == sorted(parameters), path.name


@settings(max_examples=15, deadline=None)
@given(
    in_shape=st.tuples(st.integers(1, 4), st.integers(1, 20), st.integers(1, 20)),
    classes=st.integers(2, 12),
    width=st.sampled_from([0.01, 0.125, 0.5]),
)
def test_any_image_size_and_any_number_of_classes(in_shape: tuple[int, int, int], classes: int, width: float) -> None:
    model = build_model("paper-cnn", in_shape, classes, width).eval()
    x = torch.rand(3, *in_shape)
    assert model(x).shape == (3, classes)
    assert model.embed(x).shape == (3, max(round(128 * width), 1))
    assert torch.equal(model(x), model.head(model.embed(x)))


def test_pixels_are_moved_to_the_range_that_the_study_trained_on() -> None:
    model = build_model()
    assert torch.equal(
        model.normalize(torch.tensor([0.0, 0.5, 1.0]).expand(1, 3, 1, 3))[0, 0, 0], torch.tensor([-1, 0, 1.0])
    )


def test_normalisation_has_its_own_constants_for_each_channel() -> None:
    x = Normalize([0.1, 0.2], [0.5, 0.25])(torch.full((1, 2, 1, 1), 0.6))
    assert torch.allclose(x.flatten(), torch.tensor([1.0, 1.6]))


@pytest.mark.parametrize(("channels", "given"), [(3, 1), (1, 3)])
def test_images_of_another_number_of_channels_are_refused(channels: int, given: int) -> None:
    """Broadcasting would make a colour image of a grey one in silence."""
    with pytest.raises(ModelError, match=f"{channels} channels, not {given}"):
        build_model(in_shape=(channels, 32, 32), width=0.125).eval()(torch.rand(2, given, 32, 32))


def test_the_same_seed_gives_the_same_initial_weights() -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in build_model(width=0.125).parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_an_unknown_architecture_names_the_nearest() -> None:
    with pytest.raises(SettingsError, match="did you mean 'paper-cnn'"):
        build_model("papercnn")


@pytest.mark.parametrize(
    "change", [{"classes": 1}, {"width": 0.0}, {"width": -1.0}, {"width": float("nan")}, {"in_shape": (3, 0, 32)}]
)
def test_sizes_that_make_no_network_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ModelError):
        build_model(**change)
