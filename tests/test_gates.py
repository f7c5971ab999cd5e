"""Secant gates against mpmath, at zeros, kinks, tails, in low precision and to second order."""

from __future__ import annotations

import mpmath as mp
import pytest
import torch
from planted import GATES

from fullgrad_theory.operators import Algebra, registered

mp.mp.dps = 60
HALF_PI_ROOT = mp.sqrt(2 / mp.pi)


def elu(u, alpha=1, scale=1, input_scale=1):
    return scale * u if u > 0 else scale * alpha * mp.expm1(input_scale * u)


def hardsigmoid(u):
    return min(max(u + 3, mp.mpf(0)), mp.mpf(6)) / 6


def softplus(u, beta=1, threshold=20):
    return u if beta * u > threshold else mp.log1p(mp.exp(beta * u)) / beta


def gelu(u, approximate="none"):
    if approximate == "tanh":
        return u * (1 + mp.tanh(HALF_PI_ROOT * (u + mp.mpf("0.044715") * u**3))) / 2
    return u * mp.erfc(-u / mp.sqrt(2)) / 2


def sinc(u):
    return mp.sin(mp.pi * u) / (mp.pi * u) if u else mp.mpf(1)


EXACT = {
    "gelu": gelu,
    "silu": lambda u: u / (1 + mp.exp(-u)),
    "mish": lambda u: u * mp.tanh(softplus(u, threshold=mp.inf)),
    "hardswish": lambda u: u * hardsigmoid(u),
    "exp2": lambda u: mp.mpf(2) ** u,
    "elu": elu,
    "celu": lambda u, alpha=1: elu(u, alpha, 1, 1 / mp.mpf(alpha)),
    "selu": lambda u: elu(u, mp.mpf("1.6732632423543772848"), mp.mpf("1.0507009873554804934")),
    "sigmoid": lambda u: 1 / (1 + mp.exp(-u)),
    "special_expit": lambda u: 1 / (1 + mp.exp(-u)),
    "softplus": softplus,
    "log_sigmoid": lambda u: -softplus(-u, threshold=mp.inf),
    "arctan": mp.atan,
    "sinc": sinc,
} | {
    name: getattr(mp, name)
    for name in """exp expm1 tanh log1p erf erfc erfinv sin cos tan sinh cosh asinh atan asin acos
    atanh""".split()
}
KEYWORDS = {
    "gelu": [{"approximate": "tanh"}],
    "elu": [{"alpha": 0.7, "scale": 1.3, "input_scale": 2.0}],
    "celu": [{"alpha": 0.5}],
    "softplus": [{"beta": 2.0, "threshold": 5.0}, {"beta": 0.5}, {"threshold": 0.5}],
}
CASES = [(name, kw) for name in EXACT for kw in [{}, *KEYWORDS.get(name, [])]]
SIZES = [1e-300, 1e-30, 1e-8, 1e-4, 9.99e-4, 1.001e-3, 0.03, 0.29, 0.31, 0.5, 0.99, 1.0, 1.3]
SIZES += [2.9, 3.1, 6.5, 30.0, 1e4]
UNIT = {"erfinv", "asin", "acos", "atanh"}
# each has a kink at 0: the slope from below is the convention
BELOW = {"elu": None, "celu": None, "selu": None}


def points(name: str) -> list[float]:
    sizes = [s for s in SIZES if s < 1] if name in UNIT else SIZES
    signed = [s for size in sizes for s in (size, -size)]
    return [s for s in signed if not (name == "log1p" and s <= -1)]


def secant(name: str, kw: dict, u: float) -> mp.mpf:
    f, x = EXACT[name], mp.mpf(u)
    with mp.workdps(700 if abs(u) < 1e-20 else 60):
        return (f(x, **kw) - f(mp.mpf(0), **kw)) / x


def test_every_elementwise_operation_has_a_gate():
    elementwise = {
        o.name for o in registered() if o.algebra in (Algebra.ZERO_ORIGIN, Algebra.ELEMENTWISE)
    }
    assert elementwise == set(GATES) == {f"aten.{name}.default" for name in EXACT}


@pytest.mark.parametrize(("name", "kw"), CASES)
def test_gate_is_the_secant_to_a_few_ulp(name, kw):
    """Error below 16 ulp of the gate plus the effect of rounding u: |u gate'(u)|."""
    gate = GATES[f"aten.{name}.default"]
    for u in points(name):
        with mp.workdps(60):
            exact = secant(name, kw, u)
            if not mp.isfinite(exact) or abs(exact) > 1e300:
                continue
            got = gate(torch.tensor(u, dtype=torch.float64), **kw).item()
            slope = abs(secant(name, kw, u * (1 + 1e-7)) - exact) / mp.mpf(1e-7)
            error = abs(got - exact)
            assert error <= 16 * 2.3e-16 * (abs(exact) + slope) + 1e-300, (u, got, float(exact))


@pytest.mark.parametrize(("name", "kw"), CASES)
def test_the_limit_at_zero_is_the_derivative(name, kw):
    zero = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    value = getattr(torch.ops.aten, name).default(zero, **kw)
    torch.testing.assert_close(
        GATES[f"aten.{name}.default"](zero, **kw), torch.autograd.grad(value, zero)[0]
    )


@pytest.mark.parametrize(("name", "kw"), CASES)
def test_consistency(name, kw):
    """gate(u) u = f(u) - f(0), with torch's own f."""
    f = getattr(torch.ops.aten, name).default
    u = torch.linspace(-0.9, 0.9, 61, dtype=torch.float64)
    u = u if name in UNIT | {"log1p"} else 9 * u
    expected = f(u, **kw) - f(torch.zeros_like(u), **kw)
    torch.testing.assert_close(GATES[f"aten.{name}.default"](u, **kw) * u, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "kw"), CASES)
def test_low_precision_rounds_once(name, kw, dtype):
    gate = GATES[f"aten.{name}.default"]
    u = torch.tensor([0.0, 1e-7, -1e-7, 1e-3, -0.01, 0.3, -0.7, 0.9]).to(dtype)
    got = gate(u, **kw)
    assert got.dtype == dtype
    assert torch.equal(got, gate(u.float(), **kw).to(dtype))
    exact = gate(u.double(), **kw)
    torch.testing.assert_close(got.double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize(("name", "kw"), CASES)
def test_first_and_second_derivatives_of_the_gate(name, kw):
    """Finite everywhere, 0 and tiny u included; the first by central differences."""
    gate = GATES[f"aten.{name}.default"]
    u = torch.tensor(
        [0.0, 1e-300, -1e-300, 1e-170, 1e-5, -2e-3, 0.2, -0.4, 0.7], dtype=torch.float64
    ).requires_grad_()
    (first,) = torch.autograd.grad(gate(u, **kw).sum(), u, create_graph=True)
    assert first.isfinite().all()
    if first.requires_grad:
        assert torch.autograd.grad(first.sum(), u)[0].isfinite().all()
    with torch.no_grad():
        step = 1e-5
        numeric = (gate(u + step, **kw) - gate(u - step, **kw)) / (2 * step)
        torch.testing.assert_close(first[5:], numeric[5:], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["aten.gelu.default", "aten.silu.default"])
def test_the_limit_at_zero_without_gradients(name):
    """The backward pass itself runs without, and takes another way there."""
    with torch.no_grad():
        for dtype in (torch.float32, torch.float64):
            assert torch.equal(
                GATES[name](torch.zeros(3, dtype=dtype)), torch.full((3,), 0.5).to(dtype)
            )
