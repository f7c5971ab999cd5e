"""What is said about a plan: why an operation breaks completeness, and why an edit mends it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

from ..operators.calls import Call


@dataclass(frozen=True)
class Breach:
    """How a relation is broken at a call. `wrong`: operands that should be seen at degree 0, with
    their degrees; `totals`: the degrees that should be one, or the one that is outside the domain.
    """

    kind: Literal["zero", "frozen", "ray", "sum", "eps", "constant"]
    call: Call
    wrong: Mapping[str, Fraction] = field(default_factory=dict)
    totals: tuple[Fraction, ...] = ()

    @property
    def inherited(self) -> bool:
        """Whether those are at fault that gave an operand its degree, where there are any."""
        return self.kind in ("ray", "sum", "constant")


def breach_words(breach: Breach) -> str:
    """Why a node breaks completeness, in words that follow its name."""
    degrees = " and ".join(map(str, breach.totals))
    match breach.kind:
        case "zero":
            what = ", ".join(f"{n} (degree {d})" for n, d in breach.wrong.items())
            return f"{breach.call.operator.kind.why} {what}"
        case "frozen":
            return "adds a frozen value, which nobody attributes, to a live one"
        case "ray":
            return f"its ray from 0 moves operands of degree {degrees}, not alike"
        case "sum":
            return f"adds values of degree {degrees}"
        case "eps":
            return "a literal inside a divisor is no bias: the norm with eps has no degree"
        case "constant":
            return f"adds a constant to a value of degree {degrees}"
