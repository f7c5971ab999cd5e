"""A graph and a policy as the labelling problem: prices at each node, and the pieces it falls into.

The graph is cut where every gradient path passes one value whose degree must be 1 (the residual
stream); the pieces are solved one by one. They hold no names, so that equal ones are solved once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from math import lcm

from torch import fx

from ..edits.costs import Policy
from ..edits.kinds import OWN, Prune
from ..graph.computation import ComputationGraph
from ..graph.sources import module_path
from ..operators.algebra import Algebra
from ..operators.calls import Call, target_name
from ..operators.registry import REGION
from ..operators.relations import Mode, Relation, polynomial
from .states import Liveness, State

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
class Edge:
    """What a node reads: the value (None: a frozen one), the cost of pruning it (None: never)."""

    argument: str
    value: Value | None
    prune: int | None = None


@dataclass(frozen=True)
class NodeProblem:
    """What can be done at a node. `modes`: those that the policy allows, with what each costs.

    `live`: which outputs carry gradient; `small`: whose degree can only be 0 or 1. `leave`: the
    cost of leaving it inconsistent, None where that is not allowed. `is_end`: its degree must be 1.
    """

    modes: tuple[tuple[Mode, int], ...]
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


@dataclass(frozen=True)
class Piece:
    """The nodes between one cut of the graph and the next."""

    nodes: tuple[NodeProblem, ...]

    @cached_property
    def denominator(self) -> int:
        """A common denominator of the degrees."""
        finest: dict[Value | None, int] = {INPUT: 1, None: 1}
        for place, node in enumerate(self.nodes):
            read = {edge.argument: finest[edge.value] for edge in node.edges}
            for i, small in enumerate(node.small):
                terms = [] if small else [t for m, _ in node.modes for t in m.outputs[i].terms]
                common = lcm(*(read[name] * e.denominator for term in terms for name, e in term))
                finest[place, i] = common if common <= FINEST else 1
        return lcm(*finest.values())

    @cached_property
    def _uses(self) -> Counter[Value]:
        return Counter(value for node in self.nodes for _, value in node.read)

    def is_small(self, value: Value) -> bool:
        """Whether a value's degree can only be 0 or 1."""
        place, output = value
        return value == INPUT or self.nodes[int(place)].small[output]

    def scales_before(self, place: int) -> bool:
        """Whether a scale here is a scale at the only value read, which nobody else reads."""
        read = self.nodes[place].read
        return len(read) == 1 and self._uses[read[0][1]] == 1 and self.moves(place, *read[0])

    def moves(self, place: int, argument: str, value: Value) -> bool:
        """Whether a scale here is one at the value read, if gradient takes no other edge."""
        if value == INPUT:
            return False
        before = self.nodes[int(value[0])]
        terms = [t for m, _ in self.nodes[place].modes for r in m.outputs for t in r.terms]
        linear = all(power == 1 for term in terms for name, power in term if name == argument)
        return not before.is_end and before.scalable and linear

    def relaxed(self) -> Piece:
        """The same, but that every node can be left: at a price that makes it the obstacle."""
        nodes = []
        for node in self.nodes:
            has_degree = any(r.terms for r in node.modes[0][0].outputs)
            price = LAST_OF_ALL if has_degree else NEVER
            nodes.append(replace(node, leave=price if node.leave is None else node.leave))
        return Piece(tuple(nodes))


class Problem:
    """A graph as the problem of its nodes, by name, and the pieces it falls into.

    `ends`: the outputs that carry gradient. `seen`: the degrees that its operands have at a node
    without an edit.
    """

    def __init__(
        self,
        graph: ComputationGraph,
        live: Liveness,
        policy: Policy,
        seen: Mapping[str, Mapping[str, Fraction]],
    ) -> None:
        self.graph, self.live, self.policy, self.seen = graph, live, policy, seen
        self.ends = {v.name for v in graph.outputs if live.state(v) is State.LIVE}

    @cached_property
    def nodes(self) -> dict[str, NodeProblem]:
        """The live calls from which an output is reached, in graph order."""
        read = self._read()
        uses = Counter(v[0] for operands in read.values() for v in operands.values() if v)
        uses.update(self.ends)
        small: dict[Value | None, bool] = {INPUT: True, None: True}
        nodes = {}
        for name, operands in read.items():
            node = self._node(name, operands, uses[name], small)
            small |= {(name, i): is_small for i, is_small in enumerate(node.small)}
            nodes[name] = node
        return nodes

    def _node(
        self,
        name: str,
        read: Mapping[str, Value | None],
        uses: int,
        small: Mapping[Value | None, bool],
    ) -> NodeProblem:
        call, states = self.live.calls[name], self.live.states[name]
        modes = []
        for mode in call.operator.modes(call):
            # a region was folded by the user, in order to be integrated
            free = mode.edit is None or call.operator is REGION
            cost = 0 if free else OWN[mode.edit].price(self.policy, mode)  # type: ignore[index]
            modes += [(mode, cost)] if cost is not None else []
        # the only edge into a node that is read once: pruning the reader's edge is the same
        meets = sum(value is not None for value in read.values()) > 1 or uses != 1
        # the edges of a region are none of the graph that it is folded from
        meets = meets and call.operator.name != REGION.name
        return NodeProblem(
            tuple(modes),
            tuple(
                Edge(a, v, self._prune_cost(name, a) if meets else None) for a, v in read.items()
            ),
            tuple(state is State.LIVE for state in states),
            tuple(
                all(_is_small(mode.outputs[i], read, small) for mode, _ in modes)
                for i in range(len(states))
            ),
            self.policy.leave_cost(call),
            call.eps,
            name in self.ends,
        )

    def _read(self) -> dict[str, dict[str, Value | None]]:
        """What each of those calls reads, by argument, in graph order."""
        reaching = set(self.ends)
        read: dict[str, dict[str, Value | None]] = {}
        for name in reversed(self.order):
            node = self.graph.nodes[name]
            if name in reaching and name not in self.live.sources:
                call = self.live.calls.get(name)
                operands = [o for o in call.operands if o.name in call.moving] if call else []
                read[name] = {o.name: self._value(node, o.node) for o in operands if o.node}
                reaching |= {str(value[0]) for value in read[name].values() if value is not None}
        return dict(reversed(read.items()))

    def _value(self, user: fx.Node, operand: fx.Node) -> Value | None:
        """Which output of `operand` is read; None where it is frozen. As `degrees` reads it."""
        states = self.live.states[operand.name]
        item = next((i for i, s in enumerate(states) if s is State.LIVE), 0)
        if len(states) > 1 and target_name(user.target) == "getitem":
            item = range(len(states))[user.args[1]]  # type: ignore[index]
        if states[item] is not State.LIVE:
            return None
        return INPUT if operand.name in self.live.sources else (operand.name, item)

    def _prune_cost(self, name: str, argument: str) -> int | None:
        """What pruning an edge costs, by the operation whose value it holds fixed.

        A norm with a live weight rather loses the weight's gradient than its input's.
        """
        reader = self.live.calls[name]
        if reader.gate == argument and self.policy.secant is not None:
            return self.policy.secant
        cost = self._fixed_cost(name, reader.node(argument))
        scale = self.policy.scale
        if cost is not None and scale is not None and self._normalises(name, argument):
            return min(cost, 2 * scale - 1)  # rather than a scale and its inverse
        norm = reader.operator.algebra is Algebra.NORMALISER and len(reader.moving) > 1
        if cost is None or not (norm and argument == "input"):
            return cost
        return cost + (self.policy.freeze or 0) + 1

    def _normalises(self, name: str, argument: str) -> bool:
        """Whether an operand is the denominator of a quotient of degree 0, as a norm is."""
        reader, seen = self.live.calls[name], self.seen[name]
        terms = [t for r in polynomial(reader.operator.signature, reader) or () for t in r.terms]
        if not terms or any(sum(p * seen[n] for n, p in term) for term in terms):
            return False
        powers = [p for term in terms for n, p in term if n == argument]
        call = self._computed_by(reader.node(argument), [])
        own = polynomial(call.operator.signature, call) if call and call.operator.kind.ruled else ()
        inverse = [p for r in own or () for t in r.terms for _, p in t]
        return any(p < 0 for p in powers) or (bool(inverse) and all(p < 0 for p in inverse))

    def _fixed_cost(self, name: str, value: fx.Node | None) -> int | None:
        passed: list[fx.Node] = [self.graph.nodes[name]]
        call = self._computed_by(value, passed)
        modules = {module_path(node) for node in passed}
        return Prune.price(self.policy, call.operator if call else None, modules)

    def is_factor(self, name: str, argument: str) -> bool:
        """Whether an edge brings one of two equal factors, and no gate, weight or divisor: its
        value is made of its inputs by linear steps and norms last."""
        reader = self.live.calls[name]
        if reader.operator.algebra is not Algebra.MULTILINEAR or reader.gate:
            return False
        made = self._computed_by(reader.node(argument), [])
        bends = made is not None and made.operator.algebra not in _FACTORS
        return not bends and not self._normalises(name, argument)

    def _computed_by(self, value: fx.Node | None, passed: list[fx.Node]) -> Call | None:
        """The call that computes a value, past what merely moves it; `passed`: all on the way."""
        while value is not None and (call := self.live.calls.get(value.name)):
            passed.append(value)
            if call.operator.algebra is not Algebra.STRUCTURAL or len(call.moving) != 1:
                return call
            (moved,) = call.moving
            value = call.node(moved)
        return None

    @cached_property
    def order(self) -> list[str]:
        """The nodes, all that an operand needs before what the next one does: where two plans cost
        the same the order decides, and so it is that of the expression, not of its evaluation."""
        found: dict[fx.Node, None] = {}
        stack = [*reversed(self.graph.outputs)]
        while stack:
            needed = [n for n in stack[-1].all_input_nodes if n not in found]
            if not needed:
                found[stack.pop()] = None
            stack += reversed(needed)
        return [node.name for node in found]

    def pieces(self) -> Iterator[list[str]]:
        """The names between one cut and the next; at a cut the degree must be 1.

        A node that no edge jumps over lies on every gradient path. Were its degree 0 the output's
        would be 0 as well; if it can only be 0 or 1, it is 1.
        """
        index = {name: i for i, name in enumerate(self.order)}
        reach = max((index[s] for s in self.live.sources if s in index), default=-1)
        last_read = dict.fromkeys(self.nodes, -1)
        for name, node in self.nodes.items():
            for _, value in node.read:
                last_read[str(value[0])] = index[name]
                reach = max(reach, index[name]) if value == INPUT else reach
        last_read |= dict.fromkeys(self.ends, len(index))
        piece: list[str] = []
        for name, node in self.nodes.items():
            piece.append(name)
            if reach <= index[name] and node.small == (True,):
                yield piece
                piece = []
            reach = max(reach, last_read[name])
        if piece:
            yield piece

    def without_names(self, names: Sequence[str]) -> Piece:
        """A piece with places for names, by which equal ones are known."""
        place = {name: i for i, name in enumerate(names)}

        def local(edge: Edge) -> Edge:
            if edge.value is None:
                return edge
            node, output = edge.value
            return replace(edge, value=(place[str(node)], output) if node in place else INPUT)

        nodes = [self.nodes[name] for name in names]
        nodes = [replace(node, edges=tuple(map(local, node.edges))) for node in nodes]
        if nodes[-1].small == (True,):
            nodes[-1] = replace(nodes[-1], is_end=True)
        return Piece(tuple(nodes))


_FACTORS = (Algebra.STRUCTURAL, Algebra.AFFINE, Algebra.MULTILINEAR, Algebra.NORMALISER)


def _is_small(
    relation: Relation, read: Mapping[str, Value | None], small: Mapping[Value | None, bool]
) -> bool:
    """Whether an output's degree can only be 0 or 1, whatever is edited before it."""
    if relation.frozen or not relation.terms or relation.domain is not None:
        return True
    for term in relation.terms:
        moving = [(read[name], exponent) for name, exponent in term if read[name] is not None]
        if not moving or (len(moving) == 1 and moving[0][1] == 1 and small[moving[0][0]]):
            return True
    return False
