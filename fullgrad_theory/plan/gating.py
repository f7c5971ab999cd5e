"""Which products are a value times a gate of that value itself, u*g(u), as silu is u*sigmoid(u).

For one live value, g held fixed is the secant (f(u) - f(0))/u, f(0) being 0. So the prune of such a
gate is priced as a secant, whatever primitives the function is spelled in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING

from torch import fx

from ..operators.algebra import Algebra
from ..operators.calls import Call
from ..operators.relations import polynomial
from .regions import Region, region_at

if TYPE_CHECKING:
    from .states import Walk

_KEEPS = (Algebra.STRUCTURAL, Algebra.AFFINE, Algebra.MULTILINEAR)


def mark_gates(walk: Walk, calls: Mapping[str, Call]) -> dict[str, Call]:
    """Mark the factor that is a gate where a call is such a product."""
    return {name: replace(call, gate=_gate(walk, name, call)) for name, call in calls.items()}


def _gate(walk: Walk, name: str, call: Call) -> str:
    if call.operator.algebra is not Algebra.MULTILINEAR or len(call.moving) != 2:
        return ""
    relations = polynomial(call.operator.signature, call) or ()
    if len(relations) != 1 or len(relations[0].terms) != 1 or len(relations[0].terms[0]) != 2:
        return ""
    region = region_at(walk.graph, walk.graph.nodes[name], walk.moves, walk.constants)
    if region is None or not walk.is_live(region.entry):
        return ""
    powers = dict(relations[0].terms[0])
    values = [n for n, p in powers.items() if p == 1 and _is_multiple(walk, region, call.node(n))]
    (value,) = values if len(values) == 1 else ("",)
    return next(n for n in powers if n != value) if value else ""


def _is_multiple(walk: Walk, region: Region, value: fx.Node | None) -> bool:
    """Whether a value of the region is its entry times constants."""
    while value is not None and value is not region.entry:
        call = walk.calls.get(value.name)
        if call is None or call.operator.algebra not in _KEEPS or len(call.moving) != 1:
            return False
        (moved,) = call.moving
        relations = polynomial(call.operator.signature, call)
        if (
            relations is None
            or relations[0].terms != (((moved, Fraction(1)),),)
            or relations[0].domain
        ):
            return False
        value = call.node(moved)
    return value is not None
