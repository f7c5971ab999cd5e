"""Elementwise functions that a model spells out where the parts have no plan that the whole has.

The secant of a composition is the product of the secants only where the inner function is 0 at 0.
Where it is not, as in log(1 + exp(u)), or where a part is singular, as the logarithm is there, the
whole is taken for one function of u. A gate of its own value needs none of this, see `gating`.
"""

from __future__ import annotations

import torch
from torch import fx

from ..edits.costs import Policy
from ..edits.folding import crosses_autocast
from ..edits.integrating import Integrate
from ..edits.secants import Secant
from ..graph.computation import ComputationGraph
from ..graph.constants import Constants
from ..operators.algebra import Algebra
from ..operators.calls import Call
from ..operators.relations import polynomial
from .attentions import spelled_attentions
from .exponentials import spelled_exponentials
from .jumps import is_continuous
from .labelling import Degrees
from .regions import Moves, Region, is_flag, region_at, regions_at
from .states import State

RAYS = (0.3, 1.0, 3.0, 8.0)
"""how far along the ray, in both directions, f has to be the integral of f'"""
STEPS = 512


def spelled(
    graph: ComputationGraph, before: Degrees, policy: Policy
) -> tuple[Secant | Integrate, ...]:
    """The regions that stand for one function each; `before`: the labelling without edits."""
    live = before.live
    constants = Constants(graph, lambda n: live.state(n) is not State.CONSTANT)
    softmaxes = spelled_exponentials(graph, before, constants)
    found: list[Secant | Integrate] = [*softmaxes]
    if policy.integrate is not None and policy.integrate < (policy.prune or 0):
        attentions = spelled_attentions(graph, before, softmaxes)
        within = {name for edit in attentions for name in edit.folds}
        found = [*attentions, *(edit for edit in softmaxes if edit.node not in within)]
    taken: set[str] = {name for edit in found for name in edit.folds}
    gated = {name: _gated(graph, before, name, constants) for name in live.calls}
    apart: set[str] = set().union(*gated.values())
    for name in [n for n in reversed(graph.nodes) if n in before.alive and n in live.calls]:
        if name in taken or not _curves(before, name):
            continue
        widest = _widest(graph, before, graph.nodes[name], constants, apart)
        if widest is None:
            taken |= gated[name]
            continue
        region, origin = widest
        inside = [n.name for n in region.inside]
        taken |= {*inside}
        found.append(Secant(name, tuple(inside), origin))
    whole = [
        edit
        for edit in found
        if not crosses_autocast(graph.fx.graph, [graph.nodes[n] for n in (edit.node, *edit.folds)])
    ]
    return tuple(sorted(whole, key=lambda edit: graph.places[graph.nodes[edit.node]]))


def _curves(before: Degrees, name: str) -> bool:
    """Whether a call is more than linear in the one value that it reads."""
    call = before.live.calls[name]
    if call.operator.edits or call.operator.algebra is Algebra.SINGULAR or _selects(call):
        return True
    relations = polynomial(call.operator.signature, call) if call.operator.kind.ruled else None
    return any(
        sum(abs(p) for _, p in term) != 1 or term[0][1] != 1
        for r in relations or ()
        for term in r.terms
        if term
    )


def _selects(call: Call) -> bool:
    """Whether a condition that moves says which value it is."""
    return any(n is not None and is_flag(n) for n in map(call.node, call.moving))


def _divides(call: Call) -> bool:
    """Whether it divides by a value that moves."""
    relations = polynomial(call.operator.signature, call) if call.operator.kind.ruled else None
    return any(p < 0 for r in relations or () for term in r.terms for _, p in term)


def _gated(graph: ComputationGraph, before: Degrees, name: str, constants: Constants) -> set[str]:
    """The nodes of a product of a value and its gate, which need nothing else."""
    if not before.live.calls[name].gate:
        return set()
    moves = _moves(before)
    region = region_at(graph, graph.nodes[name], moves, constants)
    return {n.name for n in region.inside} if region is not None else set()


def _moves(before: Degrees) -> Moves:
    return lambda node: before.live.state(node) is not State.CONSTANT


def _widest(
    graph: ComputationGraph,
    before: Degrees,
    exit: fx.Node,
    constants: Constants,
    inner: set[str],
) -> tuple[Region, float] | None:
    """The region back to behind the last operation that is not 0 at 0, from the exit; its f(0)."""
    best, shifted = None, 0
    singular = before.live.calls[exit.name].operator.algebra is Algebra.SINGULAR
    for region in regions_at(graph, exit, _moves(before), constants):
        if before.live.state(region.entry) is not State.LIVE:
            continue
        inside = [n for n in region.inside if n is not exit and n.name not in inner]
        calls = [before.live.calls[n.name] for n in inside if n.name in before.live.calls]
        # 1/(1 + u^2) is one function of u, (mean(x^2) + eps)^-1/2 the scale of a norm
        linear = before.facts[region.entry.name][0].degree == 1
        count = sum(
            bool(c.operator.origin)
            or c.operator.algebra is Algebra.SINGULAR
            or _divides(c)
            or (c.eps and linear)
            for c in calls
        )
        origin = _origin(region) if count > shifted or (singular and best is None) else None
        if origin is not None:
            best, shifted = (region, origin), count
    return best


def _origin(region: Region) -> float | None:
    """f(0), or one of them; None where f is not the integral of its derivative from there."""
    try:
        origin = region(region.zero)
        ends = [side * length for length in RAYS for side in (-1.0, 1.0)]
        sound = bool(torch.isfinite(origin).all()) and is_continuous(region)
        sound = sound and all(_is_integral(region, end) for end in ends)
    except (RuntimeError, ValueError, TypeError):
        return None
    (first,) = origin.flatten()[:1].tolist()
    return (first or float(origin.abs().max())) if sound else None


def _is_integral(region: Region, end: float) -> bool:
    """Whether f(end) - f(0) is what f gains on the way there, and f does not jump."""
    steps = torch.arange(STEPS, dtype=torch.float64).reshape(-1, *[1] * region.zero.dim())
    before, after = (region(end * (steps + part) / STEPS) for part in (0.25, 0.75))
    gained = 2.0 * (after - before).sum(0)
    rise = (region(region.zero + end) - region(region.zero)).reshape(gained.shape)
    return bool(((gained - rise).abs() <= 1e-2 * rise.abs().clamp(min=1e-3)).all())
