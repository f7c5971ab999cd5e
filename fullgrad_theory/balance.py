"""A plan written into the graph: same forward bit for bit, edited backward."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from . import backward, quadrature
from .degrees import degrees
from .derive import derive_rules
from .errors import InputError, PlanError
from .fold import fold
from .operators import bind, target_name
from .plan import Plan
from .policies import Policy
from .rules import Edit, FreezeScale, Integrate, Prune, Scale, Secant
from .trace import ComputationGraph, Inputs, Model, tensor_value, trace

aten = torch.ops.aten


class Balanced(nn.Module):
    """A model with an edited backward pass. `fx`: the rewritten graph; `plan`: what was written.

    Parameters are shared with the user's model: moving or casting this module moves that one too.
    """

    def __init__(self, graph: ComputationGraph, plan: Plan) -> None:
        super().__init__()
        graph = fold(graph, plan.edits)
        self.fx = rewrite(graph, plan.edits)
        self.plan = plan
        self.graph: ComputationGraph | None = graph
        self._shapes = [
            tuple(s if isinstance(s, int) else None for s in value.shape)
            for value in map(tensor_value, graph.placeholders)
            if value is not None
        ]
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        for given, wanted in zip(tensors, self._shapes, strict=False):
            fits = given.dim() == len(wanted) and all(
                w is None or s == w for s, w in zip(given.shape, wanted, strict=True)
            )
            if not fits:
                shape = tuple("any" if w is None else w for w in wanted)
                raise InputError(
                    f"this model was balanced for inputs of shape {shape}, got "
                    f"{tuple(given.shape)}; call balance() again with inputs of that shape"
                )
        return self.fx(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"graph": None}  # fake tensors do not pickle


def balance(
    model: Model | ComputationGraph, inputs: Inputs = None, policy: str | Policy | Plan = "libra"
) -> Balanced:
    """The model with a policy's (or a plan's) edits in its backward: an ordinary `nn.Module`.

    The forward is that of `model` bit for bit; any batch size that it takes is taken; nothing of it
    changes. Raises what `trace` and `derive_rules` raise, and `PlanError`.
    """
    graph = model if isinstance(model, ComputationGraph) else trace(model, inputs)
    plan = policy if isinstance(policy, Plan) else derive_rules(graph, policy=policy)
    return Balanced(graph, plan)


def rewrite(
    graph: ComputationGraph, edits: tuple[Edit, ...], root: nn.Module | None = None
) -> fx.GraphModule:
    """A copy of the graph with the edits written in, over the model's parameters or `root`'s.

    Node names stay. A pruned edge gets a `detach`, a scaled node or edge a `backward.scale`; a
    secant, a frozen norm, an attention with pruned weights and an integral have their own backward.
    """
    graph = fold(graph, edits)
    copied = copy.deepcopy(graph.fx.graph)
    nodes = {node.name: node for node in copied.nodes}
    missing = sorted({e.node for e in edits} - nodes.keys())
    if missing:
        raise PlanError(f"the plan edits nodes this graph does not have: {', '.join(missing[:5])}")
    labels = cache(lambda: degrees(graph, edits))
    pruned = {(e.node, e.argument) for e in edits if isinstance(e, Prune)}
    for edit in sorted(edits, key=_edges_first):
        node = nodes[edit.node]
        if isinstance(edit, Prune):
            if {(node.name, "query"), (node.name, "key")} <= pruned and (
                node.target in (aten.scaled_dot_product_attention.default, backward.attention)
            ):
                node.target = backward.attention
            else:
                _wrap_edge(copied, node, edit.argument, aten.detach.default)
        elif isinstance(edit, Scale) and edit.argument is not None:
            _wrap_edge(copied, node, edit.argument, backward.scale, float(edit.factor))
        elif isinstance(edit, Scale):
            with copied.inserting_after(node):
                scaled = copied.call_function(backward.scale, (node, float(edit.factor)))
            scaled.meta = dict(node.meta) | {"edit": edit}
            node.replace_all_uses_with(scaled, lambda user, new=scaled: user is not new)
        elif isinstance(edit, Secant):
            node.args = (target_name(node.target), *node.args)
            node.target = backward.secant
        elif isinstance(edit, FreezeScale):
            node.target = backward.FREEZES[target_name(node.target)]
        elif isinstance(edit, Integrate):
            along = labels().rays.get(node.name, ())
            node.args = (target_name(node.target), along, graph.describe(node.name), *node.args)
            node.target = quadrature.integrate
    copied.lint()
    copied._tracer_cls = None  # torch 2.11 cannot make export's own tracer again from a pickle
    module = fx.GraphModule(graph.fx if root is None else root, copied, "Balanced")
    module.eval()
    return module


def _edges_first(edit: Edit) -> int:
    """Edges are found by the ATen schema, which a node edit replaces."""
    edge = isinstance(edit, Prune) or (isinstance(edit, Scale) and edit.argument is not None)
    return 0 if edge else 2 if isinstance(edit, Scale) else 1


def _wrap_edge(graph: fx.Graph, node: fx.Node, argument: str, target: Any, *extra: Any) -> None:
    """Put a call on one edge; other consumers of the value are untouched."""
    stem, _, index = argument.partition("[")
    bound = bind(node)
    value = bound.get(stem)
    if index and isinstance(value, (list, tuple)):
        value = value[int(index[:-1])]
    if not isinstance(value, fx.Node):
        raise PlanError(f"{node.name}.{argument} is no edge of this graph")
    with graph.inserting_before(node):
        wrapped = graph.call_function(target, (value, *extra))
    wrapped.meta = {k: v for k, v in value.meta.items() if k == "val"}
    names = list(bound)
    if stem in node.kwargs:
        node.kwargs = {**node.kwargs, stem: wrapped}
        return
    position = names.index(stem)
    current = node.args[position]
    if index:
        elements = list(current)  # type: ignore[arg-type]
        elements[int(index[:-1])] = wrapped
        node.update_arg(position, elements)
    else:
        node.update_arg(position, wrapped)
