"""The user's own model beside its traced graph: whether gradients and values are the same.

The own backward runs in float64 with every cast lifted, as the trace does, and is compared leaf by
leaf and element by element: an allowance for low precision, or one norm over all, would be a door.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..backward.balanced import rewrite
from ..backward.running import inner
from ..graph.door import modules_of
from ..graph.foreign import met
from ..graph.keeping import kept, untouched, without_fast_path
from ..operators.calls import is_ray
from . import words
from .asleep import Seen, Sleeper, heard, sleepers_of
from .gradient import Gradient, Shares, traced_gradient
from .lifting import lifted
from .numeric import float_leaves, gradients, paired
from .structure import Structure
from .subject import Subject

TOLERANCE = 1e-13
"""of a tensor's largest entry: kernels that compute the same differ by less"""
MARGIN = 1e3
"""of the rounding that is measured where a tensor cancels to less than that"""


@dataclass(frozen=True)
class Own:
    """What the user's own gradient is beside the traced one.

    `modified`: it is another one; `shares`: what it attributes then. `problem`: why the two could
    not be compared, or what the model does that its trace does not; nothing can be judged then.
    """

    modified: bool = False
    shares: Shares | None = None
    problem: str = ""


def compared(model: Any, subject: Subject, inputs: list[Any], traced: Gradient) -> Own:
    """The own gradient of `model` (None: it is not asked for) against the traced one."""
    if model is None:
        return Own()
    learned = _leaves(model, subject, traced)
    if not learned and not any(map(is_ray, inputs)):
        return Own(problem=words.NOTHING_TO_COMPARE)
    try:
        return _compared(model, subject, inputs, traced, learned)
    except _DoesNotRun as error:
        return Own(problem=words.own_does_not_run(error.raised))


class _DoesNotRun(Exception):
    """What the user's code raised."""

    def __init__(self, raised: BaseException) -> None:
        super().__init__(str(raised))
        self.raised = raised


@contextmanager
def _running(model: Any) -> Iterator[None]:
    """The user's code runs within, in float64: a cache that keeps that is no longer the user's."""
    try:
        with lifted(), kept(model):
            yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise _DoesNotRun(error) from error


def _compared(
    model: Any, subject: Subject, inputs: list[Any], traced: Gradient, learned: dict[str, Tensor]
) -> Own:
    outputs, given, grads = _own_gradient(model, subject, inputs, traced, learned)
    rounding = _Rounding(subject, inputs, traced)
    if len(outputs) != len(traced.outputs) or not all(
        rounding.agree(ours, theirs, lambda other, i=i: other.outputs[i])
        for i, (ours, theirs) in enumerate(zip(outputs, traced.outputs, strict=True))
    ):
        return Own(problem=words.COPY_DIFFERS)
    values = given | learned
    own = _hooked(subject, dict(zip(values, grads, strict=True)))
    if _same(rounding, own, traced, values):
        hidden = _asleep(model, subject, inputs, traced, learned) if traced.sleep.asleep else ""
        return Own(problem=hidden)
    shares = _shares(subject, traced, own, values, _total(traced.cotangents, outputs))
    problem = words.MODIFIED_ASLEEP if traced.sleep.whole else ""
    return Own(True, shares, problem if shares else words.MODIFIED_BEHIND_A_TABLE)


def _asleep(
    model: Any, subject: Subject, inputs: list[Any], traced: Gradient, learned: dict[str, Tensor]
) -> str:
    """Why the own gradient is not the traced one where no gradient reaches; "" where it is.

    All sleeping values are outputs at once; only where the gradients differ one by one, and each
    tensor against every value that it may be.
    """
    seen = Seen({trait.shape for trait in traced.sleep.traits.values()})
    with _running(model):
        call, given = _own_call(model, subject, inputs, traced)
        with seen:
            outputs = call()
        seen.see(outputs)
    sleepers = sleepers_of(seen.behind(outputs), traced.sleep, subject.seed)
    behind = [s for s in sleepers if s.behind]
    values = given | learned
    watched = {name: None for s in behind for name in s.names}

    def differs(some: list[tuple[Sleeper, str]], balanced: bool = False) -> Sleeper | bool:
        """Whether a gradient does, where these are outputs as well; or the tensor whose does."""
        added = [s.cotangent(balanced) for s, _ in some]
        edges = [s.found.edge for s in behind]
        with _running(model), heard(edges) as passed:
            total = paired(traced.cotangents, outputs)
            grads = torch.autograd.grad(
                [total, *(s.found.edge for s, _ in some)],  # type: ignore[arg-type]
                [*values.values(), *edges],  # type: ignore[arg-type]
                [torch.ones_like(total), *added],
                retain_graph=True,
                allow_unused=True,
            )
        names = [name for _, name in some]
        cotangents = [*added, *traced.cotangents]
        theirs = traced_gradient(subject, inputs, cotangents, names, watched)
        assert theirs is not None, "it was no zero before"
        rounding = _Rounding(subject, inputs, theirs, watched)
        likes = [*values.values(), *(s.unit for s in behind)]
        found = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, likes, strict=True)]
        own = _hooked(subject, dict(zip(values, found, strict=False)))
        if not _same(rounding, own, theirs, values):
            return True
        for sleeper, g in zip(behind, found[len(values) :], strict=True):
            g = passed.get(sleeper.found.edge, g)
            if not any(
                rounding.agree(g, theirs.by_value[n], lambda other, n=n: other.by_value[n])
                for n in sleeper.names
            ):
                with _running(model):
                    if not sleeper.passes_all():
                        return sleeper
        return False

    asleep = [(s, s.asleep) for s in sleepers if s.asleep]
    sizes = [s.found.trait.mean for s, _ in asleep if s.found.trait.mean > 0.0]
    apart = bool(sizes) and max(sizes) > 1e3 * min(sizes)
    if not differs(asleep) and not (apart and differs(asleep, True)):
        return ""
    if isinstance(hidden := differs([]), Sleeper):
        return words.modified_asleep(subject.where(hidden.names[0]))
    for sleeper, name in asleep:
        if all(differs([(sleeper, n)]) for n in sleeper.names):
            return words.modified_asleep(subject.where(traced.sleep.asleep[name]))
    return ""


def _same(
    rounding: _Rounding, own: dict[str, Tensor], traced: Gradient, values: dict[str, Tensor]
) -> bool:
    """Whether the gradients by all leaves, whose values these are, agree."""
    return all(
        rounding.agree(g, _of(traced, name), lambda other, n=name: _of(other, n), values[name])
        for name, g in own.items()
    )


def _hooked(subject: Subject, grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients as the hooks on the user's parameters leave them, which a copy forgets."""
    traced = subject.graph.fx
    for name, parameter in traced.named_parameters():
        for hook in (parameter._backward_hooks or {}).values() if name in grads else ():
            found = hook(grads[name])
            grads[name] = grads[name] if found is None else found
    return grads


def _of(gradient: Gradient, name: str) -> Tensor:
    found = gradient.by_source.get(name)
    return gradient.by_leaf[name] if found is None else found


def _total(cotangents: list[Tensor], outputs: list[Tensor]) -> float:
    return float(paired(cotangents, outputs).detach())


def _leaves(model: Any, subject: Subject, traced: Gradient) -> dict[str, Tensor]:
    """The parameters and tables that the own model and the trace share: what a function finds in
    an object or a list is no part of it that could be copied."""
    held = {**dict(subject.module.named_parameters()), **dict(subject.module.named_buffers())}
    parts = modules_of(model)
    shared = {id(t) for part in parts for t in (*part.parameters(), *part.buffers())}
    return {name: held[name] for name in traced.by_leaf if id(held[name]) in shared}


def _own_gradient(
    model: Any, subject: Subject, inputs: list[Any], traced: Gradient, learned: dict[str, Tensor]
) -> tuple[list[Tensor], dict[str, Tensor], list[Tensor]]:
    """A callable's outputs; its float inputs by name; the gradients of <c, f> by those inputs and
    then by `learned`, all by its own autograd."""
    with _running(model):
        call, given = _own_call(model, subject, inputs, traced)
        outputs = call()
        if [o.shape for o in outputs] != [c.shape for c in traced.cotangents]:
            return [], given, []
        grads = gradients(paired(traced.cotangents, outputs), [*given.values(), *learned.values()])
    return [o.detach() for o in outputs], given, grads


def _own_call(
    model: Any, subject: Subject, inputs: list[Any], traced: Gradient
) -> tuple[Callable[[], list[Tensor]], dict[str, Tensor]]:
    """What runs a callable, and its float inputs by name."""
    graph = subject.graph
    leaves = [t.detach().clone().requires_grad_() if is_ray(t) else t for t in inputs]
    spec = pytree.tree_structure((graph.args, graph.kwargs))
    passed = pytree.tree_map_only(Tensor, Tensor.clone, leaves)  # the model may write to them
    args, kwargs = graph.given(*pytree.tree_unflatten(passed, spec))
    named = zip(graph.placeholders, leaves, strict=False)
    given = {n.name: t for n, t in named if is_ray(t) and n.name in traced.by_source}
    return lambda: graph.reading.tensors(model(*args, **kwargs)), given


class _Rounding:
    """How far two tensors may be apart: by rounding alone, which is measured where it is needed, by
    the traced gradient at inputs that differ in their last digits."""

    def __init__(
        self, subject: Subject, inputs: list[Any], traced: Gradient, watched: Collection[str] = ()
    ) -> None:
        self.subject, self.inputs, self.traced, self.watched = subject, inputs, traced, watched
        self.others: list[Gradient] | None = None

    def agree(self, own: Tensor, traced: Tensor, of: Any, value: Tensor | None = None) -> bool:
        """Whether a tensor is the traced one, and, where `value` is given, their products with it;
        `of` takes the tensor out of another gradient."""
        own, traced = own.detach(), traced.detach()
        pairs = [(own, traced, lambda other: of(other).detach())]
        if value is not None:
            x = value.detach()
            pairs.append((own * x, traced * x, lambda other: of(other).detach() * x))
        return all(self._close(a, b, take) for a, b, take in pairs)

    def _close(self, own: Tensor, traced: Tensor, take: Any) -> bool:
        gap = (own - traced).abs()
        gap = gap.masked_fill((own == traced) | (own.isnan() & traced.isnan()), 0.0)
        if not gap.numel() or bool((gap <= TOLERANCE * _largest(traced)).all()):
            return True
        noise = max(_largest(take(other) - traced) for other in self._others())
        return bool((gap <= MARGIN * noise).all())

    def _others(self) -> list[Gradient]:
        if self.others is None:
            moved = [[_last_digits(t, s) for t in self.inputs] for s in (1.0, -1.0)]
            given = self.traced.cotangents, self.traced.taken, self.watched
            found = (traced_gradient(self.subject, m, *given) for m in moved)
            self.others = [f for f in found if f is not None]
        return self.others


def _last_digits(value: Any, sign: float) -> Any:
    """A float input with other last digits."""
    if not is_ray(value):
        return value
    steps = torch.arange(value.numel(), device=value.device).reshape(value.shape) % 7 - 3
    return value * (1.0 + sign * steps * torch.finfo(value.dtype).eps)


def _largest(value: Tensor) -> float:
    finite = value.abs().nan_to_num(0.0, 0.0, 0.0)
    return float(finite.max()) if finite.numel() else 0.0


def _shares(
    subject: Subject,
    traced: Gradient,
    own: dict[str, Tensor],
    values: dict[str, Tensor],
    value: float,
) -> Shares | None:
    """What the own gradient attributes; None where a source's part of it is not seen.

    A source that is a lookup is seen by its table, where nothing else reads that.
    """
    through_input = 0.0
    for name in subject.labels.live.sources:
        node = subject.graph.nodes[name]
        table = next((str(n.target) for n in node.all_input_nodes if n.op == "get_attr"), None)
        seen = name if name in own else table
        if seen not in own or (seen == table and not _alone(subject, seen)):
            return None
        through_input += inner(own[seen], values[seen])
    of_parameters = {
        node: inner(own[name], values[name]) for node, name in _parameter_leaves(subject, own)
    }
    return Shares(value, through_input, {**traced.shares.through_biases, **of_parameters})


def _alone(subject: Subject, name: str) -> bool:
    """Whether a parameter is read once."""
    reads = [n for n in subject.graph.nodes.values() if n.op == "get_attr" and n.target == name]
    return sum(len(n.users) for n in reads) == 1


def _parameter_leaves(subject: Subject, known: Collection[str]) -> Iterator[tuple[str, str]]:
    """Bias nodes whose only leaf is a parameter that has no other use, with that parameter."""
    for name, operands in subject.labels.biases.items():
        call = subject.labels.live.calls[name]
        if call.operator.every_output or len(operands) != 1:
            continue  # a leaf an output, or several at one
        reads = {o.name: o.node for o in call.operands}
        leaf = reads.get(operands[0])
        if leaf is None or leaf.op != "get_attr" or str(leaf.target) not in known:
            continue
        if list(reads.values()).count(leaf) == len(leaf.users) == 1:
            yield name, str(leaf.target)


# --------------------------------------------------------------------------- forward


class Forward(Enum):
    """The edited forward beside the model's."""

    SAME_BITS = "same bits"
    WITHOUT_FAST_PATH = "same bits without torch's fast path for attention"
    OTHER = "other bits"
    RANDOM = "two runs of the model have different bits"
    NOT_FINITE = "not finite in the model's own dtype"


def forward_beside(structure: Structure) -> Forward:
    """Whether the edited graph's forward is the model's, bit for bit, in the model's own dtype."""
    graph = structure.graph
    module = rewrite(graph, structure.edits)
    args, kwargs = graph.given(graph.args, graph.kwargs)

    def judged() -> list[Tensor]:
        return graph.reading.tensors(untouched(graph.model, args, kwargs))

    with torch.no_grad(), met(f"{graph.name} does not run on its own inputs a second time"):
        ours, theirs = float_leaves(module(*graph.args, **graph.kwargs)), judged()
        if not all(bool(v.isfinite().all()) for v in theirs):
            return Forward.NOT_FINITE
        if _same_bits(ours, theirs):
            return Forward.SAME_BITS
        with without_fast_path():
            plain = judged()
        if _same_bits(ours, plain):
            return Forward.WITHOUT_FAST_PATH
        again = judged()
    return Forward.OTHER if _same_bits(plain, again) else Forward.RANDOM


def _same_bits(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(map(_equal, ours, theirs))


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
