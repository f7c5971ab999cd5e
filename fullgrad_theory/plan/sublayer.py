"""A plan that integrates one of a model's modules as a single function."""

from __future__ import annotations

from dataclasses import replace

from ..edits.costs import Policy
from ..edits.folding import exits, fold
from ..edits.integrating import Integrate
from ..errors import InputError, NoPlanError, unknown_name
from ..graph.computation import ComputationGraph, is_float
from ..graph.door import Inputs, Model
from ..graph.sources import module_path
from ..graph.tracing import trace
from .derivation import derive_rules
from .plan import Plan, fingerprint
from .states import State, liveness


def integrate(
    model: Model | ComputationGraph,
    inputs: Inputs = None,
    path: str = "",
    policy: str | Policy = "libra",
) -> Plan:
    """The plan in which the module at `path` ('blocks.3.mlp') is one function, its Jacobian
    integrated along the ray from 0 to what it reads; the rest is derived under `policy`.

    Raises `UnknownNameError` for a path that no operation was traced in, `InputError` where its
    value leaves at several places or something in it carries no gradient, and `NoPlanError`.
    """
    graph = model if isinstance(model, ComputationGraph) else trace(model, inputs)
    edit = _region(graph, path)
    plan = derive_rules(fold(graph, (edit,)), policy=policy)
    alone = Integrate(edit.node)
    if alone not in plan.edits:
        raise NoPlanError(
            f"under policy {plan.policy!r} no gradient passes {path}: integrate what reads it"
        )
    reasons = {edit if e == alone else e: reason for e, reason in plan.reasons.items()}
    return replace(
        plan,
        edits=tuple(edit if e == alone else e for e in plan.edits),
        reasons=reasons,
        fingerprint=fingerprint(graph),
        where={**plan.where, edit.node: ("region", path)},
    )


def _region(graph: ComputationGraph, path: str) -> Integrate:
    live = liveness(graph)
    inside = [
        node
        for name, node in graph.nodes.items()
        if name in live.calls and f"{module_path(node)}.".startswith(f"{path}.")
    ]
    if not path or not inside:
        raise unknown_name("module path", path, {module_path(n) for n in graph.nodes.values()})
    left_at = exits(inside)
    if len(left_at) != 1:
        names = ", ".join(graph.describe(n.name) for n in left_at)
        raise InputError(f"{path} is no single function of what it reads, it is left at: {names}")
    frozen = [n for n in inside if is_float(n) and live.state(n) is State.FROZEN]
    if frozen:
        raise InputError(
            f"{path} cannot be integrated: {graph.describe(frozen[0].name)} carries no gradient, "
            "so the slopes along the ray do not add up to the value at its end"
        )
    return Integrate(left_at[0].name, tuple(n.name for n in inside))
