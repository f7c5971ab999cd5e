"""Where in the input every value of a traced model belongs: boxes carried through its graph.

Forward, an operation that moves values (a view, a window partition, a roll) moves their boxes by
running on them; one that adds up elements unites their boxes; elementwise ones keep them; a
convolution's output belongs to the pixels under its stride. Backward, a value that mixed all tokens
and is then added to tokens (token mixing, attention) takes the place of what it is added to.
Operators alone decide; no hook, no name of an architecture.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..graph.computation import ComputationGraph, tensor_value
from ..graph.walking import Walker
from ..operators.algebra import Algebra, Role
from ..operators.calls import Call
from ..plan.states import Liveness
from . import boxes as bx
from .axes import Axes

Boxes = Tensor | list[Tensor] | None


@dataclass(frozen=True)
class Source:
    """The value that is attributed to, and what its dimensions mean. `nodes`: the one that has it,
    an input or what its numbers look up in a table; or several, where they look up in several
    tables (words and positions). These are one value then, side by side along a feature."""

    nodes: tuple[str, ...]
    axes: Axes


def locate(graph: ComputationGraph, live: Liveness, source: Source, given: Sequence[Any]) -> Walk:
    """Node -> the boxes of its value, a list where it is a tuple, as `boxes` of the result; nodes
    that do not depend on the source are left out. `given`: the inputs, flat."""
    walk = Walk(graph, live, source)
    with torch.no_grad():
        walk.run(*given, enable_io_processing=False)
    _backward(graph, walk)
    return walk


class Walk(Walker):
    """Runs the graph on one sample, or two, boxes beside the values."""

    def __init__(self, graph: ComputationGraph, live: Liveness, source: Source) -> None:
        super().__init__(graph.fx)
        self.live, self.source = live, source
        self.boxes: dict[str, Boxes] = {}
        self.shapes: dict[str, Any] = {}
        self.calls: dict[str, tuple[Any, Any]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.shapes[n.name] = pytree.tree_map_only(Tensor, lambda t: t.shape, value)
        if n.name in self.source.nodes:
            self.boxes[n.name] = bx.places(value.shape, self.source.axes)
        elif n.name in self.live.calls:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            self.calls[n.name] = pytree.tree_map_only(Tensor, _light, (args, kwargs))
            self.boxes[n.name] = self._forward(n, self.live.calls[n.name], value)
        return value

    def of(self, node: Any) -> Tensor | None:
        """The boxes of an operand, None where it has none."""
        found = self.boxes.get(node.name) if isinstance(node, fx.Node) else None
        return found if isinstance(found, Tensor) else None

    def _forward(self, n: fx.Node, call: Call, value: Any) -> Boxes:
        if n.target is operator.getitem and isinstance(n.args[0], fx.Node):
            source = self.boxes.get(n.args[0].name)
            if isinstance(source, list):
                return source[n.args[1]]  # type: ignore[index]
        if call.operator.algebra is Algebra.STRUCTURAL and Role.CAST not in call.operator.roles:
            return self._moved(n)
        if not isinstance(value, Tensor):  # a norm's value with its statistics
            return [self._spread(n, v) for v in value if isinstance(v, Tensor)]
        roles = call.operator.roles
        if Role.LINEAR in roles:
            return self._united(n, (-1,))
        if Role.CONTRACTION in roles:
            return self._contracted(n)
        if Role.REDUCTION in roles:
            return self._reduced(n, value)
        if Role.WINDOW in roles:
            return _windowed(self, n, call, value)
        mixed = self._mixed(n, call, value)
        return self._spread(n, value) if mixed is None else mixed

    def _operands(self, n: fx.Node) -> list[Tensor]:
        return [b for b in map(self.of, n.all_input_nodes) if b is not None]

    def _spread(self, n: fx.Node, value: Tensor) -> Tensor:
        """An elementwise operation, with broadcasting; anything else belongs nowhere."""
        found = [
            self.of(operand)
            for operand in n.all_input_nodes
            if self.of(operand) is not None and fits(self.shapes[operand.name], value.shape)
        ]
        result = bx.empty(value.dim())
        for other in found:
            result = bx.meet(result, other)  # type: ignore[arg-type]
        return result

    def _mixed(self, n: fx.Node, call: Call, value: Tensor) -> Tensor | None:
        """Of a product of one moving operand that changes the last dimension alone, as a linear
        layer written as addmm does; None for any other."""
        moving = [a for a in n.all_input_nodes if self.of(a) is not None]
        unsaid = not call.operator.roles & {Role.EQUATION, Role.WEIGHTED}
        if call.operator.algebra is not Algebra.MULTILINEAR or not unsaid or len(moving) != 1:
            return None
        before, after = self.shapes[moving[0].name], value.shape
        if before[:-1] != after[:-1] or before[-1:] == after[-1:]:
            return None
        source = self.of(moving[0])
        return None if source is None else bx.tidy(bx.union(source, (-1,)))

    def _united(self, n: fx.Node, dims: tuple[int, ...]) -> Tensor | None:
        source = self.of(n.args[0])
        return None if source is None else bx.tidy(bx.union(source, dims))

    def _reduced(self, n: fx.Node, value: Tensor) -> Tensor | None:
        source, (args, kwargs) = self.of(n.args[0]), self.calls[n.name]
        if source is None:
            return None
        rank = source.dim() - 1
        dims = args[1] if len(args) > 1 else kwargs.get("dim")
        dims = [dims] if isinstance(dims, int) else dims or range(rank)
        united = bx.union(source, tuple(dims))
        if value.dim() < rank:
            for dim in sorted((d % rank for d in dims), reverse=True):
                united = united.squeeze(dim + 1)
        return bx.tidy(united)

    def _contracted(self, n: fx.Node) -> Tensor | None:
        """A product of matrices; one of two live ones belongs to no single place."""
        left, right = self.of(n.args[0]), self.of(n.args[1])
        if left is not None and right is not None:
            return None
        if left is not None:
            return bx.tidy(bx.union(left, (-1,)))
        return None if right is None else bx.tidy(bx.union(right, (-2,)))

    def _moved(self, n: fx.Node) -> Boxes:
        """Values are moved: run the operation on the boxes' planes. A constant's are empty."""
        args, kwargs = self.calls[n.name]
        planes = []
        for p in range(4):

            def plane(a: Any, given: Any, p: int = p) -> Any:
                if isinstance(a, fx.Node) and isinstance(given, Tensor) and is_real(given):
                    own = self.of(a)
                    own = bx.empty(given.dim()) if own is None else own
                    plane = own[p].double()  # what fills in may be a float64's least number
                    return plane.expand(given.shape).contiguous().to(given.device)
                return given

            these = _map_args(plane, n.args, args), _map_args(plane, n.kwargs, kwargs)
            planes.append(n.target(*these[0], **these[1]))  # type: ignore[operator]
        if isinstance(planes[0], Tensor):
            return bx.tidy(torch.stack(planes).float().cpu()) if is_real(planes[0]) else None
        return [bx.tidy(torch.stack(item).float().cpu()) for item in zip(*planes, strict=True)]


def _map_args(function: Any, nodes: Any, values: Any) -> Any:
    """`function(node, value)` over a call's arguments, nested in lists and tuples."""
    if isinstance(nodes, Mapping):
        return {k: _map_args(function, v, values[k]) for k, v in nodes.items()}
    if isinstance(nodes, (list, tuple)):
        mapped = [_map_args(function, a, v) for a, v in zip(nodes, values, strict=True)]
        return mapped if isinstance(nodes, list) else tuple(mapped)
    return function(nodes, values)


def is_real(tensor: Tensor) -> bool:
    return tensor.is_floating_point()


def _light(tensor: Tensor) -> Tensor:
    """A stand-in of the same shape without memory; integer tensors (indices) as they are."""
    return tensor.new_zeros(()).expand(tensor.shape) if is_real(tensor) else tensor


def fits(shape: Any, onto: torch.Size) -> bool:
    """Whether a shape broadcasts to another without growing it."""
    try:
        return isinstance(shape, torch.Size) and torch.broadcast_shapes(shape, onto) == onto
    except RuntimeError:
        return False


def _windowed(walk: Walk, n: fx.Node, call: Call, value: Tensor) -> Tensor | None:
    """A convolution or a pooling: an output belongs to the inputs under its stride."""
    operand = next((a for a in n.all_input_nodes if walk.of(a) is not None), None)
    if operand is None:
        return None
    source = walk.of(operand)
    assert source is not None
    source = bx.union(source, (-3,)) if source.shape[-3] > 1 else source
    for axis in (-2, -1):
        before, after = walk.shapes[operand.name][axis], value.shape[axis]
        start, stride = _window(walk, n, call, axis, before, after)
        if source.shape[axis] == 1:
            continue
        low = torch.tensor([math.floor(start + i * stride) for i in range(after)])
        high = torch.tensor([math.ceil(start + (i + 1) * stride) - 1 for i in range(after)])
        first, last = low.clamp(0, before - 1), high.clamp(0, before - 1)
        source = bx.around(source.index_select(axis, first), source.index_select(axis, last))
    return bx.tidy(source)


def _window(
    walk: Walk, n: fx.Node, call: Call, axis: int, before: int, after: int
) -> tuple[float, float]:
    """Where the first window starts, and how far apart windows are."""

    def pair(name: str, default: Any) -> Any:
        found = call.arguments.get(name, default)
        found = default if found is None or found == [] else found
        if isinstance(found, (list, tuple)):
            return found[axis] if len(found) > 1 else found[0]
        return found

    stride = pair("stride", pair("kernel_size", None))
    if not isinstance(stride, int):  # adaptive
        return 0.0, before / after
    weight = call.arguments.get("weight")
    size = walk.shapes[weight.name][axis] if isinstance(weight, fx.Node) else None
    size = pair("kernel_size", size)
    reach = pair("dilation", 1) * (size - 1) + 1
    padding = pair("padding", 0)
    if not isinstance(padding, int):  # "same", "valid"
        padding = (reach - 1) // 2 if padding == "same" else 0
    return math.floor((reach - stride) / 2 - padding + 0.5), stride


# --------------------------------------------------------------------------- backward


def _backward(graph: ComputationGraph, walk: Walk) -> None:
    refined: set[str] = set()  # what users have told of a node beyond its own operands
    for n in reversed(graph.fx.graph.nodes):
        found = walk.boxes.get(n.name)
        if n.name not in walk.calls or found is None:
            continue
        if (
            n.name not in refined
            and len([a for a in n.all_input_nodes if a.name in walk.boxes]) < 2
        ):
            continue
        if n.target is operator.getitem and isinstance(n.args[0], fx.Node):
            items = walk.boxes.get(n.args[0].name)
            if isinstance(items, list) and isinstance(found, Tensor):
                items[n.args[1]] = bx.meet(items[n.args[1]], found)  # type: ignore[index]
                refined.add(n.args[0].name)
                continue
        for operand, boxes in _pulled(walk, n, found):
            known = walk.of(operand)
            own = bx.empty(boxes.dim() - 1) if known is None else known
            met = bx.meet(own, boxes)
            if not isinstance(walk.boxes.get(operand.name), list) and not torch.equal(met, own):
                walk.boxes[operand.name] = met
                refined.add(operand.name)


def _pulled(walk: Walk, n: fx.Node, found: Tensor | list[Tensor]) -> list[tuple[fx.Node, Tensor]]:
    """What the boxes of a result say of those of its operands."""
    call = walk.live.calls[n.name]
    moving = [a for a in n.all_input_nodes if a.name in walk.boxes]
    if call.operator.algebra is Algebra.STRUCTURAL and Role.CAST not in call.operator.roles:
        return _moved_back(walk, n, found)
    if not isinstance(found, Tensor):
        return []
    mixes = call.operator.roles & {Role.LINEAR, Role.CONTRACTION}
    if mixes or call.operator.algebra is Algebra.ATTENTION:
        first = n.args[0]
        known = isinstance(first, fx.Node) and first in moving
        return [(first, bx.tidy(bx.union(found, (-1,))))] if known else []  # type: ignore[list-item]
    pulled = []
    for operand in moving:
        shape, onto = walk.shapes[operand.name], walk.shapes[n.name]
        if isinstance(onto, torch.Size) and fits(shape, onto) and len(shape) == len(onto):
            grown = [d for d, (a, b) in enumerate(zip(shape, onto, strict=True)) if a < b]
            pulled.append((operand, bx.tidy(bx.union(found, grown))))
    return pulled


def _moved_back(
    walk: Walk, n: fx.Node, found: Tensor | list[Tensor]
) -> list[tuple[fx.Node, Tensor]]:
    """Number the elements of the operands, move the numbers, and send each box back to its own."""
    results = [found] if isinstance(found, Tensor) else found
    if all(bool(bx.is_empty(b).all()) for b in results):
        return []
    args, kwargs = walk.calls[n.name]
    starts: dict[fx.Node, tuple[int, torch.Size]] = {}
    total = 0

    def number(a: Any, given: Any) -> Any:
        nonlocal total
        if isinstance(a, fx.Node) and isinstance(given, Tensor) and is_real(given):
            if a not in starts:
                starts[a] = (total, given.shape)
                total += given.numel()
            first = starts[a][0]
            halves = torch.arange(first, first + given.numel()).double() + 0.5
            return halves.view(given.shape).to(given.device)
        return given

    these = _map_args(number, n.args, args), _map_args(number, n.kwargs, kwargs)
    moved = n.target(*these[0], **these[1])  # type: ignore[operator]
    moved = [moved] if isinstance(moved, Tensor) else list(moved)
    flat = bx.empty(1).expand(4, total).clone()
    for numbers, boxes in zip(moved, results, strict=True):
        if not is_real(numbers):
            return []
        where = (numbers := numbers.cpu()).flatten().floor().clamp(0, total - 1).long()
        inside = numbers.flatten() == where + 0.5  # what fills in, a padding, is a whole number
        spread = boxes.expand(4, *numbers.shape).reshape(4, -1)
        known = inside & ~bx.is_empty(spread)
        flat[:, where[known]] = spread[:, known]
    return [
        (operand, bx.tidy(flat[:, first : first + shape.numel()].view(4, *shape)))
        for operand, (first, shape) in starts.items()
        if operand.name in walk.boxes
    ]


def open_dim(placeholder: fx.Node) -> int | None:
    """The dimension of an input that is left open, for samples; None where there is none."""
    value = tensor_value(placeholder)
    sizes = () if value is None else value.shape
    return next((dim for dim, size in enumerate(sizes) if not isinstance(size, int)), None)


def batch_dim(
    graph: ComputationGraph, source: Source, name: str, index: int = 0
) -> tuple[int, int] | None:
    """The dimension of a node's value that grows with the batch, and how many entries a sample has
    there (windows or heads folded into it); None where there is no such dimension, or several."""
    first = tensor_value(graph.nodes[source.nodes[0]])
    value = graph.nodes[name].meta.get("val")
    value = value[index] if isinstance(value, (tuple, list)) else value
    if first is None or not isinstance(value, Tensor) or isinstance(first.shape[0], int):
        return None
    symbol = first.shape[0].node.expr
    found = []
    for dim, size in enumerate(value.shape):
        expression = 0 if isinstance(size, int) else size.node.expr
        each = expression and expression.coeff(symbol)
        if each:
            found.append((dim, int(each)) if expression == each * symbol else None)
    return found[0] if len(found) == 1 else None
