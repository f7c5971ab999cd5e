"""What is kept of an architecture: one row, plain data. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Self


class Outcome(StrEnum):
    """What came of an architecture; all but the first three mean that there was no verdict."""

    COMPLETE = "complete"
    INCOMPLETE = "incomplete"
    UNJUDGED = "unjudged"
    RAISED = "raised"
    NOT_BUILT = "not built"
    OUT_OF_TIME = "out of time"
    OUT_OF_MEMORY = "out of memory"
    DIED = "died"

    @classmethod
    def of(cls, complete: bool | None) -> Outcome:
        """Of a report's verdict."""
        return {True: cls.COMPLETE, False: cls.INCOMPLETE, None: cls.UNJUDGED}[complete]

    @property
    def rank(self) -> int:
        """How good it is: complete, incomplete, and all else alike."""
        return {Outcome.COMPLETE: 2, Outcome.INCOMPLETE: 1}.get(self, 0)


CUT_SHORT = (Outcome.OUT_OF_TIME, Outcome.OUT_OF_MEMORY, Outcome.DIED)
"""what says something of the machine and the limits, and nothing of the architecture"""


@dataclass(frozen=True)
class Architecture:
    """An entry of a source. `version`: of the package, or a digest of the file; `target`: what it
    is built from; `shapes`: of its inputs, where the model does not say them."""

    source: str
    name: str
    family: str
    version: str
    target: str
    shapes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Options:
    """How architectures are judged: under which policy, by running or not, within which limits
    (seconds of the clock, MiB), and by which versions."""

    policy: str
    numeric: bool
    time_limit: float
    memory_limit: int
    library: str
    torch: str


Key = tuple[str, str, str, str, bool, str, str]


@dataclass(frozen=True)
class Row:
    """One architecture's result.

    `verdict` is under the policy, `plain` of the gradient as it is. `operations`, `modules`: how
    many nodes of each break the plain one; `edits`: how often each is made; `nonlinear`: live nodes
    that are not linear. Errors and shares only where it was run. `seconds`: of CPU; `memory`: the
    most that the process held, MiB. `failure`: what was raised, or how the worker ended.
    """

    source: str
    name: str
    family: str
    version: str
    policy: str
    numeric: bool
    library: str
    torch: str
    time_limit: float
    memory_limit: int
    verdict: Outcome
    plain: Outcome | None = None
    inputs: str = ""
    error: float | None = None
    error_before: float | None = None
    operations: dict[str, int] = field(default_factory=dict)
    modules: dict[str, int] = field(default_factory=dict)
    edits: dict[str, int] = field(default_factory=dict)
    nonlinear: int | None = None
    input_share: float | None = None
    bias_share: float | None = None
    problems: list[str] = field(default_factory=list)
    seconds: float | None = None
    memory: float | None = None
    failure_class: str = ""
    failure: str = ""
    finished: str = ""

    @classmethod
    def of(cls, architecture: Architecture, options: Options, verdict: Outcome) -> Self:
        """The row of an architecture of which no more than this is known."""
        a, o = architecture, options
        return cls(
            a.source, a.name, a.family, a.version, o.policy, o.numeric, o.library, o.torch,
            o.time_limit, o.memory_limit, verdict, inputs=" ".join(a.shapes),
        )  # fmt: skip

    def ended(self) -> Row:
        """The same, ended now."""
        return replace(self, finished=datetime.now(UTC).isoformat(timespec="milliseconds"))

    @property
    def key(self) -> Key:
        """What is never audited twice: an architecture, by the same options and versions."""
        return (
            self.source, self.name, self.version, self.policy, self.numeric, self.library,
            self.torch,
        )  # fmt: skip

    @property
    def subject(self) -> tuple[str, str, str, bool]:
        """What is compared between versions."""
        return self.source, self.name, self.policy, self.numeric

    @property
    def kind(self) -> str:
        """By what it was judged."""
        return "values" if self.numeric else "structure"

    def holds(self, options: Options) -> bool:
        """Whether it need not be done anew: no larger limit would let it end."""
        if self.verdict is Outcome.OUT_OF_TIME:
            return self.time_limit >= options.time_limit
        if self.verdict is Outcome.OUT_OF_MEMORY:
            return self.memory_limit >= options.memory_limit
        return True

    @property
    def worth(self) -> tuple[bool, str]:
        """Of two rows with one key the larger is kept: one that ended by itself, the later one."""
        return self.verdict not in CUT_SHORT, self.finished

    def to_data(self) -> dict[str, Any]:
        """The fields in order, as they are."""
        return dict(vars(self))


def counts(rows: Iterable[Row]) -> dict[Outcome, int]:
    """How many rows have each outcome, those that occur."""
    found = [row.verdict for row in rows]
    return {outcome: found.count(outcome) for outcome in Outcome if outcome in found}
