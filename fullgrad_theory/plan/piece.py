"""A piece of the labelling problem: what can be done at each of its nodes, and nothing of where.

It holds no names, so that equal layers are equal pieces, and are solved once.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from math import lcm

from ..operators.relations import Relation

Value = tuple[str | int, int]
"""a node (by its place in the piece, in a graph by its name) and which of its outputs"""
INPUT: Value = ("", 0)
"""a value of degree 1 from before: a source, or the cut that the piece starts at"""
FINEST = 24
"""degrees with a denominator beyond this are not looked for"""
NEVER = 10**5
"""the cost of leaving a node that the policy does not leave: what is left then is the obstacle"""
LAST_OF_ALL = 20 * NEVER
"""an operation without a degree is rather the obstacle than the sum or the end it leads to"""


@dataclass(frozen=True)
class PricedMode:
    """One mode of a node: its edit, what that costs, the relation of each output."""

    edit: str | None
    cost: int
    relations: tuple[Relation, ...]


@dataclass(frozen=True)
class Edge:
    """What a node reads: the value (None: a frozen one), the cost of pruning it (None: never)."""

    argument: str
    value: Value | None
    prune: int | None = None


@dataclass(frozen=True)
class NodeProblem:
    """What can be done at a node.

    `live`: which outputs carry gradient; `small`: whose degree can only be 0 or 1. `leave`: the
    cost of leaving it inconsistent, None where that is not allowed. `is_end`: its degree must be 1.
    """

    modes: tuple[PricedMode, ...]
    edges: tuple[Edge, ...]
    live: tuple[bool, ...]
    small: tuple[bool, ...]
    leave: int | None
    eps: bool
    is_end: bool = False

    @property
    def read(self) -> tuple[tuple[str, Value], ...]:
        """The values it reads that are not frozen, by argument."""
        return tuple((e.argument, e.value) for e in self.edges if e.value is not None)

    @property
    def scalable(self) -> bool:
        """Whether it has one output, whose degree may be other than 0 and 1."""
        return self.live == (True,) and self.small == (False,)

    def is_linear(self, argument: str) -> bool:
        """Whether an operand's degree counts once, wherever it counts."""
        terms = [t for m in self.modes for r in m.relations for t in r.terms]
        return all(power == 1 for term in terms for name, power in term if name == argument)

    def relaxed(self) -> NodeProblem:
        """The same, but that it can be left: at a price that makes it the obstacle."""
        if self.leave is not None:
            return self
        has_degree = any(r.terms for r in self.modes[0].relations)
        return replace(self, leave=LAST_OF_ALL if has_degree else NEVER)


@dataclass(frozen=True)
class Piece:
    """The nodes between one cut of the graph and the next."""

    nodes: tuple[NodeProblem, ...]

    @cached_property
    def uses(self) -> Counter[Value]:
        """How often each value is read."""
        return Counter(value for node in self.nodes for _, value in node.read)

    @cached_property
    def denominator(self) -> int:
        """A common denominator of the degrees."""
        finest: dict[Value | None, int] = {INPUT: 1, None: 1}
        for place, node in enumerate(self.nodes):
            read = {edge.argument: finest[edge.value] for edge in node.edges}
            for i, small in enumerate(node.small):
                terms = [t for m in node.modes for t in m.relations[i].terms] if not small else []
                common = lcm(*(read[name] * e.denominator for term in terms for name, e in term))
                finest[place, i] = common if common <= FINEST else 1
        return lcm(*finest.values())

    def is_small(self, value: Value) -> bool:
        """Whether a value's degree can only be 0 or 1."""
        place, output = value
        return value == INPUT or self.nodes[int(place)].small[output]

    def scales_before(self, place: int) -> bool:
        """Whether a scale here is a scale at the only value read, which nobody else reads."""
        read = self.nodes[place].read
        return len(read) == 1 and self.uses[read[0][1]] == 1 and self.moves(place, *read[0])

    def moves(self, place: int, argument: str, value: Value) -> bool:
        """Whether a scale here is one at the value read, if gradient takes no other edge."""
        if value == INPUT:
            return False
        before = self.nodes[int(value[0])]
        return not before.is_end and before.scalable and self.nodes[place].is_linear(argument)

    def relaxed(self) -> Piece:
        """The same, but that every node can be left."""
        return Piece(tuple(node.relaxed() for node in self.nodes))
