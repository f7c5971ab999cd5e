"""Which calls jump to a constant, or from one, where a value that depends on the input says so.

Such a constant is no bias leaf: `where(x > 0, x + 5, x)` hides what `x + 5*(x > 0)` does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from ..operators.algebra import Algebra
from ..operators.calls import Call
from ..operators.registry import record_of
from ..operators.relations import constant_monomials, polynomial
from .regions import Region, choices_at, is_flag, region_at

if TYPE_CHECKING:
    from .states import Walk

_LINEAR = (Algebra.STRUCTURAL, Algebra.AFFINE, Algebra.MULTILINEAR)
WIDTHS = (1e-6, 1e-3, 0.37, 1.3, 5.0, 21.7, 1e3)
"""how far from where a comparison turns it is looked at once more, in units of 1 + |turn|"""


def mark_jumps(walk: Walk) -> dict[str, Call]:
    """Mark the calls that jump to a constant, or from one, as a live value says."""
    return {
        name: replace(call, chosen=True) if _jumps(walk, name, call) else call
        for name, call in walk.calls.items()
    }


def _jumps(walk: Walk, name: str, call: Call) -> bool:
    jumps = call.operator.jumps
    if jumps is not None:
        found = {*jumps(call.arguments)}
        return "1" in found or any(found & {*monomial} for monomial in constant_monomials(call))
    relations = polynomial(call.operator.signature, call) if call.operator.kind.ruled else None
    if relations is None or not walk.is_live(walk.graph.nodes[name]):
        return False
    relation = relations[0]
    said = [call.node(n) for n in relation.zero]
    if all(n is not None and n.name in walk.ids for n in said):
        return False
    sides = [{leaf for n, _ in t for leaf in _leaves(walk, call.node(n))} for t in relation.terms]
    if "+" not in call.operator.signature:  # a lookup, among what its operand is joined of
        sides = _joined(walk, [call.node(n) for t in relation.terms for n, _ in t])
    if not constant_monomials(call) and all(side == sides[0] for side in sides):
        return False
    at = (walk.graph, walk.graph.nodes[name], walk.moves, walk.constants)
    region = region_at(*at)
    ways = choices_at(*at) if region is None else iter([(region,)])
    return not any(all(map(is_continuous, way)) for way in ways)


def _joined(walk: Walk, values: list[fx.Node | None]) -> list[set[str]]:
    """The leaves behind each of the values that some are put together of, side by side."""
    queue, sides = [*values], list[set[str]]()
    for node in filter(None, queue):
        call = walk.calls.get(node.name)
        joins = call is not None and call.operator.algebra is Algebra.STRUCTURAL
        relations = polynomial(call.operator.signature, call) if call and joins else None
        if call is None or relations is None or node.name in walk.sources:
            sides.append(_leaves(walk, node))
            continue
        sides += [{node.name}] if constant_monomials(call) else []
        read = [call.node(name) for term in relations[0].terms for name, _ in term]
        queue += [n for n in read if n not in queue]
    return sides


def _leaves(walk: Walk, value: fx.Node | None) -> set[str]:
    """The calls behind a live value at which bias leaves enter."""
    queue, found = [value], set()
    for node in filter(None, queue):
        call = walk.calls.get(node.name)
        if call is None or not walk.is_live(node) or node.name in walk.sources:
            continue
        if call.operator.origin or constant_monomials(call):
            found.add(node.name)
        queue += [n for n in map(call.node, sorted(call.moving)) if n not in queue]
    return found


def is_continuous(region: Region) -> bool:
    """Whether the function does not jump where its comparisons and signs turn.

    Known where each turns at one point, as one of affine functions of the entry does, which is
    looked at from both sides; anything else (a rounding) is taken for a jump.
    """
    try:
        turns = [_turn(region, node) for node in steps_of(region.inside)]
        return all(turn is not None and _meets(region, turn) for turn in turns)
    except (RuntimeError, ValueError, TypeError, AttributeError):  # what does not run is not known
        return False


def steps_of(inside: Iterable[fx.Node]) -> list[fx.Node]:
    """The nodes where a value becomes one that carries no gradient."""
    steps: list[fx.Node] = []
    for node in inside:
        record = record_of(node)
        of_flags = all(is_flag(n) for n in node.all_input_nodes)
        if record is not None and record.algebra is Algebra.FREEZING and not of_flags:
            steps.append(node)
    return steps


def _turn(region: Region, node: fx.Node) -> Tensor | None:
    """Where a comparison or a sign of affine functions turns, NaN where it does not; None for what
    turns elsewhere."""
    if not 1 <= len(node.args) <= 2 or not _compares_affine(region, node):
        return None

    def difference(u: Tensor) -> Tensor:
        values = region.values(u)
        sides: Any = fx.map_arg(
            node.args, lambda n: values[n] if n in values else region.constants.value(n)
        )
        return sides[0] - (sides[1] if len(sides) > 1 else 0.0) + region.zero

    origin, one, two = (difference(region.zero + k) for k in (0.0, 1.0, 2.0))
    slope = one - origin
    known = torch.isfinite(origin)  # what is compared with infinity never turns
    if not torch.allclose(two[known], (origin + 2.0 * slope)[known], rtol=1e-9, atol=1e-12):
        return None
    turn = torch.where(known & (slope != 0), -origin / slope, torch.nan)
    at = torch.where(turn.isnan(), 0.0, turn)
    for side in (-1.0, 1.0):
        seen = [region.values(at + side * width * (1.0 + at.abs()))[node] for width in WIDTHS]
        if not all(bool((other == seen[0]).all()) for other in seen):
            return None
    return _hit(region, node, turn)


def _hit(region: Region, node: fx.Node, turn: Tensor) -> Tensor | None:
    """The turn; of an equality, which holds at that point alone, the float that it holds at."""
    at = torch.where(turn.isnan(), 0.0, turn)
    step = 1e-6 * (1.0 + at.abs())
    before, after = (region.values(at + side * step)[node] for side in (-1.0, 1.0))
    if len(node.args) == 1:  # as isnan: of no number, if not of 0
        target: Any = node.target
        turn = torch.where(
            (before == after) & (target(torch.zeros_like(turn)) == before), torch.nan, turn
        )
    for near in (at, at.nextafter(at + 1.0), at.nextafter(at - 1.0)):
        here = region.values(near)[node]
        if bool(((before != after) | (here != before) | turn.isnan()).all()):
            return torch.where(turn.isnan(), turn, near)
    return None


def _compares_affine(region: Region, node: fx.Node) -> bool:
    """Whether both sides are affine in the entry by their operations."""
    queue = [n for n in node.all_input_nodes if n in region.inside]
    for n in queue:
        record = record_of(n)
        inner = [i for i in n.all_input_nodes if i in region.inside or i is region.entry]
        if record is None or record.algebra not in _LINEAR or len(inner) != 1:
            return False
        queue += [i for i in inner if i is not region.entry and i not in queue]
    return True


def _meets(region: Region, turn: Tensor) -> bool:
    """Whether the values on both sides of a point come together as the distance shrinks: by a power
    of it, which a step beside it would spoil. What torch's own formulas leave at a threshold, 2e-9
    of softplus at 20, may pass."""
    middle = region(turn)

    def apart(width: float) -> Tensor:
        step = width * (1.0 + turn.abs())
        sides = [(region(turn + side * step) - middle).abs() for side in (-1.0, 1.0)]
        return torch.maximum(*sides)

    near, mid, far = map(apart, (1e-9, 1e-8, 1e-7))
    noise = 1e-13 * middle.abs()
    power = (near <= 0.5 * mid + noise) & ((near * far - mid**2).abs() <= 0.1 * mid**2 + noise**2)
    return bool((power | (near <= noise) | turn.isnan()).all())
