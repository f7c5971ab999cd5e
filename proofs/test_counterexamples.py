"""Why the theory says what it says: each case breaks a plausible but weaker rule."""

from __future__ import annotations

import sympy as sp

x = sp.Symbol("x", real=True)


def test_one_parameter_can_be_coefficient_and_bias() -> None:
    """w x + w: with both uses of w as one leaf the sum is f + w x; edge by edge it is f."""
    w = sp.Symbol("w", real=True)
    f = w * x + w
    point = {x: sp.Rational(9, 7), w: sp.Rational(7, 10)}
    by_parameter = x * sp.diff(f, x) + w * sp.diff(f, w)
    assert f.subs(point) == sp.Rational(8, 5) and by_parameter.subs(point) == sp.Rational(5, 2)
    coefficient, leaf = sp.symbols("a b", real=True)
    lifted = coefficient * x + leaf
    assert sp.expand(x * sp.diff(lifted, x) + leaf * sp.diff(lifted, leaf) - lifted) == 0


def test_a_frozen_step_is_not_constant() -> None:
    """x + 5 (x > 0): complete nowhere but at x < 0, and no constant bias mends both sides."""
    bias = sp.Symbol("b")
    above, below = x + 5, x
    errors = [f - (x * sp.diff(f, x) + bias) for f in (above, below)]
    assert errors == [5 - bias, -bias]
    assert sp.solve(errors, bias) == []


def test_a_pruned_softmax_on_the_stream_is_opaque() -> None:
    """x + softmax(x) with the softmax pruned: the error is the softmax, which depends on x."""
    y = sp.Symbol("y", real=True)
    frozen = sp.exp(x) / (sp.exp(x) + sp.exp(y))
    held = sp.Symbol("s")
    carried = x * sp.diff(x + held, x)
    error = sp.simplify((x + held - carried).subs(held, frozen))
    assert error == sp.simplify(frozen) and sp.diff(error, x) != 0
    # a frozen factor is harmless: x (1 + s)
    assert sp.expand(x * sp.diff(x * (1 + held), x) - x * (1 + held)) == 0


def test_freezing_the_mean_as_well_is_wrong() -> None:
    """Layer norm at mean 3, sigma 5/6: the mean frozen too, J~ x misses v by mean/sigma = 3.6."""
    values, ones = sp.Matrix([3 - sp.Rational(5, 6), 3 + sp.Rational(5, 6)]), sp.ones(2, 1)
    mean = sum(values) / 2
    sigma = sp.sqrt(sum((v - mean) ** 2 for v in values) / 2)
    normed = (values - ones * mean) / sigma
    frozen_mean = values / sigma - normed  # J~ = 1/sigma
    assert mean == 3 and frozen_mean == ones * sp.Rational(18, 5)
    linear = (sp.eye(2) - ones * ones.T / 2) * values / sigma  # J~ = (I - 1 1^T / n)/sigma
    assert linear == normed


def test_a_formally_perfect_plan_may_explain_nothing() -> None:
    """exp(|x|^2) (1 + 1e-9 x): with exp pruned the plan is complete, the input's share tiny."""
    gate, tiny = sp.Symbol("g", positive=True), sp.Rational(1, 10**9)
    one = sp.Symbol("b")
    f = gate * (one + tiny * x)
    assert sp.expand(x * sp.diff(f, x) + one * sp.diff(f, one) - f) == 0
    share = sp.simplify((x * sp.diff(f, x) / f).subs(one, 1))
    assert share.subs(x, sp.Rational(2, 5)) < sp.Rational(4, 10**10)


def test_eps_as_a_bias_leaf_credits_it_with_everything() -> None:
    """x / (|x| + eps), eps taken for a bias leaf of degree 1: the relation holds (1 - 1 = 0), but
    the true Jacobians then credit eps with -eps/(|x| + eps) of the output: -99 % for tiny x."""
    eps, u = sp.symbols("eps u", positive=True)
    f = u / (u + eps)
    shares = [sp.simplify(s * sp.diff(f, s) / f) for s in (u, eps)]
    assert sp.simplify(sum(shares)) == 0
    assert sp.simplify(shares[1] + eps / (u + eps)) == 0
    assert shares[1].subs({u: 1, eps: 99}) == sp.Rational(-99, 100)
    # held in the frozen denominator it takes nothing, and the input all
    s = sp.Symbol("s", positive=True)
    assert sp.expand(u * sp.diff(u * s, u) - u * s) == 0


def test_mixed_powers_need_a_scale_each_before_the_sum() -> None:
    """x + x^2/2 - x^3/5: no scale behind the sum works, one a term (1, 1/2, 1/3) does."""
    terms = (x, x**2 / 2, -(x**3) / 5)
    f = sum(terms)
    factor = sp.Symbol("a")
    wrong = sp.Poly(sp.expand(factor * x * sp.diff(f, x) - f), x)
    assert sp.solve(wrong.coeffs(), factor) == []
    scaled = sum(x * sp.diff(t, x) / k for k, t in enumerate(terms, start=1))
    assert sp.expand(scaled - f) == 0
