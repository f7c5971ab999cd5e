"""A plan as text: for a terminal, and an edit of it in a line."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..edits.base import Edit
from ..operators.calls import short_name

if TYPE_CHECKING:
    from .plan import Plan

LIMIT_MET = (
    "the search for alternatives met its limit: there may be others, and cheaper ones; "
    "raise effort in derive_rules"
)


@dataclass(frozen=True)
class PlanText:
    """What is said of a plan: `str` of it is the whole, alike edits in one paragraph."""

    plan: Plan

    def __str__(self) -> str:
        width = shutil.get_terminal_size().columns
        lines = [self._headline()]
        for text, more in self._paragraphs():
            lines += textwrap.wrap(text, width, subsequent_indent=" " * 8)
            for words in more:
                lines += textwrap.wrap(
                    words, width, initial_indent=" " * 8, subsequent_indent=" " * 10
                )
        return "\n".join(lines)

    def meaning(self, edit: Edit) -> str:
        """One edit in words: what it does to the backward, and what leaves the backward with it."""
        here = self._place(edit.node)
        words = self._label(edit) + (f" in {here}" if here != edit.node else "")
        more = filter(None, (self.plan.reasons.get(edit, ""), self._leaving([edit])))
        return "; ".join((words, *more))

    # ------------------------------------------------------------------ the whole

    def _headline(self) -> str:
        plan = self.plan
        proof = "" if plan.optimal else ", not proven to be the least: the search met its limit"
        edits = f"{len(plan)} edit" + ("" if len(plan) == 1 else "s")
        return f"policy {plan.policy!r}: {edits}, cost {plan.cost}{proof}"

    def _paragraphs(self) -> Iterator[tuple[str, Iterable[str]]]:
        """A line each, and what stands further in beneath it."""
        plan = self.plan
        alike: dict[tuple[str, str], list[Edit]] = {}
        for edit in plan.edits:
            alike.setdefault((self._label(edit), plan.reasons.get(edit, "")), []).append(edit)
        for (label, reason), edits in alike.items():
            head = f"{len(edits):>5} x {label}: {self._places(e.node for e in edits)}"
            yield head, filter(None, (reason, self._leaving(edits)))
        left: dict[str, list[str]] = {}
        for node in plan.left:
            left.setdefault(self._operation(node), []).append(node)
        for operation, nodes in left.items():
            yield f"{len(nodes):>5} x left incomplete: {operation}: {self._places(nodes)}", ()
        for number, other in enumerate(plan.alternatives, 1):
            yield f"alternative {number}, cost {other.cost}: {self._against(other)}", ()
        if plan.stopped:
            yield LIMIT_MET, ()

    def _against(self, other: Plan) -> str:
        """What another plan does differently, in a line."""
        removed, added = self.plan.diff(other)
        its = PlanText(other)
        more = "; ".join(filter(None, (its._brief(added), its._leaving(added))))
        return f"{more}; without: {self._brief(removed)}" if removed else more

    def _brief(self, edits: Iterable[Edit]) -> str:
        labels: dict[str, list[str]] = {}
        for edit in edits:
            labels.setdefault(self._label(edit), []).append(edit.node)
        return ", ".join(
            (f"{len(nodes)} x " if len(nodes) > 1 else "") + f"{label} ({self._places(nodes)})"
            for label, nodes in labels.items()
        )

    # ------------------------------------------------------------------ its parts

    def _leaving(self, edits: Iterable[Edit]) -> str:
        """What is held fixed by these prunes, and what of the model leaves the backward."""
        cuts = [self.plan.cuts[edit] for edit in edits if self.plan.cuts.get(edit)]
        if not cuts:
            return ""
        words = f"held fixed: {_some(self._operation(held) for held, *_ in cuts)}"
        gone = [node for _, *nodes in cuts for node in nodes]
        if gone:
            words += f"; out of the backward: {_some(map(self._operation, gone))}"
            paths = compress(path for node in gone if (path := self.plan.where[node][1]))
            words += f" in {_some(paths)}" if paths else ""
        return words

    def _operation(self, node: str) -> str:
        return short_name(self.plan.where.get(node, (node, ""))[0])

    def _places(self, nodes: Iterable[str]) -> str:
        return ", ".join(compress(self._place(node) for node in nodes))

    def _place(self, node: str) -> str:
        return self.plan.where.get(node, ("", ""))[1] or node

    def _label(self, edit: Edit) -> str:
        """The edit with its operation in place of its node."""
        return edit.words(self._operation(edit.node))


def _some(words: Iterable[str], most: int = 6) -> str:
    """The first few of different words."""
    words = list(dict.fromkeys(words))
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if words[most:] else "")


# --------------------------------------------------------------------------- module paths


def compress(paths: Iterable[str]) -> list[str]:
    """Paths that differ in numbers only as one: `blocks.{0..11}.norm1`. Order and doubles go."""
    rows = {tuple(path.split(".")) for path in paths}
    for position in range(max((len(row) for row in rows), default=0)):
        groups: dict[tuple[str, ...], set[int]] = {}
        merged = set()
        for row in rows:
            if position < len(row) and row[position].isdigit():
                rest = (*row[:position], "", *row[position + 1 :])
                groups.setdefault(rest, set()).add(int(row[position]))
            else:
                merged.add(row)
        for rest, numbers in groups.items():
            merged.add((*rest[:position], _runs(sorted(numbers)), *rest[position + 1 :]))
        rows = merged
    return [".".join(row) for row in sorted(rows)]


def _runs(numbers: list[int]) -> str:
    """`[0, 1, 2, 7]` as `'{0..2,7}'`; one number as itself."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [str(r[0]) if len(r) == 1 else f"{r[0]}..{r[-1]}" for r in runs]
    return parts[0] if len(numbers) == 1 else "{" + ",".join(parts) + "}"
