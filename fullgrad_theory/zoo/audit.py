"""One architecture audited, in a process of its own."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from time import process_time
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..check.completeness import check_completeness
from ..check.report import FINE, Report
from ..check.words import dtype_name
from ..graph.computation import ComputationGraph
from ..graph.door import Inputs, Model
from ..graph.sources import first_line
from ..graph.tracing import trace
from ..operators.algebra import Algebra
from ..operators.calls import short_name
from ..plan.labelling import degrees
from .rows import Architecture, Options, Outcome, Row

Build = Callable[[Architecture, bool], tuple[Model, Inputs]]
"""makes a model and its inputs, on the meta device where nothing is to be run (True)"""
_LINEAR = (Algebra.STRUCTURAL, Algebra.AFFINE)


def audited(build: Build, options: Options, architecture: Architecture) -> Row:
    """The row of one architecture; whatever is raised on the way is in it."""
    torch.set_num_threads(1)  # several architectures beside each other use the cores better
    began = process_time()
    row = _stages(build, options, Row.of(architecture, options, Outcome.NOT_BUILT), architecture)
    return replace(row, seconds=process_time() - began, memory=_peak()).ended()


def _stages(build: Build, options: Options, row: Row, architecture: Architecture) -> Row:
    try:
        model, inputs = build(architecture, not options.numeric)
        row = replace(row, verdict=Outcome.RAISED, inputs=_shapes(inputs))
        graph = trace(model, inputs)
        before = check_completeness(graph, numeric=options.numeric, beside=())
        row = replace(row, nonlinear=_nonlinear(graph), **_as_it_is(before))
        after = check_completeness(graph, policy=options.policy, numeric=options.numeric, beside=())
        return replace(row, **_edited(after))
    except BaseException as error:  # noqa: BLE001  no exit of theirs ends the run
        name = type(error).__name__
        words = first_line(error).removeprefix(f"{name}: ")
        return replace(row, failure_class=name, failure=words)


def _as_it_is(report: Report) -> dict[str, Any]:
    broken = [node for node in report.nodes if node.verdict not in FINE]
    return {
        "plain": Outcome.of(report.complete),
        "error_before": report.error,
        "operations": _counted(short_name(node.op) for node in broken),
        "modules": _counted(re.sub(r"\b\d+\b", "*", node.module_path) for node in broken),
    }


def _edited(report: Report) -> dict[str, Any]:
    names = {node.name: short_name(node.op) for node in report.nodes}
    edits = [edit.words(names.get(edit.node, edit.node)) for edit in report.plan or ()]
    own = report.measurements[0] if report.measurements else None
    return {
        "verdict": Outcome.of(report.complete),
        "error": report.error,
        "edits": _counted(edits),
        "input_share": own and own.input_share,
        "bias_share": own and own.bias_share,
        "problems": list(report.problems),
    }


def _nonlinear(graph: ComputationGraph) -> int:
    """How many live calls are not linear; a product is one where several of its factors move."""
    labels = degrees(graph, ())
    calls = [call for name, call in labels.live.calls.items() if name in labels.alive]
    return sum(
        len(call.moving) > 1
        if call.operator.algebra is Algebra.MULTILINEAR
        else call.operator.algebra not in _LINEAR
        for call in calls
    )


def _counted(names: Iterable[str]) -> dict[str, int]:
    return dict(Counter(names).most_common())


def _shapes(inputs: Inputs) -> str:
    """`1,3,224,224 1,8:int64`, as the command line takes them."""
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    return " ".join(
        ",".join(map(str, t.shape)) + ("" if t.is_floating_point() else f":{dtype_name(t.dtype)}")
        for t in tensors
    )


def _peak() -> float | None:
    """The most memory that this process has held, MiB; None where the system does not say."""
    if sys.platform == "win32":
        return None
    import resource

    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
