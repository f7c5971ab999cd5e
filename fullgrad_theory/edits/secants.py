"""Secant: an elementwise f gets (f(u) - f(0)) / u for its derivative."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd import Function

from ..operators.algebra import Algebra
from ..operators.calls import bind, bound_once, led_by, overload, target_name
from ..operators.record import Operator
from ..operators.registry import REGION, lookup
from ..operators.relations import Mode
from .base import OwnEdit
from .costs import Policy
from .writing import Target, Writing


@dataclass(frozen=True, order=True)
class Secant(OwnEdit):
    """An elementwise f gets J~ = (f(u) - f(0))/u, at u = 0 its limit; f(0) is a bias leaf.

    With a `region`, the names of nodes that `node` ends, all of them are one f; `origin` its f(0).
    """

    region: tuple[str, ...] = ()
    origin: float = 0.0

    kind = "secant"

    @property
    def folds(self) -> tuple[str, ...]:
        return self.region

    def record(self, inside: Collection[Operator]) -> Operator:
        """That of an elementwise operation; its secant is taken numerically."""
        kind = Algebra.ELEMENTWISE if self.origin else Algebra.ZERO_ORIGIN
        proved = all(operator.proved for operator in inside)
        return Operator(REGION.name, kind, origin=self.origin, proved=proved)

    def data(self) -> dict[str, Any]:
        """The edit as JSON has it; a region only where there is one."""
        return super().data() if self.region else {"edit": self.kind, "node": self.node}

    @classmethod
    def of_data(cls, entry: Mapping[str, Any]) -> Self:
        return cls(entry["node"], tuple(entry.get("region", ())), float(entry.get("origin", 0.0)))

    @classmethod
    def price(cls, policy: Policy, mode: Mode) -> int | None:
        """A secant with f(0) != 0, which makes f(0) a bias leaf, has a price of its own."""
        return policy.secant_origin if mode.outputs[0].from_origin else policy.secant

    def words(self, node: str) -> str:
        inner = f" with the {len(self.region)} nodes it ends" if self.region else ""
        return f"secant {node}{inner}"

    def write(self, writing: Writing) -> None:
        node = writing.nodes[self.node]
        (operand,) = writing.moving(self.node)
        names = list(bind(node))
        closed = writing.operator(self.node).gate is not None and names[0] == operand
        if closed and not isinstance(node.target, nn.Module):
            node.args = (target_name(node.target), *node.args)
            node.target = secant
        else:
            place = names.index(operand)
            where = place if place < len(node.args) else operand
            node.target = SecantTarget(node.target, where, closed)  # type: ignore[arg-type]


@bound_once
class _Secant(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, op: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        return overload(op)(x, *args, **kwargs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.op, ctx.args, ctx.kwargs = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        product = _gate(ctx.op).cotangent(grad, x, *ctx.args, **ctx.kwargs)
        return product, None, None, None


def _gate(op: str) -> Any:
    operator = lookup(op)
    if operator is None or operator.gate is None:
        raise KeyError(f"no secant gate for {op}")
    return operator.gate


@led_by(1)
def secant(op: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Elementwise f(x) with the pseudo-Jacobian (f(x) - f(0)) / x, its limit at x = 0, by the
    operation's gate.

    `op` is the overload's name, 'aten.gelu.default'; the rest are its arguments. Saves x alone.
    Raises KeyError for an operation without a gate.
    """
    _gate(op)
    return _Secant.apply(x, op, args, kwargs)


@bound_once
class _Gated(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, computed: Tensor, gate: Callable[[Tensor], Tensor]) -> Tensor:
        return computed.view_as(computed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, ctx.gate = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return grad * ctx.gate(x), grad, None


def _quotient(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """(f(x) - f(0)) / x; f'(x/2) where x is small, which is as near as the quotient is there."""
    bound = torch.finfo(x.dtype).eps ** (1 / 3)
    small = x.abs() < bound
    far = torch.where(small, bound, x)
    graph = torch.is_grad_enabled()
    with torch.enable_grad():
        half = torch.where(small, x / 2.0, 0.0)
        half = half if half.requires_grad else half.requires_grad_()
        value = f(half)
        (slope,) = torch.autograd.grad(value, half, torch.ones_like(value), create_graph=graph)
    return torch.where(small, slope, (f(far) - f(torch.zeros_like(x))) / far)


class SecantTarget(Target):
    """An elementwise operation with the pseudo-Jacobian (f(x) - f(0)) / x, as `secant`, where that
    is no overload with a gate.

    `function`: the call's target; `place`: its argument x, a position or a keyword; `closed`: take
    the operation's gate. Other tensors keep their own gradient. Without a gate f is run twice more
    in the backward; 16-bit dtypes are not widened.
    """

    def __init__(
        self, function: Callable[..., Tensor], place: int | str, closed: bool = False
    ) -> None:
        super().__init__(function)
        self.__module__, self.__name__ = __name__, "secant_target"
        self.place, self.closed = place, closed

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        def f(x: Tensor, detach: bool = True) -> Tensor:
            given = [
                a.detach() if detach and isinstance(a, Tensor) and i != self.place else a
                for i, a in enumerate(args)
            ]
            named = dict(kwargs)
            if isinstance(self.place, int):
                given[self.place] = x
            else:
                named[self.place] = x
            return self.function(*given, **named)

        def gate(x: Tensor) -> Tensor:
            if self.closed:
                return _gate(target_name(self.function))(x, *args[1:], **kwargs)
            return _quotient(f, x)

        x = args[self.place] if isinstance(self.place, int) else kwargs[self.place]
        return _Gated.apply(x, f(x.detach(), False), gate)
