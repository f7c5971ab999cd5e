"""The verdict: each node's by its lemma and by its real backward, and the whole's end to end."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import dataclass, field
from math import isfinite, isnan
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..backward.balanced import Balanced, rewrite
from ..backward.running import Run, finite_products, inner
from ..bars import Tick, progress
from ..edits.folding import fold
from ..edits.policy import Policy
from ..errors import FullgradError, NonConvergenceWarning, NonFiniteError, NoPlanError, TraceError
from ..graph.computation import ComputationGraph
from ..graph.door import Inputs, Model
from ..graph.exporting import untouched, without_fast_path
from ..graph.leaves import LeafSpec
from ..graph.sources import module_path, source_line
from ..operators.algebra import Algebra, Role
from ..operators.calls import target_name
from ..operators.registry import has_role, lookup
from ..plan.derivation import derive_rules
from ..plan.labelling import Degrees, degrees
from ..plan.liveness import State
from ..plan.measuring import Measured, graph_of
from ..plan.plan import Plan
from .numeric import (
    NodeByNode,
    Noise,
    aligned,
    as_double,
    double_copies,
    float_leaves,
    gap,
    gradients,
    is_float_tensor,
    jitter,
    largest,
    layout_faults,
    own_gradient,
    paired,
    perturb,
    rounding,
    widened,
)
from .report import EndToEnd, IncompleteError, NodeReport, Report, Verdict

LOCAL_TOLERANCE = 1e-9
TOLERANCE = 1e-10
OWN_TOLERANCE = 1e-6
SMALL_SHARE = 1e-6
LOW_PRECISION_TOLERANCE = 1e-2


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
) -> Report:
    """Whether the gradient of `model` (with a policy's edits, if given) is FullGrad-complete.

    Symbolic: every live node's class lemma over the degrees. Numeric (float64): every node's real
    backward under random cotangents, and <c, f> against <x, G_x> + sum <b, G_b> end to end, on
    parameters as they are and perturbed. `tolerance` is relative. `unknown="measure"` measures
    operations that nobody registered as black boxes (verdict numeric at most); `leaves` as in
    `trace`. Residuals in the dtypes `beside` are shown, not judged. With `least_share` an input
    that gets less of the output makes the gradient incomplete: the sum is right, and says nothing.
    Raises what `trace` raises, and `NonFiniteError`; what cannot be judged is reported.
    """
    bar = nullcontext(on_progress) if on_progress else progress("checking")
    with bar as tick, torch.inference_mode(False):
        tick("tracing", 0, 1)
        if isinstance(model, Balanced) and model.graph is not None:
            graph, policy = model.graph, policy or model.plan
        else:
            graph = graph_of(model, inputs, leaves, unknown)  # type: ignore[arg-type]
        audit = _Audit(graph, tolerance, seed, tick, tuple(beside), least_share)
        audit.structure(policy)
        if numeric and graph.is_meta:
            audit.notes.append("meta tensors have no values: the verdict is structural")
        elif numeric:
            _measure(audit)
        return audit.report(numeric and not graph.is_meta)


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
) -> Report:
    """The report of `check_completeness`, or `IncompleteError` (an AssertionError) with its brief.

    A model that cannot be judged is not complete. Raises what `check_completeness` raises.
    """
    __tracebackhide__ = True  # pytest shows the caller's line
    report = check_completeness(
        model, inputs, policy=policy, numeric=numeric, tolerance=tolerance, seed=seed,
        unknown=unknown, leaves=leaves,
    )  # fmt: skip
    if not report.complete:
        raise IncompleteError(report.brief())
    return report


def _measure(audit: _Audit) -> None:
    """What torch raises while the audit runs is met here: the model cannot be judged by running."""
    try:
        audit.measure()
    except FullgradError:
        raise
    except RuntimeError as error:
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise TraceError(
            f"{audit.graph.name} does not run in float64 with gradients ({type(error).__name__}: "
            f"{said}); numeric=False judges it by its structure alone"
        ) from error


@dataclass
class _Audit:
    graph: ComputationGraph
    tolerance: float
    seed: int
    tick: Tick
    beside: tuple[torch.dtype, ...] = ()
    least_share: float = 0.0
    plan: Plan | None = None
    policy: str | None = None
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    mends: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    measurements: list[EndToEnd] = field(default_factory=list)
    shown: list[EndToEnd] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unjudged: bool = False
    parts: list[float] = field(default_factory=list)
    """one a measurement: the sum of the contributions' magnitudes, relative to the output's"""
    modified: bool = False
    error_before: float | None = None
    labels: Degrees = field(init=False)

    # ------------------------------------------------------------------ symbolic

    def structure(self, policy: str | Policy | Plan | None) -> None:
        """Each live node's verdict by its lemma, and the obstacles the structure alone shows."""
        self.tick("deriving", 0, 1)
        _finite_at_the_door(self.graph)
        unedited = degrees(self.graph)
        if policy is not None:
            self.plan = policy if isinstance(policy, Plan) else self._derive(policy)
            self.policy = self.plan.policy if self.plan else str(policy)
        edits = self.plan.edits if self.plan else ()
        folded = fold(self.graph, edits)
        self.labels = degrees(folded, edits, unedited.live if folded is self.graph else None)
        self.graph = folded
        self._mends(unedited)
        for name in self.graph.nodes:
            if name not in self.labels.live.calls or name not in self.labels.alive:
                continue
            finding = self.labels.findings.get(name)
            op = self.labels.live.calls[name].operator
            if finding:
                self.verdicts[name] = Verdict.OPAQUE if finding.opaque else Verdict.VIOLATED
                self.reasons[name] = finding.reason
                if isinstance(op, Measured) and op.contradiction and not finding.opaque:
                    self.verdicts[name] = Verdict.UNKNOWN
                    self.reasons[name] = f"its measurement contradicts itself: {op.contradiction}"
            elif isinstance(op, Measured):
                self.verdicts[name], self.reasons[name] = Verdict.NUMERIC, op.note
            else:
                # that an integral exists is proved, that it was found is measured
                lemma = op.proved and self.labels.modes[name].edit != "integrate"
                self.verdicts[name] = Verdict.PROVED if lemma else Verdict.NUMERIC
                self.reasons[name] = op.kind.lemma
            if isinstance(op, Measured):
                self.notes.append(f"{self.graph.describe(name)} is a black box, {op.note}")
        self._outputs(unedited)

    def _derive(self, policy: str | Policy) -> Plan | None:
        try:
            return derive_rules(self.graph, policy=policy)
        except NoPlanError as error:
            self.problems.append(f"no honest plan: {error}")
            return None

    def _mends(self, unedited: Degrees) -> None:
        """For every edited or violated node, the edit that is (or would be) its mend."""
        plan = self.plan
        if plan is None and unedited.findings:
            try:
                plan = derive_rules(self.graph)
            except NoPlanError as error:
                self.notes.append(f"libra has no plan for this graph: {error}")
        for edit in plan.edits if plan else ():
            self.mends[edit.node] = "; ".join(filter(None, (self.mends.get(edit.node), str(edit))))

    def _outputs(self, unedited: Degrees) -> None:
        reached = [o.name for o in self.graph.outputs if o.name in self.labels.alive]
        for output in self.graph.outputs:
            if output.name not in reached:
                state = self.labels.facts[output.name][0].state
                what = "is constant" if state is State.CONSTANT else "carries no gradient"
                self.problems.append(
                    f"the input does not reach output {self.graph.describe(output.name)}: it {what}"
                )
            head = _producer(output)
            if has_role(head, Role.PROBABILITY):
                self.problems.append(
                    f"the output is a probability ({self.graph.describe(head.name)}): completeness "
                    "is a statement about logits; check the model without that head"
                )
        for source in self.labels.live.sources:
            if source in unedited.alive and source not in self.labels.alive:
                self.notes.append(
                    f"input {source!r} is held fixed by the plan, as a gate or a weight is: "
                    "nothing is attributed to it"
                )
            elif source not in self.labels.alive:
                self.problems.append(f"input {source!r} does not reach the output")

    # ------------------------------------------------------------------ numeric

    def measure(self) -> None:
        """The real backward, node by node and end to end, in float64."""
        edits = self.plan.edits if self.plan else ()
        own, root = double_copies(self.graph, with_model=self.plan is None)
        module = widened(rewrite(self.graph, edits, root))
        inputs = [as_double(t) for t in pytree.tree_leaves((self.graph.args, self.graph.kwargs))]
        own_error = self._end_to_end("own parameters", module, own, inputs)
        generator = torch.Generator().manual_seed(self.seed)
        perturb([own, root], generator)
        moved = [jitter(t, generator) for t in inputs]
        self._locally(module, moved)
        error = self._end_to_end("perturbed parameters", module, own, moved)
        if error is None:
            self.problems.append(
                "the output is zero even at perturbed parameters: nothing to judge"
            )
            self.unjudged = True
        elif own_error is None:
            self.notes.append(
                "the output is zero at the model's own parameters; judged at perturbed ones"
            )
        worst = largest(m.relative for m in self.measurements)
        share = largest(abs(m.input_share) for m in self.measurements)
        if self.measurements and share < max(self.least_share, SMALL_SHARE):
            said = self.problems if share < self.least_share else self.notes
            said.append(
                f"the input gets {share:.1e} of the output, the biases the rest: the sum is right, "
                "and the input's part of it explains next to nothing"
            )
        if self.modified:
            self._set_nodes_aside(worst <= self.tolerance)
        sound = all(v in (Verdict.PROVED, Verdict.NUMERIC) for v in self.verdicts.values())
        if isnan(worst):
            self.problems.append(
                "the gradient is not finite (a root of 0, say): infinity times zero is "
                "undetermined, and nothing adds up; clamp the value away from there"
            )
        elif worst > self.tolerance:
            self.problems.append(
                f"end to end the attributed sum misses the output by {worst:.2e} of it"
            )
            rounding = (self.tolerance * max(1.0, p) for p in self.parts)
            hidden = all(m.relative <= r for m, r in zip(self.measurements, rounding, strict=True))
            if sound and self.verdicts and hidden:
                self.unjudged = True
                self.problems.append(
                    f"which is rounding: its parts are {max(self.parts):.0e} times the output and "
                    "cancel, so that too few digits are left to judge it; choose other inputs"
                )
            elif self.verdicts and (sound or self.modified) and not self.problems[:-1]:
                faults = layout_faults(module, moved, self.seed)
                self.problems += [
                    f"{self.graph.describe(name)}: torch's backward of it gives other numbers "
                    "where the same cotangent lies in memory otherwise, as it does here; "
                    ".contiguous() on its result, or a batch of two, goes around that fault"
                    for name in faults
                ]
                if not faults and not self.modified:
                    self.problems.append(
                        "every node is consistent and the whole is not: an error of this library "
                        "or a backward that the trace does not show; please report it"
                    )
        if self.plan is not None:
            self._forward_kept()
            plain = _Audit(self.graph, self.tolerance, self.seed, self.tick)
            plain.labels = degrees(self.graph, (), self.labels.live)
            module = widened(rewrite(self.graph, (), root))
            self.error_before = plain._end_to_end("unedited", module, None, moved)
        judged = [*self.measurements]
        for dtype in self.beside:
            self._show(dtype, root, moved)
        self.shown, self.measurements = self.measurements[len(judged) :], judged

    def _show(self, dtype: torch.dtype, root: fx.GraphModule, inputs: list[Any]) -> None:
        """The residual of the whole in another precision; nothing follows from it."""
        root._apply(lambda t: t.to(dtype) if t.is_floating_point() else t)
        module = rewrite(self.graph, self.plan.edits if self.plan else (), root)
        cast = [
            t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in inputs
        ]
        try:
            self._end_to_end("perturbed parameters", module, None, cast)
        except (RuntimeError, NonFiniteError) as error:
            said = next((line for line in str(error).splitlines() if line.strip()), "")
            self.notes.append(f"it does not run in {str(dtype).removeprefix('torch.')}: {said}")

    def _set_nodes_aside(self, complete: bool) -> None:
        """A backward that the trace does not show is judged by its end-to-end residual alone."""
        self.notes.append(
            "the model's own gradient is not that of its traced graph: its backward is "
            "modified (an autograd.Function, a hook, a patch); it was judged as it is, end to end, "
            "and the nodes' verdicts are of the trace"
        )
        for name, verdict in self.verdicts.items():
            if complete and verdict not in (Verdict.PROVED, Verdict.NUMERIC):
                self.verdicts[name] = Verdict.NUMERIC
                self.reasons[name] = "its backward is modified; judged end to end only"

    def _locally(self, module: fx.GraphModule, inputs: list[Any]) -> None:
        local = NodeByNode(module, self.graph, self.labels, Noise(self.seed), self.tick)
        local.run(*inputs, enable_io_processing=False)
        self.errors = local.errors
        for name, error in local.errors.items():
            if name not in self.verdicts:
                continue
            sound = self.verdicts[name] in (Verdict.PROVED, Verdict.NUMERIC)
            if name in local.unconverged:
                self.verdicts[name] = Verdict.UNKNOWN
                self.reasons[name] = "the integral along its ray from 0 did not converge"
                self.problems.append(
                    f"{self.graph.describe(name)}: the integral along its ray from 0 did not "
                    f"converge (residual {error:.1e}): a kink or a step on the ray; forbid it with "
                    "dataclasses.replace(policy, integrate=None), so that something is pruned"
                )
            elif sound and not error <= LOCAL_TOLERANCE:
                self.verdicts[name] = Verdict.UNKNOWN
                what = self.graph.describe(name)
                self.problems.append(
                    f"{what}: its lemma says consistent, its backward misses by {error:.1e}; an "
                    "error of this library, please report it"
                    if isfinite(error)
                    else f"{what}: its gradient is not finite at these inputs (infinity times "
                    "zero, as of a square root at 0), so nothing adds up behind it"
                )
            elif not sound and error <= LOCAL_TOLERANCE:
                self.reasons[name] += " (no witness at these inputs)"

    def _end_to_end(
        self, where: str, module: fx.GraphModule, own: Any, inputs: list[Any]
    ) -> float | None:
        """The largest relative residual of the whole, None where the output is zero."""
        self.tick(f"end to end, {where}", 0, 1)
        biases: dict[str, float] = {}
        parts: list[float] = []

        def on_bias(name: str, g: Tensor, added: Tensor) -> None:
            biases[name] = biases.get(name, 0.0) + inner(g, added)
            parts.append(float(finite_products(g, added).abs().sum()))

        run = Run(module, self.graph, self.labels, on_bias)
        with torch.enable_grad(), warnings.catch_warnings():
            # reported node by node, and by the residual
            warnings.simplefilter("ignore", NonConvergenceWarning)
            outputs = float_leaves(run.run(*inputs, enable_io_processing=False))
            cotangents = [aligned(o, self.seed) for o in outputs]
            magnitude = sum(
                float((c * o.detach()).abs().sum())
                for c, o in zip(cotangents, outputs, strict=True)
            )
            if magnitude == 0.0:
                return None
            value = paired(cotangents, outputs)
            if not torch.isfinite(value.detach()):
                NodeByNode(module, self.graph, self.labels, Noise(self.seed), self.tick).run(
                    *inputs, enable_io_processing=False
                )  # names the first node
                raise NonFiniteError("the output is not finite")
            given = list(run.sources.values())
            grads = gradients(value, given)
        through_input = sum(inner(g, x) for g, x in zip(grads, given, strict=True))
        value_own = float(value.detach())
        if own is not None:
            found_own = self._own(where, own, inputs, cotangents, grads, biases)
            through_input, value_own = found_own or (through_input, value_own)
        through_biases = sum(biases.values())
        absolute = abs(value_own - through_input - through_biases)
        found = EndToEnd(
            where,
            str(value.dtype).removeprefix("torch."),
            absolute,
            absolute / magnitude,
            through_input / value_own if value_own else float("nan"),
            through_biases / value_own if value_own else float("nan"),
        )
        self.measurements.append(found)
        pairs = zip(grads, given, strict=True)
        parts += [float(finite_products(g.detach(), x.detach()).abs().sum()) for g, x in pairs]
        self.parts.append(sum(parts) / magnitude)
        return found.relative

    def _own(
        self,
        where: str,
        own: Any,
        inputs: list[Any],
        cotangents: list[Tensor],
        grads: list[Tensor],
        biases: dict[str, float],
    ) -> tuple[float, float] | None:
        """<x, grad> and <c, f> by the user's own module; None where they are those of the trace.

        Where its backward is not the traced one, the bias leaves that are parameters get its own
        gradient too (written into `biases`), and the nodes' verdicts do not count.
        """
        if any(self.graph.nodes[n].op != "placeholder" for n in self.labels.live.sources):
            return None  # attribution ends at an embedding, which only the trace shows
        leaves = {
            name: own.get_parameter(name)
            for name in self._parameter_leaves().values()
            if isinstance(own, nn.Module)
        }
        try:
            value, given, own_grads = own_gradient(
                own, inputs, self.graph, cotangents, list(leaves.values())
            )
        except RuntimeError:
            self._compare_as_it_is()
            return None
        count = len(given)
        by_name = dict(zip(leaves, own_grads[count:], strict=True))
        through_own = {
            node: inner(by_name[name], leaves[name])
            for node, name in self._parameter_leaves().items()
            if name in by_name and leaves[name].requires_grad
        }
        allowed = max(OWN_TOLERANCE, 20 * rounding(self.graph))
        other = sum(abs(part - biases.get(node, 0.0)) for node, part in through_own.items())
        if gap(own_grads[:count], grads) <= allowed and not other > allowed * max(
            abs(value), *map(abs, biases.values()), 0.0
        ):
            # one gradient: the trace has it without the model's own low-precision casts
            return None
        self.modified = True
        biases |= through_own
        pairs = zip(own_grads[:count], given, strict=True)
        return sum(inner(g, x) for g, x in pairs), value

    def _parameter_leaves(self) -> dict[str, str]:
        """Bias node -> the parameter that is its only leaf and has no other use."""
        found = {}
        for name in self.labels.biases:
            if self.labels.live.calls[name].operator.every_output:
                continue  # a leaf an output
            names = self.labels.biases[name]
            operands = {o.name: o.node for o in self.labels.live.calls[name].operands}
            nodes = [operands.get(n) for n in names]
            leaf = nodes[0] if len(nodes) == 1 else None
            once = leaf is not None and [*operands.values()].count(leaf) == len(leaf.users) == 1
            if leaf is not None and leaf.op == "get_attr" and once:
                found[name] = str(leaf.target)
        parameters = dict(self.graph.fx.named_parameters())
        return {n: t for n, t in found.items() if t in parameters}

    def _compare_as_it_is(self) -> None:
        """Own against traced gradient in the model's own dtype: it does not run in float64."""
        self.notes.append(
            "the model does not run in float64 (it makes or holds tensors of a fixed dtype): its "
            "own gradient was compared with the traced one in its own dtype"
        )
        inputs = pytree.tree_leaves((self.graph.args, self.graph.kwargs))
        with torch.no_grad():
            outputs = float_leaves(self.graph.fx(*self.graph.args, **self.graph.kwargs))
        cotangents = [aligned(o, self.seed) for o in outputs]
        _, _, own = own_gradient(self.graph.model, inputs, self.graph, cotangents, [])
        _, _, traced = own_gradient(self.graph.fx, inputs, self.graph, cotangents, [])
        self.modified |= gap(own, traced) > LOW_PRECISION_TOLERANCE

    def _forward_kept(self) -> None:
        module = rewrite(self.graph, self.plan.edits if self.plan else ())
        model = self.graph.model
        args, kwargs = self.graph.args, self.graph.kwargs
        with torch.no_grad():
            ours, theirs = module(*args, **kwargs), untouched(model, args, kwargs)
            if _same_bits(ours, theirs):
                return
            with without_fast_path():
                plain = untouched(model, args, kwargs)
        if _same_bits(ours, plain):
            self.notes.append(
                "without gradients the model takes torch's fast path for attention, which rounds "
                "differently; the edited forward is the model's without that path, bit for bit"
            )
        else:
            self.problems.append(
                "the edited forward differs from the model's: an error of this library"
            )

    # ------------------------------------------------------------------ report

    def report(self, measured: bool) -> Report:
        """Everything found, as data."""
        sound = all(v in (Verdict.PROVED, Verdict.NUMERIC) for v in self.verdicts.values())
        complete: bool | None = sound and not self.problems
        if self.unjudged:
            complete = None
        return Report(
            model=self.graph.name,
            policy=self.policy,
            complete=complete,
            error=largest(m.relative for m in self.measurements)
            if measured and self.measurements
            else None,
            error_before=self.error_before,
            nodes=tuple(self._node(name) for name in self.verdicts),
            measurements=(*self.measurements, *self.shown),
            plan=self.plan,
            problems=tuple(dict.fromkeys(self.problems)),
            notes=tuple(dict.fromkeys(self.notes)),
        )

    def _node(self, name: str) -> NodeReport:
        node = self.graph.nodes[name]
        seen = ", ".join(str(d) for d in self.labels.seen.get(name, {}).values())
        given = ", ".join(str(f.degree) for f in self.labels.facts[name])
        return NodeReport(
            name=name,
            op=target_name(node.target),
            verdict=self.verdicts[name],
            module_path=module_path(node),
            source=source_line(node),
            degree=f"{seen} -> {given}",
            error=self.errors.get(name),
            edit=self.mends.get(name),
            reason=self.reasons[name],
        )


def _same_bits(ours: Any, theirs: Any) -> bool:
    pairs = zip(float_leaves(ours), float_leaves(theirs), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def _producer(node: fx.Node) -> fx.Node:
    """The operation behind an output, past the structural ones."""
    while node.op == "call_function" and node.all_input_nodes:
        found = lookup(target_name(node.target))
        if (
            found is None
            or found.algebra is not Algebra.STRUCTURAL
            or len(node.all_input_nodes) > 1
        ):
            return node
        node = node.all_input_nodes[0]
    return node


def _finite_at_the_door(graph: ComputationGraph) -> None:
    if graph.is_meta:
        return
    tensors = {
        p.name: v
        for p, v in zip(
            graph.placeholders, pytree.tree_leaves((graph.args, graph.kwargs)), strict=False
        )
    }
    for what, items in (("input", tensors), ("parameter", dict(graph.fx.named_parameters()))):
        for name, tensor in items.items():
            if is_float_tensor(tensor) and not bool(torch.isfinite(tensor).all()):
                raise NonFiniteError(
                    f"{what} {name!r} holds NaN or Inf; completeness is a statement about finite "
                    "values, so mend it first (torch.nan_to_num, or load the weights again)"
                )
