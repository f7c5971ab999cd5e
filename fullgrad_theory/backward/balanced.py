"""A plan written into the graph: same forward bit for bit, edited backward."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..edits.channels import narrow_linears
from ..edits.costs import Policy
from ..edits.folding import fold
from ..edits.kinds import Edit
from ..edits.writing import Writing
from ..errors import InputError
from ..graph.computation import ComputationGraph, tensor_value
from ..graph.door import Inputs, Model, Names
from ..graph.forms import ordered_as, plain
from ..graph.leaves import LeafSpec
from ..graph.outputs import Selection
from ..graph.passing import forget_inner, unbound
from ..plan.derivation import derive_rules
from ..plan.labelling import degrees
from ..plan.measuring import graph_of as _graph
from ..plan.plan import Plan
from .once import guarded


class Balanced(nn.Module):
    """A model with an edited backward pass. `fx`: the rewritten graph; `plan`: what was written.

    Parameters are shared with the user's model: moving or casting this module moves that one too.
    """

    def __init__(self, graph: ComputationGraph, plan: Plan) -> None:
        super().__init__()
        traced, graph = graph, fold(graph, plan.edits)
        self.fx = rewrite(graph, plan.edits, narrow=True)
        self.whole: fx.GraphModule | None = None
        """it with what is returned besides, and not judged"""
        if traced.whole is not None:
            every = replace(traced, fx=traced.whole, whole=None)
            self.whole = rewrite(every, plan.edits, labelled=graph, narrow=True)
        self._reading, self._form = graph.reading, graph.form
        self.plan = plan
        self.graph: ComputationGraph | None = graph
        self._shapes = [
            tuple(s if isinstance(s, int) else None for s in value.shape)
            for value in map(tensor_value, graph.placeholders)
            if value is not None
        ]
        function = graph.model.forward if isinstance(graph.model, nn.Module) else graph.model
        self._positional, self._keywords = len(graph.args), tuple(graph.kwargs)
        self._example = pytree.tree_map(lambda leaf: None, (graph.args, graph.kwargs))
        self._names = _parameter_names(function)
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = self.arranged(args, kwargs)
        module = self.fx if self.whole is None else self.whole
        run = lambda given: module(*given[0], **given[1])  # noqa: E731
        return self._reading.returned(guarded(self.plan.edits, self._state, run, (args, kwargs)))

    def _state(self) -> Iterator[Tensor]:
        """The parameters and buffers as they are now, without the care that `parameters()` takes:
        a GPU would wait for it."""
        modules: list[nn.Module] = [self.fx if self.whole is None else self.whole]
        for module in modules:
            for held in (module._parameters, module._buffers):
                yield from (t for t in held.values() if t is not None)
            modules += [m for m in module._modules.values() if m is not None]

    def arranged(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments in the form they were traced in: the graph takes them by position.

        Raises `InputError` where they do not fit.
        """
        if all(isinstance(value, Tensor) for value in (*args, *kwargs.values())):
            args, kwargs = self._by_position(args, kwargs)  # torch.compile follows this
        else:
            given = self._by_position(plain(args, any_leaf=True), plain(kwargs, any_leaf=True))
            args, kwargs = ordered_as(self._example, given)
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        for tensor, wanted in zip(tensors, self._shapes, strict=False):
            fits = tensor.dim() == len(wanted) and all(
                w is None or s == w for s, w in zip(tensor.shape, wanted, strict=True)
            )
            if not fits:
                shape = tuple("any" if w is None else w for w in wanted)
                raise InputError(
                    f"this model was balanced for inputs of shape {shape}, got "
                    f"{tuple(tensor.shape)}; call balance() again with inputs of that shape"
                )
        return args, kwargs

    def _by_position(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if len(args) == self._positional and tuple(kwargs) == self._keywords:
            return args, kwargs
        named = dict(zip(self._names, args, strict=False)) | kwargs
        wanted = (*self._names[: self._positional], *self._keywords)
        if set(named) != set(wanted) or len(named) != len(args) + len(kwargs):
            raise InputError(
                f"this model was balanced for the arguments ({', '.join(wanted)}), got "
                f"{len(args)} by position and {sorted(kwargs)} by name; call balance() again"
            )
        first = tuple(named[n] for n in wanted[: self._positional])
        return first, {n: named[n] for n in self._keywords}

    def __getstate__(self) -> dict[str, Any]:
        modules = self._modules | {"fx": _with_submodules(self.fx)}
        if self.whole is not None:
            modules["whole"] = _with_submodules(self.whole)
        return self.__dict__ | {"graph": None, "_modules": modules}  # fake tensors do not pickle


def _with_submodules(module: fx.GraphModule) -> fx.GraphModule:
    """A graph that calls modules as functions (leaves), with submodules for them: that pickles."""
    if not any(isinstance(node.target, nn.Module) for node in module.graph.nodes):
        return module
    copied = fx.GraphModule(module, copy.deepcopy(module.graph), "Balanced")
    for node in copied.graph.nodes:
        if isinstance(node.target, nn.Module):
            name = f"_{node.name}"
            copied.add_submodule(name, node.target)
            node.op, node.target = "call_module", name
    copied.recompile()
    return copied.eval()


def _parameter_names(function: Any) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(function).parameters)
    except ValueError:  # a builtin, torch.sin
        return ()


def balance(
    model: Model | ComputationGraph,
    inputs: Inputs = None,
    policy: str | Policy | Plan = "libra",
    *,
    unknown: str = "error",
    leaves: Collection[LeafSpec] = (),
    output: Selection = None,
    constant: Names = (),
    explain: Names | None = None,
) -> Balanced:
    """The model with a policy's (or a plan's) edits in its backward: an ordinary `nn.Module`.

    The forward is that of `model` bit for bit; any batch size that it takes is taken; nothing of it
    changes. It returns what the model returns, a cache in it as None; with `output=` what that
    selects. `unknown` as in `check_completeness`; `leaves`, `output`, `constant` and `explain` as
    in `trace`. Raises what `trace` and `derive_rules` raise, and `PlanError`.
    """
    graph = _graph(model, inputs, leaves, unknown, output, constant, explain)
    if isinstance(policy, Plan):
        policy.check_fits(graph)
    plan = policy if isinstance(policy, Plan) else derive_rules(graph, policy=policy)
    return Balanced(graph, plan)


def rewrite(
    graph: ComputationGraph,
    edits: tuple[Edit, ...],
    root: nn.Module | None = None,
    as_it_is: bool = False,
    labelled: ComputationGraph | None = None,
    narrow: bool = False,
) -> fx.GraphModule:
    """A copy of the graph with the edits written in, over the model's parameters or `root`'s.

    Node names stay. A pruned edge gets a `detach`, a scaled node or edge a `scale`; a secant, a
    frozen norm, an attention with pruned weights and an integral have their own backward. Kernels
    that misread a cotangent are given it as they can read it, but where the graph is wanted
    `as_it_is`. `labelled`: the part of the graph that the edits are of. `narrow`: the same gradient
    for less, linear layers multiply no channel whose cotangent is held at zero.
    """
    graph = fold(graph, edits)
    labels = cache(lambda: degrees(labelled or graph, edits))
    writing = Writing(
        graph,
        edits,
        moving=lambda name: labels().live.calls[name].moving,
        rays=lambda name: labels().rays.get(name, ()),
    )
    root = graph.fx if root is None else root
    forget_inner(root)
    written = writing.write(as_it_is)
    if narrow:
        narrow_linears(written)
    module = fx.GraphModule(root, written, "Balanced")
    module.eval()
    return unbound(module)
