"""The abstract interpretation: which degree every value has, and what breaks completeness.

Leaves (inputs and bias leaves) have degree 1, coefficients and frozen values 0. A node where no
degree fits is *violated*; the analysis goes on behind it as if it were mended (degree 1), so that
blame falls on the node that breaks completeness and not on those that follow it.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from math import prod

from torch import fx

from ..edits.folding import fold
from ..edits.kinds import Edit
from ..errors import PlanError
from ..graph.computation import ComputationGraph
from ..operators.calls import Call
from ..operators.relations import Mode, Relation, snapped
from .states import Liveness, State, integers_behind, liveness
from .words import Breach, Kind, breach_words

ONE, ZERO = Fraction(1), Fraction(0)


@dataclass(frozen=True)
class Fact:
    """What is known of one value: state, degree, and the nodes that made the degree not 1."""

    state: State
    degree: Fraction = ZERO
    origins: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Finding:
    """Why a node breaks completeness. `opaque`: a frozen value is added to a live one, made of the
    inputs `integers` where these alone are behind it."""

    node: str
    reason: str
    opaque: bool = False
    integers: tuple[str, ...] = ()


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


Seen = Mapping[str, Fact]
"""the moving operands of a call, each as it is seen through its edge"""


def degrees(
    graph: ComputationGraph, edits: Collection[Edit] = (), live: Liveness | None = None
) -> Degrees:
    """Label every value with its degree under `edits`; see `Degrees`."""
    folded = fold(graph, edits)
    live = live if live is not None and folded is graph else liveness(folded)
    by_node = _by_node(folded, live, edits)
    findings: dict[str, Finding] = {}
    alive = _alive(_Sweep(folded, live, by_node, findings, frozenset()))
    while True:
        sweep = _Sweep(folded, live, by_node, findings, alive)
        new = {n: f for n, f in sweep.blamed.items() if n not in findings}
        if not new:
            break
        findings |= new
    findings = {n: f for n, f in findings.items() if n in alive}
    labels = (sweep.facts, sweep.seen, sweep.biases, sweep.modes, sweep.rays)
    return Degrees(*labels, findings, alive, live)


def _by_node(
    graph: ComputationGraph, live: Liveness, edits: Collection[Edit]
) -> dict[str, list[Edit]]:
    """The edits of each node; refuses what the labelling would have to pass over."""
    by_node: dict[str, list[Edit]] = {name: [] for name in live.calls}
    for edit in edits:
        if edit.node not in by_node:
            where = graph.describe(edit.node) if edit.node in graph.nodes else repr(edit.node)
            raise PlanError(f"{edit}: {where} is no operation here that the input goes through")
        if any(edit.place == other.place for other in by_node[edit.node]):
            raise PlanError(f"{graph.describe(edit.node)} is edited twice at one place: {edit}")
        by_node[edit.node].append(edit)
    return by_node


class _Sweep:
    """One pass over the graph under what earlier passes found; only what is `alive` is blamed."""

    def __init__(
        self,
        graph: ComputationGraph,
        live: Liveness,
        edits: Mapping[str, list[Edit]],
        findings: Mapping[str, Finding],
        alive: frozenset[str],
    ) -> None:
        self.graph, self.live, self.edits = graph, live, edits
        self.findings, self.alive = findings, alive
        self.facts: dict[str, tuple[Fact, ...]] = {}
        self.seen: dict[str, dict[str, Fraction]] = {}
        self.biases: dict[str, tuple[str, ...]] = {}
        self.modes: dict[str, Mode] = {}
        self.rays: dict[str, tuple[str, ...]] = {}
        self.blamed: dict[str, Finding] = {}
        for node in graph.fx.graph.nodes:
            if node.name in live.sources:
                self.facts[node.name] = (Fact(State.LIVE, ONE),)
            elif node.op == "output":
                for value in graph.outputs:
                    self._meet_output(value)
            elif node.name in live.calls:
                self._visit(node)
            else:
                self.facts[node.name] = tuple(Fact(s) for s in live.states[node.name])

    def _visit(self, node: fx.Node) -> None:
        """Write down what is known of a node: one fact an output."""
        name, edits = node.name, self.edits[node.name]
        seen = self._operand_facts(node)
        self.seen[name] = {n: f.degree for n, f in seen.items()}
        mode = self.modes[name] = self._mode(name)
        if mode.edit == "integrate":
            (relation,) = mode.outputs
            self.rays[name] = tuple(n for n in relation.summed if seen[n].state is State.LIVE)
        factor = prod((e.multiplies() for e in edits), start=ONE)
        moves = any(f.state is State.LIVE for f in seen.values())
        self.facts[name] = tuple(
            self._fact(name, relation, seen, factor)
            if state is State.LIVE and moves
            else Fact(State.FROZEN if state is State.LIVE else state)
            for relation, state in zip(mode.outputs, self.live.states[name], strict=True)
        )

    def _operand_facts(self, node: fx.Node) -> dict[str, Fact]:
        call, edits = self.live.calls[node.name], self.edits[node.name]
        facts = {}
        for operand in call.operands:
            if operand.name not in call.moving or operand.node is None:
                continue
            of_operand = self.facts[operand.node.name]
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

    def _mode(self, name: str) -> Mode:
        call = self.live.calls[name]
        wanted = next((e.mode for e in self.edits[name] if e.mode is not None), None)
        for mode in call.operator.modes(call):
            if mode.edit == wanted:
                return mode
        raise PlanError(f"{self.graph.describe(name)} does not take the edit {wanted!r}")

    def _fact(self, name: str, relation: Relation, seen: Seen, factor: Fraction) -> Fact:
        """The fact of one live output. Where its relation does not hold, the blame is put, and the
        degree is what it would be if it were mended."""
        call = self.live.calls[name]
        natural, breach = _judge(call, self.modes[name], relation, seen)
        inherited = frozenset[str]().union(*(seen[n].origins for n in relation.summed))
        if breach is not None:
            self._blame(name, breach, inherited)
        if breach is not None or name in self.findings:
            return Fact(State.LIVE, ZERO if call.eps else ONE)
        if relation.domain is not None and natural == 1 and not call.eps:
            # f(0), or what leads a constant monomial of the signature
            origin = relation.from_origin
            self.biases[name] = ("f(0)",) if origin else call.operator.bias_operands(call)
        degree = snapped(natural * factor)
        if degree == 1:
            return Fact(State.LIVE, degree)
        same = {seen[n].degree for t in relation.terms for n, _ in t} == {degree} == {natural}
        return Fact(State.LIVE, degree, (same and inherited) or frozenset([name]))

    def _blame(self, name: str, breach: Breach, origins: frozenset[str]) -> None:
        """Those are at fault that made an operand's degree other than 1; without any, the node."""
        if name not in self.alive:
            return
        guilty = origins - self.findings.keys() if breach.inherited else frozenset[str]()
        for other in guilty:
            reason = f"has a degree other than 1, and {name} {breach_words(breach)}"
            self.blamed[other] = Finding(other, reason)
        if not guilty and name not in self.findings:
            breach = replace(breach, integers=self._integers(name, breach))
            opaque = breach.kind in ("frozen", "chosen")
            self.blamed[name] = Finding(name, breach_words(breach), opaque, breach.integers)

    def _integers(self, name: str, breach: Breach) -> tuple[str, ...]:
        """The integer inputs that all the frozen operands of a node are made of."""
        if breach.kind != "frozen":
            return ()
        call, facts = self.live.calls[name], self.facts
        read = [o.node for o in call.operands if o.name in call.moving and o.node is not None]
        frozen = [n for n in read if _joined(facts[n.name]).state is State.FROZEN]
        found = [integers_behind(self.graph, self.live, n) for n in frozen]
        return tuple(dict.fromkeys(n for names in found for n in names)) if all(found) else ()

    def _meet_output(self, value: fx.Node) -> None:
        fact = _joined(self.facts[value.name])
        if fact.state is State.LIVE and fact.degree != 1:
            for name in (fact.origins or {value.name}) - self.findings.keys():
                self.blamed[name] = Finding(name, f"the output has degree {fact.degree}, not 1")


def _joined(facts: tuple[Fact, ...]) -> Fact:
    return next((f for f in facts if f.state is State.LIVE), facts[0])


def _judge(
    call: Call, mode: Mode, relation: Relation, seen: Seen
) -> tuple[Fraction, Breach | None]:
    """The degree that a relation gives an output, and how it is broken, if it is."""
    totals = {sum((e * seen[n].degree for n, e in term), ZERO) for term in relation.terms}
    totals |= {seen[name].degree for name in relation.ray if seen[name].state is State.LIVE}
    wrong = {n: seen[n].degree for n in relation.zero if seen[n].degree != 0}
    natural = next(iter(totals)) if len(totals) == 1 else ZERO
    if wrong:
        return natural, Breach("zero", call, wrong)
    if len(totals) > 1:
        integrated = mode.edit == "integrate"
        kind: Kind = "frozen" if _adds_frozen(relation, seen) else "ray" if integrated else "sum"
        kind = "chosen" if call.chosen else kind
        return natural, Breach(kind, call, totals=tuple(sorted(totals)))
    if relation.domain is not None and natural not in relation.domain:
        return natural, Breach("eps" if call.eps else "constant", call, totals=(natural,))
    return natural, None


def _adds_frozen(relation: Relation, seen: Seen) -> bool:
    """Whether a term made of frozen values alone stands beside a live one of degree not 0."""
    frozen = [bool(t) and all(seen[n].state is State.FROZEN for n, _ in t) for t in relation.terms]
    return any(frozen) and not all(frozen)


def _alive(sweep: _Sweep) -> frozenset[str]:
    """The live nodes from which a gradient path leads to an output."""
    reached = {value.name for value in sweep.graph.outputs}
    alive: set[str] = set()
    for node in reversed(sweep.graph.fx.graph.nodes):
        name = node.name
        if name in reached and any(f.state is State.LIVE for f in sweep.facts[name]):
            alive.add(name)
            call = sweep.live.calls.get(name)
            if call is None or name in sweep.live.sources:
                continue
            for operand in call.operands:
                held = any(e.holds(operand.name) for e in sweep.edits[name])
                if operand.name in call.moving and not held and operand.node is not None:
                    reached.add(operand.node.name)
    return frozenset(alive)
