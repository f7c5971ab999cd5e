"""Which values are constant, live or frozen: how each depends on the input, before any edit."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

import torch
from torch import fx

from ..errors import TrainingModeError, UnregisteredOperationError
from ..graph.computation import ComputationGraph, holds_tensor, is_float
from ..graph.normal import enter_autocast, leave_autocast
from ..operators.algebra import Algebra, Role
from ..operators.calls import Call, bind, operands, target_name
from ..operators.record import Operator
from ..operators.registry import LEAF, check_argument, lookup
from ..operators.relations import polynomial, signature_names


class State(StrEnum):
    """How a value depends on the input."""

    CONSTANT = "constant"
    LIVE = "live"
    FROZEN = "frozen"


States = tuple[State, ...]
"""of a node, one an output"""


@dataclass(frozen=True)
class Liveness:
    """The states of all nodes (a tuple for multi-output ones), the calls that read moving values.

    `sources` are the nodes attribution ends at: float inputs, and embeddings of integer inputs.
    """

    states: Mapping[str, States]
    calls: Mapping[str, Call]
    sources: tuple[str, ...]

    def state(self, node: fx.Node) -> State:
        """The state of a node; a multi-output node counts as its most live output."""
        return _most(self.states[node.name])


def _most(states: States) -> State:
    order = (State.CONSTANT, State.FROZEN, State.LIVE)
    return max(states, key=order.index, default=State.CONSTANT)


def liveness(graph: ComputationGraph) -> Liveness:
    """Follow dependence on the input through the graph, before any edit.

    Raises `UnregisteredOperationError` with every operation on the way that nobody registered.
    """
    walk = _walk(graph)
    nodes: dict[str, list[str]] = {}
    for node, call in walk.unknown.items():
        nodes.setdefault(call.operator.name, []).append(node)
    if not nodes:
        return Liveness(walk.states, _mark_eps(graph, walk.calls), tuple(walk.sources))
    lines = [
        f"  {name}: {graph.describe(calls[0])}"
        + (f" and {len(calls) - 1} more" if len(calls) > 1 else "")
        for name, calls in sorted(nodes.items())
    ]
    raise UnregisteredOperationError(
        "these operations carry the input and are not registered:\n"
        + "\n".join(lines)
        + "\nregister each with its class and degree rule, a sum of products of its arguments, "
        "for example\n"
        "  from fullgrad_theory import Algebra, register\n"
        + "\n".join(f"  {_entry(walk.unknown[calls[0]])}" for _, calls in sorted(nodes.items()))
        + "\nor have them measured as black boxes, for a verdict of numeric at most: "
        'unknown="measure" (on the command line --unknown measure)'
    )


def _entry(call: Call) -> str:
    """The words that register an operation, with its real arguments; its class nobody knows."""
    tensors = dict.fromkeys(o.name.partition("[")[0] for o in call.operands if o.node is not None)
    words = f"register({call.operator.name!r}, Algebra.HOMOGENEOUS, {' + '.join(tensors)!r})"
    return f"{words}  # of its arguments {', '.join(call.arguments)}"


def unregistered(graph: ComputationGraph) -> dict[str, Call]:
    """The calls that read moving values and that neither the registry nor a measurement knows."""
    return _walk(graph).unknown


@dataclass
class _Walk:
    """What is known on the way through a graph. `unknown`: calls nobody knows, taken to be live;
    `ids`: integer values that come from an integer input alone."""

    graph: ComputationGraph
    states: dict[str, States] = field(default_factory=dict)
    calls: dict[str, Call] = field(default_factory=dict)
    sources: list[str] = field(default_factory=list)
    unknown: dict[str, Call] = field(default_factory=dict)
    ids: set[str] = field(default_factory=set)

    def state(self, node: fx.Node) -> State:
        return _most(self.states[node.name])


def _walk(graph: ComputationGraph) -> _Walk:
    walk = _Walk(graph)
    for node in graph.fx.graph.nodes:
        state: States = (State.CONSTANT,)
        if node.op == "placeholder" and is_float(node):
            walk.sources.append(node.name)
            state = (State.LIVE,)
        elif node.op == "placeholder" and holds_tensor(node):
            walk.ids.add(node.name)
            state = (State.FROZEN,)
        elif node.op == "call_function" and node.target not in (enter_autocast, leave_autocast):
            state = _called(walk, node)
        walk.states[node.name] = state
    return walk


def _called(walk: _Walk, node: fx.Node) -> States:
    """The states of a call's outputs; writes down the call where it reads what moves."""
    known = lookup(target_name(node.target))
    moves = [n for n in node.all_input_nodes if walk.state(n) is not State.CONSTANT]
    if moves and all(n.name in walk.ids for n in moves):
        if known is not None and Role.LOOKUP in known.roles:
            walk.sources.append(node.name)  # attribution ends where ids become values
            return (State.LIVE,)
        if not is_float(node):
            walk.ids.add(node.name)
    if not moves and known is None and _is_random(node):
        raise TrainingModeError(
            f"{walk.graph.describe(node.name)} is random: two runs differ, and no verdict holds "
            "for both; draw it outside of the model and pass it in, or keep it in a buffer"
        )
    if not moves or not holds_tensor(node):  # a size or a flag is independent of values
        return (State.CONSTANT,)
    found = walk.graph.measured.get(node.name) or known
    if node.target is operator.getitem and known is not None:
        walk.calls[node.name] = _call(known, node, walk)
        return _item(walk.states[node.all_input_nodes[0].name], node.args[1])
    if found is None:
        nobody = Operator(target_name(node.target), Algebra.SMOOTH)
        walk.unknown[node.name] = _call(nobody, node, walk)
        return (State.LIVE,)
    return _known_call(walk, node, _call(found, node, walk))


def _is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _item(states: States, index: fx.node.Argument) -> States:
    return (states[index],) if len(states) > 1 else states  # type: ignore[index, return-value]


def _call(op: Operator, node: fx.Node, walk: _Walk) -> Call:
    arguments = bind(node)
    every = tuple(operands(arguments))
    moving = frozenset(
        o.name
        for o in every
        if o.node is not None
        and o.name not in op.shapes
        and walk.state(o.node) is not State.CONSTANT
    )
    return Call(op, every, arguments, moving)


def _known_call(walk: _Walk, node: fx.Node, call: Call) -> States:
    """The states of its outputs, by its class."""
    op = call.operator
    _check_names(walk.graph, call, node)
    refused = op.refuses(call.arguments) if op.refuses else None
    if refused:
        raise UnregisteredOperationError(f"{walk.graph.describe(node.name)}: {refused}")
    if not call.moving:  # the input lends a shape
        return (State.CONSTANT,)
    walk.calls[node.name] = call
    if op.algebra is Algebra.FACTORY:
        return (State.CONSTANT,)
    read = [o.node for o in call.operands if o.name in call.moving and o.node is not None]
    live = any(walk.state(value) is State.LIVE for value in read)
    outputs = op.modes(call)[0].outputs
    if op.algebra is Algebra.FREEZING or not live or not is_float(node):
        return (State.FROZEN,) * len(outputs)
    return tuple(State.FROZEN if r.frozen else State.LIVE for r in outputs)


def _check_names(graph: ComputationGraph, call: Call, node: fx.Node) -> None:
    """What is kept whole gets its arguments when it is traced: its degree rule is read here."""
    if call.operator.name.startswith(LEAF) and call.operator.kind.ruled:
        try:
            for argument in signature_names(call.operator.signature):
                check_argument(call.operator.name, call.arguments, argument)
        except ValueError as error:
            raise UnregisteredOperationError(f"{graph.describe(node.name)}: {error}") from None


def _mark_eps(graph: ComputationGraph, calls: Mapping[str, Call]) -> dict[str, Call]:
    """A literal that only reaches a divisor belongs to the frozen denominator, it is no bias."""
    divides: dict[str, bool] = {}

    def only_divides(node: fx.Node) -> bool:
        if node.name not in divides:
            divides[node.name] = bool(node.users) and all(
                user.name in calls and reads_as_divisor(user, node) for user in node.users
            )
        return divides[node.name]

    def reads_as_divisor(user: fx.Node, value: fx.Node) -> bool:
        call = calls[user.name]
        relations = polynomial(call.operator.signature, call)
        names = {o.name for o in call.operands if o.node is value}
        if relations is None or len(relations) != 1 or call.operator.edits:
            return False
        powers = [e for term in relations[0].terms for name, e in term if name in names]
        if len(powers) == len(names) and all(power < 0 for power in powers):
            return True
        keeps = len(relations[0].terms) == 1 == len(relations[0].terms[0])
        return keeps and all(power > 0 for power in powers) and only_divides(user)

    def adds_literal(call: Call) -> bool:
        if call.operator.algebra is not Algebra.AFFINE or not call.moving:
            return False
        relations = polynomial(call.operator.signature, call)
        literal = any(o.node is None and o.literal for o in call.operands)
        return literal and relations is not None and relations[0].domain is not None

    return {
        name: replace(c, eps=True) if adds_literal(c) and only_divides(graph.nodes[name]) else c
        for name, c in calls.items()
    }
