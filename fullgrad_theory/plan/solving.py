"""What is done to the pieces of a problem: each solved, equal ones once, and put together."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from ..edits.costs import Policy
from ..edits.kinds import OWN, Edit, Prune, Scale
from ..errors import NoPlanError
from ..operators.calls import Call
from .problem import Piece, Problem

LEAVE = "leave"
"""a node is left inconsistent"""
FREE = "free"
"""an end may have a degree other than 1"""


@dataclass(frozen=True)
class Decision:
    """What is done at one place of a piece, by an edit's kind or by `LEAVE` or `FREE`, at a cost.

    `degree`: the one that a scale makes 1.
    """

    place: int
    kind: str
    cost: int
    argument: str = ""
    degree: Fraction = Fraction(1)

    @property
    def spot(self) -> tuple[int, str, str]:
        """What it has in common with the same decision of another solution."""
        return self.place, self.kind, self.argument

    def edits(self, node: str, call: Call, policy: Policy) -> list[Edit]:
        """The edits that it makes at its node."""
        if self.kind == Prune.kind:
            return [Prune(node, self.argument)]
        if self.kind == Scale.kind:
            return [Scale(node, 1 / self.degree)]
        if self.kind == FREE:
            return []
        if self.kind == LEAVE:
            factors = policy.edge_factors(call).items()
            return [Scale(node, factor, edge) for edge, factor in factors if edge in call.moving]
        return [OWN[self.kind](node)]


@dataclass(frozen=True)
class Solution:
    """The decisions for a piece, in graph order, and whether that is proven to be the cheapest."""

    decisions: tuple[Decision, ...]
    proven: bool

    @property
    def cost(self) -> int:
        """What it costs, with what is left."""
        return sum(decision.cost for decision in self.decisions)


@dataclass(frozen=True)
class Edits:
    """The edits of a graph in graph order, what they cost, and the nodes that stand in the way."""

    edits: tuple[Edit, ...] = ()
    cost: int = 0
    obstacles: tuple[str, ...] = ()


class Solved:
    """The cheapest solution of each piece of a problem, and up to `alternatives` more of each.

    `pieces`: the names in each, and which of the different ones it is; `solutions`: of each of
    these, in order of cost; `searched`: whether all that were asked for (or there are) were found.
    Raises `NoPlanError` where the search met its limit before it found any.
    """

    def __init__(self, problem: Problem, alternatives: int, effort: float) -> None:
        self.problem = problem
        self.pieces: list[tuple[list[str], int]] = []
        self.solutions: list[list[Solution]] = []
        self.searched = True
        known: dict[Piece, int] = {}
        for names in problem.pieces():
            piece = problem.without_names(names)
            if piece not in known:
                known[piece] = len(known)
                found, all_found = _solve(piece, problem.policy, alternatives, effort)
                self.solutions.append(found)
                self.searched &= all_found
            self.pieces.append((names, known[piece]))

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
        place = {name: i for i, name in enumerate(self.problem.graph.nodes)}
        in_order = sorted(edits, key=lambda edit: place[edit.node])
        return Edits(tuple(in_order), cost, tuple(sorted(obstacles, key=place.__getitem__)))

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


def _solve(
    piece: Piece, policy: Policy, alternatives: int, effort: float
) -> tuple[list[Solution], bool]:
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
        return [best], True
    others, all_found = next_best(programme, best, alternatives, effort)
    return [best, *others], all_found
