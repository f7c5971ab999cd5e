"""The pieces of a problem solved, equal ones once, and put together."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ..edits.costs import Policy
from ..edits.kinds import Edit
from ..errors import NoPlanError
from .piece import Piece
from .problem import Problem
from .solution import FREE, LEAVE, Solution


@dataclass(frozen=True)
class Edits:
    """The edits of a graph in graph order, what they cost, and the nodes that stand in the way."""

    edits: tuple[Edit, ...]
    cost: int
    obstacles: tuple[str, ...]


@dataclass(frozen=True)
class Solved:
    """The pieces of a graph, for each which problem it is; for each problem its solutions in order
    of cost, and whether all that were asked for (or all there are) were found."""

    problem: Problem
    pieces: tuple[tuple[tuple[str, ...], int], ...]
    solutions: tuple[tuple[Solution, ...], ...]
    searched: bool

    @property
    def optimal(self) -> bool:
        return all(best.proven for best, *_ in self.solutions)

    def edits(self, choice: Sequence[int] = ()) -> Edits:
        """What one solution for each problem does to the graph; equal pieces are solved alike.

        `choice`: which of its solutions each problem takes, the first where left out.
        """
        edits: list[Edit] = []
        obstacles: list[str] = []
        cost = 0
        for names, which in self.pieces:
            for made in self.solutions[which][choice[which] if choice else 0].decisions:
                name = names[made.place]
                edits += made.edits(name, self.problem.live.calls[name], self.problem.policy)
                if made.kind not in (FREE, LEAVE):
                    cost += made.cost
                elif made.kind == FREE or self.problem.nodes[name].leave is None:
                    obstacles.append(name)
        return Edits(tuple(edits), cost, tuple(obstacles))

    def next_best(self, count: int) -> list[tuple[int, ...]]:
        """Which solution each problem takes, by total cost, the best of all left out."""
        times = Counter(which for _, which in self.pieces)
        best: list[tuple[int, tuple[int, ...]]] = [(0, ())]
        for which, solutions in enumerate(self.solutions):
            more = [
                (cost + times[which] * solution.cost, (*choice, i))
                for cost, choice in best
                for i, solution in enumerate(solutions)
            ]
            best = heapq.nsmallest(count + 1, more)  # whoever is behind these stays behind
        return [choice for _, choice in best[1:]]


def solve(problem: Problem, alternatives: int, effort: float) -> Solved:
    """The cheapest solution of each piece, and up to `alternatives` more of each.

    Raises `NoPlanError` where the search met its limit before it found any.
    """
    known: dict[Piece, int] = {}
    pieces: list[tuple[tuple[str, ...], int]] = []
    solutions: list[tuple[Solution, ...]] = []
    searched = True
    for names in problem.pieces():
        piece = problem.without_names(names)
        if piece not in known:
            known[piece] = len(solutions)
            found, all_found = _solve_piece(piece, problem.policy, alternatives, effort)
            solutions.append(found)
            searched &= all_found
        pieces.append((tuple(names), known[piece]))
    return Solved(problem, tuple(pieces), tuple(solutions), searched)


def _solve_piece(
    piece: Piece, policy: Policy, alternatives: int, effort: float
) -> tuple[tuple[Solution, ...], bool]:
    """The cheapest solution, the next ones, and whether all that were asked for were found.

    Where there is none, the cheapest with nodes left that the policy does not leave, or with an end
    whose degree is not 1: the obstacles.
    """
    from .alternatives import next_best  # OR-tools takes a second: where there is a piece to solve
    from .programme import Programme

    programme = Programme(piece, policy)
    best = programme.variables.solve(effort)
    if best is None:
        best = Programme(piece.relaxed(), policy, any_end=True).variables.solve(effort)
    if best is None:
        raise NoPlanError(
            f"the search found no plan within effort={effort}; raise it in derive_rules, or derive "
            "the layers of the model one by one"
        )
    if not alternatives:
        return (best,), True
    others, all_found = next_best(programme, best, alternatives, effort)
    return (best, *others), all_found
