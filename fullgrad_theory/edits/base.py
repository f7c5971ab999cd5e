"""What an edit of a backward pass is. The forward value never changes; each edit is plain data.

One class an edit, one file a class: its price under a policy, how it is written into a graph, how
it is named to people, how it stands in a file, and which operands it holds fixed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from enum import IntEnum
from fractions import Fraction
from typing import TYPE_CHECKING, Any, ClassVar, Self

from ..operators.record import Operator
from ..operators.relations import Mode
from .costs import Policy

if TYPE_CHECKING:
    from .writing import Writing


class Stage(IntEnum):
    """The order of writing. Edges are found by the operation's schema, which an own edit replaces,
    and what scales a result stands behind all else."""

    EDGE = 0
    OWN = 1
    RESULT = 2


@dataclass(frozen=True, order=True)
class Edit(ABC):
    """An edit at `node`. `kind` is its name in files, policies and the modes of a class."""

    node: str

    kind: ClassVar[str]
    stage: ClassVar[Stage]

    @abstractmethod
    def words(self, node: str) -> str:
        """The edit for a reader, with `node` in place of the node's name."""

    @abstractmethod
    def write(self, writing: Writing) -> None:
        """Write the edit into a graph."""

    def __str__(self) -> str:
        return self.words(self.node)

    @property
    def mode(self) -> str | None:
        """The mode of its class that the node takes under this edit, None for the unedited one."""
        return None

    @property
    @abstractmethod
    def place(self) -> tuple[str, str]:
        """What two edits of one node cannot both be at."""

    @property
    def folds(self) -> tuple[str, ...]:
        """The nodes that count as one function with this one, which they end at."""
        return ()

    def record(self, inside: Collection[Operator]) -> Operator | None:
        """What is known of the function that `folds` is, of operations with these records."""
        return None

    @property
    def held(self) -> str | None:
        """The operand whose edge carries no gradient, None where there is none."""
        return None

    def holds(self, argument: str) -> bool:
        """Whether the edge to that operand carries no gradient."""
        return argument == self.held

    def multiplies(self, argument: str | None = None) -> Fraction:
        """What the gradient is multiplied by at an edge, or, without one, at the node."""
        return Fraction(1)

    def data(self) -> dict[str, Any]:
        """The edit as JSON has it."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return {"edit": self.kind} | {
            name: str(v) if isinstance(v, Fraction) else v for name, v in own.items()
        }

    @classmethod
    def of_data(cls, entry: Mapping[str, Any]) -> Self:
        """The edit that `data` wrote; whatever else the entry holds is left."""
        return cls(**{f.name: entry[f.name] for f in fields(cls)})


class OwnEdit(Edit):
    """An edit that is a mode of the operation's class: the operation gets another backward."""

    stage = Stage.OWN

    @classmethod
    def price(cls, policy: Policy, mode: Mode) -> int | None:
        """What the policy asks for it, None where it forbids it."""
        cost: int | None = getattr(policy, cls.kind)
        return cost

    @property
    def mode(self) -> str:
        return self.kind

    @property
    def place(self) -> tuple[str, str]:
        return "own", ""
