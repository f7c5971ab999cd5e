"""The real backward node by node, each under random cotangents of its own.

Nothing here knows why a plan is right; it takes residuals of what actually runs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..backward.running import bias_maps, inner
from ..edits.scaling import Scale
from ..errors import NonConvergenceWarning, NonFiniteError
from ..graph.walking import Walker
from ..operators.calls import bind, is_ray, operation_args
from ..plan.states import State
from . import words
from .numeric import Noise, float_leaves, largest
from .subject import Subject


@dataclass(frozen=True)
class Local:
    """Relative residual of every live node; the integrated ones that missed their tolerance.

    A residual is sum d_i <J~_i^T c, u_i> + <c, J_b b> - d <c, v> for a random c, relative to
    sum |c v|, or to sum |(J~_i^T c) u_i| where the terms cancel to less than they are.
    """

    errors: Mapping[str, float]
    unconverged: frozenset[str]


def node_by_node(subject: Subject, inputs: list[Any]) -> Local:
    """Run the subject on flat inputs, and take every residual on the way.

    Raises `NonFiniteError` at the first node whose value is not finite.
    """
    run = _Residuals(subject)
    run.run(*inputs, enable_io_processing=False)
    return Local(run.errors, frozenset(run.unconverged))


@dataclass(frozen=True)
class _Ran:
    """A call that ran on operands which are leaves of their own.

    `outputs`: each live one with a random cotangent and its degree. `leaves`: the parameters that
    are bias leaves, where no bias leaf is anything else.
    """

    node: fx.Node
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    operands: list[tuple[str, Tensor]]
    leaves: list[Tensor]
    value: Any
    outputs: list[tuple[Tensor, Tensor, Fraction]]


class _Residuals(Walker):
    def __init__(self, subject: Subject) -> None:
        super().__init__(subject.module)
        self.subject, self.labels = subject, subject.labels
        self.errors: dict[str, float] = {}
        self.unconverged: set[str] = set()
        self.masked: set[str] = set()
        self.noise = Noise(subject.seed)
        self.total, self.done = len(subject.module.graph.nodes), 0

    def run_node(self, n: fx.Node) -> Any:
        self.done += 1
        self.subject.tick("node by node", self.done, self.total)
        edit = n.meta.get("edit")
        if isinstance(edit, Scale):
            value = self._scaled(n, edit)
        elif n.name in self.labels.live.calls and n.name in self.labels.alive:
            value = self._judged(n)
        else:
            with torch.no_grad():
                value = super().run_node(n)
        self._refuse_infinite(n, value)
        return value

    def _judged(self, n: fx.Node) -> Any:
        """Take the residual of a call; its value without gradient."""
        ran = self._ran(n)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", NonConvergenceWarning)
            left, of_leaves, spread = self._through_operands(ran)
            of_biases, added = self._through_biases(ran)
            left += of_biases
        self.unconverged |= {n.name for w in caught if w.category is NonConvergenceWarning}
        right, magnitude = 0.0, 0.0
        for value, cotangent, degree in ran.outputs:
            right += float(degree) * inner(cotangent, value)
            magnitude += inner(_magnitudes(cotangent), _magnitudes(value))
        if abs(left - right) > 1e-12 * magnitude:
            magnitude = max(magnitude, spread())
        self._record(n.name, abs(left - right), magnitude)
        if ran.leaves:  # what biases add, by their values, and by the gradient that they get
            self._record(n.name, abs(of_biases - of_leaves), added)
        return pytree.tree_map_only(Tensor, Tensor.detach, ran.value)

    def _ran(self, n: fx.Node) -> _Ran:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        operands: list[tuple[str, Tensor]] = []
        leaves: list[Tensor] = []
        moving = self.labels.live.calls[n.name].moving
        biases = frozenset(self.labels.biases.get(n.name, ()))

        def leaf(name: str, value: Any) -> Any:
            if not is_ray(value) or not (name in moving or value.requires_grad):
                return value  # a constant gets no gradient, and not every kernel has one for it
            value = value.detach().requires_grad_()
            if name in moving:
                operands.append((name, value))
            else:
                leaves.append(value)
            return value

        args, kwargs = _map_operands(
            n, self.subject.graph.nodes[n.name], args, kwargs, moving | biases, leaf
        )
        leaves = leaves if len(leaves) == len(biases) else []
        with torch.enable_grad():
            value = n.target(*args, **kwargs)  # type: ignore[operator]
        outputs = list(value) if isinstance(value, (tuple, list)) else [value]
        facts, factor = self.labels.facts[n.name], _factor_behind(n)
        facts = facts * len(outputs) if len(facts) == 1 else facts
        live = [
            (o, self.noise.like(o), f.degree / factor)
            for o, f in zip(outputs, facts, strict=True)
            if f.state is State.LIVE and is_ray(o)
        ]
        return _Ran(n, args, kwargs, operands, leaves, value, live)

    def _through_operands(self, ran: _Ran) -> tuple[float, float, Callable[[], float]]:
        """sum d_i <J~_i^T c, u_i>, the same of the bias leaves, and how large the first one's terms
        are before they cancel."""
        grown = [(o, c) for o, c, _ in ran.outputs if o.requires_grad]
        grads: tuple[Tensor | None, ...] = ()
        leaves = [*(u for _, u in ran.operands), *ran.leaves]
        if grown and leaves:
            values, cotangents = zip(*grown, strict=True)
            grads = torch.autograd.grad(values, leaves, cotangents, allow_unused=True)
        seen, total, terms = self.labels.seen[ran.node.name], 0.0, []
        for (name, u), g in zip(ran.operands, grads, strict=False):
            if g is not None and seen[name] != 0:
                total += float(seen[name]) * inner(g, u)
                terms.append((g, u))
        of_leaves = zip(ran.leaves, grads[len(ran.operands) :], strict=False)
        return (
            total,
            sum(inner(g, b) for b, g in of_leaves if g is not None),
            lambda: sum(inner(_magnitudes(g), _magnitudes(u)) for g, u in terms),
        )

    def _through_biases(self, ran: _Ran) -> tuple[float, float]:
        """<c, J_b b>, and sum |c| |J_b b|."""
        name = ran.node.name
        if name not in self.labels.biases:
            return 0.0, 0.0
        outputs = ran.value if isinstance(ran.value, (tuple, list)) else [ran.value]
        maps = bias_maps(
            self.subject.graph.nodes[name],
            self.labels.live.calls[name],
            operation_args(ran.node.target, ran.args),
            ran.kwargs,
            [o.detach() for o in outputs if isinstance(o, Tensor)],
        )
        pairs = [(c, b) for (_, c, _), b in zip(ran.outputs, maps, strict=False)]
        return (
            sum(inner(c, b) for c, b in pairs),
            sum(inner(_magnitudes(c), _magnitudes(b)) for c, b in pairs),
        )

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

    def _refuse_infinite(self, n: fx.Node, value: Any) -> None:
        """NaN anywhere, or an infinity that is no mask's, is the first place things went wrong."""
        for tensor in float_leaves(value):
            if bool(torch.isfinite(tensor.sum())):
                continue
            constant = n.name not in self.labels.live.calls
            literal = any(isinstance(a, float) and math.isinf(a) for a in n.args)
            inherits = any(i.name in self.masked for i in n.all_input_nodes)
            if bool(torch.isnan(tensor).any()) or not (constant or literal or inherits):
                raise NonFiniteError(words.infinite_value(self.subject.where(n.name)))
            self.masked.add(n.name)


def _factor_behind(n: fx.Node) -> Fraction:
    """The factor of the scale written behind a node: facts hold the degree behind it."""
    edits = [user.meta.get("edit") for user in n.users]
    scales = [e for e in edits if isinstance(e, Scale) and e.node == n.name]
    return scales[0].factor if scales else Fraction(1)


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


def _magnitudes(value: Tensor) -> Tensor:
    """Absolute values, of a complex tensor those of its parts."""
    value = value.detach()
    return (torch.view_as_real(value.resolve_conj()) if value.is_complex() else value).abs()
