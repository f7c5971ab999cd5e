"""The computation graph of a model: torch.export's ATen graph, and a networkx view of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from ..operators.calls import bind, operands, target_name
from ..operators.record import Operator
from .door import Model
from .sources import module_path, source_line

if TYPE_CHECKING:
    import networkx as nx


@dataclass(frozen=True, eq=False)
class ComputationGraph:
    """A traced model. `fx`: a GraphModule over pure ATen calls that shares the model's parameters.

    `args`, `kwargs` are the example inputs; `dynamic` says whether the batch size was left open.
    `measured`: node -> what `blackbox.measure` found of an operation that nobody registered.
    """

    fx: GraphModule
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    name: str
    dynamic: bool
    model: Model
    measured: Mapping[str, Operator] = field(default_factory=dict)

    @cached_property
    def nodes(self) -> dict[str, Node]:
        """The fx nodes by name, in topological order."""
        return {node.name: node for node in self.fx.graph.nodes}

    @cached_property
    def places(self) -> dict[Node, int]:
        """Node -> its place in topological order."""
        return {node: i for i, node in enumerate(self.fx.graph.nodes)}

    @cached_property
    def placeholders(self) -> tuple[Node, ...]:
        return tuple(n for n in self.fx.graph.nodes if n.op == "placeholder")

    @cached_property
    def outputs(self) -> tuple[Node, ...]:
        """The floating-point tensors among the outputs, in order, each once."""
        flat = pytree.tree_leaves(self.fx.graph.output_node().args)
        return tuple(dict.fromkeys(n for n in flat if isinstance(n, Node) and is_float(n)))

    @cached_property
    def nx(self) -> nx.DiGraph:
        """Nodes carry op, kind, shape, dtype, module_path, source; an edge its `arguments`."""
        import networkx as nx  # for this view alone

        graph = nx.DiGraph(name=self.name)
        for node in self.fx.graph.nodes:
            value = tensor_value(node)
            graph.add_node(
                node.name,
                op=target_name(node.target) if node.op == "call_function" else node.op,
                kind=node.op,
                shape=tuple(value.shape) if value is not None else None,
                dtype=value.dtype if value is not None else None,
                module_path=module_path(node),
                source=source_line(node),
            )
            if node.op == "call_function":
                pairs = [(o.name, o.node) for o in operands(bind(node)) if o.node is not None]
            else:
                pairs = [(f"output[{i}]", n) for i, n in enumerate(node.all_input_nodes)]
            for argument, operand in pairs:
                if graph.has_edge(operand.name, node.name):
                    graph.edges[operand.name, node.name]["arguments"] += (argument,)
                else:
                    graph.add_edge(operand.name, node.name, arguments=(argument,))
        return graph

    def describe(self, name: str) -> str:
        """`'gelu_3 (aten.gelu.default) in blocks.3.mlp.act, timm/layers/mlp.py:49'`."""
        node = self.nodes[name]
        what = target_name(node.target) if node.op == "call_function" else node.op
        where = ", ".join(p for p in (module_path(node), source_line(node)) if p)
        return f"{name} ({what})" + (f" in {where}" if where else "")

    @property
    def is_meta(self) -> bool:
        """Whether the model has no values, only shapes."""
        tensors = [*self.fx.parameters(), *self.fx.buffers()]
        tensors += [
            a for a in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(a, Tensor)
        ]
        return any(t.is_meta for t in tensors)


def tensor_value(node: Node) -> Tensor | None:
    """The fake tensor that stands for a node's value, None where it is no tensor."""
    value = node.meta.get("val")
    return value if isinstance(value, Tensor) else None


def is_float(node: Node) -> bool:
    """Whether a node's value is a floating-point or complex tensor (or a tuple holding one)."""
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(v, Tensor) and (v.is_floating_point() or v.is_complex()) for v in values)


def holds_tensor(node: Node) -> bool:
    """Whether a node's value is a tensor or holds one; sizes and flags do not."""
    return any(isinstance(v, Tensor) for v in pytree.tree_leaves(node.meta.get("val")))
