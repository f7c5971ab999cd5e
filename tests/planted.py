"""Faults planted in the registry, and in backwards, for tests that must notice them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor
from torch.autograd import Function

from fullgrad_theory.operators import Frozen, lookup, registry
from fullgrad_theory.operators.gates import Gate

GATES = {name: o.gate for name, o in registry._REGISTRY.items() if o.gate is not None}


def plant(monkeypatch: pytest.MonkeyPatch, name: str, **fields: Any) -> None:
    """Change an operation's record for the time of a test."""
    known = lookup(name)
    assert known is not None
    monkeypatch.setitem(registry._REGISTRY, name, replace(known, **fields))


def plant_gate(monkeypatch: pytest.MonkeyPatch, name: str, gate: Any) -> None:
    plant(monkeypatch, name, gate=Gate(gate))


def plant_frozen(monkeypatch: pytest.MonkeyPatch, name: str, form: Any) -> None:
    plant(monkeypatch, name, frozen=Frozen(form, exact=True))


class Times(Function):
    """The identity, whose gradient is multiplied."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Any) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return g * ctx.factor, None


def times(x: Tensor, factor: Any) -> Tensor:
    return Times.apply(x, factor)  # type: ignore[no-any-return,no-untyped-call]
