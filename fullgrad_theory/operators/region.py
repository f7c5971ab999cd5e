"""A sub-layer as one operation: what stands for it in a graph, and its record."""

from __future__ import annotations

from typing import Any

from torch import nn

from .algebra import Algebra
from .record import Operator


def region_of(inner: nn.Module, label: str, *values: Any) -> Any:
    """A sub-layer as one operation: `inner` of what it reads from outside. `label` names it."""
    return inner(*values)


REGION = Operator(f"{region_of.__module__}.{region_of.__name__}", Algebra.SMOOTH)
"""no operation of its own: a sub-layer that was folded into one call, to be integrated"""
