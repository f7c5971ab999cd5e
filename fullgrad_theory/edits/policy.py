"""A policy: what each edit costs, and what may keep its true gradient. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from ..errors import PolicyError, unknown_name
from ..operators.algebra import Algebra, Role

if TYPE_CHECKING:
    from ..operators.calls import Call
    from ..operators.record import Operator

HIGHEST = 10_000


@dataclass(frozen=True)
class Policy:
    """A table of costs; None forbids. Vary one: `dataclasses.replace(policy("libra"), prune=9)`.

    `prune_of` maps an operation's name, a `Role` or an `Algebra` (the first that fits) to what
    pruning costs where the value held fixed is computed by it, past what merely moves it. `keep`
    are modules (paths with what is below them, `*` for any part) in which, and at whose results,
    nothing is pruned.

    `secant_origin` is a secant with f(0) != 0, which makes f(0) a bias leaf. `leave` maps
    as `prune_of` does to the cost of leaving such a node its true
    gradient; what it sees has degree 0 or 1 then, and its label is 1. A decomposed norm's eps is
    left as a normaliser. `edge_scales` are the factors at the operands of a left node.
    """

    name: str
    description: str = ""
    source: str = ""
    prune: int | None = None
    scale: int | None = None
    secant: int | None = None
    secant_origin: int | None = None
    freeze: int | None = None
    integrate: int | None = None
    leave: Mapping[str, int] = field(default_factory=dict)
    edge_scales: Mapping[str, Mapping[str, Fraction]] = field(default_factory=dict)
    prune_of: Mapping[str, int | None] = field(default_factory=dict)
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises `PolicyError` for what is no cost, `UnknownNameError` for what is no operation."""
        for edit in EDITS:
            _check_cost(f"{edit}=", getattr(self, edit), optional=True)
        for what, table in (("leave", self.leave), ("prune_of", self.prune_of)):
            for key, cost in table.items():
                _check_key(key)
                _check_cost(f"{what}[{key!r}]: ", cost, optional=what == "prune_of")
        for key, factors in self.edge_scales.items():
            _check_key(key)
            for argument, factor in factors.items():
                if not isinstance(factor, (int, Fraction)) or factor <= 0:
                    raise PolicyError(
                        f"edge_scales[{key!r}][{argument!r}]: {factor!r} is no positive Fraction"
                    )
        if isinstance(self.keep, str) or not all(isinstance(k, str) and k for k in self.keep):
            raise PolicyError(f"keep={self.keep!r}: expected a tuple of module paths")

    @property
    def complete(self) -> bool:
        """Whether every plan under this policy makes the model complete."""
        return not self.leave

    @property
    def idle(self) -> bool:
        """Whether no edit is allowed at all."""
        costs = [getattr(self, edit) for edit in EDITS]
        return all(cost is None for cost in (*costs, *self.prune_of.values()))

    def keeps(self, module: str) -> bool:
        """Whether nothing is pruned in a module."""
        return any(within(module, pattern) for pattern in self.keep)

    def prune_of_operator(self, value: Operator) -> int | None:
        """The cost of holding a value fixed that this operation computes."""
        return _first(self.prune_of, value, value.algebra, self.prune)

    def leave_cost(self, call: Call) -> int | None:
        """The cost of leaving a call inconsistent, None where it is not allowed."""
        algebra = Algebra.NORMALISER if call.eps else call.operator.algebra
        return _first(self.leave, call.operator, algebra, None)

    def edge_factors(self, call: Call) -> Mapping[str, Fraction]:
        """The factors at the operands of a call that is left."""
        return self.edge_scales.get(call.operator.algebra, {})


def _first(
    table: Mapping[str, int | None], operator: Operator, algebra: Algebra, default: int | None
) -> int | None:
    """A table's entry for an operation by its name, else by a role of it, else by its class."""
    if operator.name in table:
        return table[operator.name]
    of_roles = [table[role] for role in sorted(operator.roles) if role in table]
    return of_roles[0] if of_roles else table.get(algebra, default)


EDITS = ("prune", "scale", "secant", "secant_origin", "freeze", "integrate")


def _check_cost(what: str, cost: Any, optional: bool) -> None:
    if cost is None and optional:
        return
    if isinstance(cost, bool) or not isinstance(cost, int) or not 1 <= cost <= HIGHEST:
        forbids = ", or None, which forbids" if optional else ""
        raise PolicyError(f"{what}{cost!r} is no cost: whole numbers from 1 to {HIGHEST}{forbids}")


def _check_key(key: str) -> None:
    if key in {*Algebra, *Role}:
        return
    from ..operators.registry import lookup, registered  # with torch, which no class or role needs

    if lookup(key) is None:
        known = [*map(str, Algebra), *map(str, Role), *(o.name for o in registered())]
        raise unknown_name("operation, role or class", key, known)


def within(module: str, pattern: str) -> bool:
    """Whether a module path is, or is below, one that the pattern names (`blocks.*.attn`)."""
    return fnmatchcase(module, pattern) or fnmatchcase(module, f"{pattern}.*")
