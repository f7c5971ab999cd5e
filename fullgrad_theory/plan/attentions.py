"""Attention that a model spells out, as the one function that it is.

Where a policy rather integrates than prunes, the fused attention moves query, key and value along
one ray; two products and a softmax between them, each by itself, would have another gradient.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import fx

from ..edits.integrating import Integrate
from ..graph.computation import ComputationGraph
from ..operators.algebra import Algebra, Role
from ..operators.registry import has_role
from .labelling import Degrees
from .states import State

_PRODUCTS = (Role.CONTRACTION, Role.TOKEN_PRODUCT)
_MOVES = (Algebra.STRUCTURAL, Algebra.AFFINE, Algebra.MULTILINEAR)


def spelled_attentions(
    graph: ComputationGraph, before: Degrees, softmaxes: Collection[Integrate]
) -> tuple[Integrate, ...]:
    """The regions from the product of query and key to that with the value; `softmaxes`: those that
    are spelled out themselves."""
    spelled = {edit.node: edit.folds for edit in softmaxes}
    found = []
    for name in graph.nodes:
        inside = _attention(graph, before, name, spelled)
        if inside is not None and _reads_live_values_alone(graph, before, inside):
            ordered = sorted(inside, key=lambda n: graph.places[graph.nodes[n]])
            found.append(Integrate(name, tuple(ordered)))
    return tuple(found)


def _attention(
    graph: ComputationGraph, before: Degrees, name: str, spelled: Mapping[str, tuple[str, ...]]
) -> set[str] | None:
    """The nodes of an attention that ends at a product, None where none does."""
    for weights in _factors(graph, before, name):
        inside = {name}
        node = _behind(before, weights, inside)
        if not (has_role(node, Role.SOFTMAX) or node.name in spelled):
            continue
        region = {node.name, *spelled.get(node.name, ())}
        inside |= region
        entries = {
            n for r in region for n in graph.nodes[r].all_input_nodes if n.name not in region
        }
        moving = [n for n in entries if before.live.state(n) is not State.CONSTANT]
        if len(moving) == 1:
            scores = _behind(before, moving[0], inside)
            if len(_factors(graph, before, scores.name)) == 2:
                return {*inside, scores.name}
    return None


def _factors(graph: ComputationGraph, before: Degrees, name: str) -> list[fx.Node]:
    """The two live values that a node is the product of over tokens, none for others."""
    node, call = graph.nodes[name], before.live.calls.get(name)
    if call is None or name not in before.alive or not any(has_role(node, r) for r in _PRODUCTS):
        return []
    read = [o.node for o in call.operands if o.name in call.moving and o.node is not None]
    live = all(before.live.state(n) is State.LIVE for n in read)
    return read if live and len(read) == 2 else []


def _behind(before: Degrees, node: fx.Node, passed: set[str]) -> fx.Node:
    """The value behind what moves it, scales it, or adds a constant to it."""
    while (call := before.live.calls.get(node.name)) and call.operator.algebra in _MOVES:
        read = [call.node(n) for n in call.moving]
        if len(read) != 1 or read[0] is None:
            break
        passed.add(node.name)
        node = read[0]
    return node


def _reads_live_values_alone(
    graph: ComputationGraph, before: Degrees, inside: Collection[str]
) -> bool:
    """Whether all that moves and enters is live."""
    nodes = [graph.nodes[n] for n in inside]
    entries = {m for n in nodes for m in n.all_input_nodes if m.name not in inside}
    states = {before.live.state(n) for n in entries}
    return State.FROZEN not in states
