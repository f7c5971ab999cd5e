"""What a node's bias leaves contribute to its output: J_b b, as a map of the output's shape.

Autograd gives nothing for Python scalars, clamp bounds, padding, `running_mean` or f(0), and one
parameter can be coefficient and bias at once; so the contribution is taken at the node, by class.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    "aten.conv3d.padding",
    "aten.convolution.default",
    "aten.conv_transpose1d.default",
    "aten.conv_transpose2d.input",
    "aten.conv_transpose3d.input",
}
_CHANNEL_SECOND = {"aten.group_norm.default", "aten.instance_norm.default"}
_LINEAR_PIECES = {
    f"aten.{op}.{kind}" for op in ("remainder", "fmod") for kind in ("Scalar", "Tensor")
}


def bias_maps(
    node: fx.Node, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: list[Tensor]
) -> list[Tensor]:
    """J_b b of every output that has bias leaves, the first ones; see `bias_map`."""
    if every_output(call):
        return origins(node, call, args, kwargs)
    return [bias_map(node, call, args, kwargs, outputs[0])]


def every_output(call: Call) -> bool:
    """Whether each output has bias leaves of its own, and not the first one alone."""
    return call.operator.algebra in (Algebra.SMOOTH, Algebra.ATTENTION)


def origins(
    node: fx.Node, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Tensor]:
    """f(0) of every output: the operation with its moving operands at 0.

    An infinite entry is a mask's, which restricts the domain: it stays as it is.
    """
    values = _runtime(node, call, args, kwargs)
    with torch.no_grad():
        zeroed = {n: origin(values[n]) for n in call.moving if is_ray(values[n])}
        result = evaluate(node.target, args, kwargs, zeroed)
    return list(result) if isinstance(result, (tuple, list)) else [result]


def is_ray(value: Any) -> bool:
    """Whether a value can move along a ray: it is a tensor of real or complex numbers."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def origin(value: Tensor) -> Tensor:
    """The start of the ray to `value`: 0, but where it is infinite."""
    return torch.where(value.isinf(), value, 0.0)


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
            operand = next(iter(call.moving))
            zero = torch.zeros_like(values[operand])
            return _first(evaluate(node.target, args, kwargs, {operand: zero}))
        alone = bias_operands(call) == ("bias",)
        if alone and name in _BROADCAST_LAST:
            return values["bias"]
        if alone and name in _BROADCAST_CHANNEL:  # without a batch dimension they come first
            return values["bias"].reshape(-1, *[1] * (values["weight"].dim() - 2))
        if alone and name in _CHANNEL_SECOND:
            return values["bias"].reshape(-1, *[1] * (output.dim() - 2))
        if call.operator.algebra is Algebra.HOMOGENEOUS:
            live = [values[n] for n in sorted(call.moving) if isinstance(values[n], Tensor)]
            if name == "aten.softshrink.default":
                return torch.where(output == 0, 0.0, output - live[0])
            if name in _LINEAR_PIECES:  # self - n other, n a whole number
                return output - values["self"] if "self" in call.moving else values["self"]
            held = {n: v for n, v in values.items() if n not in call.moving and is_ray(v)}
            if held:  # distances, and selections, which may share an element between equals
                return _along_constants(node, call, args, kwargs, values)
            chosen = _slope(node, args, kwargs, call, live[0]) != 0
            return output.masked_fill(chosen, 0.0)
        relations = polynomial(call.operator.signature, call) or ()
        factors = {n for r in relations for term in r.terms for n, power in term if power > 0}
        zeroed = {n: torch.zeros_like(values[n]) for n in factors}
        return _first(evaluate(node.target, args, kwargs, zeroed))


def _first(result: Any) -> Tensor:
    return result[0] if isinstance(result, (tuple, list)) else result


def _runtime(
    node: fx.Node, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Operand name -> its value at run time."""
    bound = named(node.target, args, kwargs)
    values: dict[str, Any] = {}
    for operand in call.operands:
        stem, _, index = operand.name.partition("[")
        value = bound.get(stem, operand.literal)
        if index and isinstance(value, (list, tuple)):
            value = value[int(index[:-1])]
        values[operand.name] = value
    return values


def named(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by their schema names; a function without a schema: `arg0`, ..."""
    schema = getattr(function, "_schema", None)
    names = [a.name for a in schema.arguments] if schema else [f"arg{i}" for i in range(len(args))]
    return dict(zip(names, args, strict=False)) | kwargs


def evaluate(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], replaced: Mapping[str, Tensor]
) -> Any:
    """A function's value with some operands replaced, by name."""

    def swap(name: str, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [replaced.get(f"{name}[{i}]", v) for i, v in enumerate(value)]
        return replaced.get(name, value)

    bound = {n: swap(n, v) for n, v in named(function, args, kwargs).items()}
    positional = list(bound)[: len(args)]
    return function(
        *(bound[n] for n in positional), **{n: v for n, v in bound.items() if n not in positional}
    )


def _slope(
    node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], call: Call, u: Tensor
) -> Tensor:
    """The derivative of a selection between an operand and literals: at a bound itself, torch gives
    clamp's operand all and hardtanh's nothing."""
    with torch.enable_grad():
        leaf = u.detach().requires_grad_()
        value = _first(evaluate(node.target, args, kwargs, {next(iter(call.moving)): leaf}))
        return torch.autograd.grad(value.sum(), leaf)[0]


def _along_constants(
    node: fx.Node,
    call: Call,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    values: dict[str, Any],
) -> Tensor:
    """J_b b by the operation's own derivative as its constant tensors b grow."""
    given = {n: v for n, v in values.items() if is_ray(v)}
    along = {n: torch.where(v.isfinite(), v, 0.0) for n, v in given.items()}
    tangents = {n: torch.zeros_like(v) if n in call.moving else along[n] for n, v in given.items()}

    def value(*tensors: Tensor) -> Any:
        replaced = dict(zip(given, tensors, strict=True))
        if call.operator.name == "aten.cdist.default":  # it has no forward derivative
            apart = replaced["x1"].unsqueeze(-2) - replaced["x2"].unsqueeze(-3)
            return torch.linalg.vector_norm(apart, values.get("p", 2.0), dim=-1)
        return evaluate(node.target, args, kwargs, replaced)

    return torch.func.jvp(value, tuple(given.values()), tuple(tangents.values()))[1]


def leaf_names(node: fx.Node, call: Call) -> str:
    """What the leaves at a node are called: parameter names where they are parameters."""
    if call.operator.algebra in (Algebra.ELEMENTWISE, Algebra.SMOOTH, Algebra.ATTENTION):
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
    return ", ".join(labels) or "f(0)"
