"""What holds of every architecture: one function that checks it all, or says what does not hold.

(a) the balanced forward is the model's, bit for bit, in float64 and float32; (b) each verdict is
that of an evaluation which shares nothing with the library (`independent`); (c) each edit is the
backward of its frozen surrogate; (d) the residual is the same at every cut; (e) derivation is
deterministic; (f) the model is untouched; (g) a plan survives its file; (h) what is complete has a
certificate, which the kernel accepts from its file.
"""

from __future__ import annotations

import copy
import math
import tempfile
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..backward.balanced import Balanced, balance, rewrite
from ..check.certificate import Certificate, verify
from ..check.completeness import check_completeness
from ..check.report import Report, Verdict
from ..edits.base import Edit
from ..edits.folding import fold
from ..edits.freezing import FreezeScale
from ..edits.integrating import Integrate
from ..edits.pruning import Prune
from ..edits.scaling import Scale
from ..edits.secants import Secant
from ..errors import (
    CertificateError,
    NonConvergenceWarning,
    NonFiniteError,
    NoPlanError,
    TraceError,
    UnregisteredOperationError,
)
from ..graph.computation import ComputationGraph
from ..graph.tracing import trace
from ..operators.algebra import Algebra
from ..operators.calls import bind, target_name
from ..operators.registry import lookup
from ..plan.derivation import derive_rules
from ..plan.labelling import Degrees, Fact, degrees
from ..plan.plan import Plan
from ..plan.states import liveness
from .independent import Bound, Evaluation, Tracker, Unjudged, evaluate, is_real, literal_divisors
from .strategies import Architecture

RTOL, ATOL = 1e-8, 1e-9
CUT_TOLERANCE = 1e-8
RESOLUTION = 1e-6
"""errors below it may go unseen by the independent evaluation, which takes differences"""
SOUND = (Verdict.PROVED, Verdict.NUMERIC)


class PropertyError(AssertionError):
    """A property that does not hold; `property` is its name."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}")
        self.property = name


@dataclass(frozen=True)
class Outcome:
    """What came of an architecture on which everything holds.

    `kind`: `complete` (as it is), `mended`, `no plan`, `unjudged` (zero or not finite), `refused`.
    `edits`: the kinds of edits in the plan; `reason`: why it was refused or unjudged;
    `unwitnessed`: violated operations that no point shows to be wrong.
    """

    kind: str
    edits: tuple[str, ...] = ()
    reason: str = ""
    unwitnessed: tuple[str, ...] = ()


def check_properties(architecture: Architecture, thorough: bool = True) -> Outcome:
    """Check every property on one architecture; raises `PropertyError`, which names the property.

    `thorough` also traces it a second time, for (e).
    """
    try:
        return _check(architecture, thorough)
    except PropertyError:
        raise
    except (Unjudged, NonFiniteError, torch.linalg.LinAlgError) as error:
        return Outcome("unjudged", reason=f"{type(error).__name__}: {error}")
    except (TraceError, UnregisteredOperationError) as error:
        return Outcome("refused", reason=f"{type(error).__name__}: {error}")
    except Exception as error:
        raise PropertyError(f"no crash by {type(error).__name__}", str(error)) from error


def _require(holds: bool, name: str, message: str) -> None:
    if not holds:
        raise PropertyError(name, message)


def _check(architecture: Architecture, thorough: bool) -> Outcome:
    model = architecture.module()
    inputs = architecture.example()
    with _untouched(model):
        graph = trace(model, inputs)
        report = check_completeness(graph, beside=())
        points = _points(architecture, model)
        plain, seen, divisors = _plainly(graph, points)
        if plain.complete != _complete(report):  # look for a witness elsewhere, of either
            points = _points(architecture, model, many=True)
            plain, seen, divisors = _plainly(graph, points)
            if plain.complete and not _complete(report):
                plain, _ = evaluate(_perturbed(graph.fx), points, divisors)
        unwitnessed = _same_verdict(graph, report, plain, seen, "plain")
        try:
            plan = derive_rules(graph)
        except NoPlanError as error:
            _require(
                not _complete(report),
                "verdict",
                f"the plain gradient is complete and yet there is no plan: {error}",
            )
            return Outcome("no plan", reason=str(error), unwitnessed=unwitnessed)
        if _complete(report):
            _require(
                not plan.edits, "plan", f"complete without an edit, but libra makes {plan.edits}"
            )
        _deterministic(graph, plan, model, inputs, thorough)
        balanced = balance(graph, policy=plan)
        _forward_kept(balanced, model, inputs, architecture)
        mended = check_completeness(graph, policy=plan, beside=())
        labels = degrees(graph, plan.edits)
        starts = from_zero(plan)
        written = rewrite(graph, plan.edits)  # `balanced` takes short cuts through it, see (d)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", NonConvergenceWarning)
            edited, tracker = evaluate(written, points, divisors, starts)
            if edited.complete != _complete(mended):
                points = _points(architecture, model, many=True)
                edited, tracker = evaluate(written, points, divisors, starts)
            judged = edited
            if judged.complete and not _complete(mended):
                judged, _ = evaluate(_perturbed(written), points, divisors, starts)
        missed = [w for w in caught if w.category is NonConvergenceWarning]
        if missed and judged.complete != _complete(mended):  # they say so to who runs them
            return Outcome("unjudged", reason=f"Unjudged: {missed[0].message}"[:100])
        # an input that the plan holds fixed is a note of the library's, no objection
        judged.unread = [name for name in judged.unread if name in plain.unread]
        _same_verdict(graph, mended, judged, tracker, "libra")
        _honest(graph, plan, tracker)
        if not edited.flat:  # else its degrees and leaves could be any
            _same_degrees(labels, edited, tracker)
            _every_cut(balanced, labels, tracker, inputs)
        _file(graph, plan, balanced, inputs)
        _certified(graph, report)
        _certified(graph, mended)
    kind, reason = "complete" if report.complete else "mended", ""
    if plain.zero or report.complete is None:
        kind = "unjudged"
        known = next(iter(report.problems), "the verdict is unknown")
        reason = "the output is 0" if plain.zero else f"the library: {known}"
    edits = tuple(sorted(str(e).split(" ")[0] for e in plan.edits))
    return Outcome(kind, edits, reason, unwitnessed)


# --------------------------------------------------------------------------- (h) the certificate


def _certified(graph: ComputationGraph, report: Report) -> None:
    """The kernel follows every complete verdict, from its certificate alone and from the graph."""
    if not report.complete:
        return
    try:
        certificate = Certificate.from_json(report.certificate().to_json())
        verify(certificate)
        verify(certificate, graph)
    except CertificateError as error:
        raise PropertyError("certificate", f"{report.policy or 'plain'}: {error}") from error


# --------------------------------------------------------------------------- (b) the verdict


def _points(
    architecture: Architecture, model: nn.Module, many: bool = False
) -> list[tuple[Any, ...]]:
    """Inputs at which the model is finite: its own, and others of other sizes."""
    scales = (1.0, -1.0, 2.5, 0.4, -2.0, 1.5) * (4 if many else 1)
    tried = [architecture.example(seed=i // 2, scale=s) for i, s in enumerate(scales)]
    with torch.no_grad():
        finite = [
            point
            for point in tried
            if all(bool(o.isfinite().all()) for o in _floats(model(*point)))
        ]
    if len(finite) < 2 or finite[0] is not tried[0]:
        raise Unjudged("the output is not finite at these points")
    return finite if many else finite[:3]


def _perturbed(module: fx.GraphModule) -> fx.GraphModule:
    """A copy with other parameters: a maximum may never choose the one that the model has."""
    moved = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in moved.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise.to(parameter))
    return moved


def _floats(tree: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(tree) if is_real(t)]


def _plainly(
    graph: ComputationGraph, points: Sequence[Sequence[Any]]
) -> tuple[Evaluation, Tracker, frozenset[str]]:
    """The unedited graph's evaluation, and the nodes whose literals belong to a denominator."""
    found, tracker = evaluate(graph.fx, points)
    divisors = literal_divisors(tracker)
    if divisors:
        found, tracker = evaluate(graph.fx, points, divisors)
    return found, tracker, divisors


def from_zero(plan: Plan) -> frozenset[str]:
    """The nodes whose backward a plan makes an integral, or a difference, from zero."""
    return frozenset(e.node for e in plan.edits if isinstance(e, (Integrate, Secant)))


def _complete(report: Report) -> bool:
    """The library's verdict on the gradient; that the output is a probability is not its matter."""
    others = [p for p in report.problems if not p.startswith("the output is a ")]
    return all(n.verdict in SOUND for n in report.nodes) and not others


def _same_verdict(
    graph: ComputationGraph, report: Report, found: Evaluation, tracker: Tracker, which: str
) -> tuple[str, ...]:
    """Both say the same; returns the operations that the library objects to without a witness."""
    for problem in report.problems:
        _require("an error of th" not in problem, "no error of the library", f"{which}: {problem}")
    if found.zero or report.complete is None:
        return ()
    ours, theirs = _complete(report), found.complete
    if ours == theirs:
        return ()
    if found.flat:
        raise Unjudged("a value is a constant's at all of the points: any degree fits it")
    objections = [n for n in report.nodes if n.verdict not in SOUND]
    if ours:
        raise PropertyError(
            "verdict",
            f"{which}: the library says complete; independently the outputs have degrees "
            f"{found.outputs}, without a degree are {found.wrong}, unread are {found.unread}",
        )
    named = [f"{n.name} ({n.op}): {n.reason}" for n in objections]
    run = {n.name: n for n in tracker.module.graph.nodes}
    calls = liveness(graph).calls
    beyond = {
        n.name
        for n in objections
        if _is_beyond_witness(graph.nodes[n.name])
        or _ignores_an_operand(run[n.name], tracker)
        or (n.name in calls and calls[n.name].chosen)  # it may jump where none of the points is
        or any(local.faint for local in found.nodes.get(n.name, ()))
    }
    if beyond and all(_is_behind(graph.nodes[n.name], beyond) for n in objections):
        return tuple(sorted({n.op for n in objections if n.name in beyond}))
    unseen = all("no witness" in n.reason for n in objections) and not report.problems
    faint = all(n.error is not None and n.error < RESOLUTION for n in objections)
    if objections and (unseen or faint):
        return tuple(sorted({n.op for n in objections}))
    raise PropertyError(
        "verdict",
        f"{which}: independently complete, the library says {named} {report.problems}",
    )


def _is_beyond_witness(node: fx.Node) -> bool:
    """Whether an operation may have a degree of which its class does not know (rnn_relu, atan2), or
    an eps below what float64 resolves."""
    entry = lookup(target_name(node.target))
    if entry is None:
        return False
    if entry.algebra is Algebra.NORMALISER:
        return bind(node).get("eps", 1.0) is None
    return entry.algebra in (Algebra.SMOOTH, Algebra.SINGULAR)


def _ignores_an_operand(node: fx.Node, tracker: Tracker) -> bool:
    """Whether a live operand carries no gradient here: the slope of prelu, of positive values."""
    if node.op != "call_function" or not any(tracker.live[node]):
        return False
    pieces = _pieces(tracker.values[0][node])
    carried = {i: torch.ones_like(v) if is_real(v) else None for i, v in enumerate(pieces)}
    return any(not bool(g.any()) for _, _, g in _backward(node, tracker, carried))


def _is_behind(node: fx.Node, names: Collection[str]) -> bool:
    """Whether a node is one of these or reads one: its degree was then only assumed."""
    seen, waiting = {node}, [node]
    while waiting:
        here = waiting.pop()
        if here.name in names:
            return True
        waiting += [n for n in here.all_input_nodes if n not in seen]
        seen.update(waiting)
    return False


def _same_degrees(labels: Degrees, found: Evaluation, tracker: Tracker) -> None:
    """The labels of what carries gradient are the degrees that were measured."""
    nodes = {n.name: n for n in tracker.module.graph.nodes}
    for name in labels.alive:
        if name not in found.alive or name not in nodes:
            continue
        if len(labels.facts[name]) != len(found.nodes[name]):
            continue  # one label for a list of outputs: its items are compared where they are taken
        factor = _factor(nodes[name])
        pairs = zip(labels.facts[name], found.nodes[name], strict=False)
        for item, (fact, local) in enumerate(pairs):
            value = _item(tracker.values[0][nodes[name]], item)
            if fact.state != "live" or local.degree is None or not bool((value != 0).any()):
                continue
            degree = float(fact.degree) / factor
            _require(
                abs(degree - local.degree) < 1e-6,
                "degrees",
                f"{name} is labelled {degree} and has the degree {local.degree}",
            )


def _item(value: Any, item: int) -> Any:
    return value[item] if isinstance(value, (tuple, list)) else value


def _factor(node: fx.Node) -> float:
    """The factor of the scale written behind a node."""
    edits = [user.meta.get("edit") for user in node.users]
    own = [e for e in edits if isinstance(e, Scale) and e.node == node.name]
    return float(own[0].factor) if own else 1.0


# --------------------------------------------------------------------------- (a) the forward


def _same_bits(ours: Any, theirs: Any) -> bool:
    pairs = zip(pytree.tree_leaves(ours), pytree.tree_leaves(theirs), strict=True)
    return all(
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
        and torch.equal(torch.signbit(torch.view_as_real(a) if a.is_complex() else a),
                        torch.signbit(torch.view_as_real(b) if b.is_complex() else b))
        for a, b in pairs
    )  # fmt: skip


def _forward_kept(
    balanced: Balanced, model: nn.Module, inputs: tuple[Any, ...], architecture: Architecture
) -> None:
    with torch.no_grad():
        wanted = model(*inputs)
        _require(_same_bits(balanced(*inputs), wanted), "forward", "float64 bits differ")
    leaves = [x.clone().requires_grad_() if is_real(x) else x for x in inputs]
    _require(_same_bits(balanced(*leaves), wanted), "forward", "bits differ with gradients")
    graph = balanced.graph
    assert graph is not None
    given = [(s.args, s.kwargs) for s in architecture.statements]
    if torch.float64 in pytree.tree_leaves(given):
        return  # a cast that is none in float64, in which this was traced
    root = copy.deepcopy(graph.fx).float()
    module = rewrite(graph, balanced.plan.edits, root)
    single = architecture.example(torch.float32)
    with torch.no_grad():
        try:
            wanted = architecture.module(torch.float32)(*single)
        except (RuntimeError, IndexError):
            return  # the program's own: torch has no kernel for these shapes, or dtypes mix
        _require(_same_bits(module(*single), wanted), "forward", "float32 bits differ")


# --------------------------------------------------------------------------- (c) honest edits


def _honest(graph: ComputationGraph, plan: Plan, tracker: Tracker) -> None:
    """Each edited node's backward, against that of its surrogate under a random cotangent."""
    nodes = {n.name: n for n in tracker.module.graph.nodes}
    folded = fold(graph, plan.edits)
    for name in dict.fromkeys(e.node for e in plan.edits):
        if tracker.live[nodes[name]] and any(tracker.live[nodes[name]]):
            _honest_node(folded, plan.edits_of(name), nodes, tracker, name)


def _honest_node(
    graph: ComputationGraph,
    edits: Sequence[Edit],
    nodes: dict[str, fx.Node],
    tracker: Tracker,
    name: str,
) -> None:
    original = graph.nodes[name]
    values = tracker.values[0]
    bound = Bound(original, lambda n: values[nodes[n.name]])
    places = [
        p
        for p in bound.places
        if p.node is not None and is_real(p.value) and any(tracker.live[nodes[p.node.name]])
    ]
    fresh = {p.index: p.value.detach().clone().requires_grad_() for p in places}
    edited = _edited_value(nodes[name], original, graph, bound, fresh, values)
    plain = {p.index: p.value.detach().clone().requires_grad_() for p in places}
    pruned = {e.argument for e in edits if isinstance(e, Prune)}
    for p in places:
        if p.label in pruned:
            plain[p.index] = plain[p.index].detach()
    moving = [
        p.index
        for p in places
        if p.node is not None and any(tracker.live[nodes[p.node.name]]) and p.label not in pruned
    ]
    surrogate = _surrogate(edits, bound, plain, moving)
    outputs, wanted_outputs = _floats(edited), _floats(surrogate)
    frozen = outputs[len(wanted_outputs) :]  # the mean and 1/sigma that a norm also returns
    _require(
        not any(o.requires_grad for o in frozen), "honest edits", f"{name} leaks through statistics"
    )
    pairs = list(zip(outputs, wanted_outputs, strict=False))
    pairs = [(a, b) for a, b in pairs if a.requires_grad or b.requires_grad]
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(a.shape, generator=generator, dtype=torch.float64) for a, _ in pairs]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", NonConvergenceWarning)
        ours = _gradients([a for a, _ in pairs], list(fresh.values()), noise)
    if any(w.category is NonConvergenceWarning for w in caught):
        return  # an integral that says itself that it is not exact
    leaves = [plain[i] for i in fresh]
    theirs = _gradients([b for _, b in pairs], leaves, noise)
    factor = math.prod(float(e.factor) for e in edits if isinstance(e, Scale) and not e.argument)
    for place, mine, wanted in zip(places, ours, theirs, strict=True):
        if place.label in pruned:
            _require(
                mine is None or not bool((mine != 0).any()),
                "honest edits",
                f"gradient passes the pruned edge {name}.{place.label}",
            )
            continue
        given = torch.zeros_like(place.value) if mine is None else mine
        expected = torch.zeros_like(place.value) if wanted is None else wanted * factor
        _require(
            bool(torch.allclose(given, expected, rtol=RTOL, atol=ATOL)),
            "honest edits",
            f"{name}.{place.label} under {', '.join(map(str, edits))}: the gradient differs from "
            f"the surrogate's by {float((given - expected).abs().max()):.1e}",
        )


def _gradients(
    outputs: list[Tensor], leaves: list[Tensor], cotangents: list[Tensor]
) -> list[Tensor | None]:
    taken = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    wanted = [x for x in leaves if x.requires_grad]
    if not taken or not wanted:
        return [None] * len(leaves)
    found = iter(
        torch.autograd.grad(
            [o for o, _ in taken], wanted, [c.to(o) for o, c in taken], allow_unused=True
        )
    )
    return [next(found) if x.requires_grad else None for x in leaves]


def _edited_value(
    node: fx.Node,
    original: fx.Node,
    graph: ComputationGraph,
    bound: Bound,
    fresh: dict[int, Tensor],
    values: dict[fx.Node, Any],
) -> Any:
    """The rewritten node, with what was written on its edges and behind it, on fresh operands."""
    flat, spec = pytree.tree_flatten((node.args, node.kwargs))
    own = pytree.tree_leaves((original.args, original.kwargs))
    lead = len(flat) - len(own)

    def run(argument: Any, leaf: Tensor) -> Any:
        if argument.name in graph.nodes or "edit" in argument.meta:
            return leaf
        inner = run(argument.args[0], leaf)
        return argument.target(inner, *argument.args[1:])

    filled = list(flat)
    tensors = iter([p.index for p in bound.places if p.node is not None])
    for place, argument in enumerate(flat[lead:], lead):
        if isinstance(argument, fx.Node):
            index = next(tensors)
            held = fresh.get(index)
            filled[place] = bound.leaves[index] if held is None else run(argument, held)
    args, kwargs = pytree.tree_unflatten(filled, spec)
    target: Any = node.target
    with torch.enable_grad():
        value = target(*args, **kwargs)
        for user in node.users:
            edit = user.meta.get("edit")
            if isinstance(edit, Scale) and edit.node == node.name:
                behind: Any = user.target
                value = behind(value, *user.args[1:])
    return value


def _surrogate(
    edits: Sequence[Edit], bound: Bound, leaves: dict[int, Tensor], moving: Sequence[int]
) -> Any:
    """What an edited call is the gradient of: f with pruned operands held, written from scratch."""
    with torch.enable_grad():
        if any(isinstance(e, Secant) for e in edits):
            ((index, u),) = leaves.items()
            held = u.detach()
            f, origin = bound.run({index: held}), bound.run({index: torch.zeros_like(held)})
            near = held.abs() < 1e-6
            # the slope half way, to second order the chord's: torch's own at a kink there, and by
            # differences where it is smooth, as torch's own cancels near 0 (sinc)
            point = (held / 2).requires_grad_()
            (slope,) = torch.autograd.grad(bound.run({index: point}).sum(), point)
            steps = (1e-5, -1e-5, 2e-5, -2e-5)
            a, b, c, d = (bound.run({index: held / 2 + h}) for h in steps)
            centred, wide = (a - b) / 2e-5, (c - d) / 4e-5
            smooth = ((slope - centred).abs() < 1e-3) & ((wide - centred).abs() < 1e-8)
            slope = torch.where(smooth, centred, slope)
            chord = (f - origin) / torch.where(near, 1.0, held)
            return origin + u * torch.where(near, slope, chord)
        if any(isinstance(e, FreezeScale) for e in edits):
            return _frozen_norm(bound, leaves)
        if any(isinstance(e, Integrate) for e in edits):
            return _averaged(bound, leaves, moving)
        return bound.run(dict(leaves))


@cache
def _gauss_legendre(count: int) -> tuple[Any, Any]:
    points, weights = np.polynomial.legendre.leggauss(count)
    return points, weights


def _averaged(bound: Bound, leaves: dict[int, Tensor], moving: Sequence[int]) -> list[Tensor]:
    """A function whose gradient in the moving operands is the integral of f's from 0 to them:
    sum w_i f(t_i u) / t_i, with 320 Gauss-Legendre points in the cube root of t, for what has a
    root or a logarithm at 0 (held operands keep f's own)."""
    points, weights = _gauss_legendre(320)
    total: list[Tensor] = []
    roots = (points + 1) / 2
    for t, w in zip(roots**3, 3 * roots**2 * weights / 2, strict=True):
        here = {
            i: torch.where(u.isinf(), u, u * float(t)) if i in moving else u.detach()
            for i, u in leaves.items()
        }
        parts = [v * float(w / t) for v in _floats(bound.run(here))]
        total = [a + b for a, b in zip(total, parts, strict=True)] if total else parts
    return total


def _frozen_norm(bound: Bound, leaves: dict[int, Tensor]) -> Tensor:
    """(x - mean) / sigma * w + b with sigma detached, from the definition of each norm."""
    named = {p.label.split("[")[0]: leaves.get(p.index, p.value) for p in bound.places}
    name = str(bound.target).split(".")[1]
    x, w, b = named["input"], named.get("weight"), named.get("bias")
    if name in ("layer_norm", "native_layer_norm", "rms_norm"):
        count = sum(p.label.startswith("normalized_shape") for p in bound.places)
        dims = tuple(range(-count, 0))
        rows = x
        shape: tuple[int, ...] = ()
    else:
        groups = int(named["num_groups"]) if name == "group_norm" else x.shape[1]
        rows = x.reshape(x.shape[0], groups, -1)
        dims = (-1,)
        shape = (1, -1, *[1] * (x.dim() - 2))
    eps = named.get("eps")
    if eps is None:
        eps = torch.finfo(x.dtype).eps
    centred = rows if name == "rms_norm" else rows - rows.mean(dims, keepdim=True)
    power = centred.square().mean(dims, keepdim=True)
    out = (centred * (power + float(eps)).rsqrt().detach()).reshape(x.shape)
    if isinstance(w, Tensor):
        out = out * (w.reshape(shape) if shape else w)
    if isinstance(b, Tensor):
        out = out + (b.reshape(shape) if shape else b)
    return out


# --------------------------------------------------------------------------- (d) every cut


def _every_cut(
    balanced: Balanced, labels: Degrees, tracker: Tracker, inputs: tuple[Any, ...]
) -> None:
    """sum d <cotangent, value> over the cut, and the biases passed, is <c, f> at each cut."""
    values = tracker.values[0]
    graph = tracker.module.graph
    nodes = list(graph.nodes)
    ends = [n for n in pytree.tree_leaves(graph.output_node().args) if n in values]
    ends = [n for n in dict.fromkeys(ends) if is_real(values[n])]
    generator = torch.Generator().manual_seed(1)
    cotangents: dict[tuple[fx.Node, int], Tensor] = {}
    noise = [torch.randn(values[n].shape, generator=generator, dtype=torch.float64) for n in ends]
    for end, c in zip(ends, noise, strict=True):
        if _label(labels, end, 0).state != "live":
            c.zero_()  # nobody claims anything of a frozen output
        cotangents[end, 0] = c
    wanted = sum(_pair(c, values[n]) for n, c in zip(ends, noise, strict=True))
    total = sum(_degree(labels, n) * _pair(c, values[n]) for n, c in zip(ends, noise, strict=True))
    size = sum(float((c * values[n]).abs().sum()) for n, c in zip(ends, noise, strict=True))
    slack = CUT_TOLERANCE  # and what kernels err by: torch's hardsigmoid has a sixth in float32

    def compare(where: str) -> None:
        _require(
            abs(total - wanted) <= slack * max(size, 1e-9),
            "every cut",
            f"the residual moves by {abs(total - wanted):.1e} of {size:.1e} at {where}",
        )

    compare("the output")
    for node in reversed(nodes):
        if node.op != "call_function" or node not in tracker.moving:
            continue
        outputs = _pieces(values[node])
        carried = {i: cotangents.pop((node, i), None) for i in range(len(outputs))}
        if all(c is None for c in carried.values()):
            continue
        for item, given in carried.items():
            if given is None:  # nobody reads this one
                continue
            total -= _degree(labels, node, item) * _pair(given, outputs[item])
            slack += tracker.locals[node][item].error
            if node.name in labels.biases and tracker.locals[node][item].leaves:
                total += _pair(given, tracker.locals[node][item].added[0])
        for source, place, g in _backward(node, tracker, carried):
            old = cotangents.get((source, place))
            cotangents[source, place] = g if old is None else old + g
            value = _pieces(values[source])[place]
            total += _degree(labels, source, place) * _pair(g, value)
            size = max(size, float((g.conj() * value).abs().sum()))
        compare(node.name)
    _real_backward(balanced, tracker, inputs, noise, cotangents)


def _pieces(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


def _pair(c: Tensor, value: Tensor) -> float:
    product = torch.real(c.conj() * value)
    return float(torch.where(torch.isfinite(product), product, 0.0).sum())


def _label(labels: Degrees, node: fx.Node, item: int) -> Fact:
    edit = node.meta.get("edit")
    # the call written behind a scaled node has the degree that is claimed of that
    scaled = edit.node if isinstance(edit, Scale) else node.name
    facts = labels.facts[node.meta.get("behind", scaled)]
    return facts[min(item, len(facts) - 1)]


def _degree(labels: Degrees, node: fx.Node, item: int = 0) -> float:
    behind = isinstance(node.meta.get("edit"), Scale) or "behind" in node.meta
    own = 1.0 if behind else _factor(node)
    return float(_label(labels, node, item).degree) / own


def _backward(
    node: fx.Node, tracker: Tracker, carried: dict[int, Tensor | None]
) -> Iterator[tuple[fx.Node, int, Tensor]]:
    """What a node's real backward sends to each of its operands."""
    values = tracker.values[0]
    source: Any = node.args[0] if node.args else None
    if isinstance(source, fx.Node) and isinstance(values[source], (tuple, list)):
        if (c := carried[0]) is not None:
            index: Any = node.args[1]
            yield source, index % len(values[source]), c
        return
    bound = Bound(node, values.__getitem__)
    places = [
        p
        for p in bound.places
        if p.node is not None and is_real(p.value) and any(tracker.live[p.node])
    ]
    leaves = [p.value.detach().requires_grad_() for p in places]
    with torch.enable_grad():
        outputs = _pieces(bound.run({p.index: x for p, x in zip(places, leaves, strict=True)}))
    kept = [(outputs[i], c) for i, c in carried.items() if c is not None]
    kept = [(o, c) for o, c in kept if is_real(o) and o.requires_grad]
    if not kept or not leaves:
        return
    grads = torch.autograd.grad(
        [o for o, _ in kept], leaves, [c for _, c in kept], allow_unused=True
    )
    for place, g in zip(places, grads, strict=True):
        if g is not None and place.node is not None:
            yield place.node, 0, g


def _real_backward(
    balanced: Balanced,
    tracker: Tracker,
    inputs: tuple[Any, ...],
    noise: list[Tensor],
    swept: dict[tuple[fx.Node, int], Tensor],
) -> None:
    """The cotangents that the sweep leaves at the inputs are the gradient of the whole module."""
    leaves = [x.detach().clone().requires_grad_() if is_real(x) else x for x in inputs]
    outputs = list({id(o): o for o in _floats(balanced(*leaves))}.values())
    given = [x for x in leaves if is_real(x)]
    pairs = zip(outputs, noise, strict=True)
    kept = [(o, c) for o, c in pairs if o.requires_grad]
    if not kept:
        return
    grads = torch.autograd.grad(
        [o for o, _ in kept], given, [c for _, c in kept], allow_unused=True
    )
    graph = tracker.module.graph
    places = [n for n in graph.nodes if n.op == "placeholder" and n in tracker.moving]
    for node, g in zip(places, grads, strict=True):
        ours = swept.get((node, 0))
        ours = torch.zeros_like(tracker.values[0][node]) if ours is None else ours
        whole = torch.zeros_like(ours) if g is None else g
        _require(
            bool(torch.allclose(ours, whole, rtol=RTOL, atol=ATOL)),
            "every cut",
            f"the node by node backward and the module's differ at {node.name}",
        )


# --------------------------------------------------------------------------- (e), (f), (g)


def _deterministic(
    graph: ComputationGraph, plan: Plan, model: nn.Module, inputs: tuple[Any, ...], again: bool
) -> None:
    _require(derive_rules(graph).edits == plan.edits, "deterministic", "derived twice, two plans")
    if again:
        fresh = derive_rules(trace(model, inputs))
        _require(
            fresh.edits == plan.edits and fresh.fingerprint == plan.fingerprint,
            "deterministic",
            f"another trace, another plan: {plan.diff(fresh)}",
        )


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """The model's tensors, flags, hooks and attributes are the same at the end."""
    before = _snapshot(model)
    yield
    after = _snapshot(model)
    same = before.keys() == after.keys() and all(
        torch.equal(a, after[k]) and a.dtype == after[k].dtype
        if isinstance(a, Tensor)
        else a == after[k]
        for k, a in before.items()
    )
    _require(same, "untouched", "the user's model was changed")


def _snapshot(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {f"state {k}": v.clone() for k, v in model.state_dict().items()}
    for path, module in model.named_modules():
        found[f"training {path}"] = module.training
        for key, value in vars(module).items():
            counted = len(value) if hasattr(value, "__len__") else repr(value)
            found[f"attribute {path}.{key}"] = counted
    for name, parameter in model.named_parameters():
        found[f"grad {name}"] = parameter.grad is None
        found[f"requires {name}"] = parameter.requires_grad
        found[f"id {name}"] = id(parameter)
    return found


def _file(graph: ComputationGraph, plan: Plan, balanced: Balanced, inputs: tuple[Any, ...]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        plan.save(path)
        loaded = Plan.load(path)
    _require(loaded == plan, "file", "a plan read back is another plan")
    again = balance(graph, policy=loaded)
    ours, theirs = (_input_gradients(m, inputs) for m in (balanced, again))
    same = all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(ours, theirs, strict=True)
    )
    _require(same, "file", "a plan read back gives other gradients")


def _input_gradients(module: nn.Module, inputs: tuple[Any, ...]) -> Sequence[Tensor | None]:
    leaves = [x.detach().clone().requires_grad_() if is_real(x) else x for x in inputs]
    outputs = [o for o in _floats(module(*leaves)) if o.requires_grad]
    given = [x for x in leaves if is_real(x)]
    if not outputs:
        return [None] * len(given)
    return torch.autograd.grad([o.sum() for o in outputs], given, allow_unused=True)
