"""The verdict: each node's by its lemma and by its real backward, and the whole's end to end."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from ..backward.balanced import Balanced, rewrite
from ..bars import Tick, progress
from ..edits.costs import Policy
from ..errors import FullgradError, NonFiniteError, TraceError
from ..graph.computation import ComputationGraph
from ..graph.door import Inputs, Model, Names, modules_of
from ..graph.foreign import without_page
from ..graph.keeping import alone
from ..graph.leaves import LeafSpec
from ..graph.outputs import Selection
from ..graph.sources import raised_at
from ..graph.tracing import need_to_run
from ..operators.calls import is_ray
from ..plan.labelling import degrees
from ..plan.measuring import graph_of, refuse_chosen
from ..plan.plan import Plan
from . import words
from .copies import double_copies, double_inputs, jittered, perturb, redraw, redrawn, widened
from .gradient import traced_gradient
from .layout import layout_faults
from .local import node_by_node
from .own import compared, forward_beside
from .report import IncompleteError, Report
from .structure import Structure, structure_of
from .subject import Subject
from .verdict import Bounds, Evidence, Sum, report_of, sum_of
from .whole import OWN, PERTURBED, end_to_end, in_precisions

TOLERANCE = 1e-10
_TRIES = 3
"""of inputs drawn anew"""
_LOUD = 1e6
"""times the cotangents elsewhere"""


def check_completeness(
    model: Model | Balanced | ComputationGraph,
    inputs: Inputs = None,
    *,
    policy: str | Policy | Plan | None = None,
    numeric: bool = True,
    tolerance: float = TOLERANCE,
    seed: int = 0,
    on_progress: Tick | None = None,
    unknown: str = "error",
    leaves: Collection[LeafSpec] = (),
    beside: Collection[torch.dtype] = (torch.float32, torch.bfloat16),
    least_share: float = 0.0,
    output: Selection = None,
    constant: Names = (),
    explain: Names | None = None,
) -> Report:
    """Whether the gradient of `model` (with a policy's edits, if given) is FullGrad-complete.

    Symbolic: every live node's class lemma over the degrees. Numeric (float64): every node's real
    backward under random cotangents, and <c, f> against <x, G_x> + sum <b, G_b> end to end, on
    parameters as they are and perturbed. `tolerance` is relative. `unknown="measure"` measures
    operations that nobody registered as black boxes (verdict numeric at most). `leaves`, `output`,
    `constant` and `explain` as in `trace`: what is not selected is not judged. Residuals in the
    dtypes `beside` are shown, not judged. With `least_share` an input that gets less of the output
    makes the gradient incomplete: the sum is right, and says nothing.
    Raises what `trace` raises, and `NonFiniteError`; what cannot be judged is reported.
    """
    bounds = Bounds(tolerance, least_share)
    bar = nullcontext(on_progress) if on_progress else progress("checking")
    with bar as listener, torch.inference_mode(False):
        tick = _Told(listener)
        tick("tracing", 0, 1)
        if isinstance(model, Balanced) and model.graph is not None:
            refuse_chosen("a balanced model", output, constant, explain)
            graph, policy = model.graph, policy or model.plan
        else:
            graph = graph_of(  # type: ignore[arg-type]
                model, inputs, leaves, unknown, output, constant, explain
            )
            if isinstance(policy, Plan):
                policy.check_fits(graph)
        tick("deriving", 0, 1)
        structure = structure_of(graph, policy)
        if numeric and graph.is_meta:
            structure = replace(structure, notes=(*structure.notes, words.NO_VALUES))
        elif numeric:
            with _judged_by_running(graph, tick):
                evidence = _evidence(structure, bounds, seed, tick, beside)
            return report_of(structure, evidence, bounds)
        return report_of(structure, None, bounds)


def assert_complete(
    model: Model | Balanced | ComputationGraph,
    inputs: Inputs = None,
    *,
    policy: str | Policy | Plan | None = None,
    numeric: bool = True,
    tolerance: float = TOLERANCE,
    seed: int = 0,
    unknown: str = "error",
    leaves: Collection[LeafSpec] = (),
    output: Selection = None,
    constant: Names = (),
    explain: Names | None = None,
) -> Report:
    """The report of `check_completeness`, or `IncompleteError` (an AssertionError) with its brief.

    A model that cannot be judged is not complete. Raises what `check_completeness` raises.
    """
    __tracebackhide__ = True  # pytest shows the caller's line
    report = check_completeness(
        model, inputs, policy=policy, numeric=numeric, tolerance=tolerance, seed=seed,
        unknown=unknown, leaves=leaves, output=output, constant=constant, explain=explain,
    )  # fmt: skip
    if not report.complete:
        raise IncompleteError(report.brief())
    return report


class _Told:
    """Whom a check tells how far it is: what they raise, to end it, is theirs and stays so."""

    def __init__(self, listener: Tick) -> None:
        self.listener = listener
        self.raised: BaseException | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        try:
            self.listener(stage, done, total)
        except BaseException as error:
            self.raised = error
            raise


@contextmanager
def _judged_by_running(graph: ComputationGraph, tick: _Told) -> Iterator[None]:
    """What torch or the user's code raises while the model runs is met here: it cannot be judged
    so. Where the model does not run at all, that is what is said."""
    try:
        yield
    except (FullgradError, KeyboardInterrupt):
        raise
    except BaseException as error:
        if error is tick.raised or not (isinstance(error, RuntimeError) or raised_at(error)):
            raise  # theirs who listen, or nobody's but ours
        need_to_run(graph.model, graph.model, graph.args, graph.kwargs)
        raise TraceError(words.does_not_run(graph.name, error)) from without_page(error)


@alone()  # warnings, the stance of torch.compile and the fast path are of the whole process
def _evidence(
    structure: Structure,
    bounds: Bounds,
    seed: int,
    tick: Tick,
    beside: Collection[torch.dtype],
) -> Evidence:
    """The real backward, node by node and end to end, where the model is and a little off."""
    graph = structure.graph
    own, subject, root = _subject(structure, seed, tick)
    inputs, note = double_inputs(graph), ""
    at_own_parameters = end_to_end(OWN, subject, inputs, own)
    listens = all(j.fine for j in structure.judgements.values())  # or the answer is known
    generator = torch.Generator().manual_seed(seed)
    perturb([*modules_of(own), root], structure.labels.live.exponents, generator)
    moved = jittered(inputs, generator)
    try:
        local, at_perturbed = (
            node_by_node(subject, moved),
            end_to_end(PERTURBED, subject, moved, own, listens),
        )
        inputs = moved
    except NonFiniteError as error:  # the first measurement stands
        own, subject, root = _subject(structure, seed, tick)
        note = words.perturbed_fails(error)
        local = node_by_node(subject, inputs)
        at_perturbed = end_to_end(OWN, subject, inputs, own, listens)
    evidence = Evidence(local, at_own_parameters, at_perturbed, note=note)
    evidence = replace(evidence, forward=forward_beside(structure))
    if sum_of(structure, evidence, bounds) is Sum.UNEXPLAINED:
        evidence = replace(evidence, layout_faults=layout_faults(subject, inputs))
    if structure.plan is not None:
        evidence = replace(
            evidence, unedited=end_to_end("unedited", _unedited(subject, root), inputs)
        )
    shown, refusals = in_precisions(beside, subject, structure.edits, root, inputs)
    evidence = replace(evidence, shown=shown, refusals=refusals)
    if own is not None and listens and not evidence.modified:
        redraw([*modules_of(own), root], structure.labels.live.exponents, generator)
        modified = _modified_elsewhere(subject, inputs, own, generator)
        evidence = replace(evidence, modified_elsewhere=modified)
    return evidence


def _modified_elsewhere(
    subject: Subject, inputs: list[Any], own_model: Model, generator: torch.Generator
) -> bool:
    """Whether the own gradient is another at parameters and inputs drawn anew, where the model has
    a value there, under cotangents so large that a backward that clips them is seen."""
    for _ in range(_TRIES):
        drawn = redrawn(inputs, generator)
        try:
            traced = traced_gradient(subject, drawn, loud=_LOUD)
        except (NonFiniteError, RuntimeError):  # they are not the user's: they may not fit
            continue
        own = compared(own_model, subject, drawn, traced) if traced else None
        if own is not None and not own.problem:
            return own.modified
    return False


def _subject(
    structure: Structure, seed: int, tick: Tick
) -> tuple[Model | None, Subject, fx.GraphModule]:
    """Copies in float64: the user's model, where it is judged; the graph as written; its root."""
    own, root = double_copies(structure.graph, with_model=structure.plan is None)
    module = widened(rewrite(structure.graph, structure.edits, root, structure.plan is None))
    subject = Subject(module, structure.graph, structure.labels, seed, tick)
    if own is not None:
        for name in subject.labels.live.sources:  # a table that is no parameter is seen as well
            for read in structure.graph.nodes[name].all_input_nodes:
                held = dict(module.named_buffers()).get(str(read.target))
                if held is not None and is_ray(held):
                    held.requires_grad_()
    return own, subject, root


def _unedited(subject: Subject, root: fx.GraphModule) -> Subject:
    """The same graph without the plan's edits."""
    labels = degrees(subject.graph, (), subject.labels.live)
    return replace(subject, module=widened(rewrite(subject.graph, (), root, True)), labels=labels)
