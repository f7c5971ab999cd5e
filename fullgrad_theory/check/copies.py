"""Copies of a model and of its inputs, in other precisions and at other values.

Nothing here writes to what it is given, but `perturb` to copies and `widened` to a written graph.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..errors import FullgradError, InputError
from ..graph.computation import ComputationGraph, holds_tensor
from ..graph.door import Model, copied, modules_of
from ..graph.passing import recompile, unbound
from ..operators.calls import is_ray
from . import words
from .lifting import WIDE, wide

# --------------------------------------------------------------------------- models


def double_copies(graph: ComputationGraph, with_model: bool) -> tuple[Any, fx.GraphModule]:
    """The user's model (where it is needed) and the traced graph, copied together, in float64.

    Copied together they go on sharing parameters; buffers, which a cast replaces, are tied again.
    All parameters of the copies take gradients.
    """
    memo: dict[int, Any] = {}
    for part in modules_of(graph.model) if with_model else ():
        memo |= _computed(part)
    try:
        own = copied(graph.model, memo) if with_model else None
        root = unbound(copy.deepcopy(graph.fx, memo))
    except (FullgradError, KeyboardInterrupt):
        raise
    except BaseException as error:  # a lock, an open file, or the user's __deepcopy__
        raise InputError(words.no_copy(graph.name, _uncopied(graph.model), error)) from error
    parts = modules_of(own) if own is not None else []
    for module in (root, *parts):
        module._apply(wide)
        for parameter in module.parameters():
            parameter.requires_grad_(is_ray(parameter))
    buffers = {id(b): c for b, c in _pairs(graph, parts)}
    for name, buffer in graph.fx.named_buffers():
        owner, _, leaf = name.rpartition(".")
        if id(buffer) in buffers:
            root.get_submodule(owner)._buffers[leaf] = buffers[id(buffer)]
    return own, root


def _uncopied(model: Model) -> str:
    """The attribute that refuses to be copied, by its path; "" where it is none."""
    for part in modules_of(model):
        for path, module in part.named_modules():
            for name, value in vars(module).items():
                if name in ("_parameters", "_buffers", "_modules"):
                    continue
                try:
                    copy.deepcopy(value, _computed(module))
                except KeyboardInterrupt:
                    raise
                except BaseException:  # noqa: BLE001  this is what is looked for
                    return f"{path}.{name}" if path else name
    return ""


def _pairs(graph: ComputationGraph, parts: list[nn.Module]) -> Iterator[tuple[Tensor, Tensor]]:
    """Every buffer of the model's with its copy."""
    for before, after in zip(modules_of(graph.model), parts, strict=False):
        yield from zip(before.buffers(), after.buffers(), strict=True)


def _computed(model: nn.Module) -> dict[int, Any]:
    """A memo for deepcopy, which refuses what forward() computed and kept (old weight_norm's)."""
    held = (v for m in model.modules() for v in vars(m).values())
    return {id(v): v.detach().clone() for v in held if isinstance(v, Tensor) and not v.is_leaf}


def cast_copy(module: fx.GraphModule, dtype: torch.dtype) -> fx.GraphModule:
    """A copy with its real parameters and buffers in another precision."""
    parameters = {
        id(p): nn.Parameter(cast(p.detach(), dtype), p.requires_grad) for p in module.parameters()
    }
    buffers = {id(b): cast(b.detach(), dtype) for b in module.buffers()}
    return unbound(copy.deepcopy(module, parameters | buffers))


def widened(module: fx.GraphModule) -> fx.GraphModule:
    """The graph without casts to a lower precision, which would limit the audit to it.

    A factory that names no dtype makes the default one, which the audit's other values are not.
    """
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            for node in list(part.graph.nodes):
                _widen_node(node)
                _widen_behind(node)
            recompile(part)
    return module


def _widen_node(node: fx.Node) -> None:
    node.args, node.kwargs = pytree.tree_map(_widen, (node.args, node.kwargs))
    value = node.meta.get("val")
    makes = node.op == "call_function" and not any(map(holds_tensor, node.all_input_nodes))
    if not makes or not isinstance(value, Tensor) or node.kwargs.get("dtype") is not None:
        return
    if value.dtype in WIDE:
        node.kwargs = {**node.kwargs, "dtype": WIDE[value.dtype]}


def _widen_behind(node: fx.Node) -> None:
    """Integers that become numbers (3 / 4) have the default dtype, which goes on in double."""
    value = node.meta.get("val")
    read = [n.meta.get("val") for n in node.all_input_nodes if holds_tensor(n)]
    of_integers = bool(read) and not any(map(is_ray, pytree.tree_leaves(read)))
    asked = any(isinstance(a, torch.dtype) for a in pytree.tree_leaves((node.args, node.kwargs)))
    if not of_integers or asked or not isinstance(value, Tensor) or value.dtype not in WIDE:
        return
    with node.graph.inserting_after(node):
        wider = node.graph.call_function(wide, (node,))
    wider.meta["val"] = wide(value)
    node.replace_all_uses_with(wider, lambda user: user is not wider)


def _widen(argument: Any) -> Any:
    return wide(argument) if isinstance(argument, torch.dtype) else argument


def perturb(modules: list[Any], held: Collection[str], generator: torch.Generator) -> None:
    """Move every floating-point parameter away from degenerate initial values (0, 1, 1e-6).

    Signs stay, and what is not larger than 1 stays so: a root, a logarithm, an arc cosine keeps its
    domain. `held`: names of parameters that stay, as a degree is read from them.
    """
    with torch.no_grad():
        for tensor in _learned(modules, held):
            tensor.copy_(_moved(tensor, 0.3, generator))


def redraw(modules: list[Any], held: Collection[str], generator: torch.Generator) -> None:
    """Other parameters, of both signs and as large; these may leave a domain."""
    with torch.no_grad():
        for tensor in _learned(modules, held):
            tensor.copy_(_drawn(tensor, generator))


def _learned(modules: list[Any], held: Collection[str]) -> list[Tensor]:
    """The floating-point parameters of modules, each once, and the means that they keep."""
    tensors: dict[int, Tensor] = {}
    stay: set[int] = set()
    for module in modules:
        tensors |= {id(p): p for p in module.parameters()}
        means = (b for n, b in module.named_buffers() if n.endswith("running_mean"))
        tensors |= {id(b): b for b in means}
        stay |= {id(p) for n, p in module.named_parameters() if n in held}
    return [t for key, t in tensors.items() if t.is_floating_point() and key not in stay]


def _moved(value: Tensor, part: float, generator: torch.Generator) -> Tensor:
    """The tensor with each entry up to `part` of it nearer to 0; one of 0s, or of one tiny number,
    a little further away."""
    draw = torch.rand(value.shape, generator=generator, dtype=torch.float64).to(value)
    few = value.detach().flatten()[:4096]
    if bool((few.abs() < 1e-3).all()) and bool((few == few[:1]).all()):
        return value + torch.where(value < 0, -0.1, 0.1) * (0.5 + draw)
    return value * (1.0 - part * draw)


def _drawn(value: Tensor, generator: torch.Generator) -> Tensor:
    """Normal numbers, as large as the tensor's finite ones are in the mean."""
    size = value.detach().abs().nan_to_num(0.0, 0.0, 0.0).square().mean().sqrt().clamp(min=1e-3)
    draw = torch.randn(value.shape, generator=generator, dtype=torch.float64)
    return size * draw.to(value)


# --------------------------------------------------------------------------- inputs


def double_inputs(graph: ComputationGraph) -> list[Any]:
    """The example inputs, flat, in float64; what is no floating-point tensor as it is."""
    leaves = pytree.tree_leaves((graph.args, graph.kwargs))
    return [wide(t.detach()) if is_ray(t) else t for t in leaves]


def jittered(inputs: list[Any], generator: torch.Generator) -> list[Any]:
    """The inputs with a little noise, which keeps signs and magnitudes below 1."""
    return [_moved(t, 0.1, generator) if is_ray(t) and t.numel() else t for t in inputs]


def redrawn(inputs: list[Any], generator: torch.Generator) -> list[Any]:
    """Other inputs of the same sizes, of both signs and as large; whole numbers as they are."""
    return [_drawn(t, generator) if is_ray(t) and t.numel() else t for t in inputs]


def cast(value: Any, dtype: torch.dtype) -> Any:
    """A real tensor in another precision; anything else as it is."""
    real = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if real else value
