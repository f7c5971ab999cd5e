"""Two files of results beside each other: what became worse, and what better."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import InputError
from .rows import Outcome, Row


@dataclass(frozen=True)
class Comparison:
    """The rows of an architecture that are not alike in `worse` and `better`, old and new;
    `gone` are not in the new file, `added` not in the old one, `same` the number of the rest."""

    worse: tuple[tuple[Row, Row], ...]
    better: tuple[tuple[Row, Row], ...]
    gone: tuple[Row, ...]
    added: tuple[Row, ...]
    same: int


def compared(old: Iterable[Row], new: Iterable[Row]) -> Comparison:
    """Each architecture under the same policy, in the old rows and in the new ones.

    Worse is a verdict of lower rank, under the policy or of the gradient as it is. Raises
    `InputError` where the two have none in common, which would say nothing.
    """
    was, now = ({row.subject: row for row in rows} for rows in (old, new))
    pairs = [(was[subject], now[subject]) for subject in was if subject in now]
    if not pairs:
        raise InputError("the two files have no architecture in common, audited in the same way")
    worse = tuple(pair for pair in pairs if _fell(*pair))
    better = tuple(pair for pair in pairs if pair not in worse and _fell(*reversed(pair)))
    return Comparison(
        worse,
        better,
        tuple(row for subject, row in was.items() if subject not in now),
        tuple(row for subject, row in now.items() if subject not in was),
        len(pairs) - len(worse) - len(better),
    )


def _fell(old: Row, new: Row) -> bool:
    return new.verdict.rank < old.verdict.rank or _plain(new) < _plain(old)


def _plain(row: Row) -> int:
    return row.plain.rank if row.plain else 0


def change(old: Row, new: Row) -> str:
    """How one architecture changed, in a line."""
    parts = []
    if old.verdict is not new.verdict:
        parts.append(f"under {new.policy} {old.verdict} -> {new.verdict}")
    if old.plain is not new.plain:
        parts.append(f"as it is {_named(old.plain)} -> {_named(new.plain)}")
    why = new.failure or "; ".join(new.problems[:1]) or _first_new(old, new)
    return ", ".join(parts) + (f": {why}" if why else "")


def _named(outcome: Outcome | None) -> str:
    return outcome or "not judged"


def _first_new(old: Row, new: Row) -> str:
    more = [op for op, count in new.operations.items() if count > old.operations.get(op, 0)]
    return f"{', '.join(more[:3])} breaks it more often" if more else ""
