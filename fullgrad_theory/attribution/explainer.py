"""The door: a model, images, methods; maps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..backward.balanced import Balanced, balance
from ..backward.targets import Chosen, Target
from ..check.numeric import float_leaves
from ..edits.costs import Policy
from ..errors import InputError, unknown_name
from ..graph.computation import ComputationGraph, tensor_value
from ..graph.door import Inputs, Model, Names
from ..graph.outputs import Selection
from ..plan.labelling import degrees
from ..plan.measuring import refuse_chosen
from ..plan.plan import Plan
from .layouts import Cell
from .map import Map, MethodResult
from .methods import METHODS, Method
from .run import OF_ATTENTION, Need, chosen_of, counted, gather
from .sampled import Sampling, Score
from .structure import Anatomy, anatomy


class Explainer:
    """Attribution maps of a model that takes one image tensor (B, C, H, W), made ready once.

    `inputs`: an example, left out where the model says what it takes. `policy`: the edits of the
    backward, None for the gradient as it is; a balanced model brings its own. A traced model saves
    tracing again for every policy. `output` as in `trace`: the scores, (B, classes), where the
    model returns more than these. Nothing of the model changes.
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
        values = [tensor_value(n) for n in graph.placeholders]
        if len(values) != 1 or values[0] is None or values[0].dim() != 4:
            shapes = [tuple(v.shape) for v in values if v is not None]
            raise InputError(
                f"maps are of models that take one image tensor (B, C, H, W), this one takes "
                f"{shapes}; fullgrad() splits the output of any model"
            )
        (image,) = pytree.tree_leaves((graph.args, graph.kwargs))
        self.model, self.shape, self.dtype = balanced, tuple(image.shape[1:]), image.dtype
        if not graph.dynamic and image.shape[0] > 1:
            raise InputError(
                f"this model takes batches of {image.shape[0]} only; pass inputs of one image"
            )
        self.labels = counted(degrees(graph, balanced.plan.edits))
        self.anatomy: Anatomy = anatomy(graph, self.labels.live, image[:1].detach())
        self._one_by_one = not graph.dynamic or _folded(self.anatomy, self.labels.biases)

    @property
    def blocks(self) -> tuple[str, ...]:
        """The module paths of the blocks, in order."""
        return tuple(b.path for b in self.anatomy.blocks)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens at the first block, of pixels where there is none."""
        if not self.anatomy.blocks:
            return self.shape[1], self.shape[2]
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
            return "blocks on a grid of tokens"
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
        x: Tensor,
        methods: str | Sequence[str] = "fullgrad+",
        target: Target | Chosen = None,
        seed: int = 0,
    ) -> dict[str, Map]:
        """Maps of images (B, C, H, W) by each of the methods, for a target or the prediction.

        `target`: see `Target`; None is the prediction. All gradient methods share one forward and
        one backward. `seed` is for random and SmoothGrad. Raises `InputError`, `UnknownNameError`.
        """
        chosen = self._methods(methods)
        if not isinstance(x, Tensor) or x.dim() != 4 or tuple(x.shape[1:]) != self.shape:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise InputError(
                f"expected images of shape (B, {', '.join(map(str, self.shape))}), got {got}"
            )
        if x.dtype != self.dtype:
            raise InputError(f"expected images of {self.dtype}, as the model is, got {x.dtype}")
        if x.shape[0] == 0:
            raise InputError("a batch without images has nothing to attribute")
        if not self._one_by_one or x.shape[0] == 1:
            return self._explain(x, chosen, target, seed)
        chosen_target = self._one_by_one_target(x, target)
        parts = []
        for i in range(x.shape[0]):
            own = None if chosen_target is None else chosen_target.sample(i)
            parts.append(self._explain(x[i : i + 1], chosen, own, seed + i))
        return {name: _join([part[name] for part in parts]) for name in chosen}

    def _one_by_one_target(self, x: Tensor, target: Target | Chosen) -> Chosen | None:
        """The target of all samples, resolved before each is run alone; None is each's largest."""
        if target is None:
            return None
        with torch.no_grad():
            return chosen_of(torch.cat([self.scores(image) for image in x.split(1)]), target)

    def _explain(
        self, x: Tensor, methods: dict[str, Method], target: Target | Chosen, seed: int
    ) -> dict[str, Map]:
        one_pass = [m for m in methods.values() if m.function is not None]
        record = None
        if one_pass:
            needs = frozenset[Need]().union(*(m.needs for m in one_pass))
            record = gather(self.model, self.labels, self.anatomy, x, target, needs)
            output, chosen = record.output, record.target
        else:
            with torch.no_grad():
                values = self.scores(x)
                chosen = chosen_of(values, target)
                output = chosen.of(values)
        score = partial(self._score, chosen)
        sampling = Sampling(x.detach(), score, self.grid, self._cell(), seed)
        return {
            name: self._map(name, method.result(record, sampling), output, chosen.index)
            for name, method in methods.items()
        }

    def scores(self, x: Tensor) -> Tensor:
        """The model's output, (B, classes): the first float tensor of it, where it is several."""
        return float_leaves(self.model.fx(x))[0]

    def _score(self, chosen: Chosen, sample: int) -> Score:
        """The value of one sample's target, of any images; captum's noise is of float32."""
        own = chosen.sample(sample)

        def score(images: Tensor) -> Tensor:
            output = self.scores(images.to(self.dtype))
            return own.expanded(output.shape[0]).of(output)

        return score

    def _cell(self) -> Cell:
        if not self.anatomy.blocks:
            return 1.0, 1.0
        return self.anatomy.stream[self.anatomy.blocks[0].input].cell

    def _map(self, name: str, found: MethodResult, output: Tensor, index: Tensor | None) -> Map:
        image = self.shape[1], self.shape[2]
        grids = [s.grid for s in self.anatomy.stream.values() if s.cell == found.cell]
        rows, columns = (max(sizes) for sizes in zip(*grids, strict=True)) if grids else image
        total = None if found.total is None else found.total.to(output)
        values = found.values[:, :rows, :columns].detach()
        cell = self._cell()
        tiled = self.grid[0] * cell[0], self.grid[1] * cell[1]
        return Map(name, values, output, index, total, image, found.cell, tiled)


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
    inputs: Tensor,
    method: str = "fullgrad+",
    target: Target = None,
    policy: str | Policy | Plan | None = None,
    *,
    output: Selection = None,
) -> Map:
    """The map of images (B, C, H, W) by one method; see `Explainer`, which is faster for many."""
    return Explainer(model, inputs, policy, output=output)(inputs, method, target)[method]
