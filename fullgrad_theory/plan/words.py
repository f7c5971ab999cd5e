"""What is said about a plan: why an operation breaks completeness, why an edit mends it, and the
plan as text, for a terminal and an edit of it in a line."""

from __future__ import annotations

import shutil
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import groupby
from typing import TYPE_CHECKING, Literal

from ..edits.kinds import Edit, FreezeScale, Integrate, Prune, Scale, Secant, Stage
from ..operators.algebra import Algebra
from ..operators.calls import Call, short_name, target_name
from ..operators.relations import Relation

if TYPE_CHECKING:
    from .labelling import Degrees
    from .plan import Plan
    from .problem import Problem

Kind = Literal["zero", "frozen", "chosen", "ray", "sum", "eps", "constant"]
LIMIT_MET = (
    "the search for alternatives met its limit: there may be others, and cheaper ones; "
    "raise effort in derive_rules"
)


@dataclass(frozen=True)
class Breach:
    """How a relation is broken at a call. `wrong`: operands that should be seen at degree 0, with
    their degrees; `totals`: the degrees that should be one, or the one that is outside the domain;
    `integers`: the integer inputs that an added value is made of.
    """

    kind: Kind
    call: Call
    wrong: Mapping[str, Fraction] = field(default_factory=dict)
    totals: tuple[Fraction, ...] = ()
    integers: tuple[str, ...] = ()

    @property
    def inherited(self) -> bool:
        """Whether those are at fault that gave an operand its degree, where there are any."""
        return self.kind in ("ray", "sum", "constant")


def breach_words(breach: Breach) -> str:
    """Why a node breaks completeness, in words that follow its name."""
    degrees = " and ".join(map(str, breach.totals))
    match breach.kind:
        case "zero":
            what = ", ".join(f"{n} (degree {d})" for n, d in breach.wrong.items())
            return f"{breach.call.operator.kind.why} {what}"
        case "frozen" if breach.integers:
            return f"adds a number made of {_integers(breach.integers)}, to a live value"
        case "frozen":
            return "adds a frozen value, which nobody attributes, to a live one"
        case "chosen":
            return (
                "jumps to or from a constant where a value that depends on the input says so, and "
                "nobody attributes the jump; write it without one (clamp, maximum, relu), or "
                "multiply by the condition"
            )
        case "ray":
            return f"its ray from 0 moves operands of degree {degrees}, not alike"
        case "sum":
            return f"adds values of degree {degrees}"
        case "eps":
            return "a literal inside a divisor is no bias: the norm with eps has no degree"
        case "constant":
            return f"adds a constant to a value of degree {degrees}"


def _integers(names: tuple[str, ...]) -> str:
    return f"the integer input {', '.join(map(repr, names))}, which carries no gradient"


def no_gradient_words(name: str, integers: tuple[str, ...]) -> str:
    """Why nothing can be attributed where no output carries gradient."""
    if integers:
        return (
            f"no output of {name} carries gradient: it is made of {_integers(integers)}; integers "
            "that are used as numbers have to be passed as floats to be explained, and those that "
            "look rows of a table up need that table to be a constant"
        )
    return (
        f"no output of {name} carries gradient: all of them are constant, detached, "
        "rounded or compared; judge a value from before that"
    )


def edit_words(edit: Edit, before: Degrees, after: Degrees) -> str:
    """Why an edit is made, in one sentence without names, so that equal edits have equal reasons.

    `before`: the labelling without edits; `after`: with all edits of the plan.
    """
    op = before.live.calls[edit.node].operator
    match edit.kind:
        case Prune.kind:
            return _why_pruned(edit, before, after)
        case Scale.kind if edit.stage is Stage.EDGE:
            return "the products inside attention share what they are attributed"
        case Scale.kind:
            what = "a product" if op.algebra is Algebra.MULTILINEAR else "its output is"
            return f"{what} of degree {1 / edit.multiplies()}, scaled to degree 1"
        case FreezeScale.kind:
            return "1/sigma depends on the input; held fixed, the layer is linear in it"
        case Integrate.kind:
            origin = "; f(0) is a bias leaf" if after.biases.get(edit.node) else ""
            return f"no closed form: its Jacobian is averaged along the ray from 0{origin}"
        case Secant.kind:
            origin = f"; f(0) = {op.origin:.3g} is a bias leaf" if op.origin else ""
            return f"not homogeneous: the secant from 0 takes the place of the derivative{origin}"
    raise AssertionError(f"nothing is said of {edit.kind}")


def _why_pruned(edit: Edit, before: Degrees, after: Degrees) -> str:
    call = before.live.calls[edit.node]
    op = call.operator
    if call.gate == edit.held:
        return "a gate of the value it multiplies: held fixed, it is the secant of their product"
    if op.algebra is Algebra.ATTENTION:
        return "the attention weights depend on it; held fixed, attention is linear in its values"
    terms = [term for r in after.modes[edit.node].outputs for term in r.terms]
    powers = [power for term in terms for name, power in term if name == edit.held]
    if powers and all(power < 0 for power in powers):
        return "the divisor is held fixed, as 1/sigma of a norm is"
    cause = _without_degree(edit, before, after)
    if cause is not None and cause.eps:
        return "the factor is one over a norm with eps, which is held fixed"
    if cause is not None:
        name = short_name(cause.operator.name)
        return f"the factor comes from {name}, which has no degree; it is held fixed"
    if edit.node in before.findings:
        return f"{short_name(op.name)} has no degree in it; it is held fixed"
    return "held fixed, so that the degrees agree"


def _without_degree(edit: Edit, before: Degrees, after: Degrees) -> Call | None:
    """The nearest operation of no degree that is behind a pruned edge, and behind it alone."""
    assert edit.held is not None
    operand = before.live.calls[edit.node].node(edit.held)
    queue = [operand] if operand is not None else []
    for node in queue:
        if node.name not in after.alive and node.name in before.live.calls:
            if node.name in before.findings:
                return before.live.calls[node.name]
            queue += [n for n in node.all_input_nodes if n not in queue]
    return None


def obstacle_words(problem: Problem, after: Degrees, obstacles: Iterable[str]) -> str:
    """All obstacles at once: node, module, source line, the condition that fails, the way out."""
    graph = problem.graph
    alike = defaultdict[tuple[str, str], list[str]](list)
    for name in dict.fromkeys([*(n for n in obstacles if n in after.findings), *after.findings]):
        reason = after.findings[name].reason + _way_out(problem, name, after)
        alike[target_name(graph.nodes[name].target), reason].append(name)
    lines = [
        f"  {graph.describe(names[0])}: {reason}"
        + (f" (and {len(names) - 1} more like it)" if len(names) > 1 else "")
        for (_, reason), names in alike.items()
    ]
    lines = lines or [f"  {graph.describe(name)}: it has no degree" for name in obstacles]
    return (
        f"no honest plan for {graph.name} under policy {problem.policy.name!r}:\n"
        + "\n".join(lines)
        + "\nchange the layer, allow more edits in the policy (dataclasses.replace), or use a "
        "partial policy ('plain', 'attnlrp'), which reports what stays incomplete"
    )


def _way_out(problem: Problem, name: str, after: Degrees) -> str:
    integers = after.findings[name].integers
    if integers:
        return (
            f"; constant={integers!r} holds that fixed, so that what it adds is a bias; to have it "
            "explained, pass it as floats"
        )
    if after.findings[name].opaque:
        return "; multiply by it instead, or take it out of the model"
    if "softmax" in target_name(problem.graph.nodes[name].target) and _is_head(problem, name):
        return "; the output is a probability: judge the logits"
    return ""


def _is_head(problem: Problem, name: str) -> bool:
    """Whether an output is this node's value, merely moved."""
    if name in problem.ends:
        return True
    return any(
        problem.live.calls[user.name].operator.algebra is Algebra.STRUCTURAL
        and len(problem.nodes[user.name].edges) == 1
        and _is_head(problem, user.name)
        for user in problem.graph.nodes[name].users
        if user.name in problem.nodes
    )


def relation_words(relation: Relation) -> str:
    """`'degree x + gate'`, `'degree 0 where y has degree 0'`."""
    if not relation.terms and relation.zero:
        return "no degree"
    sums = [" + ".join(n if p == 1 else f"{p} {n}" for n, p in t) for t in relation.terms]
    zero = f" where {', '.join(relation.zero)} has degree 0" if relation.zero else ""
    text = (" = ".join(sums) or "0").replace("+ -", "- ").replace("- 1 ", "- ")
    return f"degree {text}{zero}"


# --------------------------------------------------------------------------- the plan as text


@dataclass(frozen=True)
class PlanText:
    """What is said of a plan: `str` of it is the whole, alike edits in one paragraph."""

    plan: Plan

    def __str__(self) -> str:
        plan, width = self.plan, shutil.get_terminal_size().columns
        proof = "" if plan.optimal else ", not proven to be the least: the search met its limit"
        edits = f"{len(plan)} edit" + ("" if len(plan) == 1 else "s")
        lines = [f"policy {plan.policy!r}: {edits}, cost {plan.cost}{proof}"]
        deep, deeper = " " * 8, " " * 10
        for text, more in self._paragraphs():
            lines += textwrap.wrap(text, width, subsequent_indent=deep)
            for words in more:
                lines += textwrap.wrap(words, width, initial_indent=deep, subsequent_indent=deeper)
        return "\n".join(lines)

    def meaning(self, edit: Edit) -> str:
        """One edit in words: what it does to the backward, and what leaves the backward with it."""
        here = self._place(edit.node)
        words = self._label(edit) + (f" in {here}" if here != edit.node else "")
        more = filter(None, (self.plan.reasons.get(edit, ""), self._leaving([edit])))
        return "; ".join((words, *more))

    def _paragraphs(self) -> Iterator[tuple[str, Iterable[str]]]:
        """A line each, and what stands further in beneath it."""
        plan = self.plan
        alike = defaultdict[tuple[str, str], list[Edit]](list)
        for edit in plan.edits:
            alike[self._label(edit), plan.reasons.get(edit, "")].append(edit)
        for (label, reason), edits in alike.items():
            head = f"{len(edits):>5} x {label}: {self._places(e.node for e in edits)}"
            yield head, filter(None, (reason, self._leaving(edits)))
        left = defaultdict[str, list[str]](list)
        for node in plan.left:
            left[self._operation(node)].append(node)
        for operation, nodes in left.items():
            yield f"{len(nodes):>5} x left incomplete: {operation}: {self._places(nodes)}", ()
        for number, other in enumerate(plan.alternatives, 1):
            yield f"alternative {number}, cost {other.cost}: {self._against(other)}", ()
        if plan.stopped:
            yield LIMIT_MET, ()

    def _against(self, other: Plan) -> str:
        removed, added = self.plan.diff(other)
        its = PlanText(other)
        more = "; ".join(filter(None, (its._brief(added), its._leaving(added))))
        return f"{more}; without: {self._brief(removed)}" if removed else more

    def _brief(self, edits: Iterable[Edit]) -> str:
        labels = defaultdict[str, list[str]](list)
        for edit in edits:
            labels[self._label(edit)].append(edit.node)
        return ", ".join(
            (f"{len(nodes)} x " if len(nodes) > 1 else "") + f"{label} ({self._places(nodes)})"
            for label, nodes in labels.items()
        )

    def _leaving(self, edits: Iterable[Edit]) -> str:
        """What is held fixed by these prunes, and what of the model leaves the backward."""
        cuts = [self.plan.cuts[edit] for edit in edits if self.plan.cuts.get(edit)]
        if not cuts:
            return ""
        words = f"held fixed: {_some(self._operation(held) for held, *_ in cuts)}"
        gone = [node for _, *nodes in cuts for node in nodes]
        if gone:
            words += f"; out of the backward: {_some(map(self._operation, gone))}"
            known = (self.plan.where.get(node, ("", ""))[1] for node in gone)
            paths = compress(filter(None, known))
            words += f" in {_some(paths)}" if paths else ""
        return words

    def _operation(self, node: str) -> str:
        return short_name(self.plan.where.get(node, (node, ""))[0])

    def _places(self, nodes: Iterable[str]) -> str:
        return ", ".join(compress(self._place(node) for node in nodes))

    def _place(self, node: str) -> str:
        return self.plan.where.get(node, ("", ""))[1] or node

    def _label(self, edit: Edit) -> str:
        return edit.words(self._operation(edit.node))


def _some(words: Iterable[str], most: int = 6) -> str:
    """The first few of different words."""
    words = list(dict.fromkeys(words))
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if words[most:] else "")


def compress(paths: Iterable[str]) -> list[str]:
    """Paths that differ in numbers only as one: `blocks.{0..11}.norm1`. Order and doubles go."""
    rows = {tuple(path.split(".")) for path in paths}
    for position in range(max(map(len, rows), default=0)):
        numbered = {row for row in rows if row[position : position + 1] and row[position].isdigit()}
        groups = defaultdict[tuple[str, ...], set[int]](set)
        for row in numbered:
            groups[*row[:position], "", *row[position + 1 :]].add(int(row[position]))
        rows -= numbered
        for rest, numbers in groups.items():
            rows.add((*rest[:position], _runs(sorted(numbers)), *rest[position + 1 :]))
    return [".".join(row) for row in sorted(rows)]


def _runs(numbers: list[int]) -> str:
    """`[0, 1, 2, 7]` as `'{0..2,7}'`; one number as itself."""
    by_offset = groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    runs = [[number for _, number in run] for _, run in by_offset]
    parts = [str(r[0]) if len(r) == 1 else f"{r[0]}..{r[-1]}" for r in runs]
    return parts[0] if len(numbers) == 1 else "{" + ",".join(parts) + "}"
