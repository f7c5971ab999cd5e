"""Closed-form secant gates: gate(u) = (f(u) - f(0)) / u, and its limit f'(0) at u = 0.

No gate subtracts f(0) and none divides by u + eps. Quotients are Taylor polynomials for |u| < 1e-3,
where f(u)/u would spoil second derivatives. float16 and bfloat16 are computed in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import fused
from .calls import is_batched

NEAR = 1e-3


@dataclass(frozen=True)
class Gate:
    """gate(u, *further arguments of the operation): same shape and dtype as u.

    `product`: grad * gate(u) by one kernel, where there is one.
    """

    function: Callable[..., Tensor]
    product: Callable[..., Tensor] | None = None

    def __call__(self, u: Tensor, *args: object, **kwargs: object) -> Tensor:
        if u.dtype in (torch.float16, torch.bfloat16):
            return self.function(u.float(), *args, **kwargs).to(u.dtype)
        return self.function(u, *args, **kwargs)

    def cotangent(self, grad: Tensor, u: Tensor, *args: object, **kwargs: object) -> Tensor:
        """grad * gate(u), conjugate where it is complex, as autograd has it."""
        if self.product is not None:
            return self.product(grad, u, *args, **kwargs)
        gate = self(u, *args, **kwargs)
        return grad * (gate.conj() if gate.is_complex() else gate)


def _over_u(f: Callable[[Tensor], Tensor], u: Tensor, *taylor: float, near: float = NEAR) -> Tensor:
    """f(u)/u for f(0) = 0; `taylor` are the first coefficients of the quotient, to order >= 5.

    Each branch sees only arguments from its own side, so no derivative is 0 * inf.
    """
    small = u.abs() < near
    inner, far = torch.where(small, u, 0.0), torch.where(small, 1.0, u)
    series = torch.full_like(inner, taylor[-1])
    for coefficient in reversed(taylor[:-1]):
        series = series * inner + coefficient
    return torch.where(small, series, f(far) / far)


def _gelu(u: Tensor, approximate: str = "none") -> Tensor:
    """Phi(u), or its tanh approximation, written as a logistic function so that nothing cancels."""
    if approximate == "tanh":
        return torch.sigmoid(math.sqrt(8.0 / math.pi) * u * (1.0 + 0.044715 * u * u))
    if u.dtype == torch.float32 and not torch.is_grad_enabled():
        # f(u)/u is twice as fast; its error in the tail is that of f itself, and 0/0 is at 0 alone
        return F.gelu(u).div_(u).nan_to_num_(0.5)
    return (u * -math.sqrt(0.5)).erfc_().mul_(0.5)


def _gelu_product(grad: Tensor, u: Tensor, approximate: str = "none") -> Tensor:
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or is_batched(grad):
        return grad * gelu(u, approximate)
    if fused.takes_gelu(grad, u):
        return fused.gelu_product(grad, u, approximate == "tanh")
    return gelu(u, approximate).mul_(grad)  # fresh memory costs as much as the product


gelu = Gate(_gelu, _gelu_product)


def _silu(u: Tensor) -> Tensor:
    return torch.sigmoid(u)


def _silu_product(grad: Tensor, u: Tensor) -> Tensor:
    """The slope of softplus."""
    return torch.ops.aten.softplus_backward.default(grad, u, 1.0, 40.0)


silu = Gate(_silu, _silu_product)


@Gate
def mish(u: Tensor) -> Tensor:
    return torch.tanh(F.softplus(u))


@Gate
def hardswish(u: Tensor) -> Tensor:
    return (u + 3.0).clamp(0.0, 6.0) / 6.0


@Gate
def expm1(u: Tensor) -> Tensor:
    return _over_u(torch.expm1, u, 1, 1 / 2, 1 / 6, 1 / 24, 1 / 120, 1 / 720)


@Gate
def exp2(u: Tensor) -> Tensor:
    return math.log(2.0) * expm1(math.log(2.0) * u)


@Gate
def elu(u: Tensor, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Tensor:
    """At the kink u = 0: the slope from below, alpha * scale * input_scale, as in torch."""
    below = torch.where(u > 0, 0.0, u)
    return torch.where(u > 0, scale, alpha * scale * input_scale * expm1(input_scale * below))


@Gate
def celu(u: Tensor, alpha: float = 1.0) -> Tensor:
    return elu(u, alpha, 1.0, 1.0 / alpha)


@Gate
def selu(u: Tensor) -> Tensor:
    return elu(u, 1.6732632423543772848170429916717, 1.0507009873554804934193349852946)


@Gate
def tanh(u: Tensor) -> Tensor:
    return _over_u(torch.tanh, u, 1, 0, -1 / 3, 0, 2 / 15)


@Gate
def sigmoid(u: Tensor) -> Tensor:
    """tanh(u/2) / (2u)."""
    return 0.25 * tanh(0.5 * u)


@Gate
def softplus(u: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    """With x = beta*u: softplus(x) - log 2 = x/2 + log cosh(x/2), used for |x| < 1."""
    x = beta * u
    small = (x.abs() < 1) & (x <= threshold)
    half = torch.where(small, 0.5 * x, 0.0)
    log_cosh = _over_u(
        lambda y: torch.log1p(2 * torch.sinh(0.5 * y) ** 2), half, 0, 1 / 2, 0, -1 / 12, 0, 1 / 45
    )
    far = torch.where(small, 1.0, u)
    origin = math.log(2.0) / beta if threshold >= 0 else 0.0
    direct = (F.softplus(far, beta, threshold) - origin) / far
    return torch.where(small, 0.5 + 0.5 * log_cosh, direct)


@Gate
def log_sigmoid(u: Tensor) -> Tensor:
    """log sigmoid(u) = -softplus(-u), which in float64 is u from -40 down."""
    return softplus(-u, 1, 40)


@Gate
def log1p(u: Tensor) -> Tensor:
    return _over_u(torch.log1p, u, 1, -1 / 2, 1 / 3, -1 / 4, 1 / 5, -1 / 6)


@Gate
def erf(u: Tensor) -> Tensor:
    slope = 2 / math.sqrt(math.pi)
    return _over_u(torch.erf, u, slope, 0, -slope / 3, 0, slope / 10)


@Gate
def erfc(u: Tensor) -> Tensor:
    return -erf(u)


@Gate
def sin(u: Tensor) -> Tensor:
    return _over_u(torch.sin, u, 1, 0, -1 / 6, 0, 1 / 120)


@Gate
def cos(u: Tensor) -> Tensor:
    """cos u - 1 = -2 sin(u/2)^2."""
    return -torch.sin(0.5 * u) * sin(0.5 * u)


@Gate
def tan(u: Tensor) -> Tensor:
    return _over_u(torch.tan, u, 1, 0, 1 / 3, 0, 2 / 15)


@Gate
def sinh(u: Tensor) -> Tensor:
    return _over_u(torch.sinh, u, 1, 0, 1 / 6, 0, 1 / 120)


@Gate
def cosh(u: Tensor) -> Tensor:
    """cosh u - 1 = 2 sinh(u/2)^2."""
    return torch.sinh(0.5 * u) * sinh(0.5 * u)


@Gate
def asinh(u: Tensor) -> Tensor:
    return _over_u(torch.asinh, u, 1, 0, -1 / 6, 0, 3 / 40)


@Gate
def atan(u: Tensor) -> Tensor:
    return _over_u(torch.atan, u, 1, 0, -1 / 3, 0, 1 / 5)


@Gate
def asin(u: Tensor) -> Tensor:
    return _over_u(torch.asin, u, 1, 0, 1 / 6, 0, 3 / 40)


@Gate
def atanh(u: Tensor) -> Tensor:
    return _over_u(torch.atanh, u, 1, 0, 1 / 3, 0, 1 / 5)


@Gate
def acos(u: Tensor) -> Tensor:
    """acos u - pi/2 = -asin u."""
    return -asin(u)


@Gate
def erfinv(u: Tensor) -> Tensor:
    c = math.sqrt(math.pi) / 2
    return _over_u(torch.erfinv, u, c, 0, c**3 / 3, 0, 7 * c**5 / 30)


@Gate
def sinc(u: Tensor) -> Tensor:
    """sinc u - 1, with sinc u = sin(pi u) / (pi u), cancels up to |u| near 0.3: a longer series."""
    odd = ((-1) ** k * math.pi ** (2 * k) / math.factorial(2 * k + 1) for k in range(1, 11))
    taylor = (c for pair in odd for c in (0.0, pair))
    return _over_u(lambda v: torch.sinc(v) - 1, u, *taylor, near=0.3)
