"""From what the steps found to a report: every decision of a check stands here."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from math import inf, isfinite, isnan

from ..errors import CertificateError
from ..graph.sources import module_path, source_line
from ..operators.calls import short_name, target_name
from . import words
from .certificate import Certificate
from .local import Local
from .numeric import largest
from .own import Forward
from .report import EndToEnd, NodeReport, Report, Verdict
from .structure import Judgement, Structure
from .whole import Whole

LOCAL_TOLERANCE = 1e-9
ROUNDING = 1e-12
SMALL_SHARE = 1e-6


@dataclass(frozen=True)
class Bounds:
    """What is asked for: relative residuals below `tolerance`, and the input's least share."""

    tolerance: float
    least_share: float


@dataclass(frozen=True)
class Evidence:
    """What running the backward showed, in float64 but for what is `shown`.

    A `Whole` is None where the output is zero. `layout_faults`: nodes whose kernel is at fault,
    looked for where nothing else explains a residual. `unedited`: the gradient as it is, where a
    plan is judged. `shown`: in other precisions; `refusals` say in which it does not run. `note`:
    why the perturbed measurement is that at the model's own parameters. `modified_elsewhere`: the
    user's own backward is the traced one at both, and not at a third point.
    """

    local: Local
    at_own_parameters: Whole | None
    at_perturbed: Whole | None
    layout_faults: tuple[str, ...] = ()
    forward: Forward = Forward.SAME_BITS
    unedited: Whole | None = None
    shown: tuple[EndToEnd, ...] = ()
    refusals: tuple[str, ...] = ()
    note: str = ""
    modified_elsewhere: bool = False

    @property
    def wholes(self) -> list[Whole]:
        """The measurements that are judged."""
        measured = self.at_own_parameters, self.at_perturbed
        return [w for w in measured if w is not None]

    @property
    def error(self) -> float:
        return largest(w.found.relative for w in self.wholes)

    @property
    def problems(self) -> list[str]:
        """Why the model could not be compared with its trace, which is all that was judged."""
        of_forward = {
            Forward.OTHER: words.FORWARD_DIFFERS,
            Forward.RANDOM: words.RANDOM,
            Forward.NOT_FINITE: words.OWN_NOT_FINITE,
        }
        own = [w.own.problem for w in self.wholes if w.own.problem]
        own += [words.MODIFIED_ELSEWHERE] * self.modified_elsewhere
        return [*own, *(of_forward[f] for f in [self.forward] if f in of_forward)]

    @property
    def modified(self) -> bool:
        """Whether the user's own backward is not the traced one."""
        return any(w.own.modified for w in self.wholes)


class Sum(Enum):
    """How what is attributed compares with the output, end to end."""

    ADDS_UP = "adds up"
    UNDETERMINED = "not finite"
    ROUNDED_AWAY = "misses by no more than its cancelling parts are rounded"
    MISSES = "misses, as nodes or problems said"
    UNEXPLAINED = "misses, and nothing said so"


def report_of(structure: Structure, evidence: Evidence | None, bounds: Bounds) -> Report:
    """The report of a graph; without evidence by its structure alone.

    Complete is what has no problem, and no node but proved and measured ones. It cannot be judged
    (None) where the output is zero, where too few digits are left of a sum that cancels, where the
    trace is not known to be the model, or where what is known of a node contradicts itself.
    """
    judgements = _judgements(structure, evidence, bounds)
    problems, notes = structure.problems, structure.notes
    of_sum = Sum.ADDS_UP
    if evidence is not None:
        of_sum = sum_of(structure, evidence, bounds)
        found = [*_found_problems(structure, evidence, bounds, of_sum)]
        problems, notes = (
            (*problems, *found),
            (*notes, *_found_notes(evidence, bounds, judgements.values())),
        )
    fine = all(j.fine for j in judgements.values()) and not problems
    complete = True if fine else _unless_shown(structure, evidence, bounds, of_sum)
    measured = [whole.found for whole in evidence.wholes] if evidence else []
    return Report(
        model=structure.graph.name,
        policy=structure.policy,
        complete=complete,
        error=evidence.error if evidence and measured else None,
        error_before=evidence.unedited.found.relative if evidence and evidence.unedited else None,
        nodes=tuple(_node(structure, evidence, *judged) for judged in judgements.items()),
        measurements=(*measured, *evidence.shown) if evidence else (),
        plan=structure.plan,
        problems=tuple(dict.fromkeys(problems)),
        notes=tuple(dict.fromkeys(notes)),
        certified=_certified(structure) if complete else None,
    )


def _certified(structure: Structure) -> Certificate | None:
    """The proof as data; None where the kernel does not follow, which nodes then say."""
    try:
        return structure.certificate()
    except CertificateError:
        return None


def _unless_shown(
    structure: Structure, evidence: Evidence | None, bounds: Bounds, of_sum: Sum
) -> bool | None:
    """False where something was shown to be wrong; None where problems only stand in the way.

    A node whose lemma and residual disagree is a contradiction, and shows nothing; nor does one
    whose error others take back, to the last digits and at every point (logit of a sigmoid).
    """
    judged = [j.verdict for j in _judgements(structure, evidence, bounds).values()]
    violated = Verdict.VIOLATED in judged and not (evidence is not None and takes_back(evidence))
    shown = violated or Verdict.OPAQUE in judged or any(structure.problems)
    if evidence is None:
        return False if shown else None
    if (
        evidence.forward in (Forward.OTHER, Forward.RANDOM, Forward.NOT_FINITE)
        or evidence.at_perturbed is None
    ):
        return None  # the trace is not the model, or nothing was measured
    if of_sum is Sum.ROUNDED_AWAY:
        return None
    infinite = not all(isfinite(e) for e in evidence.local.errors.values())
    misses = of_sum in (Sum.MISSES, Sum.UNDETERMINED)
    modified = of_sum is Sum.UNEXPLAINED and evidence.modified
    small = _input_share(evidence.wholes) < bounds.least_share
    return False if shown or infinite or misses or modified or small else None


def takes_back(evidence: Evidence) -> bool:
    """Whether what is attributed adds up to rounding wherever it was measured."""
    return len(evidence.wholes) > 1 and evidence.error <= ROUNDING


def sum_of(structure: Structure, evidence: Evidence, bounds: Bounds) -> Sum:
    """What the end-to-end measurements amount to, in the light of all else that was found."""
    if isnan(evidence.error):
        return Sum.UNDETERMINED
    if evidence.error <= bounds.tolerance:
        return Sum.ADDS_UP
    judgements = _judgements(structure, evidence, bounds)
    sound = all(j.fine for j in judgements.values())
    if not judgements or not (sound or evidence.modified):
        return Sum.MISSES
    if sound and all(
        w.found.relative <= bounds.tolerance * max(1.0, w.parts) for w in evidence.wholes
    ):
        return Sum.ROUNDED_AWAY
    said = any([*structure.problems, *_problems_before_the_sum(structure, evidence, bounds)])
    return Sum.MISSES if said else Sum.UNEXPLAINED


# --------------------------------------------------------------------------- the nodes


def _judgements(
    structure: Structure, evidence: Evidence | None, bounds: Bounds
) -> Mapping[str, Judgement]:
    """Every node's, by its lemma, its residual, and what a modified backward leaves of both."""
    if evidence is None:
        return structure.judgements
    local = evidence.local
    found = {name: _with_residual(local, name, j) for name, j in structure.judgements.items()}
    if evidence.modified and evidence.error <= bounds.tolerance:
        aside = Judgement(Verdict.NUMERIC, words.JUDGED_AS_A_WHOLE)
        return {name: j if j.fine else aside for name, j in found.items()}
    return found


def _with_residual(local: Local, name: str, judgement: Judgement) -> Judgement:
    if name not in local.errors:
        return judgement
    if name in local.unconverged:
        return Judgement(Verdict.UNKNOWN, words.UNCONVERGED)
    agrees = _agrees(local.errors[name])
    if judgement.fine and not agrees:
        return replace(judgement, verdict=Verdict.UNKNOWN)
    if agrees and not judgement.fine:
        return replace(judgement, reason=judgement.reason + words.NO_WITNESS)
    return judgement


def _agrees(residual: float) -> bool:
    """Whether a node's backward is what its lemma says; one that is not finite is not."""
    return residual <= LOCAL_TOLERANCE


def _node(
    structure: Structure, evidence: Evidence | None, name: str, judgement: Judgement
) -> NodeReport:
    node, labels = structure.graph.nodes[name], structure.labels
    operation = target_name(node.target)
    seen = ", ".join(str(degree) for degree in labels.seen.get(name, {}).values())
    given = ", ".join(str(fact.degree) for fact in labels.facts[name])
    edits = structure.mending.edits_of(name) if structure.mending else ()
    return NodeReport(
        name=name,
        op=operation,
        verdict=judgement.verdict,
        module_path=module_path(node),
        source=source_line(node),
        degree=f"{seen} -> {given}",
        error=evidence.local.errors.get(name) if evidence else None,
        edit="; ".join(map(str, edits)) or None,
        reason=judgement.reason,
        mend="; ".join(edit.words(short_name(operation)) for edit in edits) or None,
    )


# --------------------------------------------------------------------------- problems and notes


def _found_problems(
    structure: Structure, evidence: Evidence, bounds: Bounds, of_sum: Sum
) -> Iterator[str]:
    """What running showed to stand in the way, in the order in which it is told."""
    yield from _problems_before_the_sum(structure, evidence, bounds)
    if of_sum is Sum.UNDETERMINED:
        yield words.UNDETERMINED
    elif of_sum is not Sum.ADDS_UP:
        yield words.misses(evidence.error)
    if of_sum is Sum.ROUNDED_AWAY:
        yield words.rounding(max(whole.parts for whole in evidence.wholes))
    if of_sum is Sum.UNEXPLAINED:
        for name in evidence.layout_faults:
            yield words.layout_fault(structure.graph.describe(name))
        if not evidence.layout_faults and not evidence.modified:
            yield words.UNEXPLAINED
    yield from evidence.problems


def _problems_before_the_sum(
    structure: Structure, evidence: Evidence, bounds: Bounds
) -> Iterator[str]:
    yield from _local_problems(structure, evidence.local)
    for whole in evidence.wholes:
        if not whole.found.relative <= bounds.tolerance:
            yield from whole.unconverged
    if evidence.at_perturbed is None:
        yield words.ZERO_OUTPUT
    share = _input_share(evidence.wholes)
    if share < bounds.least_share:
        yield words.small_share(share)


def _local_problems(structure: Structure, local: Local) -> Iterator[str]:
    """Where a node's backward is not what its lemma says."""
    where = structure.graph.describe
    for name, error in local.errors.items():
        judgement = structure.judgements.get(name)
        if judgement is not None and name in local.unconverged:
            yield words.unconverged(where(name), error)
        elif judgement is not None and judgement.fine and not _agrees(error):
            yield words.lemma_missed(where(name), error)


def _found_notes(
    evidence: Evidence, bounds: Bounds, judged: Collection[Judgement]
) -> Iterator[str]:
    """What running showed that a reader should know."""
    if evidence.note:
        yield evidence.note
    if evidence.at_own_parameters is None and evidence.at_perturbed is not None:
        yield words.ZERO_AT_OWN_PARAMETERS
    share = _input_share(evidence.wholes)
    if bounds.least_share <= share < SMALL_SHARE:
        yield words.small_share(share)
    if takes_back(evidence) and any(j.verdict is Verdict.VIOLATED for j in judged):
        yield words.TAKEN_BACK
    if evidence.modified:
        yield words.MODIFIED
    if evidence.forward is Forward.WITHOUT_FAST_PATH:
        yield words.FAST_PATH
    yield from evidence.refusals


def _input_share(wholes: Iterable[Whole]) -> float:
    """The input's largest share of the output; infinite where nothing was measured."""
    shares = [abs(whole.found.input_share) for whole in wholes]
    return largest(shares) if shares else inf
