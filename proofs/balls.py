"""Ball arithmetic: what a graph's values and tangents are, with a bound on every error.

A ball is a midpoint and a radius that surely contains the number (Arb, by python-flint). The exact
meanings of symbolic.py are evaluated in balls one call at a time, forward: of each value v its
tangent, the edited Jacobians applied to sources and bias leaves. Completeness says that the
output's tangent is the output. No gradient is taken, and no rounding goes unaccounted for.
Comparisons are decided at the middles: a statement is about one region of a piecewise function.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
import sympy as sp
import torch
from flint import arb, ctx
from torch import Tensor, fx

from fullgrad_theory.check.structure import Structure
from fullgrad_theory.operators.algebra import Algebra
from fullgrad_theory.operators.calls import bind, target_name
from fullgrad_theory.testing.sample_calls import Sample
from proofs.symbolic import (
    Array,
    Region,
    as_array,
    bound_arguments,
    from_torch,
    meaning,
    rational,
)

ctx.prec = 128
ZERO, ONE = arb(0), arb(1)
ROUNDING = 2.0**-53
_NAMES = {"Abs": "__abs__", "re": "real"}


@dataclass(frozen=True)
class Dual:
    """A number and its tangent."""

    value: arb
    tangent: arb = field(default_factory=arb)


def dual(expression: Any, at: Mapping[sp.Symbol, Dual], known: dict[Any, Dual]) -> Dual:
    """An expression and its derivative along the tangents; `known` holds what was evaluated."""
    expression = sp.sympify(expression)
    if expression not in known:
        known[expression] = _dual(expression, at, known)
    return known[expression]


def _dual(expression: sp.Expr, at: Mapping[sp.Symbol, Dual], known: dict[Any, Dual]) -> Dual:
    if expression in at:
        return at[expression]
    if expression.is_Rational:
        return Dual(arb(int(expression.p)) / int(expression.q))
    if expression.is_Float:
        return Dual(arb(float(expression)))
    if expression in (sp.pi, sp.E):
        return Dual(arb.pi() if expression is sp.pi else arb.const_e())
    parts = [dual(argument, at, known) for argument in expression.args]
    if not parts or expression.has(sp.I):
        raise LookupError(f"no ball for {expression.func.__name__}")
    if expression.is_Add:
        return Dual(_sum(p.value for p in parts), _sum(p.tangent for p in parts))
    if expression.is_Mul:
        total = Dual(ONE)
        for p in parts:
            total = Dual(total.value * p.value, total.value * p.tangent + total.tangent * p.value)
        return total
    values = [p.value for p in parts]
    slopes = (
        _apply(_slope(expression.func, len(parts), i), values) * p.tangent
        for i, p in enumerate(parts)
        if p.tangent != 0
    )
    if expression.is_Pow and expression.exp.is_Rational:
        n = expression.exp
        slope = (
            _power(values[0], n - 1) * arb(int(n.p)) / int(n.q) if parts[0].tangent != 0 else ZERO
        )
        return Dual(_power(values[0], n), slope * parts[0].tangent)
    return Dual(_function(expression.func, values), _sum(slopes))


def _sum(terms: Iterable[arb]) -> arb:
    return sum(terms, ZERO)


@cache
def _slope(function: Any, count: int, place: int) -> sp.Expr:
    """The derivative of a function in one argument, over symbols z0, z1, ..."""
    symbols = sp.symbols(f"z0:{count}", positive=True)
    return sp.diff(function(*symbols), symbols[place])


def _apply(slope: sp.Expr, values: list[arb]) -> arb:
    symbols = sp.symbols(f"z0:{len(values)}", positive=True)
    return dual(slope, {s: Dual(v) for s, v in zip(symbols, values, strict=True)}, {}).value


def _power(base: arb, exponent: sp.Rational) -> arb:
    if exponent.is_Integer:
        return base ** int(exponent)
    root = base.sqrt() if exponent.q == 2 else base.root(int(exponent.q))
    return root ** int(exponent.p)


def _function(function: Any, values: list[arb]) -> arb:
    if function is sp.Pow:
        return values[0] ** values[1]
    name = _NAMES.get(function.__name__, function.__name__)
    if not hasattr(arb, name):
        raise LookupError(f"no ball for {function.__name__}")
    return getattr(values[0], name)(*values[1:])


# --------------------------------------------------------------------------- one call


@dataclass
class Balls:
    """A tensor: an array of values, and one of tangents."""

    values: Array
    tangents: Array

    def __post_init__(self) -> None:
        """Numpy makes a number of an array without dimensions."""
        self.values = np.asarray(self.values, dtype=object)
        self.tangents = np.asarray(self.tangents, dtype=object)

    @staticmethod
    def of(value: Tensor, spread: float, moves: bool = False) -> Balls:
        """What lies within `spread` of a tensor's numbers, of 1; their own tangents if moving."""
        flat = [arb(x, abs(x) * spread) for x in value.detach().double().ravel().tolist()]
        values = as_array(flat, value.shape)
        return Balls(values, values if moves else as_array([ZERO] * len(flat), value.shape))


class _Arguments:
    """A call's arguments as symbols, and the dual that stands for each."""

    def __init__(self) -> None:
        self.at: dict[sp.Symbol, Dual] = {}
        self.point: dict[sp.Symbol, sp.Expr] = {}

    def symbols(self, given: Balls, factor: arb) -> Array:
        pairs = zip(given.values.ravel(), given.tangents.ravel(), strict=True)
        made = [self.symbol(Dual(value, factor * tangent)) for value, tangent in pairs]
        return as_array(made, given.values.shape)

    def symbol(self, given: Dual) -> sp.Symbol:
        middle = float(given.value.mid())
        sign = {"positive": True} if middle > 0 else {"negative": True} if middle < 0 else {}
        made = sp.Symbol(f"u{len(self.at)}", real=True, **sign)
        self.at[made], self.point[made] = given, rational(middle)
        return made


@dataclass
class Account:
    """The balls of every value of a graph under a plan, from its kernel's steps."""

    spread: float
    values: dict[str, list[Balls]] = field(default_factory=dict)
    gaps: dict[str, arb] = field(default_factory=dict)
    """value -> the largest |tangent - degree * value| for 1 + |value|, of those with a degree"""

    @property
    def worst(self) -> float:
        """A bound on all gaps."""
        return max((float(gap.abs_upper()) for gap in self.gaps.values()), default=0.0)


def account(found: Structure, inputs: tuple[Tensor, ...], spread: float = ROUNDING) -> Account:
    """Every value of a graph and its tangent, for all inputs and parameters within `spread` of
    these, relative to each; by default all that round to them in float64. Raises `LookupError`
    where a call has no exact meaning in balls, or an edit none here (an integral along a ray)."""
    graph, made = found.unfolded, Account(spread)
    numbers = _numbers(graph.fx, inputs)
    sources = {*found.proof.claim["sources"]}
    moving = set[str]()
    for node in graph.fx.graph.nodes:
        moves = any(n.name in moving for n in node.all_input_nodes)
        if node.op == "placeholder" and node.name in sources:
            made.values[node.name] = [Balls.of(numbers[node.name], spread, moves=True)]
            moving.add(node.name)
        elif node.op == "call_function" and moves and _floats(numbers[node.name]):
            made.values[node.name] = _call(found, made, numbers, node)
            moving.add(node.name)
    for value, fact in found.proof.facts.items():
        name, _, k = value.partition("#")
        if value in found.proof.steps:
            made.gaps[value] = _gap(made.values[name][int(k or 0)], fact.degree)
    return made


def off(found: Structure, made: Account) -> list[arb]:
    """Of each element of the outputs, its tangent less its value: 0 where it is complete."""
    balls = [made.values[node.name][0] for node in found.unfolded.outputs]
    return [e for b in balls for e in (b.tangents - b.values).ravel()]


def _gap(balls: Balls, degree: Fraction) -> arb:
    scale = arb(degree.numerator) / degree.denominator
    pairs = zip(balls.tangents.ravel(), balls.values.ravel(), strict=True)
    gaps = [abs(t - scale * v) / (1 + abs(v)) for t, v in pairs]
    return max(gaps, key=lambda g: float(g.abs_upper()), default=ZERO)


def _floats(value: Any) -> bool:
    leaves = value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(v, Tensor) and v.is_floating_point() for v in leaves)


def _numbers(module: fx.GraphModule, inputs: tuple[Tensor, ...]) -> dict[str, Any]:
    """What every node is in float64."""
    seen: dict[str, Any] = {}

    class Keeping(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            seen[n.name] = super().run_node(n)
            return seen[n.name]

    with torch.no_grad():
        Keeping(module).run(*inputs)
    return seen


def _call(
    found: Structure, made: Account, numbers: Mapping[str, Any], node: fx.Node
) -> list[Balls]:
    """The results of one call, with the tangents that its step gives them."""
    whole = {"edit": "", "scale": "1", "operands": {}}
    refused = whole if node.name in found.proof.refused else None
    step = found.proof.steps.get(node.name, refused)
    if step is None:  # it carries nothing
        return _evaluated(_Reading(made.values, numbers, made.spread), node)
    known = found.proof.facts.get(node.name)
    edit, degree = step["edit"], Fraction(1) if known is None else known.degree
    own = [e for e in found.proof.claim["edits"] if e["node"] == node.name and e["edit"] == edit]
    region = own[0].get("region") or () if own else ()
    if edit == "integrate":
        raise LookupError("no tangent of an integral is written down here")
    factors = None if known is None else {a: _ball(f) for a, (_, f) in step["operands"].items()}
    scale = _ball(step["scale"])
    if edit == "secant":
        balls = [_secant(found, made, numbers, node, region, degree)]
    else:
        seen = found.labels.live.calls[node.name]
        biased = {*seen.operator.bias_operands(seen)} if degree == 1 else set[str]()
        reading = _Reading(made.values, numbers, made.spread, factors, biased, edit == "freeze")
        reading.remains = seen.operator.algebra is Algebra.PIECEWISE and degree == 1
        balls = _evaluated(reading, node)
    return [Balls(b.values, scale * b.tangents) for b in balls]


def _ball(text: str) -> arb:
    number = Fraction(text)
    return arb(number.numerator) / number.denominator


@dataclass
class _Reading:
    """How a call reads its operands: the `factors` of those that carry something (None: all do),
    which constants are bias leaves, whether 1/sigma is `frozen`, and what `remains` a bias leaf."""

    values: Mapping[str, list[Balls]]
    numbers: Mapping[str, Any]
    spread: float = ROUNDING
    factors: Mapping[str, arb] | None = field(default_factory=dict)
    biased: set[str] = field(default_factory=set)
    frozen: bool = False
    remains: bool = False

    def argument(self, given: _Arguments, name: str, value: Any) -> Any:
        """An argument as symbols where it is a float, else as it is."""
        if isinstance(value, (list, tuple)):
            return [self.argument(given, f"{name}[{i}]", v) for i, v in enumerate(value)]
        if isinstance(value, fx.Node):
            if value.name in self.values:
                return self._moving(given, name, value)
            value = self.numbers[value.name]
        if isinstance(value, Tensor) and value.is_floating_point():
            constant = Balls.of(value, self.spread, moves=name in self.biased)
            return given.symbols(constant, ONE)
        if isinstance(value, (int, float)) and name in self.biased and value:
            return given.symbol(Dual(arb(value), arb(value)))
        return from_torch(value) if isinstance(value, Tensor) else value

    def _moving(self, given: _Arguments, name: str, value: fx.Node) -> Any:
        factor = ONE if self.factors is None else self.factors.get(name, ZERO)
        made = [given.symbols(b, factor) for b in self.values[value.name]]
        return tuple(made) if isinstance(self.numbers[value.name], (list, tuple)) else made[0]


def enclosed(name: str, sample: Sample) -> list[Balls]:
    """The results of an operation on a sample; raises `LookupError` where no ball is written."""
    return _results(_Reading({}, {}), name, bound_arguments(name, sample))


def _evaluated(reading: _Reading, node: fx.Node) -> list[Balls]:
    return _results(reading, target_name(node.target), bind(node))


def _results(reading: _Reading, name: str, bound: Mapping[str, Any]) -> list[Balls]:
    """A call's results, from its exact meaning."""
    if not name.startswith(("aten.", "getitem")):
        raise LookupError(f"{name} is no operation of torch")
    given = _Arguments()
    arguments = {n: reading.argument(given, n, v) for n, v in bound.items()}
    at = Region(given.point, freeze=reading.frozen)
    result = meaning(name)(at, arguments)
    known: dict[Any, Dual] = {}
    for symbol, expression in at.held.items():
        known[symbol] = Dual(dual(expression, given.at, known).value)
    made = []
    for output in result if isinstance(result, (list, tuple)) else [result]:
        flat = [dual(e, given.at, known) for e in np.ravel(output)]
        if reading.remains:
            slopes = {s: Dual(d.value, d.value) for s, d in given.at.items()}
            rest = [
                d.value - dual(e, slopes, {}).tangent
                for d, e in zip(flat, np.ravel(output), strict=True)
            ]
            flat = [Dual(d.value, d.tangent + r) for d, r in zip(flat, rest, strict=True)]
        shape = np.shape(output)
        made.append(
            Balls(
                as_array([d.value for d in flat], shape), as_array([d.tangent for d in flat], shape)
            )
        )
    return made


def _secant(
    found: Structure,
    made: Account,
    numbers: Mapping[str, Any],
    node: fx.Node,
    region: Iterable[str],
    degree: Fraction,
) -> Balls:
    """(f(u) - f(0))/u of the tangent, and f(0), of a pointwise call or of a region of such."""
    inside = [n for n in found.unfolded.nodes.values() if n.name in (*region, node.name)]
    read = [n for m in inside for n in m.all_input_nodes if n not in inside]
    (entry,) = dict.fromkeys(n for n in read if n.name in made.values)
    (u,) = made.values[entry.name]
    origin = {**made.values, entry.name: [Balls(u.values * ZERO, u.tangents * ZERO)]}
    plain = dict(made.values)
    for n in inside:
        origin[n.name] = _evaluated(_Reading(origin, numbers, made.spread), n)
        plain[n.name] = _evaluated(_Reading(plain, numbers, made.spread), n)
    start, value = origin[node.name][0].values, plain[node.name][0].values
    if any(e.contains(0) for e in u.values.ravel()):
        raise LookupError("a secant at 0 is a derivative, which is not written down here")
    constant = start if degree == 1 else start * ZERO
    return Balls(value, (value - start) / u.values * u.tangents + constant)
