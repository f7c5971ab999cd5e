"""The class lemmas, each in general, proved by sympy.

A lemma says that the (edited) Jacobian carries `value` into `degree * value`:
sum_i d_i J~_i u_i + sum_b J~_b b = d v. Every proof below reduces the difference to exactly 0.
"""

from __future__ import annotations

import pytest
import sympy as sp

d, e, k = sp.symbols("d e k", real=True)
t = sp.Symbol("t", positive=True)
u = sp.Symbol("u", real=True, nonzero=True)
v = sp.Symbol("v", real=True, nonzero=True)


def zero(expression: sp.Expr) -> bool:
    return sp.simplify(expression) == 0


def euler(value: sp.Expr, degrees: dict[sp.Symbol, sp.Expr]) -> sp.Expr:
    """sum_i d_i (dv/du_i) u_i."""
    return sum((w * s * sp.diff(value, s) for s, w in degrees.items()), sp.S.Zero)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_euler(n: int) -> None:
    """f(t u) = t^k f(u) for t near 1 implies J u = k f(u).

    Every such f is, away from u_1 = 0, u_1^k g(u_2/u_1, ...) with g arbitrary (t = 1/u_1): prove it
    for an undefined g. Then for the definition itself: d/dt at t = 1 of both sides.
    """
    x = sp.symbols(f"x1:{n + 1}", positive=True)
    g = sp.Function("g")(*(x[i] / x[0] for i in range(1, n))) if n > 1 else sp.Symbol("c")
    f = x[0] ** k * g
    assert zero(euler(f, dict.fromkeys(x, sp.S.One)).doit() - k * f)
    assert sp.diff(t**k * sp.Symbol("f"), t).subs(t, 1) == k * sp.Symbol("f")


def test_sum() -> None:
    """Operands of equal degree d add to degree d; a constant beside them is a leaf where d = 1 and
    a coefficient where d = 0, and breaks the relation at every other degree."""
    b = sp.Symbol("b", nonzero=True)
    assert zero(euler(u + v, {u: d, v: d}) - d * (u + v))
    total = u + b
    assert zero(euler(total, {u: 1, b: 1}) - total)
    assert euler(total, {u: 0, b: 0}) == 0
    assert sp.solve(euler(total, {u: d, b: 1}) - d * total, d) == [1]
    assert sp.solve(euler(total, {u: d, b: 0}) - d * total, d) == [0]


def test_product_quotient_power() -> None:
    """Degrees add in products, subtract in quotients, multiply in powers."""
    positive = sp.Symbol("p", positive=True)
    assert zero(euler(u * v, {u: d, v: e}) - (d + e) * u * v)
    assert zero(euler(u / v, {u: d, v: e}) - (d - e) * u / v)
    assert zero(euler(positive**k, {positive: d}) - k * d * positive**k)


def test_functions_of_degree_zero_values() -> None:
    """Any function of values of degree 0 has degree 0: all tangents are 0, whatever J is."""
    f = sp.Function("f")(u, v)
    assert euler(f, {u: 0, v: 0}) == 0


def test_chain() -> None:
    """A homogeneous function of degree k after values of degree d has degree k d."""
    x, y = sp.symbols("x y", positive=True)
    f = x**k * sp.Function("g")(y / x)
    assert zero(euler(f, {x: d, y: d}).doit() - k * d * f)


def test_secant() -> None:
    """J~ = (f(u) - f(0))/u: J~ u + f(0) = f(u); with f(0) = 0 it keeps any degree."""
    f, origin = sp.Function("f")(u), sp.Function("f")(0)
    slope = (f - origin) / u
    assert zero(slope * u + origin - f)
    assert zero((d * slope * u - d * f).subs(origin, 0))
    # with f(0) != 0 the relation forces d = 1 (d = 0 is the unedited mode)
    rest = sp.Symbol("d") * slope * u + origin - sp.Symbol("d") * f
    assert sp.solve(sp.expand(rest), sp.Symbol("d")) == [1]


def test_secant_at_zero_is_the_derivative() -> None:
    """The limit of the secant at u = 0 is f'(0)."""
    x = sp.Symbol("x", real=True)
    for f in (sp.tanh(x), x / (1 + sp.exp(-x)), sp.exp(x), x * (1 + sp.erf(x / sp.sqrt(2))) / 2):
        assert zero(sp.limit((f - f.subs(x, 0)) / x, x, 0) - sp.diff(f, x).subs(x, 0))


def test_secant_as_a_mean_of_derivatives() -> None:
    """The secant is the integral of f' along the ray from 0: local integrated gradients."""
    x, s = sp.symbols("x s", positive=True)
    for f in (sp.sinh, sp.exp, lambda z: z**3 + z):
        slope = sp.integrate(sp.diff(f(x), x).subs(x, s * x), (s, 0, 1))
        assert zero(slope * x - (f(x) - f(sp.S.Zero)))


@pytest.mark.parametrize("centred", [True, False])
def test_frozen_scale_norm(centred: bool) -> None:
    """Layer norm (n = 3) with 1/sigma frozen and the centring linear: J~ u + bias = v."""
    n = 3
    x, w, b = (sp.Matrix(sp.symbols(f"{c}1:{n + 1}", real=True)) for c in "xwb")
    inverse = sp.Symbol("s", positive=True)  # 1/sigma, held fixed whatever it is
    mean = sum(x) / sp.Integer(n) if centred else sp.S.Zero
    value = (x - mean * sp.ones(n, 1)).multiply_elementwise(w) * inverse + b
    assert sp.simplify(value.jacobian(x) * x + b - value) == sp.zeros(n, 1)
    without = value - b
    assert sp.simplify(d * without.jacobian(x) * x - d * without) == sp.zeros(n, 1)


def test_norm_without_eps_has_degree_zero() -> None:
    """x / |x| and layer norm without eps: J x = 0, so degree 0 at any degree of x."""
    x = sp.Matrix(sp.symbols("x1:4", real=True))
    unit = x / sp.sqrt((x.T * x)[0])
    assert sp.simplify(unit.jacobian(x) * x) == sp.zeros(3, 1)
    centred = x - sp.ones(3, 1) * sum(x) / 3
    whitened = centred / sp.sqrt((centred.T * centred)[0] / 3)
    assert sp.simplify(whitened.jacobian(x) * x) == sp.zeros(3, 1)


def test_norm_with_eps_has_no_degree() -> None:
    """With eps > 0 no degree fits: J x / v = eps / (x^2 + eps), which depends on x."""
    x, eps = sp.symbols("x eps", positive=True)
    value = x / sp.sqrt(x**2 + eps)
    assert zero(euler(value, {x: 1}) / value - eps / (x**2 + eps))


def test_attention_with_frozen_weights() -> None:
    """sdpa with q, k, mask seen at degree 0 is linear in the values: J~ v = output, any degree."""
    q, key, value = (sp.Matrix(2, 2, sp.symbols(f"{c}1:5", real=True)) for c in ("q", "k", "v"))
    scores = (q * key.T / sp.sqrt(2)).applyfunc(sp.exp)
    weights = sp.Matrix(2, 2, lambda i, j: scores[i, j] / sum(scores[i, :]))
    output = weights * value
    flat = sp.Matrix(list(output))
    operand = sp.Matrix(list(value))
    assert sp.simplify(d * flat.jacobian(operand) * operand - d * flat) == sp.zeros(4, 1)


def test_local_integrated_gradients() -> None:
    """Background: the integral along the ray from 0, times u, is f(u) - f(0); for a function of
    degree k > 0 that is Euler's J u / k, which is why Scale(1/k) is a closed form of it."""
    s = sp.Symbol("s", positive=True)
    x, y = sp.symbols("x y", positive=True)
    for f, degree in ((x * y, 2), (x**3 + x * y**2, 3), (sp.sqrt(x * y), 1)):
        ray = {x: s * x, y: s * y}
        slopes = [sp.diff(f, z).subs(ray, simultaneous=True) for z in (x, y)]
        integrals = [sp.integrate(sp.powsimp(sp.expand(g)), (s, 0, 1)) for g in slopes]
        assert zero(sum(g * z for g, z in zip(integrals, (x, y), strict=True)) - f)
        for g, z in zip(integrals, (x, y), strict=True):
            assert zero(g - sp.diff(f, z) / degree)
