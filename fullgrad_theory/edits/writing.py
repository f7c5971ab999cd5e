"""A copy of a graph that edits are written into."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from operator import getitem
from typing import Any

import torch
from torch import fx, nn

from ..errors import PlanError
from ..graph.computation import ComputationGraph
from ..operators.calls import bind, overload, target_name
from ..operators.record import Operator
from ..operators.registry import lookup
from .base import Edit
from .laying import laid_out


class Target(nn.Module):
    """What an edited node calls where a function alone does not do: it holds the operation."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function, self.training = function, False

    def __getstate__(self) -> dict[str, Any]:
        known = isinstance(self.function, torch._ops.OpOverload)  # does not pickle, its name does
        return self.__dict__ | ({"function": str(self.function)} if known else {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if isinstance(self.function, str):
            self.function = overload(self.function)


class Writing:
    """The copy, its nodes by name, and what edits ask of the graph they are written into.

    `moving`: node -> its operands that depend on the input; `rays`: node -> those along which it is
    integrated.
    """

    def __init__(
        self,
        traced: ComputationGraph,
        edits: Collection[Edit],
        moving: Callable[[str], Collection[str]],
        rays: Callable[[str], tuple[str, ...]],
    ) -> None:
        self.traced, self.edits, self.moving, self.rays = traced, edits, moving, rays
        self.graph = copy.deepcopy(traced.fx.graph)
        self.nodes = {node.name: node for node in self.graph.nodes}
        missing = sorted({e.node for e in edits} - self.nodes.keys())
        if missing:
            raise PlanError(
                f"the plan edits nodes this graph does not have: {', '.join(missing[:5])}"
            )

    def write(self, as_it_is: bool = False) -> fx.Graph:
        """The graph with all edits in it. Node names stay."""
        for node in () if as_it_is else self.nodes.values():
            self._lay_out(node)
        for edit in sorted(self.edits, key=lambda e: e.stage):
            edit.write(self)
        for node in self.nodes.values():
            self._stand_in(node)
        self.graph.lint()
        self.graph._tracer_cls = None  # unpickling with export's own tracer fails in torch 2.11
        return self.graph

    def operator(self, name: str) -> Operator:
        """The record of a node's operation."""
        node = self.traced.nodes[name]
        found = self.traced.measured.get(name) or lookup(target_name(node.target))
        assert found is not None, f"{name} is live, and of no known operation"
        return found

    def describe(self, name: str) -> str:
        return self.traced.describe(name)

    def _lay_out(self, node: fx.Node) -> None:
        """A kernel that misreads its cotangent is given it as it can read it."""
        record = lookup(target_name(node.target)) if node.op == "call_function" else None
        if record is None or not record.misreads:
            return
        several = isinstance(node.meta.get("val"), (tuple, list))
        for value in [u for u in node.users if u.target is getitem] if several else [node]:
            self.behind(value, laid_out).meta["behind"] = value.name

    def _stand_in(self, node: fx.Node) -> None:
        """An operation whose operands are pruned that its frozen form takes for fixed is that."""
        record = lookup(target_name(node.target)) if node.op == "call_function" else None
        frozen = record.frozen if record else None
        if frozen is not None and frozen.held and self.holds_all(node.name, frozen.held):
            node.target = frozen.form

    def holds_all(self, name: str, arguments: Collection[str]) -> bool:
        """Whether all these edges of a node carry no gradient."""
        own = [e for e in self.edits if e.node == name]
        return all(any(e.holds(a) for e in own) for a in arguments)

    def behind(self, node: fx.Node, target: Any, *extra: Any) -> fx.Node:
        """Put a call behind a node: everything that read the node reads it."""
        with self.graph.inserting_after(node):
            wrapped = self.graph.call_function(target, (node, *extra))
        wrapped.meta = _value(node.meta)
        node.replace_all_uses_with(wrapped, lambda user: user is not wrapped)
        return wrapped

    def on_edge(self, node: fx.Node, argument: str, target: Any, *extra: Any) -> None:
        """Put a call on one edge; other consumers of the value are untouched."""
        stem, _, index = argument.partition("[")
        bound = bind(node)
        value = bound.get(stem)
        if index and isinstance(value, (list, tuple)):
            value = value[int(index[:-1])]
        if not isinstance(value, fx.Node):
            raise PlanError(f"{node.name}.{argument} is no edge of this graph")
        with self.graph.inserting_before(node):
            wrapped = self.graph.call_function(target, (value, *extra))
        wrapped.meta = _value(value.meta)
        new: Any = wrapped
        if index:
            new = list(bound[stem])
            new[int(index[:-1])] = wrapped
        if stem in node.kwargs:
            node.kwargs = {**node.kwargs, stem: new}
        else:
            node.update_arg(list(bound).index(stem), new)


def _value(meta: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in meta.items() if k == "val"}
