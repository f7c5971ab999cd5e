"""A linear layer of which some channels alone carry a gradient: the others are not multiplied.

Fused projections (query, key and value in one) are such layers where query and key are held fixed:
two thirds of their cotangent are zeros, which a product with the whole weight would multiply.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from functools import partial
from operator import is_not
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd import Function
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..operators.algebra import Role
from ..operators.calls import as_one_call, bind, bound_once, is_transformed, target_name
from ..operators.registry import has_role, lookup
from .pruning import detach


@bound_once
class _SomeChannels(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, value: Tensor, order: tuple[int, ...], start: int, stop: int
    ) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, ctx.order, ctx.start, ctx.stop = inputs
        ctx.lead, ctx.dtype = x.shape[:-1], x.dtype
        ctx.save_for_backward(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        own = grad.permute(ctx.order).reshape(*ctx.lead, ctx.stop - ctx.start)
        dx = own @ weight[ctx.start : ctx.stop].to(grad.dtype).conj()
        return dx.to(ctx.dtype), None, None, None, None, None


@as_one_call
def some_channels(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    value: Tensor,
    order: tuple[int, ...],
    start: int,
    stop: int,
) -> Tensor:
    """`value`, the channels `start` to `stop` of linear(x, weight, bias) seen through views, with
    the gradient of these alone: dx = g @ weight[start:stop].

    `order` permutes the dimensions of `value` so that they are those of x but the last, and then
    the channels. `value` keeps its own gradient where weight or bias ask for one, or may (nobody
    tells under vmap), and where an export would take it for a constant.
    """
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return value
    if torch.compiler.is_exporting() or is_transformed():
        return value
    return _SomeChannels.apply(x, weight, value.detach(), order, start, stop)


some_channels.watched = 3  # type: ignore[attr-defined]
"""node by node the value itself is run: what passes through the layer is looked at"""


def narrow_linears(graph: fx.Graph) -> None:
    """Let every linear layer multiply those channels of its cotangent alone that are not zero by
    what is held fixed behind it."""
    reached = _reached(graph)
    for node in list(graph.nodes):
        if not has_role(node, Role.LINEAR) or node not in reached:
            continue
        seen = _one_view_of(node, reached)
        part = _channels(node.meta.get("val"), seen.meta.get("val"))
        if part is None:
            continue
        bound = bind(node)
        given = bound["input"], bound["weight"], bound.get("bias")
        with graph.inserting_after(seen):
            narrowed = graph.call_function(some_channels, (*given, seen, *part))
        narrowed.meta = {"val": seen.meta["val"]}
        seen.replace_all_uses_with(narrowed, partial(is_not, narrowed))


def _reached(graph: fx.Graph) -> set[fx.Node]:
    """Every node that a cotangent may reach: what is not held fixed on all ways to the output."""
    reached: set[fx.Node] = set()
    waiting = list(graph.output_node().all_input_nodes)
    while waiting:
        node = waiting.pop()
        if node not in reached and node.target is not detach:
            reached.add(node)
            waiting += node.all_input_nodes
    return reached


def _one_view_of(node: fx.Node, reached: Collection[fx.Node]) -> fx.Node:
    """The last of the views through which the whole cotangent of a node comes."""
    while True:
        users = [user for user in node.users if user in reached]
        if len(users) != 1 or not _shows(users[0], node):
            return node
        node = users[0]


def _shows(user: fx.Node, node: fx.Node) -> bool:
    """Whether `user` is a view of `node` and of nothing else."""
    if user.op != "call_function" or user.all_input_nodes[:1] != [node]:
        return False
    record = lookup(target_name(user.target))
    view = record.view if record is not None else None
    picks = isinstance(node.meta.get("val"), (tuple, list))
    return picks or (view is not None and not view.of_memory)


def _channels(whole: Any, seen: Any) -> tuple[tuple[int, ...], int, int] | None:
    """How a view shows a range of the last dimension of a contiguous tensor, and all of the others:
    the order of its dimensions (see `some_channels`), start and stop. None where it does not."""
    if not (isinstance(whole, Tensor) and isinstance(seen, Tensor)) or whole.dim() < 1:
        return None
    width, sizes, strides, start = whole.shape[-1], seen.shape, seen.stride(), seen.storage_offset()
    if not (isinstance(width, int) and isinstance(start, int) and whole.is_contiguous()):
        return None
    aliased = torch._C._is_alias_of(whole, seen)  # type: ignore[attr-defined]
    if not aliased or not all(isinstance(s, int) for s in strides):
        return None
    moving = [d for d in range(seen.dim()) if not (isinstance(sizes[d], int) and sizes[d] == 1)]
    falling = sorted(moving, key=strides.__getitem__, reverse=True)
    outer = [d for d in falling if strides[d] % width == 0]
    inner = [d for d in falling if strides[d] % width]
    count = math.prod(int(sizes[d]) for d in inner)
    if not inner or start >= width or count >= width or start + count > width:
        return None
    if not (_dense(sizes, strides, outer, width) and _dense(sizes, strides, inner, 1)):
        return None
    if not statically_known_true(math.prod(sizes[d] for d in outer) == math.prod(whole.shape[:-1])):
        return None
    ones = [d for d in range(seen.dim()) if d not in moving]
    return (*ones, *outer, *inner), start, start + count


def _dense(sizes: Any, strides: Any, dims: list[int], step: int) -> bool:
    """Whether these dimensions, by falling stride, walk without gaps in steps of `step`."""
    for d in reversed(dims):
        if strides[d] != step:
            return False
        step *= sizes[d]
    return True
