"""The real backward in float64: node by node under random cotangents, on perturbed copies.

Nothing here knows why a plan is right; it takes residuals of what actually runs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .bias import bias_map
from .degrees import Degrees, State
from .errors import NonFiniteError
from .fullgrad import inner, original_args
from .progress import Tick
from .rules import Scale
from .trace import ComputationGraph

_ROUNDED = (torch.float16, torch.bfloat16, torch.float32)


class NodeByNode(fx.Interpreter):
    """Runs the rewritten graph and takes every live node's local residual on the way.

    sum d_i <J~_i^T c, u_i> + <c, J_b b> - d <c, v>, relative to sum |c v|, c random.
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
            if not _carries(value):
                return value
            fresh = value.detach().requires_grad_()
            leaves.append((name, fresh))
            return fresh

        args, kwargs = _map_operands(n, self.traced.nodes[n.name], args, kwargs, call.moving, leaf)
        with torch.enable_grad():
            value = n.target(*args, **kwargs)  # type: ignore[operator]
        outputs = list(value) if isinstance(value, (tuple, list)) else [value]
        facts = self.labels.facts[n.name]
        facts = facts * len(outputs) if len(facts) == 1 else facts
        factor = _node_factor(n)
        kept = [
            (o, self.noise.like(o), f.degree / factor)
            for o, f in zip(outputs, facts, strict=True)
            if f.state is State.LIVE and _carries(o)
        ]
        detached = pytree.tree_map_only(Tensor, Tensor.detach, value)
        left = 0.0
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
        if n.name in self.labels.biases:
            added = bias_map(
                self.traced.nodes[n.name], call, original_args(n, args), kwargs, outputs[0].detach()
            )
            left += inner(kept[0][1], added)
        right, magnitude = 0.0, 0.0
        for o, c, degree in kept:
            right += float(degree) * inner(c, o)
            magnitude += inner(c.abs(), o.detach().abs())
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
        self.errors[name] = max(self.errors.get(name, 0.0), error)

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
    own = original_args(rewritten, args)
    lead = args[: len(args) - len(own)]
    count = max(len(own), 2)
    order = (
        [a.name for a in schema.arguments] if schema else ["self", "index", *map(str, range(count))]
    )

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
    own, root = copy.deepcopy((model if with_model else None, graph.fx))
    root.double()
    if own is None:
        return graph.model if with_model and model is None else None, root
    own.double()
    buffers = dict(own.named_buffers())
    for name, _ in list(root.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        if name in buffers:
            root.get_submodule(owner)._buffers[leaf] = buffers[name]
    return own, root


def widened(module: fx.GraphModule) -> fx.GraphModule:
    """The graph without casts to a lower precision, which would limit the audit to it."""
    for node in module.graph.nodes:
        node.args, node.kwargs = pytree.tree_map(_widen, (node.args, node.kwargs))
    module.recompile()
    return module


def _widen(argument: Any) -> Any:
    return torch.float64 if isinstance(argument, torch.dtype) and argument in _ROUNDED else argument


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
    return value.detach().double() if is_float_tensor(value) else value


def jitter(value: Any, generator: torch.Generator) -> Any:
    if not is_float_tensor(value):
        return value
    noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
    return value + 0.1 * noise


def aligned(value: Tensor, seed: int) -> Tensor:
    """A random cotangent with the signs of the output, so that <c, f> has no cancellation."""
    generator = torch.Generator().manual_seed(seed + 1)
    size = torch.rand(value.shape, generator=generator, dtype=torch.float64).to(value) + 0.5
    return size * torch.sign(value.detach())


def paired(cotangents: list[Tensor], outputs: list[Tensor]) -> Tensor:
    """<c, f> over all outputs."""
    return torch.stack([(c * o).sum() for c, o in zip(cotangents, outputs, strict=True)]).sum()


def gradients(value: Tensor, given: list[Tensor]) -> list[Tensor]:
    if not value.requires_grad:
        return [torch.zeros_like(t) for t in given]
    grads = torch.autograd.grad(value, given, allow_unused=True)
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
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    given = [t for t in leaves if is_float_tensor(t)]
    with torch.enable_grad():
        value = paired(cotangents, float_leaves(model(*args, **kwargs)))
        grads = gradients(value, [*given, *(p for p in parameters if p.requires_grad)])
    grown = iter(grads[len(given) :])
    rest = [next(grown) if p.requires_grad else torch.zeros_like(p) for p in parameters]
    return float(value.detach()), given, [*grads[: len(given)], *rest]


def gap(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """How far two lists of gradients are apart, relative to the second."""
    size = sum(float(g.norm()) for g in theirs) or 1.0
    return sum(float((a - b).norm()) for a, b in zip(ours, theirs, strict=True)) / size


def _carries(value: Any) -> bool:
    """Whether a value can carry gradient: complex numbers do."""
    return is_float_tensor(value) or (isinstance(value, Tensor) and value.is_complex())


def is_float_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def float_leaves(tree: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(tree) if is_float_tensor(t)]
