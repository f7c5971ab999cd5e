"""Piecewise linear operations as formulas of linear real arithmetic, for z3.

What autograd and the symbolic lemmas see is one region at a time, around a sample. Here a statement
is about all real numbers at once, the places where regions meet included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import z3
from torch import Tensor

Formula = Callable[..., Any]
UNDECIDED_AFTER = 60_000
"""milliseconds"""


@dataclass(frozen=True)
class Piecewise:
    """`formula(u, c)`: the results for operands u and constants c, each a list; `call(u)`: what
    torch makes of a tensor of operands and of the numbers `constants`. `count`: of the operands."""

    formula: Formula
    call: Callable[[Tensor], Any]
    count: int = 1
    constants: tuple[float, ...] = ()


def either(condition: Any, one: Any, other: Any) -> Any:
    return z3.If(condition, one, other)


def largest(values: Sequence[Any]) -> Any:
    found = values[0]
    for value in values[1:]:
        found = either(value > found, value, found)
    return found


def smallest(values: Sequence[Any]) -> Any:
    return -largest([-v for v in values])


def between(u: Any, low: Any, high: Any) -> Any:
    return smallest([largest([u, low]), high])


def size(u: Any) -> Any:
    return either(u < 0, -u, u)


def ordered(values: Sequence[Any]) -> list[Any]:
    """From the smallest on, by exchanges."""
    found = [*values]
    for end in range(len(found) - 1, 0, -1):
        for i in range(end):
            low, high = smallest(found[i : i + 2]), largest(found[i : i + 2])
            found[i : i + 2] = [low, high]
    return found


def running(values: Sequence[Any], best: Callable[[Sequence[Any]], Any]) -> list[Any]:
    return [best(values[: i + 1]) for i in range(len(values))]


def is_theorem(statement: Any) -> bool:
    """Whether z3 finds it true of all numbers; raises `TimeoutError` where it cannot tell."""
    solver = z3.Solver()
    solver.set("timeout", UNDECIDED_AFTER)
    solver.add(z3.Not(statement))
    answer = solver.check()
    if answer == z3.unknown:
        raise TimeoutError(solver.reason_unknown())
    return bool(answer == z3.unsat)


def homogeneous(operation: Piecewise) -> Any:
    """f(t u, t c) = t f(u, c) for every t > 0: degree 1, its constants bias leaves (Euler)."""
    u, c, t = *variables(operation), z3.Real("t")
    scaled = operation.formula([t * x for x in u], [t * x for x in c])
    pairs = zip(scaled, operation.formula(u, c), strict=True)
    return z3.Implies(t > 0, z3.And([a == t * b for a, b in pairs]))


def continuous(operation: Piecewise, slope: float = 1.0) -> Any:
    """|f(u) - f(v)| <= slope * the largest |u - v|: it jumps nowhere."""
    u, c = variables(operation)
    v = [z3.Real(f"v{i}") for i in range(operation.count)]
    far = largest([size(a - b) for a, b in zip(u, v, strict=True)])
    pairs = zip(operation.formula(u, c), operation.formula(v, c), strict=True)
    return z3.And([size(a - b) <= slope * far for a, b in pairs])


def variables(operation: Piecewise) -> tuple[list[Any], list[Any]]:
    """A real for every operand and every constant."""
    return (
        [z3.Real(f"u{i}") for i in range(operation.count)],
        [z3.Real(f"c{i}") for i in range(len(operation.constants))],
    )
