"""The registry: one entry an operation; registering twice is an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .base import Algebra, Operator

_REGISTRY: dict[str, Operator] = {}
REGION = Operator("fullgrad_theory.fold.region", Algebra.SMOOTH)
"""no operation of its own: a sub-layer that was folded into one call, to be integrated"""


def register(
    name: str,
    algebra: Algebra,
    signature: str = "self",
    *,
    origin: float = 0.0,
    refuses: Callable[[Mapping[str, Any]], str | None] | None = None,
    note: str = "",
    vanishes: str = "",
) -> Operator:
    """Add one operation, e.g. `register('mylib.scale.default', Algebra.STRUCTURAL, 'x')`.

    `name` is the overload as torch prints it; `signature` its degree rule over schema argument
    names. Raises ValueError where the name is registered already.
    """
    if name in _REGISTRY:
        raise ValueError(f"{name} is registered already as {_REGISTRY[name].algebra}")
    _REGISTRY[name] = Operator(name, algebra, signature, origin, refuses, note, vanishes)
    return _REGISTRY[name]


def lookup(name: str) -> Operator | None:
    """The entry of an operation, None where nobody registered it."""
    return REGION if name == REGION.name else _REGISTRY.get(name)


def registered() -> Iterator[Operator]:
    """All entries, by name."""
    return iter(sorted(_REGISTRY.values(), key=lambda operator: operator.name))
