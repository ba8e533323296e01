"""What tests of branch and bound share."""

from __future__ import annotations

import pytest

from rampart.verification import neurons


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """All neurons but those of the first layer have sites: in networks as small as these none reads little."""
    monkeypatch.setattr(neurons, "LOCAL", float("inf"))
