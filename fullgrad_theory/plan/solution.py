"""What is done to a piece: decisions, and the edits that they are."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from ..edits.costs import Policy
from ..edits.kinds import OWN, Edit, Prune, Scale
from ..operators.calls import Call

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
