"""What a node's bias leaves contribute to its output: J_b b, as a map of the output's shape.

Autograd gives nothing for Python scalars, clamp bounds, padding, `running_mean` or f(0), and one
parameter can be coefficient and bias at once; so the contribution is taken at the node, by class.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from .operators import Algebra, Call
from .operators.base import bias_operands, polynomial

aten = torch.ops.aten
_BROADCAST_LAST = {"aten.linear.default", "aten.layer_norm.default"}
_BROADCAST_CHANNEL = {
    "aten.conv1d.default",
    "aten.conv1d.padding",
    "aten.conv2d.default",
    "aten.conv2d.padding",
    "aten.conv3d.default",
    "aten.convolution.default",
    "aten.conv_transpose1d.default",
    "aten.conv_transpose2d.input",
    "aten.group_norm.default",
    "aten.instance_norm.default",
}
_REMAINDERS = {
    "aten.fmod.Scalar",
    "aten.fmod.Tensor",
    "aten.remainder.Scalar",
    "aten.remainder.Tensor",
}
_DISTANCES = {"aten.hypot.default", "aten.dist.default", "aten.cdist.default"}


def bias_map(
    node: fx.Node, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> Tensor:
    """J_b b at one call, broadcastable to `output`, from the call's runtime arguments.

    Affine and multilinear operations are evaluated with live operands at 0; a selection (clamp,
    maximum) contributes where the chosen value is no live operand; a secant contributes f(0).
    """
    name = call.operator.name
    values = _runtime(node, call, args, kwargs)
    with torch.no_grad():
        if call.operator.algebra is Algebra.ELEMENTWISE:
            origin = torch.zeros_like(output).reshape(-1)[:1]
            return _call(node, call, args, kwargs, {next(iter(call.moving)): origin})
        alone = bias_operands(call) == ("bias",)
        if name in _BROADCAST_LAST and alone:
            return values["bias"]
        if name in _BROADCAST_CHANNEL and alone:
            channels = [1] * output.dim()
            kernel = values["weight"] if "conv" in name else None
            channels[1 if kernel is None else 1 - kernel.dim()] = -1  # a batch may be left out
            return values["bias"].reshape(channels)
        if call.operator.algebra is Algebra.HOMOGENEOUS:
            live = [values[n] for n in sorted(call.moving) if isinstance(values[n], Tensor)]
            if name == "aten.softshrink.default":
                return torch.where(output == 0, 0.0, output - live[0])
            if name in _REMAINDERS:
                return output - values["self"] if "self" in call.moving else values["self"]
            if name in _DISTANCES:
                return _distance_map(name, call, values, output)
            chosen = torch.stack([output == u.expand_as(output) for u in live]).any(0)
            return output.masked_fill(chosen, 0.0)
        relations = polynomial(call.operator.signature, call) or ()
        factors = {n for r in relations for term in r.terms for n, power in term if power > 0}
        zeroed = {n: torch.zeros_like(values[n]) for n in factors}
        return _call(node, call, args, kwargs, zeroed)


def _distance_map(name: str, call: Call, values: dict[str, Any], output: Tensor) -> Tensor:
    """J_c c of a distance |u - c| with c constant: its gradient at every element, times c."""
    first, second = (n for n in values if n in ("self", "other", "x1", "x2"))
    u, c = (first, second) if first in call.moving else (second, first)
    live, held = values[u], values[c]
    if name == "aten.hypot.default":
        return held * held / output
    if name == "aten.cdist.default":
        live, held = (
            values[n].unsqueeze(-2 if n == first else -3).expand(*output.shape, -1) for n in (u, c)
        )
    live, held = torch.broadcast_tensors(live, held)
    with torch.enable_grad():
        leaf = held.detach().requires_grad_()
        gap = live.detach() - leaf
        dims = None if name == "aten.dist.default" else -1
        length = torch.linalg.vector_norm(gap, values.get("p", 2.0), dims)
        (g,) = torch.autograd.grad(length.sum(), leaf)
    product = g * held
    return product.sum() if dims is None else product.sum(dims)


def _runtime(
    node: fx.Node, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Operand name -> its value at run time."""
    bound = _named(node, args, kwargs)
    values: dict[str, Any] = {}
    for operand in call.operands:
        stem, _, index = operand.name.partition("[")
        value = bound.get(stem, operand.literal)
        if index and isinstance(value, (list, tuple)):
            value = value[int(index[:-1])]
        values[operand.name] = value
    return values


def _named(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    schema = getattr(node.target, "_schema", None)
    names = [a.name for a in schema.arguments] if schema else [f"arg{i}" for i in range(len(args))]
    return dict(zip(names, args, strict=False)) | kwargs


def _call(
    node: fx.Node,
    call: Call,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    replaced: dict[str, Tensor],
) -> Tensor:
    """The operation itself with some operands replaced."""

    def swap(name: str, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [replaced.get(f"{name}[{i}]", v) for i, v in enumerate(value)]
        return replaced.get(name, value)

    bound = {n: swap(n, v) for n, v in _named(node, args, kwargs).items()}
    positional = list(bound)[: len(args)]
    result = node.target(  # type: ignore[operator]
        *(bound[n] for n in positional), **{n: v for n, v in bound.items() if n not in positional}
    )
    return result[0] if isinstance(result, (tuple, list)) else result


def leaf_names(node: fx.Node, call: Call) -> str:
    """What the leaves at a node are called: parameter names where they are parameters."""
    if call.operator.algebra is Algebra.ELEMENTWISE:
        return "f(0)"
    names = bias_operands(call)
    by_name = {o.name: o for o in call.operands}
    labels = []
    for name in names:
        operand = by_name[name]
        if operand.node is not None and operand.node.op == "get_attr":
            labels.append(str(operand.node.target))
        else:
            labels.append(name if operand.node is not None else f"{name}={operand.literal:g}")
    return ", ".join(labels)
