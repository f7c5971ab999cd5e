"""Regions: elementwise operations with one live value coming in are one elementwise function of it.

However many primitives spell it, f is f: here it is found and evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..graph.computation import ComputationGraph, is_float, tensor_value
from ..graph.constants import Constants
from ..operators.algebra import Algebra, Role
from ..operators.registry import record_of

_ELEMENTWISE = (Algebra.ZERO_ORIGIN, Algebra.ELEMENTWISE, Algebra.PIECEWISE)


Moves = Callable[[fx.Node], bool]
"""whether a node depends on the input"""


@dataclass(frozen=True)
class Region:
    """The function of `entry` that `exit` is; `inside`: what computes it, in graph order."""

    entry: fx.Node
    exit: fx.Node
    inside: tuple[fx.Node, ...]
    constants: Constants

    def values(self, u: Tensor) -> dict[fx.Node, Any]:
        """The value of every node inside, and of the entry, where the entry is `u`."""
        found: dict[fx.Node, Any] = {self.entry: u}

        def read(node: fx.Node) -> Any:
            return found[node] if node in found else self.constants.value(node)

        with torch.no_grad():
            for node in self.inside:
                args, kwargs = fx.map_arg((node.args, node.kwargs), read)
                found[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return found

    def __call__(self, u: Tensor) -> Tensor:
        value: Tensor = self.values(u)[self.exit]
        return value.double()

    @property
    def zero(self) -> Tensor:
        """0, of as many dimensions as the entry has; constants may broadcast it."""
        value = tensor_value(self.entry)
        assert value is not None
        device = "cpu" if value.is_meta else value.device
        return torch.zeros([1] * value.dim(), dtype=torch.float64, device=device)


def region_at(
    graph: ComputationGraph, exit: fx.Node, moves: Moves, constants: Constants
) -> Region | None:
    """The smallest region that ends at a node, None where what it reads does not come together in
    one value of its own shape by elementwise operations."""
    return next(regions_at(graph, exit, moves, constants), None)


def regions_at(
    graph: ComputationGraph, exit: fx.Node, moves: Moves, constants: Constants
) -> Iterator[Region]:
    """All regions that end at a node, from the smallest to the widest."""
    frontier, inside = {exit}, []
    while frontier:
        node = max(frontier, key=graph.places.__getitem__)
        if not is_pointwise(node) or not _alike(node, exit):
            return
        inside.append(node)
        frontier = (frontier - {node}) | {n for n in node.all_input_nodes if moves(n)}
        if len(frontier) == 1:
            (entry,) = frontier
            if is_float(entry) and _alike(entry, exit):
                yield Region(entry, exit, tuple(reversed(inside)), constants)


def choices_at(
    graph: ComputationGraph, exit: fx.Node, moves: Moves, constants: Constants
) -> Iterator[tuple[Region, ...]]:
    """What ends at a node as a function of several values, of which each moves in turn, the others
    held at some numbers. First of what the conditions alone read, then of what all pointwise calls
    do."""
    for expands in (is_flag, is_pointwise):
        frontier, inside, entries = {exit}, [], set()
        while frontier:
            node = max(frontier, key=graph.places.__getitem__)
            frontier.remove(node)
            if not _alike(node, exit) or not is_pointwise(exit):
                return
            if node is exit or (is_pointwise(node) and expands(node)):
                inside.append(node)
                frontier |= {n for n in node.all_input_nodes if moves(n)}
            elif is_float(node):
                entries.add(node)
            else:
                return
        made = []
        for scale in (1.0, -0.7, 2.3):
            ordered = sorted(entries, key=graph.places.__getitem__)
            held = {n: torch.tensor(scale * (0.37 + k)) for k, n in enumerate(ordered)}
            for entry in ordered:
                others = {n: v.double() for n, v in held.items() if n is not entry}
                inner = tuple(reversed(inside))
                made.append(Region(entry, exit, inner, constants.beside(others)))
        if made:
            yield tuple(made)


def is_flag(node: fx.Node) -> bool:
    """Whether a node is true or false."""
    value = tensor_value(node)
    return value is not None and value.dtype is torch.bool


def is_pointwise(node: fx.Node) -> bool:
    """Whether a call computes each element from those in its place alone."""
    record = record_of(node)
    if record is None:
        return False
    tagged = torch.Tag.pointwise in getattr(node.target, "tags", ())
    of_role = record.roles & {Role.POINTWISE, Role.CAST}
    return tagged or bool(of_role) or record.algebra in _ELEMENTWISE


def _alike(node: fx.Node, other: fx.Node) -> bool:
    """Whether two nodes have values of one shape."""
    a, b = tensor_value(node), tensor_value(other)
    return a is not None and b is not None and str(a.shape) == str(b.shape)
