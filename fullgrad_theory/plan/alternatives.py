"""The next best solutions of a piece: each minimal, and each with another gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from ..edits.kinds import Prune
from .problem import INPUT, Piece
from .programme import IntVar, Programme
from .solving import Solution

T = TypeVar("T")
Spot = tuple[int, str]
"""an edge: place and argument"""


def next_best(
    programme: Programme, best: Solution, count: int, effort: float
) -> tuple[list[Solution], bool]:
    """Up to `count` solutions after the best in order of cost, and whether the search came to its
    end.

    Each needs all of its edits, and its gradient takes other ways, or is edited otherwise, than the
    others'.
    """
    found: list[Solution] = []
    if not best.proven:
        return found, False
    variables = programme.variables
    unpruned: dict[Spot, list[IntVar]] = {
        (place, seen.edge.argument): seen.unpruned  # type: ignore[misc]
        for place, edges in enumerate(programme.edges)
        for seen in edges
    }
    true, any_of, all_of = variables.model.new_constant(1), variables.any_of, variables.all_of
    flows = _flows(programme.piece, unpruned.__getitem__, true, any_of, all_of)
    _scale_once(programme, flows)
    _forbid(programme, best, flows)
    while len(found) < count:
        answer = variables.solve(effort - variables.spent)
        if answer is None or not answer.proven:
            return found, variables.exhausted
        within = Programme(programme.piece, programme.policy)
        within.allow_only(answer)
        smaller = within.variables.solve(effort) or answer
        minimal = smaller.cost == answer.cost
        _forbid(programme, answer if minimal else smaller, flows)
        if minimal:
            found.append(answer)
    return found, True


def _forbid(programme: Programme, solution: Solution, flows: Mapping[Spot, IntVar]) -> None:
    """Neither a set of edits that holds all of these, nor another with the same gradient."""
    variables = programme.variables
    made = {decision.spot: decision for decision in solution.decisions}
    fewer, otherwise = [], []
    for candidate in variables.candidates:
        same = made.get(candidate.decision.spot)
        if candidate.decision.kind != Prune.kind:
            otherwise.append(candidate.literal if same is None else ~candidate.literal)
        if same is None:
            continue
        fewer.append(~candidate.literal)
        if candidate.degree is not None:
            other, degree = variables.literal(), int(same.degree * variables.one)
            variables.model.add(candidate.degree != degree).only_enforce_if(other)
            fewer.append(other)
    pruned = {(d.place, d.argument) for d in solution.decisions if d.kind == Prune.kind}
    taken = _flows(programme.piece, lambda spot: [spot not in pruned], True, any, all)
    otherwise += [~flow if taken[edge] else flow for edge, flow in flows.items()]
    variables.model.add_bool_or(fewer)
    variables.model.add_bool_or(otherwise)


def _flows(
    piece: Piece,
    unpruned: Callable[[Spot], Sequence[T]],
    true: T,
    any_of: Callable[[Sequence[T]], T],
    all_of: Callable[[Sequence[T]], T],
) -> dict[Spot, T]:
    """Whether each edge carries gradient, from an end of the piece to a source: as known truth
    values, or as literals of a programme. `unpruned`: what has to hold for gradient to pass."""
    leads: dict[str | int, T] = {INPUT[0]: true}
    passed = []
    for place, node in enumerate(piece.nodes):
        into = []
        for argument, (source, _) in node.read:
            into.append(all_of([leads[source], *unpruned((place, argument))]))
            passed.append((place, argument, source, into[-1]))
        leads[place] = any_of(into)
    taken: dict[int, T] = {}
    readers: dict[str | int, list[T]] = {}
    flows = {}
    for place, argument, source, edge in reversed(passed):
        if place not in taken:  # all that read it have been seen
            is_end = piece.nodes[place].is_end
            taken[place] = true if is_end else any_of(readers.get(place, []))
        flows[place, argument] = all_of([edge, taken[place]])
        readers.setdefault(source, []).append(flows[place, argument])
    return flows


def _scale_once(programme: Programme, flows: Mapping[Spot, IntVar]) -> None:
    """Where gradient takes one edge alone, a scale at its end is one at the value that it reads."""
    piece = programme.piece
    read = {(p, a): value for p, node in enumerate(piece.nodes) for a, value in node.read}
    for place, scaled in programme.scales.items():
        into = {spot: flows[spot] for spot in read if spot[0] == place}
        for (_, argument), flow in into.items():
            value = read[place, argument]
            if piece.moves(place, argument, value):  # then by another edge as well, or from one
                out = [f for spot, f in flows.items() if read[spot][0] == value[0]]
                others = [other for other in (*into.values(), *out) if other is not flow]
                programme.variables.model.add_bool_or([~scaled, ~flow, *others])
