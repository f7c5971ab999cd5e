"""The experiment on the cost of an evaluation, at its smallest."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


@pytest.mark.slow
def test_the_passes_that_are_run_are_no_more_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXPERIMENTS)
    cost = importlib.import_module("evaluation_cost")
    found = cost.measure(images=2, rounds=1, depth=1, width=48)
    both = 2 * 2 * 9  # two images, two orders, nine fractions
    assert found["most"] == 2 + both * len(cost.METHODS) * len(cost.POLICIES)
    # a random order is the same under both policies, and is run once
    assert found["rows"] <= found["most"] - both
    assert found["rows"] > found["most"] / 2
    assert found["floor"] > 0 and found["ratio"] > 0
