"""What the graph alone shows: every node by the lemma of its class, and what is not reached."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch.utils import _pytree as pytree

from ..edits.costs import Policy
from ..edits.folding import fold
from ..edits.kinds import Edit
from ..errors import NonFiniteError, NoPlanError
from ..graph.computation import ComputationGraph
from ..kernel import Proof
from ..operators.calls import is_ray
from ..plan.derivation import derive_rules
from ..plan.labelling import Degrees, degrees
from ..plan.measuring import Measured
from ..plan.plan import Plan
from ..plan.states import State
from . import words
from .certificate import Certificate, certify, follow
from .heads import head_problems
from .report import FINE, Verdict


@dataclass(frozen=True)
class Judgement:
    """What is known of a node, and why."""

    verdict: Verdict
    reason: str

    @property
    def fine(self) -> bool:
        return self.verdict in FINE


@dataclass(frozen=True)
class Structure:
    """A graph under a plan, judged by lemmas alone.

    `graph`: with the plan's regions folded; `labels` its degrees under the plan. `mending`: the
    plan in force, or, for a gradient as it is, the one that would mend it, where there is one.
    `proof`: the kernel's account of the graph `unfolded`. `judgements`: of every live node that a
    gradient path leads from, in graph order.
    """

    graph: ComputationGraph
    unfolded: ComputationGraph
    plan: Plan | None
    policy: str | None
    labels: Degrees
    mending: Plan | None
    proof: Proof
    judgements: Mapping[str, Judgement]
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    def certificate(self) -> Certificate:
        """Raises `CertificateError` where the kernel does not follow."""
        return certify(self.unfolded, self.plan.policy if self.plan else None, self.proof)

    @property
    def edits(self) -> tuple[Edit, ...]:
        """What is written into the graph."""
        return self.plan.edits if self.plan else ()


def structure_of(graph: ComputationGraph, policy: str | Policy | Plan | None) -> Structure:
    """Derive the plan, label the graph under it, and judge each node.

    That no plan exists is a problem of the structure. Raises `NonFiniteError` where an input or a
    parameter is not finite, and what `degrees` raises.
    """
    _refuse_infinite_leaves(graph)
    unedited = degrees(graph)
    plan, obstacle = _plan(graph, policy)
    edits = plan.edits if plan else ()
    folded = fold(graph, edits)
    labels = degrees(folded, edits, unedited.live if folded is graph else None)
    to_mend = plan is None and unedited.findings
    mending, no_mend = _plan(graph, "libra") if to_mend else (plan, None)
    proof = follow(graph, plan, labels)
    judged = [n for n in folded.nodes if n in labels.live.calls and n in labels.alive]
    unreached = [source for source in labels.live.sources if source not in labels.alive]
    return Structure(
        folded,
        graph,
        plan,
        plan.policy if plan else None if policy is None else str(policy),
        labels,
        mending,
        proof,
        {name: _judgement(labels, proof, name) for name in judged},
        problems=(
            *([words.no_plan(obstacle)] if obstacle else []),
            *_unreached_outputs(folded, labels),
            *head_problems(graph, unedited),
            *(words.unreaching_input(s) for s in unreached if s not in unedited.alive),
        ),
        notes=(
            *([words.no_mend(no_mend)] if no_mend else []),
            *_beside(graph),
            *_black_boxes(folded, labels, judged),
            *(words.held_input(s) for s in unreached if s in unedited.alive),
        ),
    )


def _plan(
    graph: ComputationGraph, policy: str | Policy | Plan | None
) -> tuple[Plan | None, NoPlanError | None]:
    """The plan of a policy, or what stands in its way."""
    if policy is None or isinstance(policy, Plan):
        return policy, None
    try:
        return derive_rules(graph, policy=policy), None
    except NoPlanError as error:
        return None, error


def _judgement(labels: Degrees, proof: Proof, name: str) -> Judgement:
    """What is violated; what was measured; and proved is what the kernel follows, supposing
    nothing."""
    finding, operator = labels.findings.get(name), labels.live.calls[name].operator
    measured = operator if isinstance(operator, Measured) else None
    if finding and measured and measured.contradiction and not finding.opaque:
        return Judgement(Verdict.UNKNOWN, words.contradiction(measured.contradiction))
    if finding:
        return Judgement(Verdict.OPAQUE if finding.opaque else Verdict.VIOLATED, finding.reason)
    if measured:
        return Judgement(Verdict.NUMERIC, measured.note)
    lemma = operator.kind.lemma
    for value, degree in _values(labels, name):
        if name in proof.refused:
            return Judgement(Verdict.NUMERIC, words.not_followed(lemma, proof.refused[name]))
        if value not in proof.facts or proof.facts[value].degree != degree:
            return Judgement(Verdict.UNKNOWN, words.KERNEL_DISAGREES)
        if proof.steps[value]["supposing"]:
            return Judgement(
                Verdict.NUMERIC, words.supposed(lemma, proof.steps[value]["supposing"])
            )
    return Judgement(Verdict.PROVED, lemma)


def _values(labels: Degrees, name: str) -> Iterator[tuple[str, Fraction]]:
    """The live results of a call, as the kernel names them, with their degrees."""
    for k, fact in enumerate(labels.facts[name]):
        if fact.state is State.LIVE:
            yield f"{name}#{k}" if k else name, fact.degree


def _black_boxes(graph: ComputationGraph, labels: Degrees, judged: Iterable[str]) -> Iterator[str]:
    for name in judged:
        operator = labels.live.calls[name].operator
        if isinstance(operator, Measured):
            yield words.black_box(graph.describe(name), operator.note)


def _unreached_outputs(graph: ComputationGraph, labels: Degrees) -> Iterator[str]:
    for output in graph.outputs:
        if output.name not in labels.alive:
            constant = labels.facts[output.name][0].state is State.CONSTANT
            yield words.unreached_output(graph.describe(output.name), constant)


def _beside(graph: ComputationGraph) -> Iterator[str]:
    """What is not judged of the output, held constant of the inputs, and of their batch size."""
    reading = graph.reading
    if reading.aside or (reading.lost and reading.selection is None):
        yield words.beside(reading.names, reading.aside, reading.lost)
    if graph.held:
        yield words.held_constant([n for n in graph.nodes if n in graph.held])
    if graph.closed:
        yield words.closed_batch(graph.closed)


def _refuse_infinite_leaves(graph: ComputationGraph) -> None:
    if graph.is_meta:
        return
    values = pytree.tree_leaves((graph.args, graph.kwargs))
    given = zip(graph.placeholders, values, strict=False)
    inputs = [(p.name, v) for p, v in given if p.name not in graph.held]  # a mask's infinities
    for kind, leaves in (("input", inputs), ("parameter", graph.fx.named_parameters())):
        for name, tensor in leaves:
            if is_ray(tensor) and not bool(torch.isfinite(tensor).all()):
                raise NonFiniteError(words.infinite_leaf(kind, name))
