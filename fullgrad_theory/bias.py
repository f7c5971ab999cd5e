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
_DISTANCES = {"aten.cdist.default", "aten.dist.default", "aten.hypot.default"}
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


def bias_map(
    node: fx.Node, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> Tensor:
    """J_b b at one call, broadcastable to `output`, from the call's runtime arguments.

    Affine and multilinear operations are evaluated with live operands at 0; a selection (clamp,
    maximum) contributes where the chosen value is no live operand; a secant contributes f(0); a
    distance its derivative along the constant.
    """
    name = call.operator.name
    values = _runtime(node, call, args, kwargs)
    with torch.no_grad():
        if call.operator.algebra is Algebra.ELEMENTWISE:
            origin = torch.zeros_like(output).reshape(-1)[:1]
            return _call(node, call, args, kwargs, {next(iter(call.moving)): origin})
        if name in _BROADCAST_LAST:
            return values["bias"]
        if name in _BROADCAST_CHANNEL:
            channels = [1] * output.dim()
            channels[-output.dim() + 1 if output.dim() > 1 else 0] = -1
            return values["bias"].reshape(channels)
        if name in _DISTANCES:
            (fixed,) = bias_operands(call)
            return _distance(name, values, fixed)
        if call.operator.algebra is Algebra.HOMOGENEOUS:
            live = [values[n] for n in sorted(call.moving) if isinstance(values[n], Tensor)]
            if name == "aten.softshrink.default":
                return torch.where(output == 0, 0.0, output - live[0])
            chosen = torch.stack([output == u.expand_as(output) for u in live]).any(0)
            return output.masked_fill(chosen, 0.0)
        relations = polynomial(call.operator.signature, call) or ()
        factors = {n for r in relations for term in r.terms for n, power in term if power > 0}
        zeroed = {n: torch.zeros_like(values[n]) for n in factors}
        return _call(node, call, args, kwargs, zeroed)


def _distance(name: str, values: dict[str, Any], fixed: str) -> Tensor:
    """J_b b of a distance to a constant b: the gradient by a copy of b an output, times b."""
    (moving,) = (v for n, v in values.items() if isinstance(v, Tensor) and n != fixed)
    b = values[fixed]
    if name == "aten.cdist.default":  # a row of distances for every point
        moving, b = moving[..., :, None, :], b[..., None, :, :]
    shape = torch.broadcast_shapes(moving.shape, b.shape)
    u = b.expand(shape).detach().clone().requires_grad_()
    with torch.enable_grad():
        if name == "aten.hypot.default":
            value = torch.hypot(moving, u)
        elif name == "aten.dist.default":
            value = torch.dist(moving, u, values["p"])
        else:
            value = torch.cdist(moving, u, values["p"])
        (grad,) = torch.autograd.grad(value.sum(), u)
    if name != "aten.cdist.default":
        return grad * u.detach() if name == "aten.hypot.default" else (grad * u.detach()).sum()
    rows = (grad * u.detach()).sum(-1)
    return rows if fixed == "x2" else rows.mT


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
