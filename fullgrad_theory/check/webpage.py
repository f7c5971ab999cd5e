"""A report as one page for a browser: no file beside it, no network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib import metadata
from typing import Any

from ..graph.computation import ComputationGraph
from ..pages import filled
from ..plan.words import PlanText, compress
from .drawing import KINDS, Drawn, drawn
from .plotting import plot
from .render import few, figure, share
from .report import FINE, WORDS, Report, Verdict, group_nodes, mends, worst

_MARKS = {True: Verdict.PROVED, False: Verdict.VIOLATED, None: Verdict.UNKNOWN}


def to_html(
    report: Report, graph: ComputationGraph | None = None, before: Report | None = None
) -> str:
    """The report as a page: verdict, obstacles, residuals, shares, plan and the computation.

    `graph`: what was checked, as `trace` returns it; without it the computation is drawn without
    edges. `before`: the report of its gradient as it is, for what the edits changed.
    """
    nodes = drawn(report, graph, before)
    return filled(
        "report.html",
        report=report,
        word=WORDS[report.complete],
        mark=KINDS[_MARKS[report.complete]],
        sentence=sentence(report),
        obstacles=list(_obstacles(report)),
        plot=plot(nodes),
        measured=list(_measured(report)),
        plan=report.plan,
        paragraphs=PlanText(report.plan)._paragraphs() if report.plan else (),
        data=_data(report, nodes, graph is not None),
        version=metadata.version("fullgrad-theory"),
    )


def sentence(report: Report) -> str:
    """The verdict in a sentence."""
    under = f"under the policy {report.policy}" if report.policy else "as it is"
    whose = f"what the gradient of {report.model}, {under}, gives to the input and to every bias"
    if report.complete is None:
        return f"whether {whose} adds up to the output is not known."
    adds = f"{whose} {'adds' if report.complete else 'does not add'} up to the output"
    if report.error is None:
        return f"{adds}; that is its structure alone, nothing was measured."
    was = report.error_before if report.policy else None
    change = f" ({figure(was)} before the edits)" if was is not None else ""
    return f"{adds}: the relative error is {figure(report.error)}{change}."


def _obstacles(report: Report) -> Iterator[dict[str, Any]]:
    for group in group_nodes(n for n in report.nodes if n.verdict not in FINE):
        first, paths = group[0], compress(n.module_path for n in group if n.module_path)
        yield {
            "kind": KINDS[first.verdict],
            "op": first.op,
            "count": f"{len(group)} of {len(report.nodes)} operations",
            "where": ", ".join(few(paths, 8)) or "at the top level",
            "sources": ", ".join(few(dict.fromkeys(n.source for n in group if n.source))),
            "why": first.reason,
            "mend": "; ".join(few(mends(group))),
            "error": figure(worst(group)),
            "first": first.name,
        }


def _measured(report: Report) -> Iterator[tuple[str, ...]]:
    for one in report.measurements:
        errors = figure(one.relative), figure(one.absolute)
        yield one.where, one.dtype, *errors, share(one.input_share), share(one.bias_share)


def _data(report: Report, nodes: Sequence[Drawn], linked: bool) -> dict[str, Any]:
    """The drawing's nodes for its script: rows of places in `texts`, where each text is once."""
    texts: dict[str, int] = {}
    places = {node.name: place for place, node in enumerate(nodes)}
    kinds = list(KINDS)
    counts = dict.fromkeys(kinds, 0)
    rows: list[list[Any]] = []
    for node in nodes:
        counts[node.kind] += 1
        ends = (node.degree, figure(node.error), figure(node.before), node.edit, node.reason)
        head = [texts.setdefault(t, len(texts)) for t in (node.name, node.op, node.module)]
        tail = [texts.setdefault(t, len(texts)) for t in (*ends, node.source)]
        rows.append([*head, kinds.index(node.kind), *tail, [places[n] for n in node.reads]])
    return {
        "model": report.model,
        "linked": linked,
        "kinds": [asdict(KINDS[kind]) | {"count": counts[kind]} for kind in kinds],
        "texts": list(texts),
        "nodes": rows,
    }
