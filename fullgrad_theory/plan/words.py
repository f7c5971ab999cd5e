"""What is said about a plan: why an operation breaks completeness, and why an edit mends it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

from ..edits.kinds import Edit, FreezeScale, Integrate, Prune, Scale, Secant, Stage
from ..operators.algebra import Algebra
from ..operators.calls import Call, short_name, target_name
from ..operators.relations import Relation

if TYPE_CHECKING:
    from .labelling import Degrees
    from .problem import Problem


@dataclass(frozen=True)
class Breach:
    """How a relation is broken at a call. `wrong`: operands that should be seen at degree 0, with
    their degrees; `totals`: the degrees that should be one, or the one that is outside the domain.
    """

    kind: Literal["zero", "frozen", "ray", "sum", "eps", "constant"]
    call: Call
    wrong: Mapping[str, Fraction] = field(default_factory=dict)
    totals: tuple[Fraction, ...] = ()

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
        case "frozen":
            return "adds a frozen value, which nobody attributes, to a live one"
        case "ray":
            return f"its ray from 0 moves operands of degree {degrees}, not alike"
        case "sum":
            return f"adds values of degree {degrees}"
        case "eps":
            return "a literal inside a divisor is no bias: the norm with eps has no degree"
        case "constant":
            return f"adds a constant to a value of degree {degrees}"


# --------------------------------------------------------------------------- why an edit


def edit_words(edit: Edit, before: Degrees, after: Degrees) -> str:
    """Why an edit is made, in one sentence without names, so that equal edits have equal reasons.

    `before`: the labelling without edits; `after`: with all edits of the plan.
    """
    call = before.live.calls[edit.node]
    match edit.kind:
        case Prune.kind:
            return _why_pruned(edit, call, before, after)
        case Scale.kind:
            return _why_scaled(edit, call)
        case FreezeScale.kind:
            return "1/sigma depends on the input; held fixed, the layer is linear in it"
        case Integrate.kind:
            origin = "; f(0) is a bias leaf" if after.biases.get(edit.node) else ""
            return f"no closed form: its Jacobian is averaged along the ray from 0{origin}"
        case Secant.kind:
            at_0 = call.operator.origin
            origin = f"; f(0) = {at_0:.3g} is a bias leaf" if at_0 else ""
            return f"not homogeneous: the secant from 0 takes the place of the derivative{origin}"
    raise AssertionError(f"nothing is said of {edit.kind}")


def _why_scaled(edit: Edit, call: Call) -> str:
    if edit.stage is Stage.EDGE:
        return "the products inside attention share what they are attributed"
    what = "a product" if call.operator.algebra is Algebra.MULTILINEAR else "its output is"
    return f"{what} of degree {1 / edit.multiplies()}, scaled to degree 1"


def _why_pruned(edit: Edit, call: Call, before: Degrees, after: Degrees) -> str:
    if call.operator.algebra is Algebra.ATTENTION:
        return "the attention weights depend on it; held fixed, attention is linear in its values"
    terms = [term for r in after.modes[edit.node].outputs for term in r.terms]
    powers = [power for term in terms for name, power in term if name == edit.held]
    if powers and all(power < 0 for power in powers):
        return "the divisor is held fixed, as 1/sigma of a norm is"
    cause = _without_degree(edit, call, before, after)
    if cause is not None and cause.eps:
        return "the factor is one over a norm with eps, which is held fixed"
    if cause is not None:
        return f"the factor comes from {_short(cause)}, which has no degree; it is held fixed"
    if edit.node in before.findings:
        return f"{_short(call)} has no degree in it; it is held fixed"
    return "held fixed, so that the degrees agree"


def _without_degree(edit: Edit, call: Call, before: Degrees, after: Degrees) -> Call | None:
    """The nearest operation of no degree that is behind a pruned edge, and behind it alone."""
    assert edit.held is not None
    operand = call.node(edit.held)
    queue = [operand] if operand is not None else []
    for node in queue:
        if node.name not in after.alive and node.name in before.live.calls:
            if node.name in before.findings:
                return before.live.calls[node.name]
            queue += [n for n in node.all_input_nodes if n not in queue]
    return None


def _short(call: Call) -> str:
    return short_name(call.operator.name)


# --------------------------------------------------------------------------- why there is no plan


def obstacle_words(problem: Problem, after: Degrees, obstacles: Iterable[str]) -> str:
    """All obstacles at once: node, module, source line, the condition that fails, the way out."""
    graph = problem.graph
    alike: dict[tuple[str, str], list[str]] = {}
    for name in dict.fromkeys([*(n for n in obstacles if n in after.findings), *after.findings]):
        reason = after.findings[name].reason + _way_out(problem, name, after)
        alike.setdefault((target_name(graph.nodes[name].target), reason), []).append(name)
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
    if after.findings[name].opaque:
        return "; multiply by it instead, or take it out of the model"
    if "softmax" in target_name(problem.graph.nodes[name].target) and _is_head(problem, name):
        return "; the output is a probability: judge the logits"
    return ""


def _is_head(problem: Problem, name: str) -> bool:
    """Whether an output is this node's value, merely moved."""
    if name in problem.ends:
        return True
    users = [u.name for u in problem.graph.nodes[name].users if u.name in problem.nodes]
    structural = (
        u
        for u in users
        if problem.live.calls[u].operator.algebra is Algebra.STRUCTURAL
        and len(problem.nodes[u].edges) == 1
    )
    return any(_is_head(problem, user) for user in structural)


# --------------------------------------------------------------------------- what was measured


def relation_words(relation: Relation) -> str:
    """`'degree x + gate'`, `'degree 0 where y has degree 0'`."""
    if not relation.terms and relation.zero:
        return "no degree"
    sums = [" + ".join(n if p == 1 else f"{p} {n}" for n, p in t) for t in relation.terms]
    zero = f" where {', '.join(relation.zero)} has degree 0" if relation.zero else ""
    text = (" = ".join(sums) or "0").replace("+ -", "- ").replace("- 1 ", "- ")
    return f"degree {text}{zero}"
