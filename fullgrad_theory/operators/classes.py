"""The algebraic classes: what each brings to its operations, so that most entries are one line.

A class knows its lemma, the ways in which a call can be consistent, the edits of its own, how bias
leaves contribute, and what an entry of it has to say for itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING

from .algebra import Algebra
from .calls import Call
from .readers import Reader, at_origin, at_zero, intercepts, selected
from .relations import Mode, Relation, polynomial, signature_names

if TYPE_CHECKING:
    from .record import Operator

Modes = Callable[["Operator", Call], tuple[Mode, ...]]


@dataclass(frozen=True)
class Class:
    """What an algebraic class brings.

    `why`: what is wrong with an operand of a degree other than 0, for a reader. `reader`: how bias
    leaves contribute, None where each output has an f(0) of its own. `lacks`: what an entry of this
    class leaves out that it must have, as the words to write, or None. `ruled`: whether degrees
    follow from the signature.
    """

    lemma: str
    modes: Modes
    edits: tuple[str, ...] = ()
    why: str = "it has no degree in"
    reader: Reader | None = at_zero
    lacks: Callable[[Operator], str | None] = lambda operator: None

    @property
    def ruled(self) -> bool:
        return self.modes in (_polynomial, _normaliser)


# --------------------------------------------------------------------------- modes


def _none(call: Call) -> Mode:
    """Consistent only where everything it sees is of degree 0."""
    return Mode(None, (Relation(zero=tuple(sorted(call.moving))),))


def _polynomial(op: Operator, call: Call) -> tuple[Mode, ...]:
    relations = polynomial(op.signature, call)
    return (_none(call),) if relations is None else (Mode(None, relations),)


def _piecewise(op: Operator, call: Call) -> tuple[Mode, ...]:
    (operand,) = call.moving
    return (Mode(None, (Relation((((operand, Fraction(1)),),), domain=(0, 1)),)),)


def _elementwise(op: Operator, call: Call) -> tuple[Mode, ...]:
    operand = next(iter(sorted(call.moving)))
    domain = (1,) if op.origin else None
    secant = Relation((((operand, Fraction(1)),),), domain=domain)
    return (_none(call), Mode("secant", (secant,)))


def _normaliser(op: Operator, call: Call) -> tuple[Mode, ...]:
    frozen = polynomial(op.signature, call)
    # linear in its weight where 1/sigma is of degree 0: that is where the input is, or, with
    # eps = 0 and exactly scale-invariant, wherever it is
    plain = polynomial(re.sub(rf"\b{op.normalised}\b", f"{op.normalised}^0", op.signature), call)
    if frozen is None or plain is None:
        return (_none(call),)
    if op.normalised not in call.moving:  # 1/sigma is constant
        weights = {*signature_names(op.signature.partition("+")[0])} - {op.normalised}
        weighted = any(o.name in weights for o in call.operands)
        return (Mode(None, frozen),) if weighted else (_none(call), Mode("freeze", frozen))
    eps = call.arguments.get(op.eps, 1.0)
    if eps != 0:  # None: the least that the dtype knows
        plain = tuple(replace(r, zero=(*r.zero, op.normalised)) for r in plain)
    return Mode(None, plain), Mode("freeze", frozen)


def _attention(op: Operator, call: Call) -> tuple[Mode, ...]:
    weights = tuple(sorted(call.moving - {op.vanishes}))
    values = (((op.vanishes, Fraction(1)),),) if op.vanishes in call.moving else ()
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


# --------------------------------------------------------------------------- what an entry must say


def _lacks_origin(op: Operator) -> str | None:
    if op.origin:
        return None
    return "origin=f(0), which is a bias leaf; where f(0) = 0 its class is Algebra.ZERO_ORIGIN"


def _lacks_no_origin(op: Operator) -> str | None:
    if not op.origin:
        return None
    return f"no origin: f(0) = {op.origin:g} is a bias leaf, its class is Algebra.ELEMENTWISE"


def _lacks_frozen(op: Operator) -> str | None:
    if op.frozen is not None:
        return None
    return (
        "frozen=, a function of the same arguments that computes the same with 1/sigma detached: "
        "frozen=lambda x, weight: x * x.square().mean(-1, keepdim=True).rsqrt().detach() * weight"
    )


def _lacks_values(op: Operator) -> str | None:
    return None if op.vanishes else "vanishes=, the operand that is attended to, its values"


_OPERAND = "it is not homogeneous in"
CLASSES: Mapping[Algebra, Class] = {
    Algebra.STRUCTURAL: Class("linear without a bias: J u = v", _polynomial),
    Algebra.AFFINE: Class(
        "affine: J u + J_b b = v when operand and bias have degree 1", _polynomial
    ),
    Algebra.MULTILINEAR: Class(
        "Euler: the degree of a product is the sum of its factors' degrees", _polynomial
    ),
    Algebra.HOMOGENEOUS: Class(
        "Euler: v(t u) = t^k v(u) gives J u = k v", _polynomial, reader=selected
    ),
    Algebra.PIECEWISE: Class(
        "continuous, of linear pieces: J u + b = v, b the intercept of the piece",
        _piecewise,
        reader=intercepts,
    ),
    Algebra.ZERO_ORIGIN: Class(
        "secant from 0 with f(0) = 0: J~ u = f(u)",
        _elementwise,
        ("secant",),
        _OPERAND,
        lacks=_lacks_no_origin,
    ),
    Algebra.ELEMENTWISE: Class(
        "secant from 0: J~ u + f(0) = f(u), f(0) a bias leaf",
        _elementwise,
        ("secant",),
        _OPERAND,
        at_origin,
        _lacks_origin,
    ),
    Algebra.NORMALISER: Class(
        "1/sigma frozen, centring linear: J~ u + bias = v",
        _normaliser,
        ("freeze",),
        "1/sigma depends on",
        lacks=_lacks_frozen,
    ),
    Algebra.ATTENTION: Class(
        "weights frozen, or integrated along the ray from 0: J~ u = output",
        _attention,
        ("integrate",),
        "its weights depend on",
        None,
        _lacks_values,
    ),
    Algebra.SMOOTH: Class(
        "integral of J along the ray from 0: J~ u + f(0) = f(u), f(0) a bias leaf",
        _smooth,
        ("integrate",),
        reader=None,
    ),
    Algebra.SINGULAR: Class(
        "of degree 0 where every operand is of degree 0; its ray from 0 is broken", _singular
    ),
    Algebra.FREEZING: Class("carries no gradient: degree 0", _freezing),
    Algebra.FACTORY: Class("independent of every live value", _freezing),
    Algebra.COMPOSITE: Class(
        "opened when it is traced: the operations that torch makes of it are judged", _singular
    ),
}
