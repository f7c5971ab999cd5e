"""A plan: the edits that a policy makes to one graph's backward pass, and why. It is data."""

from __future__ import annotations

import hashlib
import json
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from torch import fx

from ..edits.kinds import Edit, edit_of_data
from ..errors import PlanError
from ..graph.computation import ComputationGraph, holds_tensor
from ..operators.calls import short_name, target_name

FORMAT = "fullgrad-theory plan 1"


def fingerprint(graph: ComputationGraph) -> str:
    """A hash of a graph's tensor operations and what they read, in order; sizes do not count."""
    lines = []
    for node in graph.fx.graph.nodes:
        if node.op == "placeholder" or holds_tensor(node):
            target = target_name(node.target) if node.op == "call_function" else node.op
            reads = [n.name for n in node.all_input_nodes if _is_value(n)]
            lines.append(f"{node.name} = {target}({', '.join(reads)})")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _is_value(node: fx.Node) -> bool:
    return node.op == "placeholder" or holds_tensor(node)


class PlanDiff(NamedTuple):
    """What one plan has that the other lacks."""

    removed: tuple[Edit, ...]
    added: tuple[Edit, ...]

    def __str__(self) -> str:
        lines = [f"- {edit}" for edit in self.removed] + [f"+ {edit}" for edit in self.added]
        return "\n".join(lines) or "no difference"


@dataclass(frozen=True)
class Plan:
    """The edits for one graph, in graph order, with the reason for each.

    `cost` is their sum under `policy`; `optimal` says whether that is proven to be the least (of an
    alternative: the next). `left` are the nodes that stay inconsistent, `where` maps nodes to
    (operation, module path). `cuts`: pruned edge -> the value held fixed there, followed by all
    nodes that leave the backward with it. `alternatives` are the plans that cost next to
    this one, in order; `stopped` says that the search for them met its limit.
    """

    edits: tuple[Edit, ...]
    policy: str
    reasons: Mapping[Edit, str]
    cost: int
    optimal: bool
    fingerprint: str
    left: tuple[str, ...] = ()
    where: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    cuts: Mapping[Edit, tuple[str, ...]] = field(default_factory=dict)
    alternatives: tuple[Plan, ...] = ()
    stopped: bool = False

    def __len__(self) -> int:
        return len(self.edits)

    def __iter__(self) -> Iterator[Edit]:
        return iter(self.edits)

    def __bool__(self) -> bool:
        return True  # an empty plan is a plan

    @cached_property
    def pruned(self) -> frozenset[tuple[str, str]]:
        """The edges (node, argument) that carry no gradient."""
        return frozenset((e.node, e.place[1]) for e in self.edits if e.holds(e.place[1]))

    @cached_property
    def _by_node(self) -> dict[str, tuple[Edit, ...]]:
        by_node: dict[str, tuple[Edit, ...]] = {}
        for edit in self.edits:
            by_node[edit.node] = (*by_node.get(edit.node, ()), edit)
        return by_node

    def edits_of(self, node: str) -> tuple[Edit, ...]:
        """The edits at one node."""
        return self._by_node.get(node, ())

    def diff(self, other: Plan) -> PlanDiff:
        """The edits that only this plan has, and those that only `other` has."""
        mine, others = set(self.edits), set(other.edits)
        return PlanDiff(
            tuple(e for e in self.edits if e not in others),
            tuple(e for e in other.edits if e not in mine),
        )

    def check_fits(self, graph: ComputationGraph) -> None:
        """Raise `PlanError` where the plan was derived for another graph."""
        if self.fingerprint != fingerprint(graph):
            missing = [e.node for e in self.edits if e.node not in graph.nodes]
            hint = f"it has no node {missing[0]!r}" if missing else "its operations differ"
            raise PlanError(
                f"this plan was derived for another graph than that of {graph.name}: {hint}; "
                "derive it again with derive_rules(model, inputs)"
            )

    # ----------------------------------------------------------------------- as text and as a file

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON with its alternatives, factors as text."""
        text = json.dumps({"format": FORMAT} | self._data(), indent=1, ensure_ascii=False)
        Path(path).write_text(text + "\n", encoding="utf-8")

    def _data(self) -> dict[str, Any]:
        edits = [
            e.data()
            | {"reason": self.reasons.get(e, "")}
            | ({"cuts": self.cuts[e]} if e in self.cuts else {})
            for e in self.edits
        ]
        chosen = ("policy", "cost", "optimal", "stopped", "fingerprint")
        data = {key: getattr(self, key) for key in chosen}
        data |= {"edits": edits, "left": self.left, "where": self.where}
        return data | {"alternatives": [plan._data() for plan in self.alternatives]}

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read what `save` wrote; raises `PlanError` where the file holds no plan."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if data["format"] != FORMAT:
                raise PlanError(f"{path} has the format {data['format']!r}, not {FORMAT!r}")
            return _plan(data)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, PlanError):
                raise
            raise PlanError(
                f"{path} holds no plan ({type(error).__name__}: {error}); write one with plan.save"
            ) from error

    def __str__(self) -> str:
        width = shutil.get_terminal_size().columns
        proof = "" if self.optimal else ", not proven to be the least: the search met its limit"
        head = f"policy {self.policy!r}: {_count(len(self), 'edit')}, cost {self.cost}{proof}"
        lines = [head]
        for (label, reason), edits in self._alike(self.edits).items():
            text = f"{len(edits):>5} x {label}: {self._places(e.node for e in edits)}"
            lines += textwrap.wrap(text, width, subsequent_indent=" " * 8)
            for words in filter(None, (reason, self._leaving(edits))):
                lines += textwrap.wrap(
                    words, width, initial_indent=" " * 8, subsequent_indent=" " * 10
                )
        by_operation: dict[str, list[str]] = {}
        for node in self.left:
            by_operation.setdefault(self._operation(node), []).append(node)
        for operation, nodes in by_operation.items():
            text = f"{len(nodes):>5} x left incomplete: {operation}: {self._places(nodes)}"
            lines += textwrap.wrap(text, width, subsequent_indent=" " * 8)
        for number, other in enumerate(self.alternatives, 1):
            text = f"alternative {number}, cost {other.cost}: {self._against(other)}"
            lines += textwrap.wrap(text, width, subsequent_indent=" " * 8)
        if self.stopped:
            text = (
                "the search for alternatives met its limit: there may be others, and cheaper ones; "
                "raise effort in derive_rules"
            )
            lines += textwrap.wrap(text, width, subsequent_indent=" " * 8)
        return "\n".join(lines)

    def meaning(self, edit: Edit) -> str:
        """One edit in words: what it does to the backward, and what leaves the backward with it."""
        here = self._place(edit.node)
        words = f"{self._label(edit)}" + (f" in {here}" if here != edit.node else "")
        more = filter(None, (self.reasons.get(edit, ""), self._leaving([edit])))
        return "; ".join((words, *more))

    def _against(self, other: Plan) -> str:
        """What another plan does differently, in a line."""
        removed, added = self.diff(other)
        more = "; ".join(filter(None, (other._brief(added), other._leaving(added))))
        return f"{more}; without: {self._brief(removed)}" if removed else more

    def _brief(self, edits: Iterable[Edit]) -> str:
        labels: dict[str, list[str]] = {}
        for edit in edits:
            labels.setdefault(self._label(edit), []).append(edit.node)
        return ", ".join(
            (f"{len(nodes)} x " if len(nodes) > 1 else "") + f"{label} ({self._places(nodes)})"
            for label, nodes in labels.items()
        )

    def _alike(self, edits: Iterable[Edit]) -> dict[tuple[str, str], list[Edit]]:
        groups: dict[tuple[str, str], list[Edit]] = {}
        for edit in edits:
            groups.setdefault((self._label(edit), self.reasons.get(edit, "")), []).append(edit)
        return groups

    def _leaving(self, edits: Iterable[Edit]) -> str:
        """What is held fixed by these prunes, and what of the model leaves the backward."""
        cuts = [self.cuts[edit] for edit in edits if self.cuts.get(edit)]
        if not cuts:
            return ""
        held = dict.fromkeys(self._operation(nodes[0]) for nodes in cuts)
        gone = dict.fromkeys(node for nodes in cuts for node in nodes[1:])
        words = f"held fixed: {_some(held)}"
        if gone:
            words += f"; out of the backward: {_some(dict.fromkeys(map(self._operation, gone)))}"
            paths = dict.fromkeys(path for node in gone if (path := self.where[node][1]))
            words += f" in {_some(compress(paths))}" if paths else ""
        return words

    def _operation(self, node: str) -> str:
        return short_name(self.where.get(node, (node, ""))[0])

    def _places(self, nodes: Iterable[str]) -> str:
        return ", ".join(compress(self._place(node) for node in nodes))

    def _place(self, node: str) -> str:
        return self.where.get(node, ("", ""))[1] or node

    def _label(self, edit: Edit) -> str:
        """The edit with its operation in place of its node."""
        return edit.words(self._operation(edit.node))


def _plan(data: Mapping[str, Any]) -> Plan:
    edits = [(edit_of_data(entry), entry) for entry in data["edits"]]
    return Plan(
        tuple(edit for edit, _ in edits),
        data["policy"],
        {edit: str(entry["reason"]) for edit, entry in edits},
        data["cost"],
        data["optimal"],
        data["fingerprint"],
        tuple(data["left"]),
        {node: (operation, module) for node, (operation, module) in data["where"].items()},
        {edit: tuple(entry["cuts"]) for edit, entry in edits if "cuts" in entry},
        tuple(_plan(other) for other in data["alternatives"]),
        data["stopped"],
    )


def _some(words: Iterable[str], most: int = 6) -> str:
    words = list(words)
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if words[most:] else "")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


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
