"""Operations that nobody registered, measured: what their own backward is consistent with.

A call's degrees (e_i, d) are the solutions of sum e_i <J_i^T c, u_i> = d <c, v>: linear equations,
one a random cotangent c and point u, whose rational solutions are read off (Euler). Scaling, v(t u)
= t^d v(u), and finite differences are witnesses that use no such product. A measurement proves
nothing: the verdict is numeric at most.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..errors import FullgradError, InputError
from ..graph.computation import ComputationGraph
from ..graph.door import Inputs, Model, Names
from ..graph.leaves import LeafSpec
from ..graph.outputs import Selection
from ..graph.tracing import trace
from ..graph.walking import Walker
from ..operators.algebra import Algebra
from ..operators.calls import Call
from ..operators.record import Operator
from ..operators.relations import Mode, Relation
from .probe import Probe
from .states import unregistered
from .witnesses import Equations, Witness
from .words import relation_words


@dataclass(frozen=True)
class Measured(Operator):
    """What was found of one call. `relations`: one an output; `contradiction`: why they are void.

    `note` says what was measured; an elementwise operation's signature is its operand.
    """

    relations: tuple[Relation, ...] = ()
    contradiction: str = ""

    def modes(self, call: Call) -> tuple[Mode, ...]:
        """Unedited as measured; a secant where the operation is elementwise and has no degree."""
        plain = Mode(None, self.relations)
        if "secant" not in self.edits:
            return (plain,)
        term = ((self.signature, Fraction(1)),)
        return plain, Mode("secant", (Relation((term,), domain=(1,) if self.origin else None),))


def graph_of(
    model: Model | ComputationGraph,
    inputs: Inputs,
    leaves: Collection[LeafSpec],
    unknown: str,
    output: Selection = None,
    constant: Names = (),
    explain: Names | None = None,
) -> ComputationGraph:
    """The model traced, its unregistered operations measured where `unknown="measure"`."""
    if unknown not in ("error", "measure"):
        raise InputError(f"unknown={unknown!r}: choose 'error' or 'measure'")
    if isinstance(model, ComputationGraph) and leaves:
        raise InputError("a traced graph has its leaves already: trace(model, inputs, leaves=...)")
    if isinstance(model, ComputationGraph):
        refuse_chosen("a traced graph", output, constant, explain)
        graph = model
    else:
        graph = trace(
            model, inputs, leaves=leaves, output=output, constant=constant, explain=explain
        )
    return measure(graph) if unknown == "measure" else graph


def refuse_chosen(what: str, output: Selection, constant: Names, explain: Names | None) -> None:
    """What a trace decides is decided in what was traced."""
    if output is not None or constant or explain is not None:
        raise InputError(
            f"{what} has its output and its inputs already: give output=, constant= and explain= "
            "to trace() or balance()"
        )


def measure(graph: ComputationGraph, seed: int = 0) -> ComputationGraph:
    """The graph with an entry in `measured` for each call on the way that nobody registered.

    Values are those of the trace's example inputs, in float64, and random ones. Raises `InputError`
    for meta tensors, for an operation that does not run in float64, or that has no backward.
    """
    calls = unregistered(graph)
    if not calls:
        return graph
    if graph.is_meta:
        raise InputError(
            f"{', '.join(sorted({c.operator.name for c in calls.values()}))}: not registered, and "
            "meta tensors have no values to measure it with; pass a model and inputs that have "
            "values, or register it with its class and degree rule"
        )
    found: dict[str, Operator] = {}

    class Capture(Walker):
        """Runs the model, and measures the calls asked for at the values that reach them."""

        def run_node(self, n: fx.Node) -> Any:
            if n.name in calls:
                where, values = graph.describe(n.name), self.fetch_args_kwargs_from_env(n)
                try:
                    found[n.name] = _judge(Probe(n, calls[n.name], values, where, seed))
                except FullgradError:
                    raise
                except (RuntimeError, ValueError) as error:
                    raise InputError(
                        f"{where} does not run near those inputs ({str(error).splitlines()[0]}); "
                        "register it with its class and degree rule"
                    ) from error
            with torch.no_grad():
                return super().run_node(n)

    values = pytree.tree_leaves((graph.args, graph.kwargs))
    Capture(graph.fx).run(*values, enable_io_processing=False)
    return replace(graph, measured={**graph.measured, **found})


@dataclass(frozen=True)
class _Finding:
    """What one output's backward is consistent with. `bias`: the constant operand of f(0)."""

    relation: Relation
    algebra: Algebra
    notes: tuple[str, ...]
    contradiction: str = ""
    origin: float = 0.0
    bias: str = ""


NO_GRADIENT = _Finding(Relation(frozen=True), Algebra.FREEZING, ("carries no gradient",))


def _judge(probe: Probe) -> Measured:
    if not probe.names:  # only integers and flags move: nothing can carry gradient
        outputs = probe.node.meta.get("val")
        count = len(outputs) if isinstance(outputs, (tuple, list)) else 1
        return _entry(probe, [replace(NO_GRADIENT, notes=())] * count, "reads no float")
    try:
        _, outputs = probe.watched(probe.example)
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        raise InputError(
            f"{probe.where} does not run in float64, in which it would be measured "
            f"({str(error).splitlines()[0]}); register it with its class and degree rule"
        ) from error
    if not probe.repeats():
        raise InputError(
            f"{probe.where} gives other numbers when it is called again at the same point: it is "
            "random or counts its calls, and a measurement says nothing of it; take that out"
        )
    near, far = probe.points()
    if not near:
        raise InputError(f"{probe.where}: its value at the example inputs is not finite")
    findings = [
        _judge_output(Witness(probe, i, near, far, alone=len(outputs) == 1))
        if isinstance(value, Tensor) and value.requires_grad
        else NO_GRADIENT
        for i, value in enumerate(outputs)
    ]
    notes = [", ".join(finding.notes) for finding in findings]
    if len(notes) > 1:
        notes = [f"output {i}: {note}" for i, note in enumerate(notes)]
    note = f"measured at {len(near) + len(far)} points: {'; '.join(notes)}"
    return _entry(probe, findings, note)


def _entry(probe: Probe, findings: list[_Finding], note: str) -> Measured:
    """Its class is that of the outputs that carry gradient; smooth where they are not of one."""
    live = [finding for finding in findings if not finding.relation.frozen]
    chosen = live[0] if live else findings[0]
    alike = all(finding.algebra is chosen.algebra for finding in live)
    algebra = chosen.algebra if alike else Algebra.SMOOTH
    relations = tuple(finding.relation for finding in findings)
    elementwise = algebra in (Algebra.ZERO_ORIGIN, Algebra.ELEMENTWISE)
    return Measured(
        probe.call.operator.name,
        algebra,
        probe.names[0] if elementwise else _signature(relations, chosen.bias),
        chosen.origin,
        note=note,
        relations=relations,
        contradiction="; ".join(f.contradiction for f in findings if f.contradiction),
    )


def _signature(relations: tuple[Relation, ...], bias: str) -> str:
    """The relations in the registry's language, for a reader and for what is added at a node."""
    constant = [bias] if bias else []
    outputs = []
    for relation in relations:
        products = ["*".join(n if p == 1 else f"{n}^{p}" for n, p in t) for t in relation.terms]
        outputs.append("-" if relation.frozen else " + ".join([*products, *constant]))
    return " ; ".join(outputs)


class _Law:
    """The equations between degrees, from rows near the example and far from it.

    `affine`: those of v - f(0), f(0) being a bias.
    """

    def __init__(self, witness: Witness, affine: bool) -> None:
        self.witness, self.affine = witness, affine
        self.near = witness.rows(witness.near, affine)
        self.far = witness.rows(witness.far, affine)
        rows = torch.cat([self.near, self.far])
        self.carries_gradient = bool(rows[:, 1:].any())
        self.equations = Equations.of(rows)

    def scales(self) -> bool:
        """Whether the values scale so; those of an edited backward need not."""
        edited = not self.witness.is_derivative
        return edited or self.witness.scales(self.equations, self.affine)

    def contradiction(self) -> str:
        """Other equations at the example than elsewhere; where all is zero at the example, none."""
        here, there = Equations.of(self.near), Equations.of(self.far)
        if here != there and here.rows and there.rows:
            names = self.witness.probe.names
            a, b = (relation_words(one.relation(names)) for one in (here, there))
            return f"at the example inputs it has {a}, at other points {b}"
        if not self.scales():
            return "its degrees by its backward are not those that scaling shows"
        return ""


def _judge_output(witness: Witness) -> _Finding:
    law, names = _Law(witness, affine=False), witness.probe.names
    if not law.carries_gradient:
        return NO_GRADIENT
    said = (
        f"its backward is the derivative (gap {witness.gap:.0e})"
        if witness.is_derivative
        else f"its backward is NOT the derivative of its forward (gap {witness.gap:.0e} of it)"
    )
    if not law.equations.degree_free and witness.has_bias:
        affine = _Law(witness, affine=True)
        law = affine if affine.equations.degree_free and affine.scales() else law
    contradiction = law.contradiction()
    if contradiction:
        none = Relation(zero=tuple(names))
        return _Finding(none, Algebra.SMOOTH, (said, contradiction), contradiction)
    relation = law.equations.relation(names)
    if relation.terms or len(relation.zero) < len(names):
        return _with_degree(witness, relation, law.affine, said)
    lacking = "no degree" if law.equations.rational else "no rational degree"
    return _without_degree(witness, relation, lacking, said)


def _with_degree(witness: Witness, relation: Relation, affine: bool, said: str) -> _Finding:
    algebra = _algebra(witness, relation, affine)
    of_kind = algebra in (Algebra.AFFINE, Algebra.STRUCTURAL)
    notes = ["affine" if affine else "linear"] if of_kind else []
    notes += [relation_words(relation) + (" and a constant f(0)" if affine else ""), said]
    if not witness.is_derivative and witness.is_secant():
        notes.append("it is the secant")
    if not affine:
        return _Finding(relation, algebra, tuple(notes))
    with_bias = replace(relation, domain=(0, 1))
    return _Finding(with_bias, algebra, tuple(notes), bias=witness.bias())


def _algebra(witness: Witness, relation: Relation, affine: bool) -> Algebra:
    powers = {power for term in relation.terms for _, power in term}
    if not relation.zero and powers == {Fraction(1)}:
        if any(len(term) > 1 for term in relation.terms):
            return Algebra.MULTILINEAR
        if not affine and witness.additive():
            return Algebra.STRUCTURAL
    return Algebra.AFFINE if affine else Algebra.HOMOGENEOUS


def _without_degree(witness: Witness, relation: Relation, lacking: str, said: str) -> _Finding:
    """Perhaps an elementwise function, which has a secant where it is continuous."""
    origin = witness.origin
    if not witness.is_derivative or origin is None or not witness.elementwise(witness.near):
        return _Finding(relation, Algebra.SMOOTH, (lacking, said))
    if not witness.continuous():
        return _Finding(relation, Algebra.SMOOTH, (lacking, "elementwise", "with jumps", said))
    at_0 = float(origin.mean()) or float(origin.abs().max()) if bool(origin.any()) else 0.0
    kind = Algebra.ELEMENTWISE if at_0 else Algebra.ZERO_ORIGIN
    notes = (lacking, "elementwise", f"f(0) = {at_0:.3g}", said)
    return _Finding(relation, kind, notes, origin=at_0)
