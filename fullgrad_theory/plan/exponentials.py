"""Softmaxes, their logarithms and log-sum-exps that a model spells out, by what their values are.

The parts of a softmax have a plan, another one than the softmax has; those of a log-sum-exp have
none, as the logarithm is infinite at 0. Either is one function of what it reads, and is integrated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..edits.integrating import Integrate
from ..graph.computation import ComputationGraph, is_float, tensor_value
from ..graph.constants import Constants, hinted
from ..operators.algebra import Algebra
from ..operators.registry import record_of
from .jumps import steps_of
from .labelling import Degrees
from .regions import is_pointwise
from .states import State

LONGEST = 24
"""the most operations that such a function is spelled in"""
SIZES = (0.5, 2.0, -3.0)
CLOSE = 1e-6
STEPS = 64
"""of the sum that an integral along a ray is taken by"""


def spelled_exponentials(
    graph: ComputationGraph, before: Degrees, constants: Constants
) -> tuple[Integrate, ...]:
    """The regions that are one such function, last ones first; `before`: without edits."""
    taken: set[str] = set()
    found = []
    for name in reversed(graph.nodes):
        if name in taken or name not in before.alive or name not in before.live.calls:
            continue
        part = _whole(graph, before, graph.nodes[name], constants)
        if part is not None:
            taken |= {n.name for n in part.inside}
            found.append(Integrate(name, tuple(n.name for n in part.inside)))
    return tuple(reversed(found))


@dataclass
class _Part:
    """What ends at `exit`, as a function of `entries`; `inside`: what computes it, in order."""

    exit: fx.Node
    entries: tuple[fx.Node, ...]
    inside: tuple[fx.Node, ...]
    constants: Constants

    def __call__(self, *values: Tensor) -> Tensor:
        found = dict(zip(self.entries, values, strict=True))

        def read(node: fx.Node) -> Any:
            return found[node] if node in found else self.constants.value(node)

        for node in self.inside:
            args, kwargs = fx.map_arg((node.args, node.kwargs), read)
            found[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        made: Tensor = found[self.exit]
        if made.is_complex():
            raise ValueError("a softmax of complex values is none")
        return made.double()

    def drawn(self) -> Iterator[list[Tensor]]:
        """Values to run it on."""
        generator = torch.Generator().manual_seed(0)
        for size in SIZES:
            drawn = []
            for like in map(tensor_value, self.entries):
                assert like is not None
                u = torch.randn(hinted(like), generator=generator, dtype=torch.float64)
                drawn.append((size * u).to("cpu" if like.is_meta else like.device).requires_grad_())
            yield drawn


def _whole(
    graph: ComputationGraph, before: Degrees, exit: fx.Node, constants: Constants
) -> _Part | None:
    """The widest softmax that ends at a node, so that what is subtracted before is part of it, or
    the smallest function that a logarithm ends and that has an integral; None for neither."""
    call = before.live.calls[exit.name]
    algebra = call.operator.algebra
    singular = algebra is Algebra.SINGULAR
    joins = len(call.moving) > 1 and algebra not in (Algebra.STRUCTURAL, Algebra.SMOOTH)
    if not is_float(exit) or not (joins or singular or algebra is Algebra.ELEMENTWISE):
        return None
    best = None
    for part in _parts(graph, before, exit, constants):
        if not any((r := record_of(n)) is not None and r.kind.edits for n in part.inside):
            continue
        try:
            if len(part.entries) == 1 and _is_softmax(part):
                best = part
            elif len(part.entries) == 1 and best is not None:
                break
            elif singular and best is None and _is_integral(part):
                return None if _is_elementwise(part) else part
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
            break  # it has no values, as on the meta device
    return best


def _parts(
    graph: ComputationGraph, before: Degrees, exit: fx.Node, constants: Constants
) -> Iterator[_Part]:
    """What ends at a node as functions of what it reads, from the nearest to the farthest."""
    frontier, inside = {exit}, list[fx.Node]()
    while frontier and len(inside) < LONGEST:
        node = max(frontier, key=graph.places.__getitem__)
        if node.name not in before.live.calls or record_of(node) is None:
            return
        if node.name in before.live.sources or any(
            n.op == "get_attr" for n in node.all_input_nodes
        ):
            return  # no weight has a part in a softmax
        inside.append(node)
        moving = {n for n in node.all_input_nodes if before.live.state(n) is not State.CONSTANT}
        frontier = (frontier - {node}) | moving
        live = all(is_float(n) and before.live.state(n) is State.LIVE for n in frontier)
        if live and all(tensor_value(n) is not None for n in frontier):  # else a list of them
            entries = tuple(sorted(frontier, key=graph.places.__getitem__))
            yield _Part(exit, entries, tuple(reversed(inside)), constants)


def _is_elementwise(part: _Part) -> bool:
    """Whether it is a function of one value in its place, whose secant is the rule."""
    return len(part.entries) == 1 and all(map(is_pointwise, part.inside))


def _is_softmax(part: _Part) -> bool:
    """Whether value and gradient are those of a softmax along a dimension, of its logarithm, or of
    a log-sum-exp, at some points."""
    fitting: list[tuple[str, int]] | None = None
    for (u,) in part.drawn():
        y = part(u)
        (slope,) = torch.autograd.grad(y, u, _cotangent(y), allow_unused=True)
        if slope is None:
            return False
        forms = _forms(u)
        known = forms if fitting is None else fitting
        fitting = [f for f in known if _agree(forms[f], y, u, slope)]
        if not fitting:
            return False
    return True


def _forms(u: Tensor) -> Mapping[tuple[str, int], Tensor]:
    made = {}
    for dim in range(u.dim()):
        if u.shape[dim] > 1:
            made["softmax", dim] = u.softmax(dim)
            made["log_softmax", dim] = u.log_softmax(dim)
            made["logsumexp", dim] = u.logsumexp(dim)
            made["logsumexp with its dimension", dim] = u.logsumexp(dim, keepdim=True)
    return made


def _agree(form: Tensor, y: Tensor, u: Tensor, slope: Tensor) -> bool:
    if form.shape != y.shape or not bool(((form - y).abs() <= CLOSE * (1.0 + y.abs())).all()):
        return False
    (wanted,) = torch.autograd.grad(form, u, _cotangent(form), retain_graph=True)
    return bool(((wanted - slope).abs() <= CLOSE * (1.0 + slope.abs())).all())


def _cotangent(y: Tensor) -> Tensor:
    return torch.cos(torch.arange(y.numel(), dtype=y.dtype, device=y.device)).reshape(y.shape)


def _is_integral(part: _Part) -> bool:
    """Whether f(0) is finite, and what f gains along rays from there is the integral of its
    gradient; no step is in it, which so coarse a sum would not see."""
    if steps_of(part.inside):
        return False
    for values in part.drawn():
        origin = part(*(torch.zeros_like(v) for v in values))
        if not bool(torch.isfinite(origin).all()):
            return False
        gained = 0.0
        for k in range(STEPS):
            at = [(v.detach() * ((k + 0.5) / STEPS)).requires_grad_() for v in values]
            y = part(*at)
            slopes = torch.autograd.grad(y, at, _cotangent(y), materialize_grads=True)
            pairs = zip(slopes, values, strict=True)
            gained += sum(float((s * v).sum().detach()) for s, v in pairs) / STEPS
        rise = float((_cotangent(origin) * (part(*values) - origin)).sum().detach())
        if not abs(gained - rise) <= 1e-2 * max(abs(rise), 1e-3):
            return False
    return True
