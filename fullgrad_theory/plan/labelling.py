"""The abstract interpretation: which degree every value has, and what breaks completeness.

Leaves (inputs and bias leaves) have degree 1, coefficients and frozen values 0. A node where no
degree fits is *violated*; the analysis goes on behind it as if it were mended (degree 1), so that
blame falls on the node that breaks completeness and not on those that follow it.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from math import prod

from torch import fx

from ..edits.folding import fold
from ..edits.kinds import Edit
from ..errors import PlanError
from ..graph.computation import ComputationGraph
from ..operators.calls import Call
from ..operators.relations import Mode, Relation
from .states import Liveness, State, liveness
from .words import Breach, breach_words

ONE, ZERO = Fraction(1), Fraction(0)


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
class _Sweep:
    """One pass over the graph under what earlier passes found; only what is `alive` is blamed."""

    findings: Mapping[str, Finding]
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
    alive = _alive(graph, _sweep(graph, live, by_node, findings, frozenset()).facts, live, by_node)
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
        if any(edit.place == other.place for other in others):
            raise PlanError(f"{graph.describe(edit.node)} is edited twice at one place: {edit}")
        others.append(edit)
    return by_node


def _sweep(
    graph: ComputationGraph,
    live: Liveness,
    edits: Mapping[str, list[Edit]],
    findings: Mapping[str, Finding],
    alive: frozenset[str],
) -> _Sweep:
    sweep = _Sweep(findings, alive)
    for node in graph.fx.graph.nodes:
        call = live.calls.get(node.name)
        if node.name in live.sources:
            sweep.facts[node.name] = (Fact(State.LIVE, ONE),)
        elif node.op == "output":
            for value in graph.outputs:
                _meet_output(sweep, value)
        elif call is None:
            sweep.facts[node.name] = tuple(Fact(s) for s in live.states[node.name])
        else:
            own = edits.get(node.name, [])
            seen = _operand_facts(sweep, node, call, own)
            mode = _mode(graph, node, call, own)
            _visit(sweep, node, call, live.states[node.name], mode, seen, own)
    return sweep


def _operand_facts(
    sweep: _Sweep, node: fx.Node, call: Call, edits: Iterable[Edit]
) -> dict[str, Fact]:
    """Every moving operand as it is seen through its edge."""
    facts = {}
    for operand in call.operands:
        if operand.name not in call.moving or operand.node is None:
            continue
        of_operand = sweep.facts[operand.node.name]
        fact = _joined(of_operand)
        if node.target is operator.getitem and len(of_operand) > 1:
            fact = of_operand[node.args[1]]  # type: ignore[index]
        if any(e.holds(operand.name) for e in edits):
            fact = Fact(State.FROZEN)
        elif fact.state is State.LIVE:
            factor = prod((e.multiplies(operand.name) for e in edits), start=ONE)
            fact = Fact(fact.state, fact.degree * factor, fact.origins)
        facts[operand.name] = fact
    return facts


def _joined(facts: tuple[Fact, ...]) -> Fact:
    return next((f for f in facts if f.state is State.LIVE), facts[0])


def _mode(graph: ComputationGraph, node: fx.Node, call: Call, edits: Iterable[Edit]) -> Mode:
    """The mode of its class that a node's edits choose."""
    wanted = next((e.mode for e in edits if e.mode is not None), None)
    for mode in call.operator.modes(call):
        if mode.edit == wanted:
            return mode
    raise PlanError(f"{graph.describe(node.name)} does not take the edit {wanted!r}")


def _visit(
    sweep: _Sweep,
    node: fx.Node,
    call: Call,
    states: tuple[State, ...],
    mode: Mode,
    seen: dict[str, Fact],
    edits: list[Edit],
) -> None:
    """Write down what is known of a node: one fact an output."""
    sweep.seen[node.name] = {n: f.degree for n, f in seen.items()}
    sweep.modes[node.name] = mode
    if mode.edit == "integrate":
        (relation,) = mode.outputs
        moving = [n for n in relation.summed if seen[n].state is State.LIVE]
        sweep.rays[node.name] = tuple(moving)
    factor = prod((e.multiplies() for e in edits), start=ONE)
    moves = any(f.state is State.LIVE for f in seen.values())
    facts = []
    for relation, state in zip(mode.outputs, states, strict=True):
        if state is State.LIVE and moves:
            facts.append(_fact(sweep, node, call, mode, relation, seen, factor))
        else:
            facts.append(Fact(State.FROZEN if state is State.LIVE else state))
    sweep.facts[node.name] = tuple(facts)


def _fact(
    sweep: _Sweep,
    node: fx.Node,
    call: Call,
    mode: Mode,
    relation: Relation,
    seen: Mapping[str, Fact],
    factor: Fraction,
) -> Fact:
    """The fact of one live output. Where its relation does not hold, the blame is put, and the
    degree is what it would be if it were mended."""
    natural, breach = _judge(call, mode, relation, seen)
    if breach is not None:
        _blame(sweep, node.name, breach, _origins(relation, seen))
    if breach is not None or node.name in sweep.findings:
        return Fact(State.LIVE, ZERO if call.eps else ONE)
    if relation.domain is not None and natural == 1 and not call.eps:
        # f(0), or what leads a constant monomial of the signature
        origin = relation.from_origin
        sweep.biases[node.name] = ("f(0)",) if origin else call.operator.bias_operands(call)
    degree = natural * factor
    inherited = frozenset[str]()
    if degree == natural and {seen[n].degree for t in relation.terms for n, _ in t} == {degree}:
        inherited = _origins(relation, seen)
    origins = frozenset[str]() if degree == 1 else inherited or frozenset([node.name])
    return Fact(State.LIVE, degree, origins)


def _judge(
    call: Call, mode: Mode, relation: Relation, seen: Mapping[str, Fact]
) -> tuple[Fraction, Breach | None]:
    """The degree that a relation gives an output, and how it is broken, if it is."""
    totals = {
        sum((exponent * seen[name].degree for name, exponent in term), ZERO)
        for term in relation.terms
    } | {seen[name].degree for name in relation.ray if seen[name].state is State.LIVE}
    wrong = {n: seen[n].degree for n in relation.zero if seen[n].degree != 0}
    natural = next(iter(totals)) if len(totals) == 1 else ZERO
    if wrong:
        return natural, Breach("zero", call, wrong)
    if len(totals) > 1:
        degrees = tuple(sorted(totals))
        if _adds_frozen(relation, seen):
            return natural, Breach("frozen", call, totals=degrees)
        integrated = mode.edit == "integrate"
        return natural, Breach("ray" if integrated else "sum", call, totals=degrees)
    if relation.domain is not None and natural not in relation.domain:
        return natural, Breach("eps" if call.eps else "constant", call, totals=(natural,))
    return natural, None


def _adds_frozen(relation: Relation, seen: Mapping[str, Fact]) -> bool:
    """Whether a term made of frozen values alone stands beside a live one of degree not 0."""
    frozen = [all(seen[n].state is State.FROZEN for n, _ in t) for t in relation.terms]
    return any(frozen) and not all(frozen)


def _blame(sweep: _Sweep, name: str, breach: Breach, origins: frozenset[str]) -> None:
    """The nodes that made an operand's degree other than 1 are at fault; without any, the node."""
    if name not in sweep.alive:
        return
    guilty = origins - sweep.findings.keys() if breach.inherited else frozenset[str]()
    for other in guilty:
        reason = f"has a degree other than 1, and {name} {breach_words(breach)}"
        sweep.blamed[other] = Finding(other, reason)
    if not guilty and name not in sweep.findings:
        sweep.blamed[name] = Finding(name, breach_words(breach), breach.kind == "frozen")


def _origins(relation: Relation, seen: Mapping[str, Fact]) -> frozenset[str]:
    return frozenset().union(*(seen[n].origins for n in relation.summed))


def _meet_output(sweep: _Sweep, value: fx.Node) -> None:
    fact = _joined(sweep.facts[value.name])
    if fact.state is State.LIVE and fact.degree != 1:
        for name in (fact.origins or {value.name}) - sweep.findings.keys():
            sweep.blamed[name] = Finding(name, f"the output has degree {fact.degree}, not 1")


def _alive(
    graph: ComputationGraph,
    facts: Mapping[str, tuple[Fact, ...]],
    live: Liveness,
    edits: Mapping[str, list[Edit]],
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
        own = edits.get(node.name, [])
        for operand in call.operands:
            if operand.name in call.moving and not any(e.holds(operand.name) for e in own):
                reach(operand.node)  # type: ignore[arg-type]
    return frozenset(alive)
