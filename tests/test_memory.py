"""Calls leave no tensor behind, not even until the garbage collector comes by."""

from __future__ import annotations

import gc
import linecache
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import fullgrad_theory as fgt


class Gated(nn.Module):
    """Every edit of libra's, a table of positions, and images for maps."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8)
        self.positions = nn.Parameter(torch.randn(1, 16, 8))
        self.qkv, self.act, self.head = nn.Linear(8, 24), nn.GELU(), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).flatten(2).mT + self.positions
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + (q @ k.mT).softmax(-1) @ v
        return self.head(self.act(x) * torch.sigmoid(q)).mean(1)


MODEL, X = Gated().eval(), torch.randn(2, 3, 16, 16)
GRAPH = fgt.trace(MODEL, X)
BALANCED = fgt.balance(GRAPH)
EXPLAINER = fgt.Explainer(GRAPH, policy="libra")

CALLS: dict[str, Callable[[], Any]] = {
    "Explainer": lambda: EXPLAINER(X, ["fullgrad", "fullgrad+"]),
    "Explainer made": lambda: fgt.Explainer(GRAPH, policy="libra"),
    "check of a plan": lambda: fgt.check_completeness(GRAPH, policy="libra"),
    "check of the gradient": lambda: fgt.check_completeness(GRAPH),
    "fullgrad": lambda: fgt.fullgrad(BALANCED, X, target=1),
    "derive_rules": lambda: fgt.derive_rules(GRAPH),
    "balance": lambda: fgt.balance(GRAPH),
    "integrated": lambda: fgt.balance(GRAPH, policy="integrated"),
    "backward": lambda: BALANCED(X.clone().requires_grad_()).sum().backward(),
}


@pytest.fixture
def without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def live() -> int:
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_no_tensor_outlives_a_call(name: str, without_collector: None) -> None:
    call = CALLS[name]
    for _ in range(3):
        call()
    gc.collect()
    before, sources = live(), len(linecache.cache)
    for _ in range(10):
        call()
    assert live() <= before
    gc.collect()
    assert len(linecache.cache) <= sources


@pytest.mark.slow
def test_nothing_of_a_trace_outlives_it() -> None:
    def traced() -> int:
        fgt.trace(MODEL, X)
        gc.collect()
        return live()

    before = [traced() for _ in range(3)][-1]
    assert [traced() for _ in range(3)][-1] <= before + 3  # torch.export interns a few sizes


@pytest.mark.slow
def test_the_benchmark_says_what_is_flat(capsys: pytest.CaptureFixture[str]) -> None:
    from experiments.memory_flat import measure

    assert measure("nothing", lambda: None, 20).flat
    kept: list[torch.Tensor] = []
    found = measure("a leak", lambda: kept.append(torch.ones(100_000)), 20)
    assert not found.flat and found.tensors == 20
