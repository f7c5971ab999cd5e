"""A sub-layer folded into one call, so that it can be edited as one function.

The folded graph is a graph like any other: the region's exit keeps its name and calls the region,
whose operands are the values it reads from outside, weights included. What is read from within it
elsewhere is computed there once more.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import replace

from torch import fx, nn

from ..errors import PlanError
from ..graph.computation import ComputationGraph
from ..graph.normal import enter_autocast, leave_autocast
from ..graph.passing import forget_inner, recompile, unbound
from ..operators.registry import record_of, region_of
from .base import Edit


def fold(graph: ComputationGraph, edits: Collection[Edit]) -> ComputationGraph:
    """The graph with the region of every edit that has one folded into its exit; itself without.

    Raises `PlanError` where a region is not in the graph or changes autocast.
    """
    todo = [e for e in edits if e.folds and _open(graph, e)]
    if not todo:
        return graph
    forget_inner(graph.fx)
    module = fx.GraphModule(graph.fx, copy.deepcopy(graph.fx.graph), graph.name)
    for edit in todo:
        _fold_one(graph, module, edit)
    module.graph.lint()
    recompile(module)
    module.eval()
    inside = {e.node: [record_of(graph.nodes[n]) for n in e.folds] for e in todo}
    records = {e.node: e.record([r for r in inside[e.node] if r is not None]) for e in todo}
    known = {node: record for node, record in records.items() if record is not None}
    return replace(graph, fx=unbound(module), measured={**graph.measured, **known})


def _open(graph: ComputationGraph, edit: Edit) -> bool:
    """Whether the region is still to be folded."""
    found = graph.nodes.get(edit.node)
    return found is None or found.target is not region_of


def _fold_one(graph: ComputationGraph, module: fx.GraphModule, edit: Edit) -> None:
    nodes = {n.name: n for n in module.graph.nodes}
    missing = sorted({edit.node, *edit.folds} - nodes.keys())
    if missing:
        raise PlanError(f"the region of {edit.node} is not of this graph: {', '.join(missing[:5])}")
    inside = [n for n in module.graph.nodes if n.name in {edit.node, *edit.folds}]
    if crosses_autocast(module.graph, inside):
        raise PlanError(f"the region of {edit.node} enters or leaves autocast: take one within it")
    graph_of_region = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    reads = dict.fromkeys(u for n in inside for u in n.all_input_nodes if u not in inside)
    for value in reads:
        copies[value] = graph_of_region.placeholder(value.name)
        copies[value].meta = dict(value.meta)
    for node in inside:
        copies[node] = graph_of_region.node_copy(node, copies.__getitem__)
    leaving = nodes[edit.node]
    graph_of_region.output(copies[leaving])
    path = f"region_of_{edit.node}"
    module.add_submodule(path, unbound(fx.GraphModule(nn.Module(), graph_of_region, "Region")))
    with module.graph.inserting_before(leaving):
        inner = module.graph.get_attr(path)
    leaving.target, leaving.args, leaving.kwargs = region_of, (inner, edit.node, *reads), {}
    for node in reversed(inside):
        if node is not leaving and not node.users:  # what others read as well stays beside it
            module.graph.erase_node(node)


def crosses_autocast(graph: fx.Graph, inside: Collection[fx.Node]) -> bool:
    """Whether autocast begins or ends between the first and the last of these nodes."""
    order = list(graph.nodes)
    places = [order.index(node) for node in inside]
    between = order[min(places) : max(places)]
    return any(node.target in (enter_autocast, leave_autocast) for node in between)


def exits(inside: Collection[fx.Node]) -> list[fx.Node]:
    """The nodes among `inside` that others read."""
    within = set(inside)
    return [n for n in inside if any(user not in within for user in n.users)]
