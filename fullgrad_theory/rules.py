"""The edits of a backward pass. The forward value never changes; each is plain data."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from .errors import PlanError


@dataclass(frozen=True, order=True)
class Prune:
    """The edge (node, argument) carries no gradient; other consumers of the value keep theirs."""

    node: str
    argument: str

    def __str__(self) -> str:
        return f"prune {self.node}.{self.argument}"


@dataclass(frozen=True, order=True)
class Scale:
    """The gradient into a node, or through one of its edges, is multiplied by a positive factor.

    1/d at a node of accumulated degree d > 0 makes its degree 1.
    """

    node: str
    factor: Fraction
    argument: str | None = None

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise PlanError(f"{self}: only a positive factor keeps the Jacobian an honest one")

    def __str__(self) -> str:
        edge = f".{self.argument}" if self.argument else ""
        return f"scale {self.node}{edge} by {self.factor}"


@dataclass(frozen=True, order=True)
class Secant:
    """An elementwise f gets J~ = (f(u) - f(0))/u, at u = 0 its limit; f(0) is a bias leaf."""

    node: str

    def __str__(self) -> str:
        return f"secant {self.node}"


@dataclass(frozen=True, order=True)
class FreezeScale:
    """A normalisation layer's 1/sigma is held fixed; its centring stays linear."""

    node: str

    def __str__(self) -> str:
        return f"freeze 1/sigma of {self.node}"


@dataclass(frozen=True, order=True)
class Integrate:
    """J~ = integral of J(t u) over t from 0 to 1, u the live operands; f(0) is a bias leaf.

    With a `region`, the names of nodes that `node` ends, all of them count as one function of what
    they read from outside.
    """

    node: str
    region: tuple[str, ...] = ()

    def __str__(self) -> str:
        inner = f" with the {len(self.region)} nodes it ends" if self.region else ""
        return f"integrate {self.node}{inner}"


Edit = Prune | Scale | Secant | FreezeScale | Integrate
NODE_EDITS: dict[str, type[Secant] | type[FreezeScale] | type[Integrate]] = {
    "secant": Secant,
    "freeze": FreezeScale,
    "integrate": Integrate,
}
