"""Which values are constant, live or frozen: how each depends on the input, before any edit."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property, partial
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from ..errors import TrainingModeError, UnregisteredOperationError
from ..graph.causes import other_experts
from ..graph.computation import ComputationGraph, holds_tensor, is_float
from ..graph.constants import Constants
from ..graph.normal import enter_autocast, leave_autocast
from ..graph.sources import module_path
from ..operators.algebra import Algebra, Role
from ..operators.calls import Call, Operand, bind, is_ray, operands, target_name
from ..operators.record import Operator
from ..operators.registry import LEAF, check_argument, lookup
from ..operators.relations import constant_monomials, exponent_names, polynomial, signature_names
from .gating import mark_gates
from .jumps import mark_jumps


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
    `exponents`: the parameters that a degree is read from.
    """

    states: Mapping[str, States]
    calls: Mapping[str, Call]
    sources: tuple[str, ...]
    exponents: frozenset[str] = frozenset()

    def state(self, node: fx.Node) -> State:
        """The state of a node; a multi-output node counts as its most live output."""
        return _most(self.states[node.name])


def integers_behind(graph: ComputationGraph, live: Liveness, node: fx.Node) -> tuple[str, ...]:
    """The integer inputs that a value without gradient is made of, where it is of these alone."""
    behind = [node]
    for n in behind:
        behind += [m for m in n.all_input_nodes if m not in behind]
    read = [n for n in behind if n.op == "placeholder" and live.state(n) is not State.CONSTANT]
    floats = any(is_float(n) for n in read) or any(n.name in live.sources for n in behind)
    return () if floats else tuple(n.name for n in read if n.name not in graph.held)


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
        calls = _mark_eps(graph, mark_gates(walk, mark_jumps(walk)))
        return Liveness(walk.states, calls, tuple(walk.sources), frozenset(walk.exponents))
    lines = [
        f"  {name}: {graph.describe(calls[0])}"
        + (f" and {len(calls) - 1} more" if len(calls) > 1 else "")
        for name, calls in sorted(nodes.items())
    ]
    experts = other_experts(graph.model, [module_path(graph.nodes[name]) for name in walk.unknown])
    raise UnregisteredOperationError(
        "these operations carry the input and are not registered:\n"
        + "\n".join(lines)
        + (f"\n{experts}: its experts then run by operations that are known; or" if experts else "")
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
class Walk:
    """What is known on the way through a graph. `unknown`: calls nobody knows, taken to be live;
    `ids`: integer values that come from an integer input alone; `indicators`: zeros and ones that
    say which one they are; `lookups`: what holds looked up values among others."""

    graph: ComputationGraph
    states: dict[str, States] = field(default_factory=dict)
    calls: dict[str, Call] = field(default_factory=dict)
    sources: list[str] = field(default_factory=list)
    unknown: dict[str, Call] = field(default_factory=dict)
    ids: set[str] = field(default_factory=set)
    indicators: set[str] = field(default_factory=set)
    lookups: set[str] = field(default_factory=set)
    exponents: set[str] = field(default_factory=set)

    @cached_property
    def constants(self) -> Constants:
        return Constants(self.graph, partial(_moves, self.states))  # not a cycle through the walk

    def moves(self, node: fx.Node) -> bool:
        """Whether a node depends on the input."""
        return _moves(self.states, node)

    def is_live(self, node: fx.Node) -> bool:
        return self.state(node) is State.LIVE

    def state(self, node: fx.Node) -> State:
        return _most(self.states[node.name])


def _moves(states: Mapping[str, States], node: fx.Node) -> bool:
    return _most(states[node.name]) is not State.CONSTANT


def _walk(graph: ComputationGraph) -> Walk:
    walk = Walk(graph)
    for node in graph.fx.graph.nodes:
        state: States = (State.CONSTANT,)
        if node.name in graph.held:
            pass  # as a buffer would be
        elif node.op == "placeholder" and is_float(node):
            walk.sources.append(node.name)
            state = (State.LIVE,)
        elif node.op == "placeholder" and holds_tensor(node):
            walk.ids.add(node.name)
            state = (State.FROZEN,)
        elif node.op == "call_function" and node.target not in (enter_autocast, leave_autocast):
            state = _called(walk, node)
            if _is_decided(walk, node):
                state = tuple(State.FROZEN if s is State.CONSTANT else s for s in state)
        walk.states[node.name] = state
    return walk


def _is_decided(walk: Walk, node: fx.Node) -> bool:
    """Whether values of the input decide the number that a node is, or the size that it has."""
    moves = any(map(walk.moves, node.all_input_nodes))
    return moves and bool(free_unbacked_symbols(node.meta.get("val")))


def _called(walk: Walk, node: fx.Node) -> States:
    """The states of a call's outputs; writes down the call where it reads what moves."""
    known = lookup(target_name(node.target))
    moves = list(filter(walk.moves, node.all_input_nodes))
    looked_up = _looked_up(walk, node, known, moves)
    if looked_up:
        return looked_up
    if known is None and _is_random(node):
        raise TrainingModeError(
            f"{walk.graph.describe(node.name)} is random: two runs differ, and no verdict holds "
            "for both; draw it outside of the model and pass it in, or keep it in a buffer"
        )
    if not moves or not holds_tensor(
        node
    ):  # a size: whether values decide it is seen by its symbol
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


_PRODUCTS = frozenset((Role.CONTRACTION, Role.LINEAR, Role.EQUATION))


def _looked_up(
    walk: Walk, node: fx.Node, known: Operator | None, moves: list[fx.Node]
) -> States | None:
    """The states of what integers of the input look up in constants, where attribution ends.

    A row of a table by its number, or by a product with the indicator of that number.
    """
    if known is None or not moves:
        return None
    if node.target is operator.getitem and moves[0].name in walk.lookups:
        walk.sources.extend([node.name] if is_float(node) else [])
        return (State.LIVE if is_float(node) else State.FROZEN,)
    of_ids = all(n.name in walk.ids for n in moves)
    of_indicators = all(n.name in walk.indicators for n in moves)
    finds = of_ids and Role.LOOKUP in known.roles
    if is_float(node) and (finds or (of_indicators and _PRODUCTS & known.roles)):
        outputs = node.meta.get("val")
        if isinstance(outputs, (tuple, list)):
            walk.lookups.add(node.name)
            return tuple(State.LIVE if is_ray(v) else State.FROZEN for v in outputs)
        walk.sources.append(node.name)
        return (State.LIVE,)
    if of_ids and not is_float(node):
        walk.ids.add(node.name)
    kept = known.algebra is Algebra.STRUCTURAL and of_indicators
    if kept or (of_ids and Role.INDICATOR in known.roles):
        walk.indicators.add(node.name)
    return None


def _is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _item(states: States, index: fx.node.Argument) -> States:
    return (states[index],) if len(states) > 1 else states  # type: ignore[index, return-value]


def _call(op: Operator, node: fx.Node, walk: Walk) -> Call:
    arguments = bind(node)
    moving = frozenset(
        o.name
        for o in operands(arguments)
        if o.node is not None and o.name not in op.shapes and walk.moves(o.node)
    )
    op = (op.becomes and op.becomes(_sized(arguments), moving)) or op
    arguments |= {n: _exponent(arguments[n], walk) for n in exponent_names(op.signature)}
    every = [_with_zero(o, walk) for o in operands(arguments)]
    return Call(op, tuple(every), arguments, moving)


def _sized(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments, the sizes among them as what is known of them, not as nodes."""

    def known(node: fx.Node) -> Any:
        return node if holds_tensor(node) else node.meta.get("val", node)

    return {name: fx.map_arg(value, known) for name, value in arguments.items()}


def _exponent(value: Any, walk: Walk) -> Any:
    """An exponent as the number that it is, where it is a constant, however it is stored."""
    if not isinstance(value, fx.Node) or walk.moves(value):
        return value
    number = walk.constants.number(value)
    walk.exponents |= walk.constants.read_by(value) if number is not None else set()
    return value if number is None else number


def _with_zero(operand: Operand, walk: Walk) -> Operand:
    """The operand; as a literal 0 where the model's code fills it with zeros."""
    node = operand.node
    if node is None or walk.moves(node) or not is_float(node):
        return operand
    return replace(operand, literal=0.0) if walk.constants.is_written_zero(node) else operand


def _known_call(walk: Walk, node: fx.Node, call: Call) -> States:
    """The states of its outputs, by its class."""
    op = call.operator
    _check_names(walk.graph, call, node)
    refused = op.refuses(_sized(call.arguments)) if op.refuses else None
    if refused:
        raise UnregisteredOperationError(f"{walk.graph.describe(node.name)}: {refused}")
    if not call.moving:  # the input lends a shape
        return (State.CONSTANT,)
    walk.calls[node.name] = call
    if op.algebra is Algebra.FACTORY:  # of a tensor it takes the shape, and a number is filled in
        filled = [o for o in call.operands if o.name in call.moving and not holds_tensor(o.node)]  # type: ignore[arg-type]
        return (State.FROZEN if filled else State.CONSTANT,)
    if op.kind.ruled and op.algebra is not Algebra.NORMALISER:
        relations = polynomial(op.signature, call)
        if relations and all(not (r.terms or r.domain or r.frozen) for r in relations):
            del walk.calls[node.name]  # every product in it has a factor that is written as 0
            return (State.CONSTANT,) * len(relations)
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
        added = constant_monomials(call)
        reads = {o.name: o.node for o in call.operands}
        literal = any(all(reads[name] is None for name in names) for names in added)
        return literal and relations is not None and relations[0].domain is not None

    return {
        name: replace(c, eps=True) if adds_literal(c) and only_divides(graph.nodes[name]) else c
        for name, c in calls.items()
    }
