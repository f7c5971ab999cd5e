"""The abstract interpretation: which values are constant, live or frozen, and of what degree.

Leaves (inputs and bias leaves) have degree 1, coefficients and frozen values 0. A node where no
degree fits is *violated*; the analysis goes on behind it as if it were mended (degree 1), so that
blame falls on the node that breaks completeness and not on those that follow it.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from fractions import Fraction
from math import prod
from typing import Any

import torch
from torch import fx

from .errors import PlanError, TrainingModeError, UnregisteredOperationError
from .fold import fold
from .functionalise import enter_autocast, leave_autocast
from .operators import Algebra, Call, Mode, Operator, Relation, bind, lookup, target_name
from .operators.base import bias_operands, operands, polynomial
from .rules import NODE_EDITS, Edit, Prune, Scale
from .trace import ComputationGraph, holds_tensor, is_float

ONE, ZERO = Fraction(1), Fraction(0)


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
            + "\nregister each with its class and degree rule, for example\n"
            "  from fullgrad_theory.operators import Algebra, register\n"
            f"  register({sorted(nodes)[0]!r}, Algebra.STRUCTURAL, 'self')\n"
            "or have them measured as black boxes, for a verdict of numeric at most: "
            'unknown="measure" (on the command line --unknown measure)'
        )
    return replace(live, calls=_mark_eps(graph, dict(live.calls)))


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
            if only_ids and name == "aten.embedding.default":
                state = (State.LIVE,)
                sources.append(node.name)
            elif not moving and lookup(name) is None and _is_random(node):
                raise TrainingModeError(
                    f"{graph.describe(node.name)} is random: two runs differ, and no verdict holds "
                    "for both; draw it outside of the model and pass it in, or keep it in a buffer"
                )
            elif not holds_tensor(node):
                pass  # a size or a flag: independent of values
            elif node.target is operator.getitem and moving:
                state = _item(states[inputs[0].name], node.args[1])
                calls[node.name] = _call(lookup(name), node, states)  # type: ignore[arg-type]
            elif moving:
                found = graph.measured.get(node.name) or lookup(name)
                if found is None:
                    nobody = Operator(name, Algebra.SMOOTH)
                    unknown[node.name] = _call(nobody, node, states)
                    state = (State.LIVE,)
                else:
                    call = _call(found, node, states)
                    refused = found.refuses(call.arguments) if found.refuses else None
                    if refused:
                        raise UnregisteredOperationError(f"{graph.describe(node.name)}: {refused}")
                    if call.moving:  # else the input lends a shape
                        calls[node.name] = call
                        state = _result(found, node, call, states)
        states[node.name] = state
    return Liveness(states, calls, tuple(sources)), unknown


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
        name: Call(c.operator, c.operands, c.arguments, c.moving, True)
        if adds_literal(c) and only_divides(graph.nodes[name])
        else c
        for name, c in calls.items()
    }


# --------------------------------------------------------------------------- degrees


@dataclass(frozen=True)
class Fact:
    """What is known of one value: state, degree, and the nodes that made the degree not 1."""

    state: State
    degree: Fraction = ZERO
    origins: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Finding:
    """Why a node breaks completeness. `opaque`: a frozen value is added to a live one."""

    node: str
    reason: str
    opaque: bool = False


@dataclass(frozen=True)
class Degrees:
    """The labelling of a graph under some edits.

    `facts[node]`: a tuple, one an output. `seen[node]`: operand name -> degree at that edge (0
    where pruned or frozen). `biases[node]`: operands that are bias leaves there; `'f(0)'` for a
    secant's or an integral's origin. `rays[node]`: the operands that move where a node is
    integrated. `findings`: nodes that break completeness. `alive`: on a gradient path.
    """

    facts: Mapping[str, tuple[Fact, ...]]
    seen: Mapping[str, Mapping[str, Fraction]]
    biases: Mapping[str, tuple[str, ...]]
    modes: Mapping[str, Mode]
    rays: Mapping[str, tuple[str, ...]]
    findings: Mapping[str, Finding]
    alive: frozenset[str]
    live: Liveness


@dataclass
class _Pass:
    alive: frozenset[str]
    facts: dict[str, tuple[Fact, ...]] = field(default_factory=dict)
    seen: dict[str, dict[str, Fraction]] = field(default_factory=dict)
    biases: dict[str, tuple[str, ...]] = field(default_factory=dict)
    modes: dict[str, Mode] = field(default_factory=dict)
    rays: dict[str, tuple[str, ...]] = field(default_factory=dict)
    blamed: dict[str, Finding] = field(default_factory=dict)


def degrees(
    graph: ComputationGraph, edits: Collection[Edit] = (), live: Liveness | None = None
) -> Degrees:
    """Label every value with its degree under `edits`; see `Degrees`."""
    folded = fold(graph, edits)
    live = live if live is not None and folded is graph else liveness(folded)
    graph = folded
    findings: dict[str, Finding] = {}
    by_node = _by_node(graph, live, edits)
    pruned = {(e.node, e.argument) for e in edits if isinstance(e, Prune)}
    states = _sweep(graph, live, by_node, findings, frozenset()).facts
    alive = _alive(graph, states, live, pruned)
    while True:
        result = _sweep(graph, live, by_node, findings, alive)
        new = {n: f for n, f in result.blamed.items() if n not in findings}
        if not new:
            break
        findings |= new
    return Degrees(
        result.facts,
        result.seen,
        result.biases,
        result.modes,
        result.rays,
        {n: f for n, f in findings.items() if n in alive},
        alive,
        live,
    )


def _by_node(
    graph: ComputationGraph, live: Liveness, edits: Collection[Edit]
) -> dict[str, list[Edit]]:
    """The edits of each node; refuses what the labelling would have to pass over."""
    by_node: dict[str, list[Edit]] = {}
    for edit in edits:
        if edit.node not in live.calls:
            where = graph.describe(edit.node) if edit.node in graph.nodes else repr(edit.node)
            raise PlanError(f"{edit}: {where} is no operation here that the input goes through")
        others = by_node.setdefault(edit.node, [])
        if any(_place(edit) == _place(other) for other in others):
            raise PlanError(f"{graph.describe(edit.node)} is edited twice at one place: {edit}")
        others.append(edit)
    return by_node


def _place(edit: Edit) -> tuple[str, str | None]:
    kind = type(edit).__name__ if isinstance(edit, (Prune, Scale)) else "its own"
    return kind, getattr(edit, "argument", None)


def _sweep(
    graph: ComputationGraph,
    live: Liveness,
    edits: Mapping[str, list[Edit]],
    findings: Mapping[str, Finding],
    alive: frozenset[str],
) -> _Pass:
    """One pass over the graph; only what is `alive` is to blame for anything."""
    sweep = _Pass(alive)
    for node in graph.fx.graph.nodes:
        call = live.calls.get(node.name)
        if node.name in live.sources:
            sweep.facts[node.name] = (Fact(State.LIVE, ONE),)
        elif node.op == "output":
            for value in graph.outputs:
                _meet_output(sweep, value, findings)
        elif call is None:
            sweep.facts[node.name] = tuple(Fact(s) for s in live.states[node.name])
        else:
            _visit(graph, live, sweep, node, call, edits.get(node.name, []), findings)
    return sweep


def _operand_facts(
    sweep: _Pass, node: fx.Node, call: Call, edits: Iterable[Edit]
) -> dict[str, Fact]:
    pruned = {e.argument for e in edits if isinstance(e, Prune)}
    scaled = {e.argument: e.factor for e in edits if isinstance(e, Scale)}
    facts = {}
    for operand in call.operands:
        if operand.name not in call.moving or operand.node is None:
            continue
        fact = _joined(sweep.facts[operand.node.name])
        if node.target is operator.getitem and len(sweep.facts[operand.node.name]) > 1:
            fact = sweep.facts[operand.node.name][node.args[1]]  # type: ignore[index]
        if operand.name in scaled and fact.state is State.LIVE:
            fact = Fact(fact.state, fact.degree * scaled[operand.name], fact.origins)
        facts[operand.name] = Fact(State.FROZEN) if operand.name in pruned else fact
    return facts


def _joined(facts: tuple[Fact, ...]) -> Fact:
    return next((f for f in facts if f.state is State.LIVE), facts[0])


def _visit(
    graph: ComputationGraph,
    live: Liveness,
    sweep: _Pass,
    node: fx.Node,
    call: Call,
    edits: list[Edit],
    findings: Mapping[str, Finding],
) -> None:
    seen = _operand_facts(sweep, node, call, edits)
    sweep.seen[node.name] = {n: f.degree for n, f in seen.items()}
    wanted = _class_edit(edits)
    mode = next((m for m in call.operator.modes(call) if m.edit == wanted), None)
    if mode is None:
        raise PlanError(f"{graph.describe(node.name)} does not take the edit {wanted!r}")
    sweep.modes[node.name] = mode
    if mode.edit == "integrate":
        (relation,) = mode.outputs
        names = [*(n for term in relation.terms for n, _ in term), *relation.ray]
        sweep.rays[node.name] = tuple(n for n in names if seen[n].state is State.LIVE)
    factor = prod(e.factor for e in edits if isinstance(e, Scale) and e.argument is None)
    moves = any(f.state is State.LIVE for f in seen.values())
    facts = []
    for relation, state in zip(mode.outputs, live.states[node.name], strict=True):
        if state is State.LIVE and moves:
            facts.append(_judge(sweep, node, call, relation, seen, Fraction(factor), findings))
        else:
            facts.append(Fact(State.FROZEN if state is State.LIVE else state))
    sweep.facts[node.name] = tuple(facts)


def _class_edit(edits: Iterable[Edit]) -> str | None:
    """The name of the class's own edit among a node's edits, None for the unedited operation."""
    names = [name for name, kind in NODE_EDITS.items() for e in edits if isinstance(e, kind)]
    return names[0] if names else None


def _judge(
    sweep: _Pass,
    node: fx.Node,
    call: Call,
    relation: Relation,
    seen: Mapping[str, Fact],
    factor: Fraction,
    findings: Mapping[str, Finding],
) -> Fact:
    """The fact of one live output; puts the blame where the relation does not hold."""
    totals = {
        sum((exponent * seen[name].degree for name, exponent in term), ZERO)
        for term in relation.terms
    } | {seen[name].degree for name in relation.ray if seen[name].state is State.LIVE}
    wrong = [n for n in relation.zero if seen[n].degree != 0]
    natural = next(iter(totals)) if len(totals) == 1 else ZERO
    agrees = len(totals) <= 1
    inside = relation.domain is None or natural in relation.domain
    reason = ""
    blame: frozenset[str] = frozenset()
    opaque = False
    if wrong:
        reason = _needs_zero(call, wrong, seen)
    elif not agrees:
        opaque = _adds_frozen(relation, seen, totals)
        degrees_text = " and ".join(str(t) for t in sorted(totals))
        reason = (
            "adds a frozen value, which nobody attributes, to a live one"
            if opaque
            else f"its ray from 0 moves operands of degree {degrees_text}, not alike"
            if sweep.modes[node.name].edit == "integrate"
            else f"adds values of degree {degrees_text}"
        )
        blame = _origins(relation, seen) if not opaque else blame
    elif not inside:
        reason = (
            "a literal inside a divisor is no bias: the norm with eps has no degree"
            if call.eps
            else f"adds a constant to a value of degree {natural}"
        )
        blame = frozenset() if call.eps else _origins(relation, seen)
    if reason and node.name in sweep.alive:
        if blame - findings.keys():
            for name in blame - findings.keys():
                sweep.blamed[name] = Finding(
                    name, f"has a degree other than 1, and {node.name} {reason}"
                )
        elif node.name not in findings:
            sweep.blamed[node.name] = Finding(node.name, reason, opaque)
    if reason or node.name in findings:
        return Fact(State.LIVE, ZERO if call.eps else ONE)
    if not opaque and relation.domain is not None and natural == 1 and not call.eps:
        sweep.biases[node.name] = _bias_operands(call, relation)
    degree = natural * factor
    inherited = frozenset[str]()
    if degree == natural and {seen[n].degree for t in relation.terms for n, _ in t} == {degree}:
        inherited = _origins(relation, seen)
    origins = frozenset[str]() if degree == 1 else inherited or frozenset([node.name])
    return Fact(State.LIVE, degree, origins)


def _needs_zero(call: Call, wrong: list[str], seen: Mapping[str, Fact]) -> str:
    algebra = call.operator.algebra
    what = ", ".join(f"{n} (degree {seen[n].degree})" for n in wrong)
    why = {
        Algebra.ATTENTION: "its weights depend on",
        Algebra.NORMALISER: "1/sigma depends on",
        Algebra.ZERO_ORIGIN: "it is not homogeneous in",
        Algebra.ELEMENTWISE: "it is not homogeneous in",
    }.get(algebra, "it has no degree in")
    return f"{why} {what}"


def _adds_frozen(
    relation: Relation, seen: Mapping[str, Fact], totals: Collection[Fraction]
) -> bool:
    """Whether a term made of frozen values alone stands beside a live one of degree not 0."""
    frozen = [all(seen[n].state is State.FROZEN for n, _ in t) for t in relation.terms]
    return any(frozen) and not all(frozen)


def _origins(relation: Relation, seen: Mapping[str, Fact]) -> frozenset[str]:
    names = [*(n for term in relation.terms for n, _ in term), *relation.ray]
    return frozenset().union(*(seen[n].origins for n in names))


def _bias_operands(call: Call, relation: Relation) -> tuple[str, ...]:
    """The operands that lead a constant monomial of the signature; `f(0)` where J~ is a secant or
    an integral from 0."""
    if relation.domain == (1,):
        return ("f(0)",)
    return bias_operands(call)


def _meet_output(sweep: _Pass, value: fx.Node, findings: Mapping[str, Finding]) -> None:
    fact = _joined(sweep.facts[value.name])
    if fact.state is State.LIVE and fact.degree != 1:
        for name in (fact.origins or {value.name}) - findings.keys():
            sweep.blamed[name] = Finding(name, f"the output has degree {fact.degree}, not 1")


def _alive(
    graph: ComputationGraph,
    facts: Mapping[str, tuple[Fact, ...]],
    live: Liveness,
    pruned: Collection[tuple[str, str]],
) -> frozenset[str]:
    """The live nodes from which a gradient path leads to an output."""
    alive: set[str] = set()

    def reach(node: fx.Node) -> None:
        if any(f.state is State.LIVE for f in facts[node.name]):
            alive.add(node.name)

    for value in graph.outputs:
        reach(value)
    for node in reversed(graph.fx.graph.nodes):
        call = live.calls.get(node.name)
        if node.name not in alive or call is None or node.name in live.sources:
            continue
        for operand in call.operands:
            if operand.name in call.moving and (node.name, operand.name) not in pruned:
                reach(operand.node)  # type: ignore[arg-type]
    return frozenset(alive)
