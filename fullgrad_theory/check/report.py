"""The verdict of a check as data, and as a table for a terminal."""

from __future__ import annotations

import io
import json
import re
import tempfile
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from math import isfinite
from pathlib import Path
from typing import Any

from rich.box import Box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..errors import FullgradError
from ..plan.plan import Plan, compress


class Verdict(StrEnum):
    """What is known of one node."""

    PROVED = "proved"
    NUMERIC = "numeric"
    VIOLATED = "violated"
    OPAQUE = "opaque"
    UNKNOWN = "unknown"


class IncompleteError(FullgradError, AssertionError):
    """Raised by `Report.raise_if_incomplete`; its text is the report."""


@dataclass(frozen=True)
class NodeReport:
    """One live node. `error`: the relative local residual in float64, None where none was taken.

    `degree` is the label under which the node was judged; `edit` the edit applied to it, or, where
    it is violated, the one that would mend it.
    """

    name: str
    op: str
    verdict: Verdict
    module_path: str
    source: str
    degree: str
    error: float | None
    edit: str | None
    reason: str


@dataclass(frozen=True)
class EndToEnd:
    """<c, f> against <x, G_x> + sum <b, G_b> for one cotangent c over the whole output.

    `relative` divides by sum |c f|; shares are fractions of <c, f>.
    """

    where: str
    dtype: str
    absolute: float
    relative: float
    input_share: float
    bias_share: float


@dataclass(frozen=True)
class Report:
    """The verdict for a whole model.

    `complete` is None where it could not be judged. `problems` say what stands in the way, `notes`
    what a reader should know. `error` is the largest relative end-to-end residual in float64,
    `error_before` that of the unedited gradient.
    """

    model: str
    policy: str | None
    complete: bool | None
    error: float | None
    error_before: float | None
    nodes: tuple[NodeReport, ...]
    measurements: tuple[EndToEnd, ...]
    plan: Plan | None
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """What a terminal shows, without colour, at most 100 columns wide."""
        return _text(_render(self))

    def brief(self) -> str:
        """The verdict, and what stands in the way of a complete one: where, why, the mend."""
        return _text(_render_brief(self))

    def __rich__(self) -> RenderableType:
        """The same for a rich console, in colour."""
        return Group(*_render(self))

    def to_json(self) -> str:
        """Everything the report holds, as JSON; `Report.from_json` reads it back.

        A number that is not finite is written as a string: "nan", "inf", "-inf".
        """
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        fields |= {
            "nodes": [asdict(node) for node in self.nodes],
            "measurements": [asdict(one) for one in self.measurements],
            "plan": None if self.plan is None else _plan_data(self.plan),
        }
        head = {"format": FORMAT, "verdict": _WORDS[self.complete]}
        return json.dumps(_strict(head | fields), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report that `to_json` wrote; raises ValueError where `text` is none."""
        data = json.loads(text)
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"not a report in the format {FORMAT!r}")
        nodes = (
            NodeReport(
                **node | {"verdict": Verdict(node["verdict"]), "error": _number(node["error"])}
            )
            for node in data["nodes"]
        )
        measurements = (
            EndToEnd(**{k: v if k in ("where", "dtype") else _number(v) for k, v in one.items()})
            for one in data["measurements"]
        )
        plan = data["plan"]
        return cls(
            model=data["model"],
            policy=data["policy"],
            complete=data["complete"],
            error=_number(data["error"]),
            error_before=_number(data["error_before"]),
            nodes=tuple(nodes),
            measurements=tuple(measurements),
            plan=None if plan is None else _plan_of(plan),
            problems=tuple(data["problems"]),
            notes=tuple(data["notes"]),
        )

    @classmethod
    def unjudged(cls, model: str, policy: str | None, why: str) -> Report:
        """The report of a model that could not even be traced."""
        return cls(model, policy, None, None, None, (), (), None, problems=(why,))

    @property
    def exit_code(self) -> int:
        """0 complete, 1 incomplete, 2 could not be judged."""
        return {True: 0, False: 1, None: 2}[self.complete]

    def raise_if_incomplete(self) -> None:
        """Raise `IncompleteError`, the report as its text, unless the verdict is complete."""
        if not self.complete:
            raise IncompleteError(str(self))


# --------------------------------------------------------------------------- JSON

FORMAT = "fullgrad-theory report 1"


def _strict(value: Any) -> Any:
    """Plain JSON values; numbers that are not finite as strings."""
    if isinstance(value, dict):
        return {key: _strict(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(entry) for entry in value]
    return str(value) if isinstance(value, float) and not isfinite(value) else value


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) else value


def _plan_data(plan: Plan) -> Any:
    """The contents of the file that `plan.save` writes."""
    with tempfile.TemporaryDirectory() as folder:
        plan.save(file := Path(folder) / "plan.json")
        return json.loads(file.read_text(encoding="utf-8"))


def _plan_of(data: Any) -> Plan:
    with tempfile.TemporaryDirectory() as folder:
        (file := Path(folder) / "plan.json").write_text(json.dumps(data), encoding="utf-8")
        return Plan.load(file)


# --------------------------------------------------------------------------- text

WIDTH = 100
_GROUPS_SHOWN = 24
_OPERATIONS_SHOWN = 30
_WORDS = {True: "COMPLETE", False: "INCOMPLETE", None: "COULD NOT BE JUDGED"}
_STYLES = {True: "bold green", False: "bold red", None: "bold yellow"}
_VERDICT_STYLES = {
    Verdict.PROVED: "green",
    Verdict.NUMERIC: "green",
    Verdict.VIOLATED: "red",
    Verdict.OPAQUE: "yellow",
    Verdict.UNKNOWN: "yellow",
}
FINE = (Verdict.PROVED, Verdict.NUMERIC)
# ASCII, for terminals and log files that know nothing else
_RULED = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)


def _text(parts: Iterable[RenderableType]) -> str:
    page = io.StringIO()
    console = Console(
        file=page, width=WIDTH, color_system=None, force_terminal=False, legacy_windows=False
    )
    for part in parts:
        console.print(part, highlight=False)
    return "\n".join(line.rstrip() for line in page.getvalue().splitlines())


def _render_brief(report: Report) -> Iterator[RenderableType]:
    yield _headline(report)
    yield from _listed("problems", report.problems, "red")
    yield from _obstacles(report)


def _render(report: Report) -> Iterator[RenderableType]:
    yield _headline(report)
    yield from _listed("problems", report.problems, "red")
    if report.nodes:
        yield Text("\noperations", style="bold")
        yield _operations(report.nodes)
    yield from _obstacles(report)
    if report.measurements:
        yield Text("\nend to end", style="bold")
        yield _measured(report.measurements)
    if report.plan is not None:
        yield Text("\nplan", style="bold")
        for line in str(report.plan).splitlines():  # it wraps itself to the terminal's width
            yield Text("\n".join(textwrap.wrap(line, WIDTH, subsequent_indent=" " * 8)))
    yield from _listed("notes", report.notes, "")


def _headline(report: Report) -> Text:
    of = f"policy {report.policy}" if report.policy else "the gradient as it is"
    if report.error is None:
        error = "nothing was measured"
    else:
        error = f"relative error {_figure(report.error)}"
        if report.policy and report.error_before is not None:
            error = f"relative error {_figure(report.error_before)} -> {_figure(report.error)}"
    return Text.assemble(
        (_WORDS[report.complete], _STYLES[report.complete]), f"  {report.model}, {of}: {error}"
    )


def _listed(title: str, lines: Sequence[str], style: str) -> Iterator[RenderableType]:
    """A list; lines that differ in numbers only are said once, and counted."""
    alike: dict[str, list[str]] = {}
    for line in lines:
        alike.setdefault(_shape(line), []).append(line)
    if lines:
        yield Text(f"\n{title}", style="bold")
        table = Table.grid(padding=(0, 1))
        for first, *more in alike.values():
            count = f" (and {len(more)} more like it)" if more else ""
            table.add_row("  -", Text(first + count, style=style, overflow="fold"))
        yield table


def _operations(nodes: Sequence[NodeReport]) -> Table:
    """Counts by operation, the troubled ones first; then the many, and the rest in one row."""
    counts: dict[str, Counter[Verdict]] = {}
    worst: dict[str, float] = {}
    for node in nodes:
        counts.setdefault(node.op, Counter())[node.verdict] += 1
        if node.error is not None:
            worst[node.op] = max(worst.get(node.op, 0.0), node.error, key=_badness)
    order = sorted(
        counts, key=lambda op: (-sum(counts[op][v] for v in Verdict if v not in FINE),
                                -counts[op].total(), op)
    )  # fmt: skip
    shown = [v for v in Verdict if any(c[v] for c in counts.values())]
    table = Table(box=_RULED, show_edge=False, show_footer=True)
    table.add_column("operation", footer="all", overflow="fold")
    table.add_column("nodes", footer=str(len(nodes)), justify="right")
    for verdict in shown:
        total = sum(c[verdict] for c in counts.values())
        style = _VERDICT_STYLES[verdict]
        table.add_column(str(verdict), footer=str(total), justify="right", style=style)
    table.add_column("worst error", justify="right")
    for op in order[:_OPERATIONS_SHOWN]:
        row = [str(counts[op][v] or "") for v in shown]
        table.add_row(Text(op), str(counts[op].total()), *row, _figure(worst.get(op)))
    rest = order[_OPERATIONS_SHOWN:]
    if rest:
        row = [str(sum(counts[op][v] for op in rest) or "") for v in shown]
        errors = [worst[op] for op in rest if op in worst]
        table.add_row(
            f"{len(rest)} other operations",
            str(sum(counts[op].total() for op in rest)),
            *row,
            _figure(max(errors, key=_badness) if errors else None),
        )
    return table


def _obstacles(report: Report) -> Iterator[RenderableType]:
    groups = group_nodes(n for n in report.nodes if n.verdict not in FINE)
    if groups:
        yield Text("\nwhat stands in the way", style="bold")
        yield from _culprits(groups)


def _culprits(groups: Sequence[Sequence[NodeReport]]) -> Iterator[RenderableType]:
    """A paragraph a group: what, where, why, and what mends it."""
    ranked = sorted(groups, key=len, reverse=True)[:_GROUPS_SHOWN]
    for place, group in enumerate(g for g in groups if g in ranked):
        if place:
            yield ""
        first = group[0]
        errors = [n.error for n in group if n.error is not None]
        counted = f"{len(group)} {first.verdict}"
        counted += f", error up to {_figure(max(errors, key=_badness))}" if errors else ""
        yield Text.assemble(first.op, "  ", (counted, _VERDICT_STYLES[first.verdict]))
        paths = compress(n.module_path for n in group if n.module_path)
        sources = dict.fromkeys(n.source for n in group if n.source)
        edits = dict.fromkeys(edit_of_kind(n) for n in group if n.edit)
        where = ", ".join(_few(paths, 8)) or "(top level)"
        at = f" ({', '.join(_few(sources, 3))})" if sources else ""
        table = Table.grid(padding=(0, 1))
        table.add_row("", "where", Text.assemble(where, (at, "dim"), overflow="fold"))
        table.add_row("", "why", Text(first.reason, overflow="fold"))
        if edits:
            table.add_row("", "mend", Text("; ".join(_few(edits)), style="cyan", overflow="fold"))
        yield table
    hidden = [group for group in groups if group not in ranked]
    if hidden:
        nodes = sum(map(len, hidden))
        yield Text(f"{len(hidden)} more kinds, {nodes} nodes; all are in report.nodes")


def _few(texts: Iterable[str], most: int = 3) -> list[str]:
    texts = list(texts)
    left = len(texts) - most
    return texts[:most] + ([f"and {left} more"] if left > 0 else [])


def edit_of_kind(node: NodeReport) -> str:
    """A node's edit with its operation in place of its name: the same for the whole group."""
    short = node.op.split(".")[1] if node.op.startswith("aten.") else node.op
    return re.sub(rf"\b{re.escape(node.name)}\b", short, node.edit or "")


def _measured(measurements: Sequence[EndToEnd]) -> Table:
    table = Table(box=_RULED, show_edge=False)
    table.add_column("where", overflow="fold")
    table.add_column("dtype")
    for title in ("relative", "absolute", "input", "biases"):
        table.add_column(title, justify="right", no_wrap=True)
    for one in measurements:
        figures = (_figure(one.relative), _figure(one.absolute))
        shares = (_share(one.input_share), _share(one.bias_share))
        table.add_row(Text(one.where), one.dtype, *figures, *shares)
    return table


def _figure(value: float | None) -> str:
    if not value:
        return "" if value is None else "0"
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e4 else f"{value:.1e}"


def _share(value: float) -> str:
    return f"{100 * value:.1f} %" if abs(value) < 100 else f"{100 * value:.1e} %"


def _badness(error: float) -> float:
    """NaN is the worst of all."""
    return error if error == error else float("inf")


# --------------------------------------------------------------------------- grouping


def group_nodes(nodes: Iterable[NodeReport]) -> list[list[NodeReport]]:
    """Nodes of one operation with one reason and one kind of edit; violated groups come first."""
    groups: dict[tuple[str, ...], list[NodeReport]] = {}
    for node in nodes:
        key = (node.verdict, node.op, _shape(node.reason), edit_of_kind(node))
        groups.setdefault(key, []).append(node)
    return sorted(groups.values(), key=lambda g: (list(Verdict).index(g[0].verdict), -len(g)))


_SUFFIX = re.compile(r"(?<=[A-Za-z])_\d+\b")
_VARYING = re.compile(r"\d+(?:\.\d+)?e[-+]?\d+|\d+\.\d+|(?<=[A-Za-z]\.)\d+|(?<=:)\d+")


def _shape(text: str) -> str:
    """The text without node numbers, block numbers, lines and measurements; a degree counts."""
    return _VARYING.sub("#", _SUFFIX.sub("", text))
