"""From a model to its computation graph."""

from __future__ import annotations

from collections.abc import Collection
from types import MethodType

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from ..errors import InputError, TraceError
from .computation import ComputationGraph, tensor_value
from .door import (
    Inputs,
    Model,
    as_module,
    check_arguments,
    name_of,
    own_copy,
    split_inputs,
    tensors_of,
)
from .exporting import export, kept, muted
from .fakes import fill_fake_values
from .functional import functionalise
from .leaves import LeafSpec, Leaves
from .normal import drop_assertions, inline_regions, mutates, unroll


def trace(
    model: Model, inputs: Inputs = None, *, leaves: Collection[LeafSpec] = ()
) -> ComputationGraph:
    """The computation graph of a model, a layer or a function, in eval mode.

    `inputs`: a tensor, a tuple of positional arguments or a dict of keywords; left out where the
    model has a `pretrained_cfg`. Works on the meta device. The batch dimension is left open where
    the model allows it. `leaves`: module classes, autograd.Functions and module paths whose calls
    become one node each, backward kept. Raises `TrainingModeError`, `InputError`, `TraceError`.
    """
    module = as_module(model)
    if isinstance(module, torch.jit.ScriptModule):
        raise TraceError(
            f"{name_of(model)} is a ScriptModule, which torch.export does not take; pass the "
            "module or function it was made from"
        )
    with torch.inference_mode(False):
        args, kwargs = pytree.tree_map_only(Tensor, own_copy(), split_inputs(model, inputs))
    if not any(t.numel() for t in tensors_of(args, kwargs)):
        raise InputError("inputs hold no tensor with elements; pass what the model's forward takes")
    check_arguments(module, model, args, kwargs)
    kept_whole = Leaves(module, leaves)
    with kept(module), muted(), torch.inference_mode(False):
        program, dynamic = export(module, model, args, kwargs, kept_whole)
    unlifted = program.module()
    inline_regions(unlifted)
    kept_whole.write(unlifted)
    unroll(unlifted)
    drop_assertions(unlifted)
    kept_whole.check_writes(any(mutates(n) for n in unlifted.graph.nodes))
    functionalise(unlifted)
    fill_fake_values(unlifted)
    name = name_of(model)
    graph = GraphModule(unlifted, unlifted.graph, name)
    graph.eval()
    model = module if isinstance(model, MethodType) else model  # a method's module, to be copied
    traced = ComputationGraph(graph, args, kwargs, name, dynamic, model)
    if not traced.outputs:
        raise InputError(f"{name} returns no floating-point tensor; there is nothing to attribute")
    shapes = (v.shape for v in map(tensor_value, traced.outputs) if v is not None)
    if any(isinstance(s, int) and s == 0 for shape in shapes for s in shape):
        raise InputError(f"{name} returns an empty tensor for these inputs; pass larger ones")
    return traced
