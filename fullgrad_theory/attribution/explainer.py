"""The door: a model, images or texts, methods; maps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import networkx as nx
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..backward.balanced import Balanced, balance
from ..backward.targets import Chosen, Target
from ..check.numeric import float_leaves
from ..edits.costs import Policy
from ..errors import InputError, unknown_name
from ..graph.computation import ComputationGraph, tensor_value
from ..graph.door import Inputs, Model, Names, split_inputs
from ..graph.outputs import Selection
from ..plan.labelling import degrees
from ..plan.measuring import refuse_chosen
from ..plan.plan import Plan
from .axes import Axes, usual
from .layouts import Cell
from .map import Map, MethodResult
from .methods import METHODS, Method
from .places import Source, open_dim
from .run import OF_ATTENTION, Need, chosen_of, counted, gather, output_and_source, output_from
from .sampled import Sampling, Score
from .structure import Anatomy, anatomy


class Explainer:
    """Attribution maps of a model over the places of its input, made ready once.

    The input is one image tensor (B, C, H, W), the tokens of a text, which the model embeds, or any
    other whose dimensions `axes` gives a meaning. `inputs`: an example, left out where the model
    says what it takes. `policy`: the edits of the backward, None for the gradient as it is; a
    balanced model brings its own. A traced model saves tracing again for every policy. `output`,
    `constant`, `explain` as in `trace`. Nothing of the model changes.
    """

    def __init__(
        self,
        model: Model | Balanced | ComputationGraph,
        inputs: Inputs = None,
        policy: str | Policy | Plan | None = None,
        *,
        output: Selection = None,
        constant: Names = (),
        explain: Names | None = None,
        axes: Axes | None = None,
    ) -> None:
        if isinstance(model, Balanced):
            refuse_chosen("a balanced model", output, constant, explain)
            if policy is not None:
                raise InputError("a balanced model has its edits; leave the policy out")
            balanced = model
        else:
            balanced = balance(
                model,
                inputs,
                "plain" if policy is None else policy,
                output=output,
                constant=constant,
                explain=explain,
            )
        graph = balanced.graph
        if graph is None:
            raise InputError("a balanced model that was copied or loaded has no graph; balance()")
        self.model, self.labels = balanced, counted(degrees(graph, balanced.plan.edits))
        self.source = _source(graph, self.labels.live.sources, axes)
        self._graph, self._example = graph, pytree.tree_leaves((graph.args, graph.kwargs))
        self._batched = [open_dim(n) for n in graph.placeholders]
        if not graph.dynamic and (many := _count(self._example)) > 1:
            called = self.source.axes.called
            raise InputError(
                f"this model takes batches of {many} only; pass inputs of one {called}"
            )
        first = pytree.tree_map_only(Tensor, Tensor.detach, self._rows(self._example, 0))
        self.anatomy: Anatomy = anatomy(graph, self.labels.live, self.source, first)
        self._one_by_one = not graph.dynamic or _folded(self.anatomy, self.labels.biases)

    @property
    def blocks(self) -> tuple[str, ...]:
        """The module paths of the blocks, in order."""
        return tuple(b.path for b in self.anatomy.blocks)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens at the first block, of pixels where there is none; a text is
        one row."""
        if not self.anatomy.blocks:
            return self.anatomy.size
        return self.anatomy.stream[self.anatomy.blocks[0].input].grid

    def applying(self) -> tuple[str, ...]:
        """The methods that apply to this model."""
        return tuple(name for name, method in METHODS.items() if self._lacks(method) is None)

    def _lacks(self, method: Method) -> str | None:
        found, needs = self.anatomy, method.needs
        attention = needs & OF_ATTENTION
        if attention and not found.attention:
            return f"attention between tokens in a form that is recognised ({found.forms})"
        if needs & {Need.BLOCKS, *attention} and not found.blocks:
            return "blocks of several tokens"
        if Need.LAYERS in needs and not found.layers:
            return "attention in blocks whose output is as the last one's"
        if Need.STREAM in needs and all(site.step is None for site in found.attention):
            return str(Need.STREAM)
        if Need.VECTORS in needs and not found.plain:
            return str(Need.VECTORS)
        if Need.STEADY in needs and not found.steady:
            return str(Need.STEADY)
        return None

    def _methods(self, names: str | Sequence[str]) -> dict[str, Method]:
        chosen = {}
        for name in [names] if isinstance(names, str) else names:
            if name not in METHODS:
                raise unknown_name("method", name, METHODS)
            chosen[name] = METHODS[name]
            lacks = self._lacks(chosen[name])
            if lacks is not None:
                raise InputError(
                    f"{name} needs {lacks}, which this model does not have; methods that apply: "
                    f"{', '.join(self.applying())}"
                )
        if not chosen:
            raise InputError(f"name a method: {', '.join(self.applying())}")
        return chosen

    @torch.inference_mode(False)
    def __call__(
        self,
        x: Inputs,
        methods: str | Sequence[str] = "fullgrad+",
        target: Target | Chosen = None,
        seed: int = 0,
    ) -> dict[str, Map]:
        """Maps of a batch, images (B, C, H, W), by each of the methods, for a target.

        `x`: as the example. `target`: see `Target`; None is the prediction. All gradient methods
        share one forward and one backward. `seed` is for random and SmoothGrad. Raises
        `InputError`, `UnknownNameError`.
        """
        chosen = self._methods(methods)
        parts = self._inputs(x)
        if len(parts) == 1:
            return self._explain(parts[0], chosen, target, seed)
        chosen_target = None  # of each the largest
        if target is not None:  # resolved before each sample is run alone
            with torch.no_grad():
                chosen_target = chosen_of(torch.cat([self._output(p) for p in parts]), target)
        made = []
        for i, part in enumerate(parts):
            own = None if chosen_target is None else chosen_target.sample(i)
            made.append(self._explain(part, chosen, own, seed + i))
        return {name: _join([maps[name] for maps in made]) for name in chosen}

    def _inputs(self, x: Inputs) -> list[list[Any]]:
        """The inputs, flat: of all samples, or of each where they are run one by one."""
        called, leaves = self.source.axes.called, pytree.tree_leaves(x)
        tensors = [t for t in leaves if isinstance(t, Tensor)]
        if len(self._example) == 1 and not (
            len(tensors) == len(leaves) == 1 and tensors[0].shape[1:] == self._example[0].shape[1:]
        ):
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            shape = ", ".join(map(str, self._example[0].shape[1:]))
            raise InputError(f"expected {called}s of shape (B, {shape}), got {got}")
        count = _count(tensors)
        if count == 0:
            raise InputError(f"a batch without {called}s has nothing to attribute")
        given = self._split(x)

        def one(k: int, t: Tensor) -> Tensor:
            return t[k : k + 1] if t.dim() and t.shape[0] == count else t

        alone = range(count) if self._one_by_one and count > 1 else ()
        many = [pytree.tree_map_only(Tensor, partial(one, k), given) for k in alone] or [given]
        found = [pytree.tree_leaves(self.model.arranged(*part)) for part in many]
        for t, example in zip(found[0], self._example, strict=True):
            if isinstance(t, Tensor) and t.dtype != example.dtype:
                raise InputError(
                    f"expected {called}s of {example.dtype}, as the model is, got {t.dtype}"
                )
        return found

    def _rows(self, given: Sequence[Any], k: int, count: int = 1) -> list[Any]:
        """The k-th sample of flat inputs, repeated; of a batch that is not open there is one."""
        return [
            t if at is None else t.narrow(at, k, 1).repeat_interleave(count, at)
            for t, at in zip(given, self._batched, strict=True)
        ]

    def _explain(
        self, given: list[Any], methods: dict[str, Method], target: Target | Chosen, seed: int
    ) -> dict[str, Map]:
        one_pass = [m for m in methods.values() if m.function is not None]
        record = None
        if one_pass:
            needs = frozenset[Need]().union(*(m.needs for m in one_pass))
            record = gather(self.model, self.labels, self.anatomy, given, target, needs)
            output, chosen, value = record.output, record.target, record.input
        else:
            with torch.no_grad():
                values, parts = output_and_source(self.model, self.source, given)
                value = self.source.axes.joined(parts)
                chosen = chosen_of(values, target)
                output = chosen.of(values)
        score = partial(self._score, given, chosen)
        axes = self.source.axes
        sampling = Sampling(value.detach(), axes, score, self.grid, self._cell(), seed)
        return {
            name: self._map(name, method.result(record, sampling), output, chosen.index)
            for name, method in methods.items()
        }

    def scores(self, x: Inputs) -> Tensor:
        """The model's output, (B, classes): the first float tensor of it, where it is several."""
        return self._output(pytree.tree_leaves(self.model.arranged(*self._split(x))))

    def _split(self, x: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return split_inputs(self._graph.model, x)

    def _output(self, given: Sequence[Any]) -> Tensor:
        return float_leaves(self.model.fx(*given))[0]

    def _score(self, given: Sequence[Any], chosen: Chosen, sample: int) -> Score:
        """The value of one sample's target, of any of its inputs; captum's noise is of float32."""
        own = chosen.sample(sample)
        axes = self.source.axes
        like = [self._graph.nodes[name].meta["val"] for name in self.source.nodes]

        def score(inputs: Tensor) -> Tensor:
            count = inputs.shape[0]
            rows = self._rows(given, sample, count)
            parts = axes.parted(inputs.to(like[0].dtype), like)
            output = output_from(self.model, self.source, rows, parts)
            return own.expanded(count).of(output)

        return score

    def _cell(self) -> Cell:
        if not self.anatomy.blocks:
            return 1.0, 1.0
        return self.anatomy.stream[self.anatomy.blocks[0].input].cell

    def _map(self, name: str, found: MethodResult, output: Tensor, index: Tensor | None) -> Map:
        size, axes = self.anatomy.size, self.source.axes
        grids = [s.grid for s in self.anatomy.stream.values() if s.cell == found.cell]
        rows, columns = (max(sizes) for sizes in zip(*grids, strict=True)) if grids else size
        total = None if found.total is None else found.total.to(output)
        values = axes.off_grid(found.values[:, :rows, :columns].detach())
        cell = self._cell()
        tiled = self.grid[0] * cell[0], self.grid[1] * cell[1]
        n = len(axes.places)  # a sequence has no rows
        cells = found.cell[-n:], tiled[-n:]
        return Map(name, values, output, index, total, size[-n:], *cells, axes)


def _source(graph: ComputationGraph, sources: Sequence[str], axes: Axes | None) -> Source:
    """The one value that is attributed to, with what its dimensions mean; raises `InputError`."""
    values = {name: tensor_value(graph.nodes[name]) for name in sources}
    shapes = {name: tuple(v.shape) for name, v in values.items() if v is not None}
    meant = axes or (usual(len(next(iter(shapes.values())))) if shapes else None)
    if meant is None:
        raise InputError(
            f"maps are of models that take one image tensor (B, C, H, W), or embed tokens as (B, "
            f"T, width); this one's is {[*shapes.values()]}: say by axes= what the dimensions "
            "mean; fullgrad() splits the output of any model"
        )
    if len({_inputs_behind(graph, name) for name in shapes}) > 1:
        raise InputError(
            f"maps are of one input, and this model has several, {', '.join(shapes)}: hold the "
            "others fixed by constant=, as token types are, or name the one by explain="
        )
    for shape in shapes.values():
        meant.fit(len(shape))
    places = {str([shape[dim] for dim in (0, *meant.places)]) for shape in shapes.values()}
    if len(places) > 1 or (len(shapes) > 1 and not meant.features):
        raise InputError(
            f"this model looks its input up in several tables that do not fit each other, of "
            f"shapes {[*shapes.values()]}; fullgrad() splits the output of any model"
        )
    return Source(tuple(shapes), meant)


def _inputs_behind(graph: ComputationGraph, name: str) -> frozenset[str]:
    """The inputs that a source is, or is looked up by, and that are not held."""
    behind = {name, *nx.ancestors(graph.nx, name)}
    return frozenset(n.name for n in graph.placeholders if n.name in behind) - graph.held


def _count(given: Sequence[Any]) -> int:
    """How many samples flat inputs have."""
    return next((t.shape[0] for t in given if isinstance(t, Tensor) and t.dim()), 1)


def _folded(found: Anatomy, biases: Iterable[str]) -> bool:
    """Whether a value's batch cannot be told apart, so that samples must be run one by one."""
    names = {*biases, *found.stream, *(s.node for s in found.attention)}
    return any(found.layout(name).batch is None for name in names)


def _join(parts: Sequence[Map]) -> Map:
    first = parts[0]

    def cat(name: str) -> Tensor | None:
        if getattr(first, name) is None:
            return None
        return torch.cat([getattr(p, name) for p in parts])

    values, output = torch.cat([p.values for p in parts]), torch.cat([p.output for p in parts])
    total = cat("total")
    return replace(first, values=values, output=output, target=cat("target"), total=total)


def explain(
    model: Model | Balanced,
    inputs: Inputs,
    method: str = "fullgrad+",
    target: Target = None,
    policy: str | Policy | Plan | None = None,
    *,
    output: Selection = None,
    constant: Names = (),
    explain: Names | None = None,
    axes: Axes | None = None,
) -> Map:
    """The map of images (B, C, H, W), or of texts, by one method; see `Explainer`, which is faster
    for many."""
    made = Explainer(
        model, inputs, policy, output=output, constant=constant, explain=explain, axes=axes
    )
    return made(inputs, method, target)[method]
