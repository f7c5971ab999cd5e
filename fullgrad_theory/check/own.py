"""The user's own model beside its traced graph: whether gradient and forward are the same."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..backward.balanced import rewrite
from ..backward.running import inner
from ..graph.computation import ComputationGraph
from ..graph.tracing import untouched, without_fast_path
from ..operators.calls import is_ray
from .copies import coarsest_rounding
from .gradient import Gradient, Shares
from .numeric import aligned, float_leaves, gradients, paired
from .structure import Structure
from .subject import Subject

TOLERANCE = 1e-6
LOW_PRECISION_TOLERANCE = 1e-2


@dataclass(frozen=True)
class Own:
    """What the user's own gradient is beside the traced one.

    `modified`: it is another one. `shares`: what it attributes then, where it runs in float64.
    `in_float64` is False where the two could be compared in the model's own dtype alone.
    """

    modified: bool = False
    shares: Shares | None = None
    in_float64: bool = True


def compared(model: Any, subject: Subject, inputs: list[Any], traced: Gradient) -> Own:
    """The own gradient of `model` (None: it is not asked for) against the traced one.

    Where its backward is not the traced one, the bias leaves that are parameters count by its own
    gradient too.
    """
    sources = [subject.graph.nodes[name] for name in subject.labels.live.sources]
    if model is None or any(node.op != "placeholder" for node in sources):
        return Own()  # attribution ends at an embedding, which only the trace shows
    leaves = _parameter_leaves(subject, model) if isinstance(model, nn.Module) else {}
    try:
        value, given, grads = _own_gradient(
            model, inputs, subject.graph, traced.cotangents, list(leaves.values())
        )
    except RuntimeError:
        return _compared_as_it_is(subject.graph, subject.seed)
    own, of_leaves = grads[: len(given)], zip(leaves.items(), grads[len(given) :], strict=True)
    through_own = {node: inner(g, parameter) for (node, parameter), g in of_leaves}
    biases = traced.shares.through_biases
    allowed = max(TOLERANCE, 20 * coarsest_rounding(subject.graph))
    other = sum(abs(part - biases.get(node, 0.0)) for node, part in through_own.items())
    scale = max(abs(value), *map(abs, biases.values()), 0.0)
    if _gap(own, traced.gradients) <= allowed and not other > allowed * scale:
        # one gradient: the trace has it without the model's own low-precision casts
        return Own()
    through_input = sum(inner(g, x) for g, x in zip(own, given, strict=True))
    return Own(modified=True, shares=Shares(value, through_input, {**biases, **through_own}))


def _parameter_leaves(subject: Subject, model: nn.Module) -> dict[str, Tensor]:
    """Bias node -> the model's parameter that is its only leaf and has no other use."""
    known = {name for name, _ in subject.graph.fx.named_parameters()}
    found: dict[str, Tensor] = {}
    for name, operands in subject.labels.biases.items():
        call = subject.labels.live.calls[name]
        if call.operator.every_output or len(operands) != 1:
            continue  # a leaf an output, or several at one
        reads = {o.name: o.node for o in call.operands}
        leaf = reads.get(operands[0])
        if leaf is None or leaf.op != "get_attr" or leaf.target not in known:
            continue
        if list(reads.values()).count(leaf) == len(leaf.users) == 1:
            found[name] = model.get_parameter(str(leaf.target))
    return {name: parameter for name, parameter in found.items() if parameter.requires_grad}


def _own_gradient(
    model: Any,
    inputs: list[Any],
    graph: ComputationGraph,
    cotangents: list[Tensor],
    parameters: list[Tensor],
) -> tuple[float, list[Tensor], list[Tensor]]:
    """<c, f> of a callable by its own autograd; the float inputs; the gradients of those inputs
    followed by those of `parameters`."""
    leaves = [t.detach().clone().requires_grad_() if is_ray(t) else t for t in inputs]
    spec = pytree.tree_structure((graph.args, graph.kwargs))
    passed = pytree.tree_map_only(Tensor, Tensor.clone, leaves)  # the model may write to them
    args, kwargs = pytree.tree_unflatten(passed, spec)
    given = float_leaves(leaves)
    with torch.enable_grad():
        value = paired(cotangents, float_leaves(model(*args, **kwargs)))
        grads = gradients(value, [*given, *parameters])
    return float(value.detach()), given, grads


def _compared_as_it_is(graph: ComputationGraph, seed: int) -> Own:
    """Own against traced gradient in the model's own dtype: it does not run in float64."""
    inputs = pytree.tree_leaves((graph.args, graph.kwargs))
    with torch.no_grad():
        outputs = float_leaves(graph.fx(*graph.args, **graph.kwargs))
    cotangents = [aligned(o, seed) for o in outputs]
    _, _, own = _own_gradient(graph.model, inputs, graph, cotangents, [])
    _, _, traced = _own_gradient(graph.fx, inputs, graph, cotangents, [])
    return Own(modified=_gap(own, traced) > LOW_PRECISION_TOLERANCE, in_float64=False)


def _gap(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """How far two lists of gradients are apart, relative to the second; NaN is like NaN."""
    size = sum(float(g.nan_to_num().norm()) for g in theirs) or 1.0
    same = ((a == b) | (a.isnan() & b.isnan()) for a, b in zip(ours, theirs, strict=True))
    apart = zip(same, ours, theirs, strict=True)
    return sum(float((a - b).masked_fill(s, 0.0).norm()) for s, a, b in apart) / size


# --------------------------------------------------------------------------- forward


class Forward(Enum):
    """The edited forward beside the model's."""

    SAME_BITS = "same bits"
    WITHOUT_FAST_PATH = "same bits without torch's fast path for attention"
    OTHER = "other bits"


def forward_beside(structure: Structure) -> Forward:
    """Whether the edited graph's forward is the model's, bit for bit, in the model's own dtype."""
    graph = structure.graph
    args, kwargs = graph.args, graph.kwargs
    module = rewrite(graph, structure.edits)
    with torch.no_grad():
        ours, theirs = module(*args, **kwargs), untouched(graph.model, args, kwargs)
        if _same_bits(ours, theirs):
            return Forward.SAME_BITS
        with without_fast_path():
            plain = untouched(graph.model, args, kwargs)
    return Forward.WITHOUT_FAST_PATH if _same_bits(ours, plain) else Forward.OTHER


def _same_bits(ours: Any, theirs: Any) -> bool:
    pairs = zip(float_leaves(ours), float_leaves(theirs), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)
