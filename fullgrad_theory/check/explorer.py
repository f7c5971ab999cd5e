"""A checked computation for Model Explorer: its graph, and the verdicts to lay over it.

The formats are those of ai-edge-model-explorer, `graph_builder.py` and `node_data_builder.py`: a
`GraphCollection`, and a `ModelNodeData`, by the same graph's name and the same nodes' ids.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ..operators.calls import short_name
from .drawing import KINDS, Drawn
from .render import figure
from .report import WORDS, Report


def to_explorer_graph(report: Report, nodes: Sequence[Drawn]) -> str:
    """The graph, as `drawn` lists it, as JSON; modules are the layers that open."""
    group = {"": {"verdict": WORDS[report.complete], "policy": report.policy or "none"}}
    graph = {
        "id": report.model,
        "nodes": list(map(_node, nodes)),
        "groupNodeAttributes": group,
    }
    return json.dumps({"label": report.model, "graphs": [graph]})


def _node(node: Drawn) -> dict[str, Any]:
    said = {
        "verdict": KINDS[node.kind].word,
        "degrees": node.degree,
        "lemma or reason": node.reason,
        "local error": figure(node.error),
        "local error before the edits": figure(node.before),
        "edit": node.edit,
        "operation": node.op,
        "source": node.source,
    }
    return {
        "id": node.name,
        "label": node.name if node.op in ("placeholder", "output") else short_name(node.op),
        "namespace": node.module.replace(".", "/"),
        "attrs": [{"key": key, "value": value} for key, value in said.items() if value],
        "incomingEdges": [
            {"sourceNodeId": name, "sourceNodeOutputId": "0", "targetNodeInputId": str(place)}
            for place, name in enumerate(node.reads)
        ],
    }


def to_node_data(report: Report) -> str:
    """The verdict of every judged node, in its colour, as JSON."""
    results = {
        node.name: {
            "value": f"{KINDS[node.verdict].sign} {KINDS[node.verdict].word}",
            "bgColor": KINDS[node.verdict].tint,
            "textColor": "#1b1f24",
        }
        for node in report.nodes
    }
    data = {"name": "completeness", "results": results, "showExpandedSummaryOnGroupNode": True}
    return json.dumps({report.model: data})
