"""From a graph and a policy to a plan: the least-cost labelling with degrees.

Every live value gets a degree so that each operation's relation holds, the output has degree 1 and
the edits cost least.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction

from torch import fx

from ..edits.costs import Policy, within
from ..edits.costs import policy as policy_of
from ..edits.folding import fold
from ..edits.kinds import Edit, Integrate, Scale
from ..errors import InputError, NoPlanError, PolicyError
from ..graph.computation import ComputationGraph
from ..graph.door import Inputs, Model, Names
from ..graph.leaves import LeafSpec
from ..graph.outputs import Selection
from ..graph.sources import module_path
from ..operators.calls import target_name
from ..operators.registry import REGION
from .labelling import Degrees, degrees
from .measuring import graph_of
from .plan import Plan, fingerprint
from .problem import Problem
from .solving import Edits, Solved
from .spelling import spelled
from .states import integers_behind, liveness
from .words import compress, edit_words, no_gradient_words, obstacle_words


def derive_rules(
    model: Model | ComputationGraph,
    inputs: Inputs = None,
    policy: str | Policy = "libra",
    *,
    alternatives: int = 0,
    effort: float = 10.0,
    unknown: str = "error",
    leaves: Collection[LeafSpec] = (),
    output: Selection = None,
    constant: Names = (),
    explain: Names | None = None,
) -> Plan:
    """The least-cost plan that makes a model, a layer or a traced graph complete under a policy.

    `alternatives`: how many further plans to look for, the next cheapest ones, as the plan's
    `alternatives`; each needs all of its edits, and gives another gradient than the rest.
    `effort` bounds the search per piece, for the best plan and once more for the alternatives, in
    the solver's deterministic units (a unit takes seconds, six on one hard layer): the same graph
    gives the same plan, and beyond it the best one so far with `optimal=False`. `unknown` as in
    `check_completeness`; `leaves`, `output`, `constant` and `explain` as in `trace`.
    Raises `NoPlanError` naming the obstacle, `UnknownNameError`, `PolicyError`, `InputError` for
    alternatives to a partial policy, and what `trace` raises.
    """
    chosen = policy_of(policy)
    if alternatives < 0:
        raise InputError(f"alternatives={alternatives}: expected a number from 0 up")
    if alternatives and not chosen.complete:
        raise InputError(
            f"policy {chosen.name!r} is partial, and alternatives are plans that leave "
            "nothing incomplete; take a complete policy, such as 'libra'"
        )
    graph = graph_of(model, inputs, leaves, unknown, output, constant, explain)
    problem, before = _problem(graph, chosen)
    if not problem.ends:
        behind = [integers_behind(graph, before.live, output) for output in graph.outputs]
        integers = tuple(dict.fromkeys(n for names in behind for n in names)) if all(behind) else ()
        raise NoPlanError(no_gradient_words(graph.name, integers))
    _check_modules(graph, chosen)
    if not before.findings or chosen.idle:
        return _plan(problem, before, before, Edits(), True)
    whole = spelled(graph, before, chosen)
    if not whole:
        return _reaching(problem, before, alternatives, effort)
    folded = fold(graph, whole)
    # a user folds a region in order to have it integrated; this one is an operation with a price
    priced = {e.node: replace(REGION) for e in whole if isinstance(e, Integrate)}
    folded = replace(folded, measured={**folded.measured, **priced})
    plan = _reaching(*_problem(folded, chosen), alternatives, effort)
    return _unfolded(plan, graph, {type(edit)(edit.node): edit for edit in whole})


def _problem(graph: ComputationGraph, policy: Policy) -> tuple[Problem, Degrees]:
    """The problem, and the labelling without edits."""
    live = liveness(graph)
    before = degrees(graph, (), live)
    return Problem(graph, live, policy, before.seen), before


def _unfolded(plan: Plan, graph: ComputationGraph, regions: Mapping[Edit, Edit]) -> Plan:
    """The plan of a graph in which regions are folded, as one of the graph itself."""
    return replace(
        plan,
        edits=tuple(regions.get(edit, edit) for edit in plan.edits),
        reasons={regions.get(edit, edit): reason for edit, reason in plan.reasons.items()},
        fingerprint=fingerprint(graph),
        where={name: _where(graph.nodes[name]) for name in plan.where},
        alternatives=tuple(_unfolded(other, graph, regions) for other in plan.alternatives),
    )


def _check_modules(graph: ComputationGraph, policy: Policy) -> None:
    """Raise where a module that is to be kept is none of this graph's."""
    paths = dict.fromkeys(filter(None, map(module_path, graph.nodes.values())))
    for pattern in policy.keep:
        if not any(within(path, pattern) for path in paths):
            raise PolicyError(
                f"policy {policy.name!r} keeps {pattern!r}, and {graph.name} has no such module; "
                f"its modules: {', '.join(compress(paths)[:12]) or 'none'}"
            )


def _reaching(problem: Problem, before: Degrees, alternatives: int, effort: float) -> Plan:
    """The plan, but that no factor is held fixed whose inputs would then be explained nowhere.

    To cut one of two towers off costs less than to mend it, and says nothing of its input.
    """
    plan = _search(problem, before, alternatives, effort)
    lost = _lost(problem, before, plan.edits)
    meeting = [
        edit.node
        for edit, gone in plan.cuts.items()
        if edit.held and lost & {*gone} and problem.is_factor(edit.node, edit.held)
    ]
    policy = problem.policy
    if alternatives or not policy.complete or policy.scale is None or len(meeting) != 1:
        return plan
    return _of_both(problem, before, lost, meeting[0], effort) or plan


def _of_both(
    problem: Problem, before: Degrees, lost: set[str], meeting: str, effort: float
) -> Plan | None:
    """Each tower mended with the other one held constant, and the product that they meet in halved;
    None where that does not make the graph complete."""
    graph = problem.graph
    one = _inputs_behind(graph, lost)
    other = _inputs_behind(graph, set(problem.live.sources) & before.alive - lost)
    if not one or not other or one & other:
        return None
    try:
        plans = [
            derive_rules(
                replace(graph, held=graph.held | held), None, problem.policy, effort=effort
            )
            for held in (one, other)
        ]
    except NoPlanError:
        return None
    place = graph.places
    both = {edit for plan in plans for edit in plan.edits} | {Scale(meeting, Fraction(1, 2))}
    edits = tuple(sorted(both, key=lambda edit: (place[graph.nodes[edit.node]], edit.stage)))
    if len({(edit.node, edit.place) for edit in edits}) < len(edits):
        return None
    after = degrees(graph, edits, problem.live)
    if after.findings or _lost(problem, before, edits):
        return None
    cost = sum(plan.cost for plan in plans) + (problem.policy.scale or 0)
    return _plan(problem, before, after, Edits(edits, cost), all(p.optimal for p in plans))


def _inputs_behind(graph: ComputationGraph, names: Collection[str]) -> frozenset[str]:
    """The inputs that values are made of."""
    behind = [graph.nodes[name] for name in names]
    for node in behind:
        behind += [n for n in node.all_input_nodes if n not in behind]
    return frozenset(n.name for n in behind if n.op == "placeholder")


def _lost(problem: Problem, before: Degrees, edits: tuple[Edit, ...]) -> set[str]:
    """The inputs that edits cut off."""
    after = degrees(problem.graph, edits, problem.live)
    return {s for s in problem.live.sources if s in before.alive and s not in after.alive}


def _search(problem: Problem, before: Degrees, alternatives: int, effort: float) -> Plan:
    solved = Solved(problem, alternatives, effort)
    choices = [(), *solved.next_best(alternatives)]
    best, *others = [_labelled(problem, before, solved, choice) for choice in choices]
    return replace(best, alternatives=tuple(others), stopped=not solved.searched)


def _labelled(problem: Problem, before: Degrees, solved: Solved, choice: Sequence[int]) -> Plan:
    """One solution as a plan, by the labelling that `degrees` has, which knows nothing of the
    search."""
    graph, made = problem.graph, solved.edits(choice)
    after = degrees(graph, made.edits, problem.live)
    if made.obstacles:
        raise NoPlanError(obstacle_words(problem, after, made.obstacles))
    if problem.policy.complete and after.findings:
        reasons = "; ".join(f"{graph.describe(n)}: {f.reason}" for n, f in after.findings.items())
        raise AssertionError(f"error of the library: the plan derived leaves {reasons}")
    return _plan(problem, before, after, made, solved.searched if choice else solved.optimal)


def _plan(problem: Problem, before: Degrees, after: Degrees, made: Edits, optimal: bool) -> Plan:
    """The plan of these edits, with what is said of them, by the labelling before and after."""
    graph = problem.graph
    left = tuple(name for name in graph.nodes if name in after.findings)
    cuts = {e: _cut(e.held, e, before, after) for e in made.edits if e.held is not None}
    named = [*(e.node for e in made.edits), *left, *(n for nodes in cuts.values() for n in nodes)]
    return Plan(
        made.edits,
        problem.policy.name,
        {edit: edit_words(edit, before, after) for edit in made.edits},
        made.cost,
        optimal,
        fingerprint(graph),
        left,
        {name: _where(graph.nodes[name]) for name in dict.fromkeys(named)},
        cuts,
    )


def _where(node: fx.Node) -> tuple[str, str]:
    """The operation (the name of an input) and the module path."""
    return target_name(node.target) if node.op == "call_function" else node.name, module_path(node)


def _cut(held: str, edit: Edit, before: Degrees, after: Degrees) -> tuple[str, ...]:
    """The value held fixed, then all nodes that leave the backward with it, nearest first."""
    value = before.live.calls[edit.node].node(held)
    assert value is not None
    queue = [value]
    for node in queue:
        if node.name not in after.alive:
            behind = [n for n in node.all_input_nodes if n.name in before.alive]
            queue += [n for n in behind if n not in queue and n.name not in after.alive]
    return (value.name, *(n.name for n in queue if n.name not in after.alive))
