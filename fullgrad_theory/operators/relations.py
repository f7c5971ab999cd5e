"""Degree rules: the signature of an operation, and the relations it stands for in one call.

A value v has degree d when v(t * leaves) = t^d v(leaves) near t = 1. A *signature* is a sum of
monomials in the schema's argument names, for instance `input*weight + bias` for linear or
`self/other` for div; outputs are separated by `;`, and `-` is a frozen one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from .calls import Call

FINEST = 24
"""the largest denominator that a degree is expected to have"""


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

    @property
    def summed(self) -> tuple[str, ...]:
        """The operands whose degrees make the output's."""
        return (*(name for term in self.terms for name, _ in term), *self.ray)

    @property
    def from_origin(self) -> bool:
        """Whether f(0) is a bias leaf here, as for a secant or an integral from 0."""
        return self.domain == (1,)


@dataclass(frozen=True)
class Mode:
    """One way a node may be consistent: unedited (`edit` None), or under an edit of its own."""

    edit: str | None
    outputs: tuple[Relation, ...]


def parse_signature(signature: str) -> tuple[tuple[str, ...], ...]:
    """`'self*weight + bias ; -'` -> per output, the monomials as text."""
    return tuple(
        tuple(term.strip() for term in output.split("+") if term.strip())
        for output in signature.split(";")
    )


_FACTOR = re.compile(r"(?P<op>[*/]?)\s*(?P<name>[A-Za-z_]\w*)\s*(?:\^\s*(?P<exp>[-\w./]+))?")


def signature_names(signature: str) -> tuple[str, ...]:
    """The argument names that a signature speaks of; raises ValueError where it is none.

    `'self*weight + bias^1/2 ; -'`: products and quotients of names with rational exponents, or the
    name of a number among the arguments for an exponent.
    """
    names: list[str] = []
    for output in parse_signature(signature):
        if output == ("-",):
            continue
        for term in output:
            rest = _FACTOR.sub("", term).strip()
            found = list(_FACTOR.finditer(term))
            if rest or not found or any(m["op"] == "" for m in found[1:]):
                raise ValueError(
                    f"{signature!r} is no degree rule: {term!r} is no product of argument names, "
                    "such as x*weight, x/y, x^1/2 or *tensors"
                )
            for match in found:
                names.append(match["name"])
                if match["exp"] and match["exp"][0].isalpha():
                    names.append(match["exp"])
        if not output:
            raise ValueError(f"{signature!r} is no degree rule: an output without a product")
    return tuple(dict.fromkeys(names))


def _exponent(text: str | None, arguments: Mapping[str, Any]) -> Fraction | None:
    """A literal exponent, or the value of the argument it names; None if that is no number."""
    if text is None:
        return Fraction(1)
    value: Any = arguments.get(text, text) if text[0].isalpha() else text
    try:
        return snapped(Fraction(value))
    except (TypeError, ValueError):
        return None


def snapped(degree: Fraction) -> Fraction:
    """The nearest fraction with a small denominator, where a rounded number is that."""
    near = degree.limit_denominator(FINEST)
    return near if abs(near - degree) < Fraction(1, 10**9) else degree


def exponent_names(signature: str) -> tuple[str, ...]:
    """The arguments whose number is an exponent in a signature."""
    return tuple(
        m["exp"] for m in _FACTOR.finditer(signature) if m["exp"] and m["exp"][0].isalpha()
    )


def _term(text: str, call: Call) -> list[list[tuple[str, Fraction]] | None]:
    """The monomials `text` stands for in this call: a list argument is a sum, `*list` a product.

    A monomial over arguments that are absent, or a literal zero, is no term; one whose exponent is
    no number is None.
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
            spread += [[(o.name, Fraction(1))] for o in elements if o.literal != 0.0]
        elif name not in by_name:
            if call.arguments.get(name) is None and match.start() == 0:
                return []  # an optional argument left out: the whole term is absent
        else:
            exponent = _exponent(match["exp"], call.arguments)
            if exponent is None:
                return [None]
            if by_name[name].literal == 0.0 and sign * exponent > 0:
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
            for factors in _term(text, call):
                if factors is None:
                    return None
                mentioned |= {name for name, _ in factors}
                moving = tuple((n, e) for n, e in factors if n in call.moving and e != 0)
                if moving or any(n in call.moving for n, _ in factors):
                    terms.append(moving)  # a product of moving values to the 0: degree 0
                elif factors:
                    constant = True
        if call.chosen:
            terms.append(())  # as a frozen value: of degree 0
        domain = ((0,) if call.eps else (0, 1)) if constant and not call.chosen else None
        relations.append(Relation(tuple(dict.fromkeys(terms)), domain=domain))
    selectors = tuple(sorted(call.moving - mentioned))
    return tuple(r if r.frozen else Relation(r.terms, selectors, r.domain) for r in relations)


def constant_monomials(call: Call) -> tuple[tuple[str, ...], ...]:
    """The operands of each monomial in which nothing depends on the input."""
    found: list[tuple[str, ...]] = []
    for output in parse_signature(call.operator.signature):
        for text in output if output != ("-",) else ():
            for factors in _term(text, call):
                if factors and not any(name in call.moving for name, _ in factors):
                    found.append(tuple(name for name, _ in factors))
    return tuple(found)
