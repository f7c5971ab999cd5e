"""FullGrad attribution: what the input and every bias leaf contribute to an output."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..errors import FullgradError, InputError, NonFiniteError, TraceError
from ..graph.computation import ComputationGraph, tensor_value
from ..graph.door import Inputs, Model, Names, split_inputs
from ..graph.foreign import without_page
from ..graph.outputs import Selection
from ..graph.sources import first_line
from ..operators.algebra import Algebra
from ..operators.calls import Call, is_ray
from ..plan.labelling import Degrees, degrees
from ..plan.measuring import refuse_chosen
from .balanced import Balanced, balance
from .running import Run, finite_products
from .samples import Samples, first_not_finite, samples_of
from .targets import Chosen, Target, resolve


@dataclass(frozen=True)
class FullGrad:
    """Contributions to the target. `input`: of the inputs' shape (a tuple where there are several);
    `biases`: leaf -> map of the shape of the node it enters; `output`, `total`, `error` (relative)
    have shape (samples,), or () where all that is given is one sample: then `batch` is None.

    `batch`: the dimension of the output that holds the samples.
    """

    input: Tensor | tuple[Tensor, ...]
    biases: Mapping[str, Tensor]
    output: Tensor
    total: Tensor
    batch: int | None = 0

    @property
    def samples(self) -> int:
        """How many samples were told apart; 1 where they meet, or where there is no batch."""
        return self.output.numel()

    @property
    def error(self) -> Tensor:
        """|output - total| / |output|."""
        return (self.output - self.total).abs() / self.output.abs()


@torch.inference_mode(False)
def fullgrad(
    model: Model | Balanced,
    inputs: Inputs = None,
    target: Target = None,
    *,
    batch: int | Literal["auto"] | None = "auto",
    baseline: Inputs = None,
    output: Selection = None,
    constant: Names = (),
    explain: Names | None = None,
) -> FullGrad:
    """Split an output into contributions of input and bias leaves (Srinivas & Fleuret 2019).

    `model`: a balanced model, or any model for its plain gradient. `target`: see `Target`; None is
    the largest entry of each sample. `batch`: the dimension of the inputs that holds samples; by
    default it is looked for, and where samples meet the whole is one; None says that it is. Of a
    complex output the real part is split. `baseline`: other inputs x0, given as these are; then
    f(x) - f(x0) is split, each part being what it is at x less what it is at x0. `output`,
    `constant` and `explain` as in `trace`, for a model that is not balanced yet. Raises
    `InputError` and `NonFiniteError`.
    """
    if isinstance(model, Balanced):
        refuse_chosen("a balanced model", output, constant, explain)
        balanced = model
    else:
        balanced = balance(
            model, inputs, "plain", output=output, constant=constant, explain=explain
        )
    graph = balanced.graph
    if graph is None:
        raise InputError("a balanced model that was copied or loaded has no graph; balance() again")
    split = _splitting(balanced, graph, batch)
    given = (graph.args, graph.kwargs) if inputs is None else split_inputs(graph.model, inputs)
    args = balanced.arranged(*given)
    if batch == "auto" and _names_the_whole(target, graph) and split.samples.output != 0:
        split = _splitting(balanced, graph, None)
    elif batch == "auto" and split.samples.output is None and _is_one(graph, args):
        split = replace(split, samples=replace(split.samples, output=0))
    if baseline is None:
        return _parts(split, pytree.tree_leaves(args), target)
    flat, origin = pytree.tree_leaves(args), balanced.arranged(*split_inputs(graph.model, baseline))
    chosen = split.resolved(split.first_output(flat), target)
    here = _parts(split, flat, chosen)
    try:
        there = _parts(split, _as_many(pytree.tree_leaves(origin), flat), chosen)
    except NonFiniteError as error:
        raise NonFiniteError(f"at the baseline, {error}; choose another one") from None
    return _less(here, there)


def _parts(split: _Splitting, flat: Sequence[Any], target: Target | Chosen) -> FullGrad:
    size = next((t.shape[0] for t in flat if isinstance(t, Tensor) and t.dim()), 1)
    if size == 1 or not split.wants_slices:
        return _split(split, flat, target)
    chosen = target if isinstance(target, Chosen) else None
    if chosen is None:
        chosen = split.resolved(split.first_output(flat), target)
    slices = [pytree.tree_map_only(Tensor, _nth(k), [*flat]) for k in range(size)]
    return _join([_split(split, one, chosen.sample(k)) for k, one in enumerate(slices)])


def _as_many(baseline: Sequence[Any], flat: Sequence[Any]) -> list[Any]:
    """A baseline, one for all samples being enough."""
    fitted = []
    for given, like in zip(baseline, flat, strict=True):
        if isinstance(given, Tensor) and isinstance(like, Tensor):
            try:
                given = given.expand_as(like)
            except RuntimeError:
                raise InputError(
                    f"a baseline of shape {tuple(given.shape)} does not fit an input of shape "
                    f"{tuple(like.shape)}"
                ) from None
        fitted.append(given)
    return fitted


def _less(here: FullGrad, there: FullGrad) -> FullGrad:
    """The parts of a difference."""
    one, other = (p.input if isinstance(p.input, tuple) else (p.input,) for p in (here, there))
    inputs = tuple(a - b for a, b in zip(one, other, strict=True))
    biases = {name: part - there.biases[name] for name, part in here.biases.items()}
    return FullGrad(
        inputs if isinstance(here.input, tuple) else inputs[0],
        biases,
        here.output - there.output,
        here.total - there.total,
        here.batch,
    )


def _names_the_whole(target: Target, graph: ComputationGraph) -> bool:
    """Whether a target has one index for each dimension of the output, the batch among them: where
    that is not the first, it was not meant as one."""
    value = tensor_value(graph.outputs[0])
    return isinstance(target, tuple) and value is not None and len(target) == value.dim() > 0


def _is_one(graph: ComputationGraph, args: Any) -> bool:
    """Whether a batch of one is given, and returned: whether more would meet is not asked."""
    value = tensor_value(graph.outputs[0])
    given = [t for t in pytree.tree_leaves(args) if isinstance(t, Tensor) and t.dim()]
    ones = bool(given) and all(t.shape[0] == 1 for t in given)
    return ones and value is not None and value.dim() > 0 and str(value.shape[0]) in _ones(graph)


def _ones(graph: ComputationGraph) -> set[str]:
    """A size of one, as the output has it: the number, or that of the inputs that is left open."""
    values = [v for v in map(tensor_value, graph.placeholders) if v is not None and v.dim()]
    return {"1", *(str(v.shape[0]) for v in values if not isinstance(v.shape[0], int))}


@dataclass(frozen=True)
class _Splitting:
    """What is known of a balanced model before it runs. `places`: leaf -> the node that it enters,
    and which of its outputs."""

    module: fx.GraphModule
    graph: ComputationGraph
    labels: Degrees
    samples: Samples
    places: Mapping[str, tuple[str, int]]

    @property
    def tells_apart(self) -> bool:
        """Whether every contribution has the samples in a dimension of its own."""
        known = self.samples.nodes.keys() >= set(self.places.values())
        return known and None not in self.samples.sources.values()

    @property
    def wants_slices(self) -> bool:
        """Whether samples are run one by one: where they do not tell apart, and can be."""
        first = {0, self.samples.output} | {*self.samples.sources.values()}
        return self.graph.dynamic and first == {0} and not self.tells_apart

    def output(self, made: Any) -> Tensor:
        """The first floating-point tensor of what the graph returns."""
        return next(t for t in pytree.tree_leaves(made) if is_ray(t))

    @torch.no_grad()
    def first_output(self, flat: Sequence[Any]) -> Tensor:
        """The same at some flat inputs."""
        run = fx.Interpreter(self.module)
        return self.output(run.run(*flat, enable_io_processing=False))

    def resolved(self, output: Tensor, target: Target | Chosen) -> Chosen:
        if isinstance(target, Chosen):
            return target
        if callable(target) and not isinstance(target, Tensor):
            function = target
            return resolve(lambda front: function(self.samples.back(front)), self.front(output))
        return resolve(target, self.front(output))

    def front(self, output: Tensor) -> Tensor:
        return self.samples.front(output)


_KNOWN: weakref.WeakKeyDictionary[Balanced, dict[Any, _Splitting]] = weakref.WeakKeyDictionary()


def _splitting(balanced: Balanced, graph: ComputationGraph, batch: Any) -> _Splitting:
    """Found once a balanced model: it runs the graph some times."""
    known = _KNOWN.setdefault(balanced, {})
    if batch not in known:
        if not (batch is None or batch == "auto" or isinstance(batch, int)):
            raise InputError(f"batch is a dimension, None or 'auto', not {batch!r}")
        labels = degrees(graph, balanced.plan.edits)
        places = {k: at for k, at in _leaf_places(graph, labels).items() if at[0] in labels.alive}
        watched = [name for name, _ in places.values()]
        sources = [name for name in labels.live.sources if name in labels.alive]
        samples = samples_of(balanced.fx, graph, sources, watched, batch)
        known[batch] = _Splitting(balanced.fx, graph, labels, samples, places)
    return known[batch]


def _nth(k: int) -> Callable[[Tensor], Tensor]:
    return lambda t: t[k : k + 1] if t.dim() else t


def _join(parts: Sequence[FullGrad]) -> FullGrad:
    def cat(*tensors: Any) -> Any:
        return tuple(map(cat, *tensors)) if isinstance(tensors[0], tuple) else torch.cat(tensors)

    return FullGrad(
        cat(*(p.input for p in parts)),
        {name: cat(*(p.biases[name] for p in parts)) for name in parts[0].biases},
        cat(*(p.output for p in parts)),
        cat(*(p.total for p in parts)),
    )


def _leaf_places(graph: ComputationGraph, labels: Degrees) -> dict[str, tuple[str, int]]:
    """Where bias leaves enter, as `Run.on_bias` calls it: the node, and which of its outputs."""
    places: dict[str, tuple[str, int]] = {}
    for name in labels.biases:
        value = graph.nodes[name].meta.get("val")
        outputs = len(value) if isinstance(value, (tuple, list)) else 1
        if outputs > 1 and labels.live.calls[name].operator.every_output:
            places |= {f"{name}[{i}]": (name, i) for i in range(outputs)}
        else:
            places[name] = (name, 0)
    return places


def _split(split: _Splitting, flat: Sequence[Any], target: Target | Chosen) -> FullGrad:
    """One forward; one backward, or one a sample where a map does not tell them apart."""
    maps: dict[str, Tensor] = {}
    heard = partial(_hear, maps)
    run = Run(split.module, split.graph, split.labels, heard)
    with torch.enable_grad(), _told(split.graph):
        output = split.output(run.run(*flat, enable_io_processing=False))
        values = split.resolved(output, target).of(split.front(output))
        if not bool(torch.isfinite(values).all()):
            raise NonFiniteError(_not_finite(split, flat, values))
        given = list(run.sources.values())
        count = values.numel()
        each = [values.sum()] if count == 1 or split.tells_apart else [*values]
        found = [
            _contributions(value, given, maps, k < len(each)) for k, value in enumerate(each, 1)
        ]
    inputs = tuple(_added([part.inputs[i] for part in found]) for i in range(len(given)))
    keys = [key for key in split.places if any(key in part.biases for part in found)]
    biases = {key: _added([p.biases[key] for p in found if key in p.biases]) for key in keys}
    if len(found) < count:
        dims = split.samples.sources  # of others nothing comes
        parts_of = dict(zip(run.sources, inputs, strict=True))
        total = sum((_summed(parts_of[n], d) for n, d in dims.items()), values.new_zeros(()))
        for key, parts in biases.items():
            total = total + _summed(parts, split.samples.nodes[split.places[key]])
    else:
        total = torch.stack([_everything(part, values) for part in found])
    if not bool(torch.isfinite(total).all()):
        raise NonFiniteError(
            "the contributions are not finite: an operation has no finite gradient at these inputs "
            "(a root or a norm of 0); check_completeness names it"
        )
    shape = values.shape if split.samples.output is not None else ()
    names = _leaf_labels(split.graph, split.labels, biases)
    return FullGrad(
        inputs[0] if len(inputs) == 1 else inputs,
        {names[key]: parts for key, parts in biases.items()},
        values.detach().reshape(shape),
        total.reshape(shape),
        split.samples.output,
    )


@contextmanager
def _told(graph: ComputationGraph) -> Iterator[None]:
    """What torch cannot run, or not differentiate, is an error of ours."""
    try:
        yield
    except FullgradError:
        raise
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        raise TraceError(
            f"{graph.name} cannot be split here, torch does not run or differentiate it: "
            f"{first_line(error)}; hold what has no derivative fixed with constant="
        ) from without_page(error)


@dataclass(frozen=True)
class _Part:
    """What one backward told."""

    inputs: tuple[Tensor, ...]
    biases: Mapping[str, Tensor]


def _hear(maps: dict[str, Tensor], key: str, g: Tensor, added: Tensor) -> None:
    maps[key] = finite_products(g, added)


def _contributions(
    value: Tensor, given: Sequence[Tensor], maps: dict[str, Tensor], again: bool
) -> _Part:
    maps.clear()
    grads: Sequence[Tensor | None] = [None] * len(given)
    if value.requires_grad:  # else the target does not depend on the input
        grads = torch.autograd.grad(value, given, retain_graph=again, allow_unused=True)
    inputs = tuple(
        torch.zeros_like(x.real if x.is_complex() else x)
        if g is None
        else finite_products(g.to_dense() if g.is_sparse else g, x).detach()
        for g, x in zip(grads, given, strict=True)
    )
    return _Part(inputs, dict(maps))


def _added(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack([*parts]).sum(0)


def _everything(part: _Part, like: Tensor) -> Tensor:
    sums = [t.sum() for t in (*part.inputs, *part.biases.values())]
    return sum(sums, like.new_zeros(()))


def _not_finite(split: _Splitting, flat: Sequence[Any], values: Tensor) -> str:
    """What to say of a target that is NaN or infinite: where it began."""
    for node, given in zip(split.graph.placeholders, flat, strict=False):
        if is_ray(given) and bool(given.isnan().any()):
            return f"the input {node.name} holds NaN"
    first = first_not_finite(split.module, flat)
    where = f"; it begins at {split.graph.describe(first)}" if first in split.graph.nodes else ""
    bad = values.detach()[~torch.isfinite(values)]
    return f"the target's value is {float(bad[0])}, which has no contributions{where}"


def _summed(parts: Tensor, batch: int | None) -> Tensor:
    """The sum over all dimensions but the batch one, (n,)."""
    assert batch is not None, "a map without samples of its own is summed one by one"
    front = parts.movedim(batch, 0)
    return front.reshape(front.shape[0], -1).sum(1)


def _leaf_names(call: Call) -> str:
    """What the leaves at a call are called: parameter names where they are parameters."""
    operator = call.operator
    if operator.every_output or operator.origin:
        return "f(0)"
    labels = []
    for name in operator.bias_operands(call):
        operand = next(o for o in call.operands if o.name == name)
        if operand.node is not None and operand.node.op in ("get_attr", "placeholder"):
            labels.append(str(operand.node.target))
        else:
            labels.append(name if operand.node is not None else f"{name}={operand.literal:g}")
    return ", ".join(labels) or ("intercept" if operator.algebra is Algebra.PIECEWISE else "f(0)")


def _leaf_labels(
    graph: ComputationGraph, labels: Degrees, maps: Mapping[str, Tensor]
) -> dict[str, str]:
    places = {key: name for key, (name, _) in _leaf_places(graph, labels).items()}
    names = {k: _leaf_names(labels.live.calls[places[k]]) for k in maps}
    once = {label for label in names.values() if list(names.values()).count(label) == 1}
    return {n: label if label in once else f"{label} @ {n}" for n, label in names.items()}
