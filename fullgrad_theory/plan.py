"""A plan: the edits that a policy makes to one graph's backward pass, and why. It is data."""

from __future__ import annotations

import hashlib
import json
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from torch import fx

from .errors import PlanError
from .operators import target_name
from .rules import Edit, FreezeScale, Integrate, Prune, Scale, Secant
from .trace import ComputationGraph, holds_tensor

KINDS: dict[str, type[Edit]] = {
    "prune": Prune,
    "scale": Scale,
    "secant": Secant,
    "freeze": FreezeScale,
    "integrate": Integrate,
}
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

    `cost` is their sum under `policy`; `optimal` says whether that is proven to be the least.
    `left` are the nodes that stay inconsistent, `where` maps nodes to (operation, module path).
    """

    edits: tuple[Edit, ...]
    policy: str
    reasons: Mapping[Edit, str]
    cost: int
    optimal: bool
    fingerprint: str
    left: tuple[str, ...] = ()
    where: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.edits)

    def __iter__(self) -> Iterator[Edit]:
        return iter(self.edits)

    def __bool__(self) -> bool:
        return True  # an empty plan is a plan

    @cached_property
    def pruned(self) -> frozenset[tuple[str, str]]:
        """The edges (node, argument) that carry no gradient."""
        return frozenset((e.node, e.argument) for e in self.edits if isinstance(e, Prune))

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
        """Write the plan as JSON, one edit a line group, factors as text."""
        edits = [
            {"edit": _kind(e)}
            | {k: str(v) if isinstance(v, Fraction) else v for k, v in vars(e).items()}
            | {"reason": self.reasons.get(e, "")}
            for e in self.edits
        ]
        data = {"format": FORMAT} | vars(self) | {"edits": edits}
        chosen = ("format", "policy", "cost", "optimal", "fingerprint", "edits", "left", "where")
        text = json.dumps({key: data[key] for key in chosen}, indent=1, ensure_ascii=False)
        Path(path).write_text(text + "\n", encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read what `save` wrote; raises `PlanError` where the file holds no plan."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if data["format"] != FORMAT:
                raise PlanError(f"{path} has the format {data['format']!r}, not {FORMAT!r}")
            reasons = {_edit(entry): str(entry["reason"]) for entry in data["edits"]}
            where = {node: (op, module) for node, (op, module) in data["where"].items()}
            return Plan(
                tuple(reasons),
                data["policy"],
                reasons,
                data["cost"],
                data["optimal"],
                data["fingerprint"],
                tuple(data["left"]),
                where,
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, PlanError):
                raise
            raise PlanError(
                f"{path} holds no plan ({type(error).__name__}: {error}); write one with plan.save"
            ) from error

    def __str__(self) -> str:
        width = shutil.get_terminal_size().columns
        proof = "" if self.optimal else ", not proven to be the least"
        head = f"policy {self.policy!r}: {_count(len(self), 'edit')}, cost {self.cost}{proof}"
        groups: dict[tuple[str, str], list[str]] = {}
        for edit in self.edits:
            key = (self._label(edit), self.reasons.get(edit, ""))
            groups.setdefault(key, []).append(self._place(edit.node))
        lines = [head]
        for (label, reason), places in groups.items():
            text = f"{len(places):>5} x {label}: {', '.join(compress(places))}"
            lines += textwrap.wrap(text, width, subsequent_indent=" " * 8)
            lines += textwrap.wrap(reason, width, initial_indent=" " * 8, subsequent_indent=" " * 8)
        by_operation: dict[str, list[str]] = {}
        for node in self.left:
            by_operation.setdefault(self._operation(node), []).append(self._place(node))
        for operation, places in by_operation.items():
            text = f"{len(places):>5} x left incomplete: {operation}: {', '.join(compress(places))}"
            lines += textwrap.wrap(text, width, subsequent_indent=" " * 8)
        return "\n".join(lines)

    def _operation(self, node: str) -> str:
        name = self.where.get(node, (node, ""))[0]
        return name.split(".")[1] if name.startswith("aten.") else name

    def _place(self, node: str) -> str:
        return self.where.get(node, ("", ""))[1] or node

    def _label(self, edit: Edit) -> str:
        """The edit with its operation in place of its node."""
        return str(edit).replace(edit.node, self._operation(edit.node), 1)


def _kind(edit: Edit) -> str:
    return next(name for name, kind in KINDS.items() if isinstance(edit, kind))


def _edit(entry: Mapping[str, Any]) -> Edit:
    fields = {k: v for k, v in entry.items() if k not in ("edit", "reason")}
    if "factor" in fields:
        fields["factor"] = Fraction(fields["factor"])
    if "region" in fields:
        fields["region"] = tuple(fields["region"])
    return KINDS[entry["edit"]](**fields)


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
