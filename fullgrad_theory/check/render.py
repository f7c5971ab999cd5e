"""A report for a terminal: rich tables and text, in ASCII, at most `WIDTH` columns wide."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Iterator, Sequence

from rich.box import Box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..plan.plan import compress
from .report import (
    FINE,
    WIDTH,
    WORDS,
    EndToEnd,
    NodeReport,
    Report,
    Verdict,
    group_nodes,
    mends,
    shape,
    worst,
)

_GROUPS_SHOWN = 24
_OPERATIONS_SHOWN = 30
_STYLES = {True: "bold green", False: "bold red", None: "bold yellow"}
_VERDICT_STYLES = {
    Verdict.PROVED: "green",
    Verdict.NUMERIC: "green",
    Verdict.VIOLATED: "red",
    Verdict.OPAQUE: "yellow",
    Verdict.UNKNOWN: "yellow",
}
# ASCII, for terminals and log files that know nothing else
_RULED = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)


def as_text(parts: Iterable[RenderableType]) -> str:
    """What a terminal without colour shows."""
    page = io.StringIO()
    console = Console(
        file=page, width=WIDTH, color_system=None, force_terminal=False, legacy_windows=False
    )
    for part in parts:
        console.print(part, highlight=False)
    return "\n".join(line.rstrip() for line in page.getvalue().splitlines())


def in_colour(report: Report) -> RenderableType:
    """The whole report for a rich console."""
    return Group(*whole(report))


def obstacles(report: Report) -> Iterator[RenderableType]:
    """The verdict, and what stands in the way of a complete one."""
    yield _headline(report)
    yield from _listed("problems", report.problems, "red")
    yield from _culprits(report.nodes)


def whole(report: Report) -> Iterator[RenderableType]:
    """Everything that a reader is shown, the verdict first."""
    yield _headline(report)
    yield from _listed("problems", report.problems, "red")
    if report.nodes:
        yield _title("operations")
        yield _operations(report.nodes)
    yield from _culprits(report.nodes)
    if report.measurements:
        yield _title("end to end")
        yield _measured(report.measurements)
    if report.plan is not None:
        yield _title("plan")
        for line in str(report.plan).splitlines():  # it wraps itself to the terminal's width
            yield Text("\n".join(textwrap.wrap(line, WIDTH, subsequent_indent=" " * 8)))
    yield from _listed("notes", report.notes, "")


def _title(words: str) -> Text:
    return Text(f"\n{words}", style="bold")


def _headline(report: Report) -> Text:
    of = f"policy {report.policy}" if report.policy else "the gradient as it is"
    if report.error is None:
        error = "nothing was measured"
    else:
        before = report.error_before if report.policy else None
        change = f"{figure(before)} -> " if before is not None else ""
        error = f"relative error {change}{figure(report.error)}"
    return Text.assemble(
        (WORDS[report.complete], _STYLES[report.complete]), f"  {report.model}, {of}: {error}"
    )


def _listed(title: str, lines: Sequence[str], style: str) -> Iterator[RenderableType]:
    """A list; lines that differ in numbers only are said once, and counted."""
    alike: dict[str, list[str]] = {}
    for line in lines:
        alike.setdefault(shape(line), []).append(line)
    if lines:
        yield _title(title)
        table = Table.grid(padding=(0, 1))
        for first, *more in alike.values():
            count = f" (and {len(more)} more like it)" if more else ""
            table.add_row("  -", Text(first + count, style=style, overflow="fold"))
        yield table


# --------------------------------------------------------------------------- tables


def _operations(nodes: Sequence[NodeReport]) -> Table:
    """Counts by operation, the troubled ones first; then the many, and the rest in one row."""
    by_operation: dict[str, list[NodeReport]] = {}
    for node in nodes:
        by_operation.setdefault(node.op, []).append(node)
    order = sorted(by_operation.items(), key=_rank)
    shown = [v for v in Verdict if _count(nodes, v)]
    table = Table(box=_RULED, show_edge=False, show_footer=True)
    table.add_column("operation", footer="all", overflow="fold")
    table.add_column("nodes", footer=str(len(nodes)), justify="right")
    for verdict in shown:
        total = str(_count(nodes, verdict))
        style = _VERDICT_STYLES[verdict]
        table.add_column(str(verdict), footer=total, justify="right", style=style)
    table.add_column("worst error", justify="right")
    for operation, own in order[:_OPERATIONS_SHOWN]:
        table.add_row(Text(operation), *_cells(own, shown))
    rest = order[_OPERATIONS_SHOWN:]
    if rest:
        others = [node for _, own in rest for node in own]
        table.add_row(f"{len(rest)} other operations", *_cells(others, shown))
    return table


def _rank(entry: tuple[str, list[NodeReport]]) -> tuple[int, int, str]:
    operation, nodes = entry
    return -sum(n.verdict not in FINE for n in nodes), -len(nodes), operation


def _cells(nodes: Sequence[NodeReport], shown: Sequence[Verdict]) -> list[str]:
    """A row of counts, and the worst error."""
    counts = [str(_count(nodes, verdict) or "") for verdict in shown]
    return [str(len(nodes)), *counts, figure(worst(nodes))]


def _count(nodes: Sequence[NodeReport], verdict: Verdict) -> int:
    return sum(n.verdict == verdict for n in nodes)


def _measured(measurements: Sequence[EndToEnd]) -> Table:
    table = Table(box=_RULED, show_edge=False)
    table.add_column("where", overflow="fold")
    table.add_column("dtype")
    for title in ("relative", "absolute", "input", "biases"):
        table.add_column(title, justify="right", no_wrap=True)
    for one in measurements:
        figures = (figure(one.relative), figure(one.absolute))
        shares = (share(one.input_share), share(one.bias_share))
        table.add_row(Text(one.where), one.dtype, *figures, *shares)
    return table


def figure(value: float | None) -> str:
    """A number in three digits; nothing for None."""
    if not value:
        return "" if value is None else "0"
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e4 else f"{value:.1e}"


def share(value: float) -> str:
    """A fraction in per cent."""
    return f"{100 * value:.1f} %" if abs(value) < 100 else f"{100 * value:.1e} %"


# --------------------------------------------------------------------------- what stands in the way


def _culprits(nodes: Iterable[NodeReport]) -> Iterator[RenderableType]:
    """A paragraph a group of nodes; the largest groups where there are too many."""
    groups = group_nodes(n for n in nodes if n.verdict not in FINE)
    if not groups:
        return
    yield _title("what stands in the way")
    ranked = sorted(groups, key=len, reverse=True)[:_GROUPS_SHOWN]
    for place, group in enumerate(g for g in groups if g in ranked):
        if place:
            yield ""
        yield from _paragraph(group)
    hidden = [group for group in groups if group not in ranked]
    if hidden:
        count = sum(map(len, hidden))
        yield Text(f"{len(hidden)} more kinds, {count} nodes; all are in report.nodes")


def _paragraph(group: Sequence[NodeReport]) -> Iterator[RenderableType]:
    """What, where, why, and what mends it."""
    first, error = group[0], worst(group)
    counted = f"{len(group)} {first.verdict}"
    counted += f", error up to {figure(error)}" if error is not None else ""
    yield Text.assemble(first.op, "  ", (counted, _VERDICT_STYLES[first.verdict]))
    paths = compress(n.module_path for n in group if n.module_path)
    sources = dict.fromkeys(n.source for n in group if n.source)
    where = ", ".join(few(paths, 8)) or "(top level)"
    at = f" ({', '.join(few(sources, 3))})" if sources else ""
    table = Table.grid(padding=(0, 1))
    table.add_row("", "where", Text.assemble(where, (at, "dim"), overflow="fold"))
    table.add_row("", "why", Text(first.reason, overflow="fold"))
    edits = mends(group)
    if edits:
        table.add_row("", "mend", Text("; ".join(few(edits)), style="cyan", overflow="fold"))
    yield table


def few(texts: Iterable[str], most: int = 3) -> list[str]:
    """The first of them, and how many more there are."""
    texts = list(texts)
    left = len(texts) - most
    return texts[:most] + ([f"and {left} more"] if left > 0 else [])
