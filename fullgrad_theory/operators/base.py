"""What an operation is: an algebraic class, and how its output's degree follows from its operands'.

A value v has degree d when v(t * leaves) = t^d v(leaves) near t = 1. An operation tells the degree
of its output by a *signature*: a sum of monomials in its schema's argument names, for instance
`input*weight + bias` for linear or `self/other` for div. Everything the degree analysis, the
derivation and the check need follows from the class and that one line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from fractions import Fraction
from typing import Any

import torch
from torch import fx


class Algebra(StrEnum):
    """The algebraic classes; each brings its lemma (see `LEMMAS`), degree relation and edits."""

    STRUCTURAL = "structural"
    AFFINE = "affine"
    MULTILINEAR = "multilinear"
    HOMOGENEOUS = "homogeneous"
    ZERO_ORIGIN = "zero-origin elementwise"
    ELEMENTWISE = "elementwise"
    NORMALISER = "normaliser"
    ATTENTION = "attention"
    SMOOTH = "smooth"
    SINGULAR = "singular"
    FREEZING = "freezing"
    FACTORY = "factory"


LEMMAS: Mapping[Algebra, str] = {
    Algebra.STRUCTURAL: "linear without a bias: J u = v",
    Algebra.AFFINE: "affine: J u + J_b b = v when operand and bias have degree 1",
    Algebra.MULTILINEAR: "Euler: the degree of a product is the sum of its factors' degrees",
    Algebra.HOMOGENEOUS: "Euler: v(t u) = t^k v(u) gives J u = k v",
    Algebra.ZERO_ORIGIN: "secant from 0 with f(0) = 0: J~ u = f(u)",
    Algebra.ELEMENTWISE: "secant from 0: J~ u + f(0) = f(u), f(0) a bias leaf",
    Algebra.NORMALISER: "1/sigma frozen, centring linear: J~ u + bias = v",
    Algebra.ATTENTION: "weights frozen, or integrated along the ray from 0: J~ u = output",
    Algebra.SMOOTH: "integral of J along the ray from 0: J~ u + f(0) = f(u), f(0) a bias leaf",
    Algebra.SINGULAR: "of degree 0 where every operand is of degree 0; its ray from 0 is broken",
    Algebra.FREEZING: "carries no gradient: degree 0",
    Algebra.FACTORY: "independent of every live value",
}


@dataclass(frozen=True)
class Operand:
    """One argument position of a call: `weight`, or `tensors[1]` inside a list argument."""

    name: str
    node: fx.Node | None
    literal: float | None = None


@dataclass(frozen=True)
class Term:
    """A monomial: argument names with rational exponents, `self * other^-1`."""

    factors: tuple[tuple[str, Fraction], ...]


@dataclass(frozen=True)
class Relation:
    """When one output is consistent, and with which degree.

    Every entry of `terms` is a sum of operand degrees with coefficients; all of them must agree and
    are the output's degree d. Operands in `zero` must be seen at degree 0. `domain`, where given,
    restricts d: {0, 1} where a constant is added, {1} where f(0) != 0 becomes a bias leaf.
    Operands in `ray` move with those of `terms` along the ray from 0: where they are live their
    degree is d as well; where they are pruned or frozen they are held fixed.
    """

    terms: tuple[tuple[tuple[str, Fraction], ...], ...] = ()
    zero: tuple[str, ...] = ()
    domain: tuple[int, ...] | None = None
    frozen: bool = False
    ray: tuple[str, ...] = ()


@dataclass(frozen=True)
class Mode:
    """One way a node may be consistent: unedited (`edit` None), or under an edit of its own."""

    edit: str | None
    outputs: tuple[Relation, ...]


@dataclass(frozen=True)
class Call:
    """An operation as it stands in a graph: its operands, and which of them are live or frozen."""

    operator: Operator
    operands: tuple[Operand, ...]
    arguments: Mapping[str, Any]
    moving: frozenset[str]
    """names of the operands that depend on the input, live or frozen"""
    eps: bool = False
    """a literal added here only ever reaches a divisor, so it belongs to the frozen denominator"""


@dataclass(frozen=True)
class Operator:
    """A registry entry. `signature`: the degree rule; outputs are separated by `;`, `-` is frozen.

    Arguments in no monomial (indices, masks) must be seen at degree 0; one that lends nothing but
    its shape or dtype stands with exponent 0 (`self*other^0`).

    `origin` is f(0) of an elementwise operation. `vanishes` is the operand at whose 0 a smooth
    operation is 0, whatever the others are. `refuses` returns a reason to refuse a call
    (training-mode batch norm). `edits` are the names of the edits its class allows.
    """

    name: str
    algebra: Algebra
    signature: str = "self"
    origin: float = 0.0
    refuses: Callable[[Mapping[str, Any]], str | None] | None = None
    note: str = ""
    vanishes: str = ""

    def modes(self, call: Call) -> tuple[Mode, ...]:
        """The ways this call can be consistent, unedited first."""
        return _MODES.get(self.algebra, _polynomial)(self, call)

    @property
    def shapes(self) -> frozenset[str]:
        """Arguments of a structural operation that lend nothing but their shape or dtype."""
        if self.algebra is not Algebra.STRUCTURAL:
            return frozenset()
        return frozenset(re.findall(r"(\w+)\^0\b", self.signature))

    @property
    def edits(self) -> tuple[str, ...]:
        """Which node edits the class knows, besides `prune` and `scale`."""
        return _EDITS.get(self.algebra, ())


_EDITS: Mapping[Algebra, tuple[str, ...]] = {
    Algebra.ZERO_ORIGIN: ("secant",),
    Algebra.ELEMENTWISE: ("secant",),
    Algebra.NORMALISER: ("freeze",),
    Algebra.ATTENTION: ("integrate",),
    Algebra.SMOOTH: ("integrate",),
}


# --------------------------------------------------------------------------- signatures


def parse_signature(signature: str) -> tuple[tuple[str, ...], ...]:
    """`'self*weight + bias ; -'` -> per output, the monomials as text."""
    return tuple(
        tuple(term.strip() for term in output.split("+") if term.strip())
        for output in signature.split(";")
    )


_FACTOR = re.compile(r"(?P<op>[*/]?)\s*(?P<name>[A-Za-z_]\w*)\s*(?:\^\s*(?P<exp>[-\w./]+))?")


def _exponent(text: str | None, arguments: Mapping[str, Any]) -> Fraction | None:
    """A literal exponent, or the value of the scalar argument it names; None if not a rational."""
    if text is None:
        return Fraction(1)
    value: Any = arguments.get(text, text) if text[0].isalpha() else text
    try:
        fraction = Fraction(value).limit_denominator(24)
    except (TypeError, ValueError):
        return None
    return fraction if abs(float(fraction) - float(Fraction(value))) < 1e-9 else None


def _term(text: str, call: Call, skip_zero: bool) -> list[list[tuple[str, Fraction]] | None]:
    """The monomials `text` stands for in this call: a list argument is a sum, `*list` a product.

    A monomial over arguments that are absent, or a literal zero, is no term; one whose exponent is
    no rational number is None.
    """
    product: list[tuple[str, Fraction]] = []
    by_name = {o.name: o for o in call.operands}
    spread: list[list[tuple[str, Fraction]] | None] = []
    for match in _FACTOR.finditer(text):
        name, sign = match["name"], -1 if match["op"] == "/" else 1
        elements = [o for o in call.operands if o.name.startswith(name + "[")]
        if elements and match["op"] == "*":
            product += [(o.name, Fraction(1)) for o in elements]
        elif elements:
            spread += [[(o.name, Fraction(1))] for o in elements]
        elif name not in by_name:
            if call.arguments.get(name) is None and match.start() == 0:
                return []  # an optional argument left out: the whole term is absent
        else:
            exponent = _exponent(match["exp"], call.arguments)
            if exponent is None:
                return [None]
            if skip_zero and by_name[name].literal == 0.0 and by_name[name].node is None:
                return []
            product.append((name, sign * exponent))
    return [product] if product else spread


def polynomial(signature: str, call: Call) -> tuple[Relation, ...] | None:
    """The relations of a signature for this call; None where an exponent has no degree."""
    relations = []
    mentioned: set[str] = set()
    for output in parse_signature(signature):
        if output == ("-",):
            relations.append(Relation(frozen=True))
            continue
        terms: list[tuple[tuple[str, Fraction], ...]] = []
        constant = False
        for text in output:
            for factors in _term(text, call, skip_zero=True):
                if factors is None:
                    return None
                mentioned |= {name for name, _ in factors}
                moving = tuple((n, e) for n, e in factors if n in call.moving and e != 0)
                if moving or any(n in call.moving for n, _ in factors):
                    terms.append(moving)  # a product of moving values to the 0: degree 0
                elif factors:
                    constant = True
        domain = ((0,) if call.eps else (0, 1)) if constant else None
        relations.append(Relation(tuple(dict.fromkeys(terms)), domain=domain))
    selectors = tuple(sorted(call.moving - mentioned))
    return tuple(r if r.frozen else Relation(r.terms, selectors, r.domain) for r in relations)


def bias_operands(call: Call) -> tuple[str, ...]:
    """The leading operand of each constant monomial: a bias leaf where the output's degree is 1."""
    names: list[str] = []
    for output in parse_signature(call.operator.signature):
        for text in output if output != ("-",) else ():
            for factors in _term(text, call, skip_zero=True):
                if factors and not any(name in call.moving for name, _ in factors):
                    # a norm is linear in its weight, and not in a constant input
                    last = call.operator.algebra is Algebra.NORMALISER
                    names.append(factors[-1 if last else 0][0])
    return tuple(dict.fromkeys(names))


# --------------------------------------------------------------------------- modes by class


def _none(call: Call) -> Mode:
    """Consistent only where everything it sees is of degree 0."""
    return Mode(None, (Relation(zero=tuple(sorted(call.moving))),))


def _polynomial(op: Operator, call: Call) -> tuple[Mode, ...]:
    relations = polynomial(op.signature, call)
    return (_none(call),) if relations is None else (Mode(None, relations),)


def _elementwise(op: Operator, call: Call) -> tuple[Mode, ...]:
    operand = next(iter(sorted(call.moving)))
    domain = (1,) if op.origin else None
    secant = Relation((((operand, Fraction(1)),),), domain=domain)
    return (_none(call), Mode("secant", (secant,)))


def _normaliser(op: Operator, call: Call) -> tuple[Mode, ...]:
    frozen = polynomial(op.signature, call)
    # linear in its weight where 1/sigma is of degree 0: that is where the input is, or, with
    # eps = 0 and exactly scale-invariant, wherever it is
    plain = polynomial(op.signature.replace("input", "input^0"), call)
    if frozen is None or plain is None:
        return (_none(call),)
    if "input" not in call.moving:  # 1/sigma is constant
        weighted = any(o.name == "weight" for o in call.operands)
        return (Mode(None, frozen),) if weighted else (_none(call), Mode("freeze", frozen))
    eps = call.arguments.get("eps", 1.0)
    if eps is None or eps > 0:
        plain = tuple(replace(r, zero=(*r.zero, "input")) for r in plain)
    return Mode(None, plain), Mode("freeze", frozen)


def _attention(op: Operator, call: Call) -> tuple[Mode, ...]:
    weights = tuple(sorted(call.moving & {"query", "key", "attn_mask"}))
    values = ((("value", Fraction(1)),),) if "value" in call.moving else ()
    plain = Mode(None, (Relation(values, weights),))
    mask = call.moving & {"attn_mask"}  # restricts the domain: held fixed
    if mask and not values:
        return (plain,)  # and then what is left at 0 would depend on it
    along = _integrated(op, call, call.moving - mask)
    return plain, Mode("integrate", (replace(along, zero=tuple(mask)),))


def _freezing(op: Operator, call: Call) -> tuple[Mode, ...]:
    return (Mode(None, (Relation(frozen=True),)),)


def _integrated(op: Operator, call: Call, moving: Collection[str]) -> Relation:
    """The relation of J~ = integral of J(t u) over t from 0 to 1, u the operands in `moving`.

    It needs an f(0) that does not depend on the input. Either every moving operand goes to 0, all
    of them live and of one degree: then f(0) is a constant, a bias leaf, and the degree is 1. Or
    the operand `vanishes` goes to 0, and the value with it whatever the others are: these may be
    held fixed, where pruned or frozen, and any degree will do, as for a secant with f(0) = 0.
    """
    if op.vanishes in moving:
        others = tuple(sorted({*moving} - {op.vanishes}))
        return Relation((((op.vanishes, Fraction(1)),),), ray=others)
    return Relation(tuple(((name, Fraction(1)),) for name in sorted(moving)), domain=(1,))


def _smooth(op: Operator, call: Call) -> tuple[Mode, ...]:
    return _none(call), Mode("integrate", (_integrated(op, call, call.moving),))


def _singular(op: Operator, call: Call) -> tuple[Mode, ...]:
    return (_none(call),)


_MODES: Mapping[Algebra, Callable[[Operator, Call], tuple[Mode, ...]]] = {
    Algebra.ZERO_ORIGIN: _elementwise,
    Algebra.ELEMENTWISE: _elementwise,
    Algebra.NORMALISER: _normaliser,
    Algebra.ATTENTION: _attention,
    Algebra.SMOOTH: _smooth,
    Algebra.SINGULAR: _singular,
    Algebra.FREEZING: _freezing,
}


# --------------------------------------------------------------------------- calls


def bind(node: fx.Node) -> dict[str, Any]:
    """A call's arguments by their schema names; an operation without a schema gets `arg0`, ...

    Arguments left out are present with their schema default.
    """
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        names = (
            ["self", "index"] if len(node.args) == 2 else [f"arg{i}" for i in range(len(node.args))]
        )
        return dict(zip(names, node.args, strict=True)) | dict(node.kwargs)
    bound: dict[str, Any] = {}
    for position, argument in enumerate(schema.arguments):
        if position < len(node.args):
            bound[argument.name] = node.args[position]
        elif argument.name in node.kwargs:
            bound[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            bound[argument.name] = argument.default_value
    return bound


def operands(arguments: Mapping[str, Any]) -> Iterator[Operand]:
    """Every node and number among the arguments, one `Operand` an argument position."""
    for name, value in arguments.items():
        if isinstance(value, (list, tuple)):
            for index, element in enumerate(value):
                if isinstance(element, fx.Node):
                    yield Operand(f"{name}[{index}]", element)
        elif isinstance(value, fx.Node):
            yield Operand(name, value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield Operand(name, None, float(value))


def target_name(target: Any) -> str:
    """`'aten.gelu.default'` for an overload; the qualified name for a Python function."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    module = getattr(target, "__module__", "") or ""
    name = getattr(target, "__name__", str(target))
    return name if module in ("_operator", "builtins", "operator", "") else f"{module}.{name}"
