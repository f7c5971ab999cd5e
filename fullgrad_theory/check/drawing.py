"""What a drawing of a checked computation shows: its nodes, what each reads, and its verdict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..graph.computation import ComputationGraph, holds_tensor
from .report import NodeReport, Report, Verdict


@dataclass(frozen=True)
class Kind:
    """How a verdict is shown: by a sign and a word as well as by its colour.

    The colours are those of Okabe and Ito, which all kinds of colour vision tell apart; `tint` is
    the same, pale. `rank`: the higher one is the news in a module that holds several.
    """

    word: str
    sign: str
    colour: str
    tint: str
    rank: int
    means: str


BESIDE = "beside"
"""the kind of what no verdict is about"""
KINDS: Mapping[str, Kind] = {
    Verdict.VIOLATED: Kind(
        "violated", "✕", "#d55e00", "#fbe3d3", 5, "inconsistent: its residual is the witness"
    ),
    Verdict.OPAQUE: Kind(
        "opaque", "◐", "#b57a00", "#fdf0d0", 4, "part of the output that belongs to nobody"
    ),
    Verdict.UNKNOWN: Kind(
        "unknown", "?", "#a8467a", "#f7e3ee", 3, "the two ways disagree, or nothing is known"
    ),
    Verdict.NUMERIC: Kind(
        "numeric", "≈", "#0072b2", "#d9eaf6", 2, "rests on measurements at rounding level"
    ),
    Verdict.PROVED: Kind(
        "proved", "✓", "#009e73", "#d6f1e8", 1, "follows from its lemma, and the kernel agrees"
    ),
    BESIDE: Kind("beside", "·", "#8c959f", "#eef1f4", 0, "an end, or carries no contribution"),
}


@dataclass(frozen=True)
class Drawn:
    """A node of a drawing. `reads`: the names of those it reads; `before`: its error unedited."""

    name: str
    op: str
    module: str
    source: str
    kind: str
    degree: str = ""
    error: float | None = None
    before: float | None = None
    edit: str = ""
    reason: str = ""
    reads: tuple[str, ...] = ()


def drawn(
    report: Report, graph: ComputationGraph | None = None, before: Report | None = None
) -> list[Drawn]:
    """The nodes to draw, in the order in which they run.

    With the traced graph there are edges, and the nodes that no verdict is about, if the input
    reaches them. `before`: the report of the same graph's gradient as it is.
    """
    earlier = {node.name: node.error for node in before.nodes} if before else {}
    judged = {node.name: node for node in report.nodes}
    if graph is None:
        return [_judged(node, earlier, ()) for node in report.nodes]
    return [
        _judged(judged[name], earlier, reads)
        if name in judged
        else Drawn(name, op, module, source, BESIDE, reason=_why_beside(report, op), reads=reads)
        for name, op, module, source, reads in _moving(graph)
    ]


def _judged(node: NodeReport, earlier: Mapping[str, float | None], reads: tuple[str, ...]) -> Drawn:
    return Drawn(
        node.name,
        node.op,
        node.module_path,
        node.source,
        node.verdict,
        node.degree,
        node.error,
        earlier.get(node.name),
        node.edit or "",
        node.reason,
        reads,
    )


def _moving(graph: ComputationGraph) -> Iterator[tuple[str, str, str, str, tuple[str, ...]]]:
    """Tensors that the inputs reach: name, operation, module, source line, what it reads of these.

    Sizes are left out, as parameters are: they say nothing of where contributions go.
    """
    reached: set[str] = set()
    for name, data in graph.nx.nodes(data=True):
        reads = tuple(n for n in graph.nx.predecessors(name) if n in reached)
        end = data["kind"] in ("placeholder", "output")
        if end or (reads and holds_tensor(graph.nodes[name])):
            reached.add(name)
            yield name, data["op"], data["module_path"], data["source"], reads


def _why_beside(report: Report, op: str) -> str:
    ends = {"placeholder": "an input", "output": "what the model returns"}
    cut = "; the plan's edits take it out of the backward" if report.plan else ""
    return ends.get(op, f"no gradient that is attributed goes through it{cut}")
