"""A graph and a policy as the labelling problem: prices at each node, and the pieces it falls into.

The graph is cut where every gradient path passes one value whose degree must be 1 (the residual
stream); the pieces are solved one by one, equal ones once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from torch import fx

from ..edits.costs import Policy
from ..edits.kinds import OWN, Prune
from ..graph.computation import ComputationGraph
from ..graph.sources import module_path
from ..operators.algebra import Algebra
from ..operators.calls import Call, target_name
from ..operators.registry import REGION
from ..operators.relations import Mode, Relation
from .piece import INPUT, Edge, NodeProblem, Piece, PricedMode, Value
from .states import Liveness, State


class Problem:
    """A graph as the problem of its nodes, by name, and the pieces it falls into.

    `ends`: the outputs that carry gradient.
    """

    def __init__(self, graph: ComputationGraph, live: Liveness, policy: Policy) -> None:
        self.graph, self.live, self.policy = graph, live, policy
        self.ends = {v.name for v in graph.outputs if live.state(v) is State.LIVE}

    @cached_property
    def nodes(self) -> dict[str, NodeProblem]:
        """The live calls from which an output is reached, in graph order."""
        read = self._read()
        values = Counter(v[0] for operands in read.values() for v in operands.values() if v)
        uses = values + Counter(self.ends)
        small: dict[Value | None, bool] = {INPUT: True, None: True}
        return {name: self._node(name, read[name], uses[name], small) for name in read}

    def _node(
        self,
        name: str,
        read: Mapping[str, Value | None],
        uses: int,
        small: dict[Value | None, bool],
    ) -> NodeProblem:
        """The problem of one node; writes down which of its outputs are small."""
        call = self.live.calls[name]
        priced = [(m, _mode_cost(self.policy, call, m)) for m in call.operator.modes(call)]
        modes = tuple(PricedMode(m.edit, c, m.outputs) for m, c in priced if c is not None)
        states = self.live.states[name]
        for i in range(len(states)):
            small[name, i] = all(_is_small(m.relations[i], read, small) for m in modes)
        # the only edge into a node that is read once: pruning the reader's edge is the same
        meets = sum(value is not None for value in read.values()) > 1 or uses != 1
        return NodeProblem(
            modes,
            tuple(
                Edge(a, v, self._prune_cost(name, a) if meets else None) for a, v in read.items()
            ),
            tuple(state is State.LIVE for state in states),
            tuple(small[name, i] for i in range(len(states))),
            self.policy.leave_cost(call),
            call.eps,
            name in self.ends,
        )

    # ------------------------------------------------------------------ what is read

    def _read(self) -> dict[str, dict[str, Value | None]]:
        """What each of those calls reads, by argument, in graph order."""
        reaching = set(self.ends)
        read = {}
        for name in reversed(self.graph.nodes):
            if name in reaching and name not in self.live.sources:
                read[name] = self._operands(name)
                reaching |= {str(value[0]) for value in read[name].values() if value is not None}
        return dict(reversed(read.items()))

    def _operands(self, name: str) -> dict[str, Value | None]:
        call = self.live.calls.get(name)
        if call is None:
            return {}
        node = self.graph.nodes[name]
        read = [(o.name, o.node) for o in call.operands if o.name in call.moving]
        return {n: self._value(node, o) for n, o in read if o is not None}

    def _value(self, user: fx.Node, operand: fx.Node) -> Value | None:
        """Which output of `operand` is read; None where it is frozen. As `degrees` reads it."""
        states = self.live.states[operand.name]
        item = next((i for i, s in enumerate(states) if s is State.LIVE), 0)
        if len(states) > 1 and target_name(user.target) == "getitem":
            item = range(len(states))[user.args[1]]  # type: ignore[index]
        if states[item] is not State.LIVE:
            return None
        return INPUT if operand.name in self.live.sources else (operand.name, item)

    # ------------------------------------------------------------------ what a prune costs

    def _prune_cost(self, name: str, argument: str) -> int | None:
        """What pruning an edge costs, by the operation whose value it holds fixed.

        A norm with a live weight rather loses the weight's gradient than its input's.
        """
        reader = self.live.calls[name]
        cost = self._fixed_cost(name, reader.node(argument))
        norm = reader.operator.algebra is Algebra.NORMALISER and len(reader.moving) > 1
        if cost is None or not (norm and argument == "input"):
            return cost
        return cost + (self.policy.freeze or 0) + 1

    def _fixed_cost(self, name: str, value: fx.Node | None) -> int | None:
        modules = {module_path(self.graph.nodes[name])}
        while value is not None and (call := self.live.calls.get(value.name)):
            modules.add(module_path(value))
            if call.operator.algebra is not Algebra.STRUCTURAL or len(call.moving) != 1:
                return Prune.price(self.policy, call.operator, modules)
            (moved,) = call.moving
            value = call.node(moved)
        return Prune.price(self.policy, None, modules)

    # ------------------------------------------------------------------ pieces

    def pieces(self) -> Iterator[list[str]]:
        """The names between one cut and the next; at a cut the degree must be 1.

        A node that no edge jumps over lies on every gradient path. Were its degree 0 the output's
        would be 0 as well; if it can only be 0 or 1, it is 1.
        """
        index = {name: i for i, name in enumerate(self.graph.nodes)}
        reach = max((index[s] for s in self.live.sources), default=-1)
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

        def local(value: Value | None) -> Value | None:
            if value is None:
                return None
            return (place[str(value[0])], value[1]) if value[0] in place else INPUT

        def placed(node: NodeProblem) -> NodeProblem:
            return replace(node, edges=tuple(replace(e, value=local(e.value)) for e in node.edges))

        nodes = [placed(self.nodes[name]) for name in names]
        if nodes[-1].small == (True,):
            nodes[-1] = replace(nodes[-1], is_end=True)
        return Piece(tuple(nodes))


def _mode_cost(policy: Policy, call: Call, mode: Mode) -> int | None:
    """What the policy asks; a region was folded by the user, in order to be integrated."""
    if mode.edit is None or call.operator is REGION:
        return 0
    return OWN[mode.edit].price(policy, mode)


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
