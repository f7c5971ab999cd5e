"""Which values are constant, live or frozen: how each depends on the input, before any edit."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

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


@dataclass(frozen=True)
class Liveness:
    """The states of all nodes (a tuple for multi-output ones), the calls that read moving values.

    `sources` are the nodes attribution ends at: float inputs, and embeddings of integer inputs.
    """

    states: Mapping[str, tuple[State, ...]]
    calls: Mapping[str, Call]
    sources: tuple[str, ...]

    def state(self, node: fx.Node) -> State:
        """The state of a node; a multi-output node counts as its most live output."""
        return _most(self.states[node.name])


def _most(states: Iterable[State]) -> State:
    order = (State.CONSTANT, State.FROZEN, State.LIVE)
    return max(states, key=order.index, default=State.CONSTANT)


def liveness(graph: ComputationGraph) -> Liveness:
    """Follow dependence on the input through the graph, before any edit.

    Raises `UnregisteredOperationError` with every operation on the way that nobody registered.
    """
    live, unknown = _walk(graph)
    if unknown:
        nodes: dict[str, list[str]] = {}
        for node, call in unknown.items():
            nodes.setdefault(call.operator.name, []).append(node)
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
            + "\n".join(f"  {_entry(unknown[calls[0]])}" for _, calls in sorted(nodes.items()))
            + "\nor have them measured as black boxes, for a verdict of numeric at most: "
            'unknown="measure" (on the command line --unknown measure)'
        )
    return replace(live, calls=_mark_eps(graph, dict(live.calls)))


def _entry(call: Call) -> str:
    """The words that register an operation, with its real arguments; its class nobody knows."""
    tensors = dict.fromkeys(o.name.partition("[")[0] for o in call.operands if o.node is not None)
    words = f"register({call.operator.name!r}, Algebra.HOMOGENEOUS, {' + '.join(tensors)!r})"
    return f"{words}  # of its arguments {', '.join(call.arguments)}"


def unregistered(graph: ComputationGraph) -> dict[str, Call]:
    """The calls that read moving values and that neither the registry nor a measurement knows."""
    return _walk(graph)[1]


def _walk(graph: ComputationGraph) -> tuple[Liveness, dict[str, Call]]:
    """The states of all nodes, and the calls nobody knows, which are taken to be live."""
    states: dict[str, tuple[State, ...]] = {}
    calls: dict[str, Call] = {}
    sources: list[str] = []
    unknown: dict[str, Call] = {}
    ids: set[str] = set()  # integer values that come from an integer input alone
    for node in graph.fx.graph.nodes:
        state: tuple[State, ...] = (State.CONSTANT,)
        inputs = node.all_input_nodes
        if node.op == "placeholder":
            if is_float(node):
                state = (State.LIVE,)
                sources.append(node.name)
            elif holds_tensor(node):
                state = (State.FROZEN,)
                ids.add(node.name)
        elif node.op == "call_function" and node.target not in (enter_autocast, leave_autocast):
            name = target_name(node.target)
            moves = [n for n in inputs if _most(states[n.name]) is not State.CONSTANT]
            moving = bool(moves)
            only_ids = moving and all(n.name in ids for n in moves)
            if only_ids and not is_float(node):
                ids.add(node.name)
            known = lookup(name)
            if only_ids and known is not None and Role.LOOKUP in known.roles:
                state = (State.LIVE,)
                sources.append(node.name)
            elif not moving and known is None and _is_random(node):
                raise TrainingModeError(
                    f"{graph.describe(node.name)} is random: two runs differ, and no verdict holds "
                    "for both; draw it outside of the model and pass it in, or keep it in a buffer"
                )
            elif not holds_tensor(node):
                pass  # a size or a flag: independent of values
            elif node.target is operator.getitem and moving:
                state = _item(states[inputs[0].name], node.args[1])
                calls[node.name] = _call(known, node, states)  # type: ignore[arg-type]
            elif moving:
                found = graph.measured.get(node.name) or known
                if found is None:
                    nobody = Operator(name, Algebra.SMOOTH)
                    unknown[node.name] = _call(nobody, node, states)
                    state = (State.LIVE,)
                else:
                    call = _call(found, node, states)
                    _check_names(graph, call, node)
                    refused = found.refuses(call.arguments) if found.refuses else None
                    if refused:
                        raise UnregisteredOperationError(f"{graph.describe(node.name)}: {refused}")
                    if call.moving:  # else the input lends a shape
                        calls[node.name] = call
                        state = _result(found, node, call, states)
        states[node.name] = state
    return Liveness(states, calls, tuple(sources)), unknown


def _check_names(graph: ComputationGraph, call: Call, node: fx.Node) -> None:
    """What is kept whole gets its arguments when it is traced: its degree rule is read here."""
    polynomial_class = not call.operator.edits and call.operator.algebra is not Algebra.FREEZING
    if call.operator.name.startswith(LEAF) and polynomial_class:
        try:
            for argument in signature_names(call.operator.signature):
                check_argument(call.operator.name, call.arguments, argument)
        except ValueError as error:
            raise UnregisteredOperationError(f"{graph.describe(node.name)}: {error}") from None


def _is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _item(states: tuple[State, ...], index: Any) -> tuple[State, ...]:
    return (states[index],) if len(states) > 1 else states


def _call(op: Operator, node: fx.Node, states: Mapping[str, tuple[State, ...]]) -> Call:
    arguments = bind(node)
    every = tuple(operands(arguments))
    moving = frozenset(
        o.name
        for o in every
        if o.node is not None
        and o.name not in op.shapes
        and _most(states[o.node.name]) is not State.CONSTANT
    )
    return Call(op, every, arguments, moving)


def _result(
    op: Operator, node: fx.Node, call: Call, states: Mapping[str, tuple[State, ...]]
) -> tuple[State, ...]:
    if op.algebra is Algebra.FACTORY:
        return (State.CONSTANT,)
    live = any(
        _most(states[o.node.name]) is State.LIVE
        for o in call.operands
        if o.name in call.moving and o.node is not None
    )
    outputs = op.modes(call)[0].outputs
    if op.algebra is Algebra.FREEZING or not live or not is_float(node):
        return (State.FROZEN,) * len(outputs)
    return tuple(State.FROZEN if r.frozen else State.LIVE for r in outputs)


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
