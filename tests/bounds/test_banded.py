"""Products by bands are the dense products."""

from __future__ import annotations

import pytest
import torch

from rampart.bounds import banded
from rampart.bounds.banded import Banded
from tests.problems import problem


def matrices() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    band = torch.rand(300, 400)
    place = torch.arange(400) - torch.arange(300)[:, None]
    return {
        "dense": torch.rand(300, 400),
        "band": band * (place.abs() < 20),
        "two bands": band * ((place.abs() < 20) | ((place - 150).abs() < 10)),
        "zero": torch.zeros(130, 7),
        "no rows": torch.rand(0, 5),
        "no columns": torch.rand(5, 0),
    }


@pytest.mark.parametrize("name", list(matrices()))
def test_products_are_the_dense_ones(name: str) -> None:
    matrix = matrices()[name].double()
    product, rows = Banded(matrix), torch.rand(9, len(matrix)).double()
    columns = torch.rand(9, matrix.shape[1]).double()
    out, transposed = torch.rand(9, matrix.shape[1]).double(), torch.rand(9, len(matrix)).double()
    expected = out + rows @ matrix, transposed + columns @ matrix.T
    # Halves of wider tensors, as they are when layers are worked on in turn.
    wide = torch.cat([out, out], 1)
    product.add(wide[:, : matrix.shape[1]], rows)
    product.add_transposed(transposed, columns)
    assert torch.allclose(wide[:, : matrix.shape[1]], expected[0])
    assert torch.equal(wide[:, matrix.shape[1] :], out)
    assert torch.allclose(transposed, expected[1])


def test_zeros_beside_a_band_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(banded, "BLOCK", 32)
    monkeypatch.setattr(banded, "GAP", 8)
    sizes = {name: sum(block.numel() for *_, block in Banded(matrix).blocks) for name, matrix in matrices().items()}
    assert sizes["dense"] == 300 * 400
    assert sizes["band"] < 0.25 * 300 * 400
    assert sizes["band"] < sizes["two bands"] < 0.45 * 300 * 400
    assert sizes["zero"] == sizes["no rows"] == sizes["no columns"] == 0


def test_neurons_of_a_map_are_sorted_by_its_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a block of them reads the pixels of a few lines."""
    monkeypatch.setattr(banded, "BLOCK", 8)
    monkeypatch.setattr(banded, "GAP", 1)
    net, _, _, _ = problem("strided", 0.1)
    first = net.neurons.of_input[slice(*net.layers[0])]
    assert len(first) > 16
    assert sum(block.numel() for *_, block in Banded(first).blocks) < 0.7 * first.numel()
