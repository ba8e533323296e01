"""α,β-CROWN as an engine: its statuses are mapped honestly. Its own code is used where it is installed."""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rampart.errors import RampartError
from rampart.verification import verify
from rampart.verification.abcrown import _folded
from tests.exact import exact_margins, tiny_net
from tests.nets import NETS, small_net

EPS = 0.05


def pretend(monkeypatch: pytest.MonkeyPatch, status: str, searches: list[list[float]], **stats: Any) -> dict[str, Any]:
    """A package `abcrown` that answers so; what it is asked is entered into the result."""
    asked: dict[str, Any] = {}

    class Specification:
        @staticmethod
        def build_from_input_bounds(lower: Tensor, upper: Tensor, clauses: Any) -> Any:
            asked.update(lower=lower, upper=upper, clauses=clauses)

    class Config:
        def __init__(self, values: dict[str, Any]) -> None:
            self.values = values

        @staticmethod
        def from_defaults() -> Config:
            return Config({})

        def update(self, values: dict[str, Any]) -> Config:
            return Config({**self.values, **values})

        def to_dict(self) -> dict[str, Any]:
            return self.values

    class Solver:
        def __init__(self, question: Any, net: nn.Module, config: dict[str, Any]) -> None:
            asked.update(config=config, net=net)

        def solve(self) -> Any:
            print("much")
            torch.manual_seed(1)
            return types.SimpleNamespace(status=status, stats={"bab": searches, **stats})

    package = types.ModuleType("abcrown")
    package.__dict__.update(VerificationSpec=Specification, ConfigBuilder=Config, ABCrownSolver=Solver)
    monkeypatch.setitem(sys.modules, "abcrown", package)
    return asked


@pytest.fixture
def question() -> tuple[nn.Module, Tensor, int]:
    model, x, _ = small_net("dense", count=1)
    return model, x[0], int(model(x).argmax())


@pytest.mark.parametrize(
    ("status", "searches", "expected"),
    [
        ("safe-incomplete", [], "safe-incomplete"),
        ("verified", [], "safe-incomplete"),
        ("safe", [[0, 0.1, 40, 2.0]], "safe"),
        ("verified", [[0, 0.1, 40, 2.0]], "safe"),
        ("unknown", [[0, -0.1, 40, 2.0]], "unknown"),
        ("timed out of the blue", [], "unknown"),
        ("unsafe-bab", [[0, -0.1, 40, 2.0]], "unknown"),  # without a counterexample
    ],
)
def test_statuses_are_mapped(
    status: str,
    searches: list[list[float]],
    expected: str,
    question: tuple[nn.Module, Tensor, int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pretend(monkeypatch, status, searches)
    found = verify(*question, EPS, timeout=100, engine="abcrown")
    assert (found.status, found.stage) == (expected, "abcrown")
    assert found.domains == sum(search[2] for search in searches)
    assert capsys.readouterr().out == ""


def test_an_unknown_after_the_time_limit_is_a_timeout(
    question: tuple[nn.Module, Tensor, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, "unknown", [[0, -0.5, 8, 1.0]])
    found = verify(*question, EPS, timeout=1e-9, engine="abcrown")
    assert (found.status, found.lower_bound) == ("timeout", -0.5)


def test_unsafe_counts_with_a_counterexample_that_the_model_confirms(monkeypatch: pytest.MonkeyPatch) -> None:
    model, image = tiny_net((6,)), torch.rand(1, 1, 2)
    label = int(model(image[None]).argmax())
    wrong = next(x for x in torch.rand(5000, *image.shape) if int(model(x[None]).argmax()) != label)
    for eps, expected in ((1.0, "unsafe"), (1e-4, "unknown")):
        pretend(monkeypatch, "unsafe-pgd", [], attack_examples=wrong[None, None])
        found = verify(model, image, label, eps, engine="abcrown")
        assert found.status == expected
        assert (found.counterexample is not None) == (expected == "unsafe")


def test_a_counterexample_at_a_rounded_end_of_the_ball_is_brought_into_it(monkeypatch: pytest.MonkeyPatch) -> None:
    image = torch.full((1, 1, 1), 0.5)
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[-1.0], [0.0]]))
        model[1].bias.copy_(torch.tensor([0.5 + EPS / 2, 0.0]))
    end = image + EPS
    assert float(end) - 0.5 > EPS
    pretend(monkeypatch, "unsafe-pgd", [], attack_examples=end[None, None])
    found = verify(model, image, 0, EPS, engine="abcrown")
    assert found.status == "unsafe"
    assert float(found.counterexample) - 0.5 <= EPS


def test_it_is_asked_what_we_ask_and_leaves_our_random_state(
    question: tuple[nn.Module, Tensor, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, image, label = question
    asked = pretend(monkeypatch, "safe", [])
    before = torch.get_rng_state()
    verify(model, image, label, EPS, timeout=12, engine="abcrown")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(asked["lower"][0], (image - EPS).clamp(0, 1))
    assert torch.equal(asked["upper"][0], (image + EPS).clamp(0, 1))
    assert asked["config"]["bab"]["timeout"] == 12
    assert asked["config"]["attack"]["pgd_order"] == "skip"
    logits = torch.randn(len(asked["clauses"]) + 1)
    refuted = any(bool(((rows @ logits) <= limit).all()) for rows, limit in asked["clauses"])
    assert refuted == (int(logits.argmax()) != label)


def test_without_it_one_line_says_how_to_install_it(
    question: tuple[nn.Module, Tensor, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "abcrown", None)
    with pytest.raises(RampartError, match=r"engine=abcrown needs alpha-beta-CROWN .*git clone") as raised:
        verify(*question, EPS, engine="abcrown")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["strided", "residual", "pooled", "dense"])
def test_the_network_that_it_gets_does_the_same(name: str) -> None:
    model, x, _ = small_net(name, count=5)
    given = _folded(model)
    assert torch.allclose(given(x), model(x), atol=1e-5)
    assert NETS[name]


@pytest.mark.skipif(importlib.util.find_spec("abcrown") is None, reason="alpha-beta-CROWN is not installed")
def test_its_verdicts_are_right_on_tiny_networks() -> None:
    pytest.importorskip("auto_LiRPA", minversion="0.7")
    for seed in range(4):
        torch.manual_seed(seed)
        model, image = tiny_net((4,)), torch.rand(1, 1, 2)
        label = int(model(image[None]).argmax())
        smallest = float(exact_margins(model, image, label, EPS).min())
        found = verify(model, image, label, EPS, timeout=20, engine="abcrown")
        assert found.status != "error"
        if found.status in ("safe", "safe-incomplete"):
            assert smallest > 0
        if found.status == "unsafe":
            assert smallest <= 0
