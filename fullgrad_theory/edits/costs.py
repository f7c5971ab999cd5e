"""Policies: what each edit costs, and what may keep its true gradient although it is inconsistent.

A *complete* policy leaves nothing; a plan under it makes the model FullGrad-complete. A *partial*
one is a published method or an ablation: its edits are applied, the rest is left and reported.

`attnlrp` and `alilrp` are written as gradient edits from the papers (Achtibat et al. 2024, Ali et
al. 2022), not from anybody's code. The licence of LXT, AttnLRP's own implementation, claims a
patent on layer-wise relevance propagation: users judge for themselves whether that concerns them.
Nothing here needs torch.
"""

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
        algebra = Algebra.ZERO_ORIGIN if call.gate else algebra  # a product u*g(u) is a function
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


# --------------------------------------------------------------------------- the published ones

LAST_RESORT = 1000
"""what a partial policy pays for leaving a node it has an edit for"""

_COSTS: dict[str, Any] = {"prune": 30, "scale": 8, "secant": 6, "secant_origin": 60, "freeze": 6}

_ATTENTION: Mapping[str, int] = dict.fromkeys(
    (Algebra.ATTENTION, Algebra.SMOOTH, Algebra.SINGULAR), 1
)
_MATMULS: Mapping[str, int] = {Role.TOKEN_PRODUCT: 1}
_NORM: Mapping[str, int] = {Algebra.NORMALISER: 1}
_ACTIVATION: Mapping[str, int] = {Algebra.ZERO_ORIGIN: 1, Algebra.ELEMENTWISE: 1}
_PRODUCT: Mapping[str, int] = {Algebra.MULTILINEAR: 1, Algebra.HOMOGENEOUS: 1}
# a sigmoid that gates is rather pruned (30) than left
_ACTIVATION_NO_GATE: Mapping[str, int] = {Algebra.ZERO_ORIGIN: 1, Algebra.ELEMENTWISE: 40}

_HALVES: Mapping[str, Mapping[str, Fraction]] = {
    Algebra.ATTENTION: {
        "query": Fraction(1, 4),
        "key": Fraction(1, 4),
        "value": Fraction(1, 2),
    }
}

LIBRAGRAD = "LibraGrad, CVPR 2025, arXiv:2411.16760"


def _leave(*tables: Mapping[str, int]) -> dict[str, int]:
    """Everything may be left, as a last resort; what `tables` name is left first."""
    merged: dict[str, int] = dict.fromkeys((str(a) for a in Algebra), LAST_RESORT)
    for table in tables:
        merged |= {str(key): cost for key, cost in table.items()}
    return merged


def _without(*edits: str) -> dict[str, Any]:
    return {edit: cost for edit, cost in _COSTS.items() if edit not in edits}


_TABLE = (
    Policy("libra", "prune attention weights, freeze 1/sigma, secants, halved products; complete",
           LIBRAGRAD, **_COSTS, integrate=200),
    # a denominator has no integral: pruned, at a price that only the lack of any other way pays
    Policy("integrated", "as libra, but attention and softmax integrated from 0, nothing pruned",
           "this library, after Sundararajan et al. 2017, arXiv:1703.01365",
           **_COSTS | {"prune": 1000}, integrate=20),
    Policy("plain", "the gradient as it is, no edit", "Simonyan et al. 2014, arXiv:1312.6034",
           leave=_leave()),
    Policy("attnlrp", "as libra, but gradient through attention weights, q and k by 1/4, v by 1/2",
           "Achtibat et al. 2024, arXiv:2402.05602",
           **_COSTS | {"secant_origin": 6}, leave=_leave(_ATTENTION), edge_scales=_HALVES),
    Policy("alilrp", "prune attention weights, freeze 1/sigma; activations and products left",
           "Ali et al. 2022, arXiv:2202.07304",
           **_without("scale", "secant", "secant_origin"), leave=_leave(_ACTIVATION, _PRODUCT)),
    Policy("decompx", "prune attention weights, freeze 1/sigma, secants; products left",
           "after Modarressi et al. 2023, arXiv:2306.02873",
           **_without("scale"), leave=_leave(_PRODUCT)),
    Policy("scale-only", "q and k by 1/4, v by 1/2, halved products; norms and activations left",
           LIBRAGRAD, scale=8, leave=_leave(_ATTENTION, _NORM, _ACTIVATION), edge_scales=_HALVES),
    Policy("gate+scale", "as scale-only, with secants", LIBRAGRAD,
           scale=8, secant=6, secant_origin=6, leave=_leave(_ATTENTION, _NORM),
           edge_scales=_HALVES),
    Policy("only-attention", "ablation: prune attention weights, nothing else", LIBRAGRAD,
           prune=30, leave=_leave(_NORM, _ACTIVATION, _PRODUCT)),
    Policy("only-norm", "ablation: freeze 1/sigma, nothing else", LIBRAGRAD,
           prune=30, freeze=6, leave=_leave(_ATTENTION, _ACTIVATION, _PRODUCT)),
    Policy("only-activation", "ablation: secants, nothing else", LIBRAGRAD,
           secant=6, secant_origin=60, leave=_leave(_ATTENTION, _NORM, _PRODUCT)),
    Policy("only-gate", "ablation: halved gated products, nothing else", LIBRAGRAD,
           scale=8, leave=_leave(_ATTENTION, _MATMULS, _NORM, _ACTIVATION)),
    Policy("without-attention", "ablation: libra, attention keeps its true gradient", LIBRAGRAD,
           **_COSTS, leave=_leave(_ATTENTION, _MATMULS)),
    Policy("without-norm", "ablation: libra, norms keep their true gradient", LIBRAGRAD,
           **_without("freeze"), leave=_leave(_NORM)),
    Policy("without-activation", "ablation: libra, activations keep their true gradient", LIBRAGRAD,
           **_without("secant", "secant_origin"), leave=_leave(_ACTIVATION_NO_GATE)),
    Policy("without-gate", "ablation: libra, products keep their true gradient", LIBRAGRAD,
           **_without("scale"), leave=_leave(_PRODUCT)),
)  # fmt: skip
_POLICIES = {entry.name: entry for entry in _TABLE}


def policy(name: str | Policy) -> Policy:
    """The policy of that name (or the policy itself); raises `UnknownNameError` with near names."""
    if isinstance(name, Policy):
        return name
    if name not in _POLICIES:
        raise unknown_name("policy", name, _POLICIES)
    return _POLICIES[name]


def policies() -> tuple[Policy, ...]:
    """All policies known by name, each with its one-line `description` and its `source`."""
    return tuple(_POLICIES.values())
