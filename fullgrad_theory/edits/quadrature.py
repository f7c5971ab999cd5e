"""The integrated Jacobian: J~ = integral of J(t u) over t from 0 to 1, by adaptive quadrature.

The forward is bit for bit the operation's, called as it is; the backward calls it again along the
ray, in its operands' dtype (float32 for 16 bits), and saves only these. On every piece [a, b] of
the ray the rule has a residual that is known exactly: <c, J~ u> = <c, f(b u) - f(a u)>.
"""

from __future__ import annotations

import heapq
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function

from ..errors import NonConvergenceWarning, NonFiniteError
from ..operators.calls import evaluate, is_ray, named, origin

RULE = tuple(zip(*np.polynomial.legendre.leggauss(8), strict=True))
"""Gauss-Legendre on [-1, 1], exact to degree 15; a piece that it misses is halved"""
MOST = 1024
"""vector-Jacobian products, at most, for one backward of one operation"""
TOLERANCES = {torch.float64: (1e-12, 1e-8), torch.float32: (1e-6, 1e-4)}
"""of a piece's residual, and of how far its halves are from the whole: they are 2^-16 as wrong"""
EXCESS = 10
"""how much of that the sum over all pieces may reach before it counts as missed"""


@dataclass(frozen=True)
class _Ray:
    """A call whose floating-point operands are left out; `along` are those that move."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    names: tuple[str, ...]
    along: tuple[str, ...]
    label: str

    def at(self, t: float, operands: list[Tensor]) -> list[Tensor]:
        """The operands at t; an infinite entry is a mask's and stays, at 0 too."""
        return [
            u if n not in self.along else u * t if t else origin(u)
            for n, u in zip(self.names, operands, strict=True)
        ]

    def values(self, operands: list[Tensor]) -> list[Tensor]:
        """The operation's floating-point results."""
        given = dict(zip(self.names, operands, strict=True))
        result = evaluate(self.function, self.args, dict(self.kwargs), given)
        return [v for v in (result if isinstance(result, (tuple, list)) else [result]) if is_ray(v)]


class _Integrate(Function):
    @staticmethod
    def forward(ctx: Any, ray: _Ray, outputs: int, *tensors: Tensor) -> Any:
        ctx.ray, ctx.outputs = ray, outputs
        ctx.save_for_backward(*tensors[outputs:])
        views = tuple(t.view_as(t) for t in tensors[:outputs])
        return views if outputs > 1 else views[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        needs = ctx.needs_input_grad[2 + ctx.outputs :]
        widest = torch.float32
        for tensor in saved:
            widest = torch.promote_types(widest, tensor.dtype.to_real())
        operands = [u.to(widest) if u.is_floating_point() else u for u in saved]
        cotangents = [g.to(torch.promote_types(g.dtype, widest)) for g in grads]
        flags = torch.backends.cudnn.flags(enabled=False)  # no backward of a cudnn rnn in eval mode
        with torch.autocast(saved[0].device.type, enabled=False), flags:
            found = _gradients(ctx.ray, operands, cotangents, needs)
        cast = [g if g is None else g.to(u.dtype) for g, u in zip(found, saved, strict=True)]
        return (None,) * (2 + ctx.outputs) + tuple(cast)


def _gradients(
    ray: _Ray, operands: list[Tensor], cotangents: list[Tensor], needs: tuple[bool, ...]
) -> list[Tensor | None]:
    """The integral of the vector-Jacobian product for operands on the ray; the true one at u for
    the others (weights)."""
    again = torch.is_grad_enabled()  # a second derivative is wanted
    moving = [i for i, n in enumerate(ray.names) if n in ray.along]
    held = [i for i, need in enumerate(needs) if need and i not in moving]

    def pull(t: float, which: list[int]) -> list[Tensor]:
        with torch.enable_grad():
            here = ray.at(t, operands if again else [u.detach() for u in operands])
            for i in which:  # a value of its own, even at t = 1, and not that of another operand
                here[i] = here[i].view_as(here[i]) if again else here[i].detach()
                if not here[i].requires_grad:
                    here[i].requires_grad_()
            wanted = [here[i] for i in which]
            pairs = zip(ray.values(here), cotangents, strict=True)
            grown = [(v, c) for v, c in pairs if v.requires_grad]
            if not grown:
                return [torch.zeros_like(u) for u in wanted]
            grads = torch.autograd.grad(
                [v for v, _ in grown],
                wanted,
                [c for _, c in grown],
                create_graph=again,
                allow_unused=True,
            )
        return [torch.zeros_like(u) if g is None else g for g, u in zip(grads, wanted, strict=True)]

    result: list[Tensor | None] = [None] * len(operands)
    if any(needs[i] for i in moving):
        line = _Line(ray, operands, cotangents, [operands[i].detach() for i in moving])
        integrals = line.integral(lambda t: pull(t, moving))
        result = [
            integrals[moving.index(i)] if i in moving and needs[i] else None
            for i in range(len(operands))
        ]
    for i, gradient in zip(held, pull(1.0, held) if held else (), strict=True):
        result[i] = gradient
    return result


class _Line:
    """Quadrature along one ray under one cotangent."""

    def __init__(
        self, ray: _Ray, operands: list[Tensor], cotangents: list[Tensor], moving: list[Tensor]
    ) -> None:
        self.ray, self.moving = ray, [u.masked_fill(u.isinf(), 0.0) for u in moving]
        self.operands = [u.detach() for u in operands]
        self.cotangents = [c.detach() for c in cotangents]
        self.heights: dict[float, float] = {}
        self.residual, self.spread = TOLERANCES[moving[0].dtype.to_real()]
        self.spent = 0

    def values(self, t: float) -> list[Tensor]:
        with torch.no_grad():
            return self.ray.values(self.ray.at(t, self.operands))

    def height(self, t: float) -> float:
        """<c, f(t u)>."""
        if t not in self.heights:
            self.heights[t] = sum(map(_inner, self.cotangents, self.values(t)))
        return self.heights[t]

    def estimate(self, pull: Callable[[float], list[Tensor]], a: float, b: float) -> list[Tensor]:
        """The rule on [a, b]."""
        total: list[Tensor] = []
        for x, weight in RULE:
            t = float((a + b) / 2 + (b - a) / 2 * x)
            part = [g * float(weight * (b - a) / 2) for g in pull(t)]
            total = [p + q for p, q in zip(total, part, strict=True)] if total else part
        self.spent += len(RULE)
        self.finite(self.size(total), f"Jacobian is not finite between {a:g} and {b:g} of the")
        return total

    def finite(self, number: float, what: str) -> None:
        if not np.isfinite(number):
            raise NonFiniteError(
                f"{self.ray.label}: its {what} ray from 0 to these values, so it cannot be "
                "integrated; prune what it reads, or freeze the norm before it"
            )

    def size(self, gradients: list[Tensor]) -> float:
        """sum |g u|."""
        pairs = zip(gradients, self.moving, strict=True)
        return sum(float((g.detach() * u).abs().sum(dtype=torch.float64)) for g, u in pairs)

    def integral(self, pull: Callable[[float], list[Tensor]]) -> list[Tensor]:
        """Pieces are halved, the worst first, until each agrees with its halves and with f."""
        whole = self.estimate(pull, 0.0, 1.0)
        total_rise = 0.0
        for c, v, w in zip(self.cotangents, self.values(1.0), self.values(0.0), strict=True):
            rise = c * torch.where(v == w, 0.0, v - w)  # a mask's infinities may pass
            total_rise += float(rise.abs().sum(dtype=torch.float64))
        self.finite(total_rise, "value is not finite at the start of the")
        scale = max(self.size(whole), total_rise)
        order = count()  # the heap never compares tensors
        open_pieces = [(0.0, next(order), 0.0, 1.0, whole)]
        total = [torch.zeros_like(g) for g in whole]
        unsure = 0.0
        while open_pieces:
            wrong, _, a, b, piece = heapq.heappop(open_pieces)
            m = (a + b) / 2
            if self.spent + 2 * len(RULE) > MOST:
                total = [p + q for p, q in zip(total, piece, strict=True)]
                unsure -= wrong
                continue
            halves = self.estimate(pull, a, m), self.estimate(pull, m, b)
            both = [p + q for p, q in zip(*halves, strict=True)]
            residual = abs(self.contract(both) - (self.height(b) - self.height(a)))
            spread = self.size([p - q for p, q in zip(both, piece, strict=True)])
            if residual <= self.residual * scale and spread <= self.spread * scale:
                total = [p + q for p, q in zip(total, both, strict=True)]
                continue
            error = -max(residual, spread) / 2
            heapq.heappush(open_pieces, (error, next(order), a, m, halves[0]))
            heapq.heappush(open_pieces, (error, next(order), m, b, halves[1]))
        missed = abs(self.contract(total) - (self.height(1.0) - self.height(0.0)))
        if missed > EXCESS * self.residual * scale or unsure > EXCESS * self.spread * scale:
            warnings.warn(
                f"the integral of {self.ray.label} along its ray from 0 did not converge with "
                f"{self.spent} evaluations: its residual is {missed / scale:.1e}, its error about "
                f"{max(missed, unsure) / scale:.1e}; its gradient is not complete, prune instead",
                NonConvergenceWarning,
                stacklevel=2,
            )
        return total

    def contract(self, gradients: list[Tensor]) -> float:
        """<g, u>, where an infinite entry of u counts nothing."""
        return sum(map(_inner, gradients, self.moving))


def _inner(a: Tensor, b: Tensor) -> float:
    """The real inner product, summed in float64; a mask's infinities count nothing."""
    product = (a.detach().conj() * b).real
    return float(product.masked_fill(b.isinf(), 0.0).sum(dtype=torch.float64))


def integrated(
    function: Callable[..., Any],
    along: tuple[str, ...],
    label: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """A call's own result; its Jacobian in the operands `along` is the integral along the ray from
    0, the others being held fixed and keeping their true gradient. See `integrating.integrate`."""
    # called here and not in the Function, so that grad mode and requires_grad choose the kernel
    computed = function(*args, **kwargs)
    several = isinstance(computed, (tuple, list))
    outputs = [v.detach() for v in (computed if several else [computed])]
    operands: dict[str, Tensor] = {}

    def take(name: str, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [take(f"{name}[{i}]", v) for i, v in enumerate(value)]
        if is_ray(value):
            operands[name] = value
            return None
        return value

    bound = {n: take(n, v) for n, v in named(function, args, kwargs).items()}
    left = tuple(bound[n] for n in list(bound)[: len(args)])
    rest = {n: bound[n] for n in kwargs}
    ray = _Ray(function, left, rest, tuple(operands), along, label)
    result = _Integrate.apply(ray, len(outputs), *outputs, *operands.values())
    return tuple(result) if several and len(outputs) > 1 else result
