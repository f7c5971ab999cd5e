"""Operations that write in place: the one that computes the same without writing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from .calls import bind

aten = torch.ops.aten
Emitted = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""target, arguments and keywords of a call"""

_OF_MEMORY = (aten.as_strided_.default, aten.resize_.default, aten.set_.source_Tensor)


def functional(node: fx.Node) -> Emitted | None:
    """The call that computes what an in-place one writes to its first argument; None if there is
    none.

    It is found by its name and what it takes: the same types in order, whatever their names
    (`dropout_(self)`, `dropout(input)`), or the same names in another order (`polygamma`).
    """
    target: Any = node.target
    if target is aten.zero_.default:  # aten.zero has no derivative
        return aten.zeros_like.default, node.args, node.kwargs
    name = target._schema.name.split("::")[1]
    written = [a.alias_info is not None and a.alias_info.is_write for a in target._schema.arguments]
    alone = written[0] and not any(written[1:]) and isinstance(node.args[0], fx.Node)
    if not name.endswith("_") or not alone or target in _OF_MEMORY:
        return None
    pure = [*_overloads(name.removesuffix("_")), *_overloads(f"{name}functional")]
    given = bind(node)
    for fits in (_same, _same_types, _same_names):
        for found in pure:
            if fits(found, target):
                return found, *_arguments(found, given, by_name=fits is _same_names)
    return None


def _overloads(name: str) -> list[Any]:
    packet = getattr(aten, name, None)
    found = [getattr(packet, o) for o in packet.overloads()] if packet is not None else []
    return [o for o in found if not o._schema.is_mutable and len(o._schema.returns) == 1]


def _takes(target: Any) -> list[tuple[str, str]]:
    return [(a.name, str(a.type)) for a in target._schema.arguments]


def _same(pure: Any, target: Any) -> bool:
    # by its signature: pow_.Scalar is pow.Tensor_Scalar, and pow.Scalar something else
    return _takes(pure) == _takes(target)


def _same_types(pure: Any, target: Any) -> bool:
    return [t for _, t in _takes(pure)] == [t for _, t in _takes(target)]


def _same_names(pure: Any, target: Any) -> bool:
    return sorted(_takes(pure)) == sorted(_takes(target))


def _arguments(
    pure: Any, given: dict[str, Any], by_name: bool
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of an in-place call as its functional form takes them, defaults filled in."""
    schema = pure._schema.arguments
    values = [given[a.name] for a in schema] if by_name else list(given.values())
    pairs = list(zip(schema, values, strict=True))
    keywords = {a.name: v for a, v in pairs if a.kwarg_only and v != a.default_value}
    return tuple(v for a, v in pairs if not a.kwarg_only), keywords


# --------------------------------------------------------------------------- in steps


def _fill_diagonal(self: Tensor, fill_value: float, wrap: bool = False) -> Tensor:
    """By views that can be followed; torch's own go by strides."""
    tall = self.shape[1] + 1 if wrap and self.dim() == 2 else self.shape[0]
    for start in range(0, int(self.shape[0]), int(tall)):
        part = self.narrow(0, start, self.shape[0] - start) if start else self
        while part.dim() > 1:
            part = part.diagonal(0, 0, -1)
        part.fill_(fill_value)
    return self


STEPS: dict[Any, Callable[..., Any]] = {aten.fill_diagonal_.default: _fill_diagonal}
"""those whose write is made of others, through views that can be followed"""
