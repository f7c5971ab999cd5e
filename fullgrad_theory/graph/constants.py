"""The values of a graph's constants, in float64: what a degree is read from, and what is zero."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .computation import ComputationGraph


class Constants:
    """Evaluates nodes that do not depend on the input, each once.

    `moves`: whether a node does depend on it; one that does lends nothing but its shape.
    """

    def __init__(self, graph: ComputationGraph, moves: Callable[[fx.Node], bool]) -> None:
        self._graph, self._moves = graph, moves
        self._values: dict[fx.Node, Any] = {}
        model = graph.model
        buffers = dict(model.named_buffers()) if isinstance(model, nn.Module) else {}
        self._learned = {*buffers, *(name for name, _ in graph.fx.named_parameters())}

    def value(self, node: fx.Node) -> Any:
        """A node's value; None where there is none, as on the meta device."""
        if node not in self._values:
            try:
                with torch.no_grad():
                    value = self._evaluated(node)
            except (RuntimeError, ValueError, TypeError, IndexError):
                value = None
            meta = isinstance(value, Tensor) and value.is_meta
            self._values[node] = None if meta else value
        return self._values[node]

    def beside(self, values: Mapping[fx.Node, Any]) -> Constants:
        """These, and some nodes that count as constants of these values."""
        made = copy.copy(self)
        made._values = {**self._values, **values}
        return made

    def number(self, node: fx.Node) -> float | None:
        """The number that every entry of a constant is, None where there is no such number."""
        value = self.value(node)
        if isinstance(value, Tensor) and value.numel() and not value.is_complex():
            same = bool((value == value.flatten()[0]).all())
            return float(value.flatten()[0]) if same else None
        return float(value) if isinstance(value, (int, float)) else None

    def is_written_zero(self, node: fx.Node) -> bool:
        """Whether it is 0 by the model's code, and not by what a parameter happens to be."""
        return self.number(node) == 0.0 and not self._learned.intersection(self.read_by(node))

    def read_by(self, node: fx.Node) -> set[str]:
        """The parameters, buffers and tensors that a constant is made of, by name."""
        if self._moves(node):
            return set()
        if node.op == "get_attr":
            return {str(node.target)}
        return set().union(*(self.read_by(n) for n in node.all_input_nodes))

    def _evaluated(self, node: fx.Node) -> Any:
        if node.name in self._graph.held:
            return None  # another call may bring another value
        if self._moves(node) or node.op == "placeholder":
            return pytree.tree_map_only(Tensor, _lent, node.meta["val"])
        if node.op == "get_attr":
            found = attrgetter(str(node.target))(self._graph.fx)
            return found.detach().double() if found.is_floating_point() else found.detach()
        if any(self.value(n) is None for n in node.all_input_nodes):
            return None
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.value)
        made = node.target(*args, **kwargs)  # type: ignore[operator]
        return pytree.tree_map_only(Tensor, _wide, made)


def _lent(value: Tensor) -> Tensor:
    """Zeros of a fake tensor's shape, at the sizes of the example inputs."""
    return torch.zeros(hinted(value), dtype=value.dtype, device=value.device)


def _wide(value: Tensor) -> Tensor:
    """In float64, as all floats here are, whatever the model computes in."""
    return value.double() if value.is_floating_point() else value


def hinted(value: Tensor) -> list[int]:
    """A fake tensor's shape at the example inputs; raises ValueError where values decide it."""
    sizes = [s if isinstance(s, int) else s.node.hint for s in value.shape]
    if None in sizes:
        raise ValueError("a size that is read off a value")
    return sizes
