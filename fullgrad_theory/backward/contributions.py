"""FullGrad attribution: what the input and every bias leaf contribute to an output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..errors import InputError
from ..graph.computation import ComputationGraph, tensor_value
from ..graph.door import Inputs, Model, Names, split_inputs
from ..graph.outputs import Selection
from ..operators.algebra import Algebra
from ..operators.calls import Call
from ..plan.labelling import Degrees, degrees
from ..plan.measuring import refuse_chosen
from .balanced import Balanced, balance
from .running import Run, finite_products


@dataclass(frozen=True)
class FullGrad:
    """Contributions to the target. `input`: of the inputs' shape (a tuple where there are several);
    `biases`: leaf -> map of the shape of the node it enters; `output`, `total`, `error` (relative)
    have shape (batch,), or () where the batch dimension is not open."""

    input: Tensor | tuple[Tensor, ...]
    biases: Mapping[str, Tensor]
    output: Tensor
    total: Tensor

    @property
    def error(self) -> Tensor:
        """|output - total| / |output|."""
        return (self.output - self.total).abs() / self.output.abs()


@torch.inference_mode(False)
def fullgrad(
    model: Model | Balanced,
    inputs: Inputs = None,
    target: int | Sequence[int] | None = None,
    *,
    output: Selection = None,
    constant: Names = (),
    explain: Names | None = None,
) -> FullGrad:
    """Split an output into contributions of input and bias leaves (Srinivas & Fleuret 2019).

    `model`: a balanced model, or any model for its plain gradient. `target`: an index (or one a
    dimension) into the output behind the batch dimension, for all samples; None: the largest.
    `output`, `constant` and `explain` as in `trace`, for a model that is not balanced yet.
    Raises `InputError` for a target out of range.
    """
    if isinstance(model, Balanced):
        refuse_chosen("a balanced model", output, constant, explain)
        balanced = model
    else:
        balanced = balance(
            model, inputs, "plain", output=output, constant=constant, explain=explain
        )
    graph = balanced.graph
    if graph is None:
        raise InputError("a balanced model that was copied or loaded has no graph; balance() again")
    args, kwargs = balanced.arranged(*split_inputs(graph.model, inputs))
    labels = degrees(graph, balanced.plan.edits)
    batch_dims = {key: _batch_dim(graph, *at) for key, at in _leaf_places(graph, labels).items()}
    size = next(t.shape[0] for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor))
    if graph.dynamic and size > 1 and None in batch_dims.values():
        parts = []
        for index in range(size):
            one, named = _sample(args, kwargs, index)
            parts.append(_split(balanced.fx, graph, labels, one, named, target, batch_dims))
        return _join(parts)
    return _split(balanced.fx, graph, labels, args, kwargs, target, batch_dims)


def _sample(
    args: tuple[Any, ...], kwargs: dict[str, Any], index: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return pytree.tree_map_only(Tensor, lambda t: t[index : index + 1], (args, kwargs))


def _join(parts: Sequence[FullGrad]) -> FullGrad:
    def cat(*tensors: Any) -> Any:
        return tuple(map(cat, *tensors)) if isinstance(tensors[0], tuple) else torch.cat(tensors)

    return FullGrad(
        cat(*(p.input for p in parts)),
        {name: cat(*(p.biases[name] for p in parts)) for name in parts[0].biases},
        cat(*(p.output for p in parts)),
        cat(*(p.total for p in parts)),
    )


def _leaf_places(graph: ComputationGraph, labels: Degrees) -> dict[str, tuple[str, int]]:
    """Where bias leaves enter, as `Run.on_bias` calls it: the node, and which of its outputs."""
    places: dict[str, tuple[str, int]] = {}
    for name in labels.biases:
        value = graph.nodes[name].meta.get("val")
        outputs = len(value) if isinstance(value, (tuple, list)) else 1
        if outputs > 1 and labels.live.calls[name].operator.every_output:
            places |= {f"{name}[{i}]": (name, i) for i in range(outputs)}
        else:
            places[name] = (name, 0)
    return places


def _batch_dim(graph: ComputationGraph, name: str, index: int) -> int | None:
    """The dimension of a node's output that is the batch, None where it is folded into another."""
    first = tensor_value(graph.placeholders[0])
    value = graph.nodes[name].meta.get("val")
    value = value[index] if isinstance(value, (tuple, list)) else value
    if first is None or value is None or isinstance(first.shape[0], int):
        return None
    fitting = [i for i, s in enumerate(value.shape) if str(s) == str(first.shape[0])]
    return fitting[0] if len(fitting) == 1 else None


def _split(
    module: fx.GraphModule,
    graph: ComputationGraph,
    labels: Degrees,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    target: int | Sequence[int] | None,
    batch_dims: Mapping[str, int | None],
) -> FullGrad:
    maps: dict[str, Tensor] = {}
    run = Run(module, graph, labels, lambda name, g, b: maps.update({name: finite_products(g, b)}))
    with torch.enable_grad():
        flat = pytree.tree_leaves(
            run.run(*pytree.tree_leaves((args, kwargs)), enable_io_processing=False)
        )
        chosen = _choose(next(t for t in flat if isinstance(t, Tensor)), target)
        given = list(run.sources.values())
        grads = torch.autograd.grad(chosen.sum(), given, allow_unused=True)
    inputs = tuple(
        torch.zeros_like(x) if g is None else finite_products(g, x).detach()
        for g, x in zip(grads, given, strict=True)
    )
    output = chosen.detach()
    separate = graph.dynamic and output.dim() > 0 and output.shape[0] > 1
    total = sum((_summed(i, 0 if separate else None) for i in inputs), output.new_zeros(()))
    for name, parts in maps.items():
        total = total + _summed(parts, batch_dims[name] if separate else None)
    if not separate:
        output = output.sum() if output.numel() > 1 else output
        total = total.reshape(output.shape)
    names = _leaf_labels(graph, labels, maps)
    ordered = {names[key]: maps[key] for key in batch_dims if key in maps}
    return FullGrad(inputs[0] if len(inputs) == 1 else inputs, ordered, output, total)


def _summed(parts: Tensor, batch: int | None) -> Tensor:
    """The sum over all dimensions but the batch one."""
    return parts.sum() if batch is None else parts.movedim(batch, 0).flatten(1).sum(1)


def _leaf_names(call: Call) -> str:
    """What the leaves at a call are called: parameter names where they are parameters."""
    operator = call.operator
    if operator.every_output or operator.origin:
        return "f(0)"
    labels = []
    for name in operator.bias_operands(call):
        operand = next(o for o in call.operands if o.name == name)
        if operand.node is not None and operand.node.op in ("get_attr", "placeholder"):
            labels.append(str(operand.node.target))
        else:
            labels.append(name if operand.node is not None else f"{name}={operand.literal:g}")
    return ", ".join(labels) or ("intercept" if operator.algebra is Algebra.PIECEWISE else "f(0)")


def _leaf_labels(
    graph: ComputationGraph, labels: Degrees, maps: Mapping[str, Tensor]
) -> dict[str, str]:
    places = {key: name for key, (name, _) in _leaf_places(graph, labels).items()}
    names = {k: _leaf_names(labels.live.calls[places[k]]) for k in maps}
    once = {label for label in names.values() if list(names.values()).count(label) == 1}
    return {n: label if label in once else f"{label} @ {n}" for n, label in names.items()}


def _choose(output: Tensor, target: int | Sequence[int] | None) -> Tensor:
    """The target's value per sample, shape (batch,)."""
    if output.dim() == 0:
        return output
    rest = output.shape[1:]
    if target is None:
        return output.flatten(1).amax(1) if output.dim() > 1 else output
    index = (target,) if isinstance(target, int) else tuple(target)
    bad = len(index) != len(rest) or any(not -s <= i < s for i, s in zip(index, rest, strict=False))
    if bad:
        raise InputError(
            f"target {target} is out of range for an output of shape {tuple(output.shape)}: one "
            f"index below {tuple(rest)} for each dimension behind the batch"
        )
    for i in index:
        output = output[:, i]
    return output
