"""The real backward in float64: node by node under random cotangents, on perturbed copies.

Nothing here knows why a plan is right; it takes residuals of what actually runs.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..backward.running import bias_maps, inner
from ..bars import Tick
from ..edits.scaling import Scale
from ..errors import NonConvergenceWarning, NonFiniteError, TraceError
from ..graph.computation import ComputationGraph
from ..operators.calls import Call, bind
from ..operators.traced import operation_args
from ..plan.labelling import Degrees
from ..plan.liveness import State

_ROUNDED = (torch.float16, torch.bfloat16, torch.float32)
_WIDE = dict.fromkeys(_ROUNDED, torch.float64) | dict.fromkeys(
    (torch.complex32, torch.complex64), torch.complex128
)


class NodeByNode(fx.Interpreter):
    """Runs the rewritten graph and takes every live node's local residual on the way.

    sum d_i <J~_i^T c, u_i> + <c, J_b b> - d <c, v>, c random, relative to sum |c v|, or to
    sum |(J~_i^T c) u_i| where the terms cancel to less than they are.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        graph: ComputationGraph,
        labels: Degrees,
        noise: Noise,
        tick: Tick,
    ) -> None:
        super().__init__(module)
        self.traced, self.labels, self.tick = graph, labels, tick
        self.errors: dict[str, float] = {}
        self.unconverged: set[str] = set()
        """integrated nodes whose quadrature missed its tolerance"""
        self.masked: set[str] = set()
        self.total, self.done = len(module.graph.nodes), 0
        self.noise = noise

    def run_node(self, n: fx.Node) -> Any:
        self.done += 1
        self.tick("node by node", self.done, self.total)
        edit = n.meta.get("edit")
        if isinstance(edit, Scale):
            value = self._scaled(n, edit)
        elif n.name in self.labels.live.calls and n.name in self.labels.alive:
            value = self._judged(n)
        else:
            with torch.no_grad():
                value = super().run_node(n)
        self._finite(n, value)
        return value

    def _judged(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        call = self.labels.live.calls[n.name]
        leaves: list[tuple[str, Tensor]] = []

        def leaf(name: str, value: Any) -> Any:
            if not is_float_tensor(value):
                return value
            fresh = value.detach().requires_grad_()
            leaves.append((name, fresh))
            return fresh

        args, kwargs = _map_operands(n, self.traced.nodes[n.name], args, kwargs, call.moving, leaf)
        with torch.enable_grad():
            value = n.target(*args, **kwargs)  # type: ignore[operator]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", NonConvergenceWarning)
            detached = self._residual(n, call, args, kwargs, leaves, value)
        self.unconverged |= {n.name for w in caught if w.category is NonConvergenceWarning}
        return detached

    def _residual(
        self,
        n: fx.Node,
        call: Call,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        leaves: list[tuple[str, Tensor]],
        value: Any,
    ) -> Any:
        """Record the local residual of a call that ran on `leaves`; its value without gradient."""
        outputs = list(value) if isinstance(value, (tuple, list)) else [value]
        facts = self.labels.facts[n.name]
        facts = facts * len(outputs) if len(facts) == 1 else facts
        factor = _node_factor(n)
        kept = [
            (o, self.noise.like(o), f.degree / factor)
            for o, f in zip(outputs, facts, strict=True)
            if f.state is State.LIVE and is_float_tensor(o)
        ]
        detached = pytree.tree_map_only(Tensor, Tensor.detach, value)
        left, terms = 0.0, []
        grown = [(o, c) for o, c, _ in kept if o.requires_grad]
        if grown and leaves:
            grads = torch.autograd.grad(
                [o for o, _ in grown],
                [u for _, u in leaves],
                [c for _, c in grown],
                allow_unused=True,
            )
            seen = self.labels.seen[n.name]
            for (name, u), g in zip(leaves, grads, strict=True):
                if g is not None and seen[name] != 0:
                    left += float(seen[name]) * inner(g, u)
                    terms.append((g, u))
        if n.name in self.labels.biases:
            known = [o.detach() for o in outputs if isinstance(o, Tensor)]
            maps = bias_maps(
                self.traced.nodes[n.name], call, operation_args(n.target, args), kwargs, known
            )
            left += sum(inner(c, b) for (_, c, _), b in zip(kept, maps, strict=False))
        right, magnitude = 0.0, 0.0
        for o, c, degree in kept:
            right += float(degree) * inner(c, o)
            magnitude += inner(_magnitudes(c), _magnitudes(o))
        if abs(left - right) > 1e-12 * magnitude:
            spread = sum(inner(_magnitudes(g), _magnitudes(u)) for g, u in terms)
            magnitude = max(magnitude, spread)
        self._record(n.name, abs(left - right), magnitude)
        return detached

    def _scaled(self, n: fx.Node, edit: Scale) -> Tensor:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        u = args[0].detach().requires_grad_()
        with torch.enable_grad():
            value = n.target(u, *args[1:], **kwargs)  # type: ignore[operator]
        cotangent = self.noise.like(value)
        (g,) = torch.autograd.grad(value, u, cotangent)
        after = self.labels.facts[edit.node][0].degree
        natural = after / edit.factor
        gap = abs(float(natural) * inner(g, u) - float(after) * inner(cotangent, u))
        self._record(edit.node, gap, inner(cotangent.abs(), u.detach().abs()))
        return value.detach()

    def _record(self, name: str, gap: float, magnitude: float) -> None:
        error = gap / magnitude if magnitude else (0.0 if gap == 0.0 else float("inf"))
        self.errors[name] = largest([self.errors.get(name, 0.0), error])

    def _finite(self, n: fx.Node, value: Any) -> None:
        """NaN anywhere, or an infinity that is no mask's, is the first place things went wrong."""
        for tensor in pytree.tree_leaves(value):
            if not is_float_tensor(tensor) or bool(torch.isfinite(tensor.sum())):
                continue
            constant = n.name not in self.labels.live.calls
            literal = any(
                isinstance(a, float) and a in (float("inf"), -float("inf")) for a in n.args
            )
            inherits = any(i.name in self.masked for i in n.all_input_nodes)
            if bool(torch.isnan(tensor).any()) or not (constant or literal or inherits):
                what = self.traced.describe(n.name) if n.name in self.traced.nodes else n.name
                raise NonFiniteError(
                    f"{what} is the first node whose value is not finite; look at what it divides "
                    "by or takes the logarithm of at these inputs"
                )
            self.masked.add(n.name)


class _Cotangents(fx.Interpreter):
    """Runs a module with gradients; keeps every call's arguments and, later, its cotangent."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.calls: dict[fx.Node, tuple[Any, Any]] = {}
        self.cotangents: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "call_function" and isinstance(value, Tensor) and value.requires_grad:
            self.calls[n] = self.fetch_args_kwargs_from_env(n)
            value.register_hook(lambda g: self.cotangents.__setitem__(n, g))
        return value


def layout_faults(module: fx.GraphModule, inputs: list[Any], seed: int) -> list[str]:
    """The nodes whose backward gives other numbers for the same cotangent laid out in memory
    otherwise: a fault of a kernel, that no residual under fresh cotangents can see."""
    run = _Cotangents(module)
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() if is_float_tensor(x) else x for x in inputs]
        outputs = float_leaves(run.run(*leaves, enable_io_processing=False))
        value = paired([aligned(o, seed) for o in outputs], outputs)
        gradients(value, [x for x in leaves if is_float_tensor(x)])
    return [n.name for n, g in run.cotangents.items() if not _same_backward(n, run.calls[n], g)]


def _same_backward(n: fx.Node, call: tuple[Any, Any], cotangent: Tensor) -> bool:
    found = []
    for given in (cotangent, cotangent.clone(memory_format=torch.contiguous_format)):
        fresh = pytree.tree_map_only(
            Tensor, lambda t: t.detach().requires_grad_(t.requires_grad), call
        )
        args, kwargs = fresh
        leaves = [t for t in pytree.tree_leaves(fresh) if isinstance(t, Tensor) and t.requires_grad]
        try:
            with torch.enable_grad():
                out = n.target(*args, **kwargs)  # type: ignore[operator]
                found.append(torch.autograd.grad(out, leaves, given, allow_unused=True))
        except RuntimeError:  # a call that runs in its graph alone accuses nobody
            return True
    return all(
        a is None or b is None or torch.allclose(a, b, rtol=1e-6, atol=1e-12)
        for a, b in zip(*found, strict=True)
    )


def _node_factor(n: fx.Node) -> Any:
    """The factor of the scale written behind a node: facts hold the degree behind it."""
    for user in n.users:
        edit = user.meta.get("edit")
        if isinstance(edit, Scale) and edit.node == n.name:
            return edit.factor
    return 1


def _map_operands(
    rewritten: fx.Node,
    original: fx.Node,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    names: frozenset[str],
    leaf: Callable[[str, Any], Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Apply `leaf` to the run-time values of the named operands of a call."""
    schema = getattr(original.target, "_schema", None)
    own = operation_args(rewritten.target, args)
    lead = args[: len(args) - len(own)]
    order = [a.name for a in schema.arguments] if schema else list(bind(original))

    def visit(name: str, value: Any) -> Any:
        if isinstance(value, (list, tuple)) and name in names:  # getitem of a multi-output node
            return type(value)(leaf(name, v) for v in value)
        if isinstance(value, (list, tuple)):
            return type(value)(
                leaf(f"{name}[{i}]", v) if f"{name}[{i}]" in names else v
                for i, v in enumerate(value)
            )
        return leaf(name, value) if name in names else value

    return (
        (*lead, *(visit(n, v) for n, v in zip(order, own, strict=False))),
        {n: visit(n, v) for n, v in kwargs.items()},
    )


# --------------------------------------------------------------------------- copies and inputs


def double_copies(graph: ComputationGraph, with_model: bool) -> tuple[Any, fx.GraphModule]:
    """The user's module (where it is needed) and the traced graph, copied together, in float64.

    Copied together they go on sharing parameters; buffers, which a cast replaces, are tied again.
    """
    model = graph.model if isinstance(graph.model, nn.Module) else None
    own, root = copy.deepcopy(
        (model if with_model else None, graph.fx), _computed(model) if with_model else None
    )
    _double(root)
    if own is None:
        return graph.model if with_model and model is None else None, root
    _double(own)
    given = model.parameters() if model is not None else ()
    for parameter, copied in zip(given, own.parameters(), strict=True):
        for hook in (parameter._backward_hooks or {}).values():  # a copy forgets them
            copied.register_hook(hook)
    buffers = dict(own.named_buffers())
    for name, _ in list(root.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        if name in buffers:
            root.get_submodule(owner)._buffers[leaf] = buffers[name]
    return own, root


def _computed(model: nn.Module | None) -> dict[int, Any]:
    """A memo for deepcopy, which refuses what forward() computed and kept (old weight_norm's)."""
    held = (v for m in model.modules() for v in vars(m).values()) if model is not None else ()
    return {id(v): v.detach().clone() for v in held if isinstance(v, Tensor) and not v.is_leaf}


def _double(module: nn.Module) -> None:
    module._apply(lambda t: t.to(_WIDE.get(t.dtype, t.dtype)))


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


def rounding(graph: ComputationGraph) -> float:
    """The coarsest machine epsilon among the dtypes that the model itself casts to."""
    leaves = (a for n in graph.fx.graph.nodes for a in pytree.tree_leaves((n.args, n.kwargs)))
    named = {a for a in leaves if isinstance(a, torch.dtype) and a in _ROUNDED}
    return max((torch.finfo(d).eps for d in named), default=0.0)


@lru_cache(1)
def _long_draw(seed: int) -> Tensor:
    draw = torch.randn(1 << 20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.cat([draw, draw])


class Noise:
    """Random cotangents cut from one long draw at random places: a fresh draw a node is slow."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.draw = _long_draw(seed)

    def like(self, value: Tensor) -> Tensor:
        """Standard normal numbers of the shape of `value`."""
        if value.is_complex():
            return torch.complex(self.like(value.real), self.like(value.imag))
        count, half = value.numel(), self.draw.numel() // 2
        # at an even place: two numbers in a row may be viewed as a complex one
        start = 2 * int(torch.randint(half // 2, (), generator=self.generator))
        long = self.draw if count <= half else self.draw.repeat(count // half + 1)
        return long[start : start + count].to(value).reshape(value.shape)


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


def as_double(value: Any) -> Any:
    return (
        value.detach().to(_WIDE.get(value.dtype, value.dtype)) if is_float_tensor(value) else value
    )


def jitter(value: Any, generator: torch.Generator) -> Any:
    if not is_float_tensor(value):
        return value
    noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
    return value + 0.1 * noise


def aligned(value: Tensor, seed: int) -> Tensor:
    """A random cotangent with the signs of the output, so that <c, f> has no cancellation."""
    generator = torch.Generator().manual_seed(seed + 1)
    size = torch.rand(value.shape, generator=generator, dtype=torch.float64).to(value) + 0.5
    return size * torch.sgn(value.detach())


def paired(cotangents: list[Tensor], outputs: list[Tensor]) -> Tensor:
    """<c, f> over all outputs; of complex ones the real part."""
    sums = [(c.conj() * o).real.sum() for c, o in zip(cotangents, outputs, strict=True)]
    return torch.stack(sums).sum()


def gradients(value: Tensor, given: list[Tensor]) -> list[Tensor]:
    if not value.requires_grad:
        return [torch.zeros_like(t) for t in given]
    try:
        grads = torch.autograd.grad(value, given, allow_unused=True)
    except RuntimeError as error:
        if "derivative for" in str(error):  # torch has none: this backward never runs
            raise TraceError(f"the model has no gradient: {error}") from error
        raise
    return [torch.zeros_like(t) if g is None else g for g, t in zip(grads, given, strict=True)]


def own_gradient(
    model: Any,
    inputs: list[Any],
    graph: ComputationGraph,
    cotangents: list[Tensor],
    parameters: list[Tensor],
) -> tuple[float, list[Tensor], list[Tensor]]:
    """<c, f> of a callable by its own autograd: the value, the float inputs, and the gradients
    of those inputs followed by those of `parameters`."""
    leaves = [t.detach().clone().requires_grad_() if is_float_tensor(t) else t for t in inputs]
    spec = pytree.tree_structure((graph.args, graph.kwargs))
    passed = pytree.tree_map_only(Tensor, Tensor.clone, leaves)  # the model may write to them
    args, kwargs = pytree.tree_unflatten(passed, spec)
    given = [t for t in leaves if is_float_tensor(t)]
    with torch.enable_grad():
        value = paired(cotangents, float_leaves(model(*args, **kwargs)))
        grads = gradients(value, [*given, *(p for p in parameters if p.requires_grad)])
    grown = iter(grads[len(given) :])
    rest = [next(grown) if p.requires_grad else torch.zeros_like(p) for p in parameters]
    return float(value.detach()), given, [*grads[: len(given)], *rest]


def largest(errors: Iterable[float]) -> float:
    """The largest error, NaN being the worst of all (`max` passes over it); 0 for none."""
    return max(errors, default=0.0, key=lambda e: float("inf") if math.isnan(e) else e)


def gap(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """How far two lists of gradients are apart, relative to the second; NaN is like NaN."""
    size = sum(float(g.nan_to_num().norm()) for g in theirs) or 1.0
    same = ((a == b) | (a.isnan() & b.isnan()) for a, b in zip(ours, theirs, strict=True))
    apart = zip(same, ours, theirs, strict=True)
    return sum(float((a - b).masked_fill(s, 0.0).norm()) for s, a, b in apart) / size


def _magnitudes(value: Tensor) -> Tensor:
    """Absolute values, of a complex tensor those of its parts."""
    value = value.detach()
    return (torch.view_as_real(value.resolve_conj()) if value.is_complex() else value).abs()


def is_float_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def float_leaves(tree: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(tree) if is_float_tensor(t)]
