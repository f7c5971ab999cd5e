"""Copies of a model and of its inputs, in other precisions and at other values.

Nothing here writes to what it is given, but `perturb` to copies and `widened` to a written graph.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..graph.computation import ComputationGraph
from ..operators.calls import is_ray

_ROUNDED = (torch.float16, torch.bfloat16, torch.float32)
_WIDE = dict.fromkeys(_ROUNDED, torch.float64) | dict.fromkeys(
    (torch.complex32, torch.complex64), torch.complex128
)


# --------------------------------------------------------------------------- models


def double_copies(graph: ComputationGraph, with_model: bool) -> tuple[Any, fx.GraphModule]:
    """The user's module (where it is needed) and the traced graph, copied together, in float64.

    Copied together they go on sharing parameters; buffers, which a cast replaces, are tied again.
    A callable that is no module has no copy: it is given back as it is.
    """
    if not with_model or not isinstance(graph.model, nn.Module):
        root = copy.deepcopy(graph.fx)
        _double(root)
        return graph.model if with_model else None, root
    own, root = copy.deepcopy((graph.model, graph.fx), _computed(graph.model))
    _double(root)
    _double(own)
    for parameter, copied in zip(graph.model.parameters(), own.parameters(), strict=True):
        for hook in (parameter._backward_hooks or {}).values():  # a copy forgets them
            copied.register_hook(hook)
    buffers = dict(own.named_buffers())
    for name, _ in list(root.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        if name in buffers:
            root.get_submodule(owner)._buffers[leaf] = buffers[name]
    return own, root


def _computed(model: nn.Module) -> dict[int, Any]:
    """A memo for deepcopy, which refuses what forward() computed and kept (old weight_norm's)."""
    held = (v for m in model.modules() for v in vars(m).values())
    return {id(v): v.detach().clone() for v in held if isinstance(v, Tensor) and not v.is_leaf}


def _double(module: nn.Module) -> None:
    module._apply(lambda t: t.to(_WIDE.get(t.dtype, t.dtype)))


def cast_copy(module: fx.GraphModule, dtype: torch.dtype) -> fx.GraphModule:
    """A copy with its real parameters and buffers in another precision."""
    parameters = {
        id(p): nn.Parameter(cast(p.detach(), dtype), p.requires_grad) for p in module.parameters()
    }
    buffers = {id(b): cast(b.detach(), dtype) for b in module.buffers()}
    return copy.deepcopy(module, parameters | buffers)


def widened(module: fx.GraphModule) -> fx.GraphModule:
    """The graph without casts to a lower precision, which would limit the audit to it.

    A factory that names no dtype makes the default one, which the audit's other values are not.
    """
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            for node in part.graph.nodes:
                _widen_node(node)
            part.recompile()
    return module


def _widen_node(node: fx.Node) -> None:
    node.args, node.kwargs = pytree.tree_map(_widen, (node.args, node.kwargs))
    value = node.meta.get("val")
    makes = node.op == "call_function" and not node.all_input_nodes
    if not makes or not isinstance(value, Tensor) or node.kwargs.get("dtype") is not None:
        return
    if value.dtype in _WIDE:
        node.kwargs = {**node.kwargs, "dtype": _WIDE[value.dtype]}


def _widen(argument: Any) -> Any:
    return _WIDE.get(argument, argument) if isinstance(argument, torch.dtype) else argument


def coarsest_rounding(graph: ComputationGraph) -> float:
    """The coarsest machine epsilon among the dtypes that the model itself casts to."""
    leaves = (a for n in graph.fx.graph.nodes for a in pytree.tree_leaves((n.args, n.kwargs)))
    named = {a for a in leaves if isinstance(a, torch.dtype) and a in _ROUNDED}
    return max((torch.finfo(d).eps for d in named), default=0.0)


def perturb(modules: list[Any], generator: torch.Generator) -> None:
    """Move every floating-point parameter away from degenerate initial values (0, 1, 1e-6)."""
    tensors: dict[int, Tensor] = {}
    for module in modules:
        if isinstance(module, nn.Module):
            tensors |= {id(p): p for p in module.parameters()}
            means = (b for n, b in module.named_buffers() if n.endswith("running_mean"))
            tensors |= {id(b): b for b in means}
    with torch.no_grad():
        for tensor in tensors.values():
            if tensor.is_floating_point():
                few = tensor.flatten()[:4096]
                spread = float(few.std()) if few.numel() > 1 else 0.0
                noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
                tensor.add_(noise.to(tensor), alpha=0.3 * spread if spread > 1e-3 else 0.1)


# --------------------------------------------------------------------------- inputs


def double_inputs(graph: ComputationGraph) -> list[Any]:
    """The example inputs, flat, in float64; what is no floating-point tensor as it is."""
    leaves = pytree.tree_leaves((graph.args, graph.kwargs))
    return [t.detach().to(_WIDE.get(t.dtype, t.dtype)) if is_ray(t) else t for t in leaves]


def jittered(inputs: list[Any], generator: torch.Generator) -> list[Any]:
    """The inputs with a little noise."""
    return [_jitter(t, generator) if is_ray(t) else t for t in inputs]


def _jitter(value: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
    return value + 0.1 * noise


def cast(value: Any, dtype: torch.dtype) -> Any:
    """A real tensor in another precision; anything else as it is."""
    real = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if real else value
