"""Which outputs are probabilities or their logarithms: squashed scores that no weight has touched.

Found by what the value is, not by the name of what made it: the steps behind the last weight are
run on scores drawn at many sizes. A probability stays between 0 and 1 whatever they are, and was
squashed on the way: something sums to one, or is a bounded function of each score alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..graph.computation import ComputationGraph, is_float, tensor_value
from ..graph.constants import Constants, hinted
from ..operators.algebra import Algebra, Role
from ..operators.registry import has_role, record_of
from ..plan.labelling import Degrees
from ..plan.regions import region_at
from ..plan.states import State
from . import words

SIZES = (0.5, 3.0, 30.0, 1000.0)
CLOSE = 1e-6


def head_problems(graph: ComputationGraph, labels: Degrees) -> Iterator[str]:
    """A sentence for every output that is a probability or the logarithm of one."""
    live = labels.live
    constants = Constants(graph, lambda n: live.state(n) is not State.CONSTANT)
    for place, output in enumerate(graph.outputs):
        if live.state(output) is State.LIVE:
            kind = _Tail(graph, labels, constants, output).kind()
            which = f"output {place}, " if len(graph.outputs) > 1 else ""
            if kind:
                yield words.probability(which + graph.describe(output.name), kind)


@dataclass
class _Tail:
    """The steps from the last weights to an output."""

    graph: ComputationGraph
    labels: Degrees
    constants: Constants
    output: fx.Node

    @cached_property
    def parameters(self) -> set[str]:
        return {name for name, _ in self.graph.fx.named_parameters()}

    def kind(self) -> str:
        """`probability`, `log-probability`, or nothing."""
        starts, inside = self._steps()
        if not inside:
            return ""
        try:
            runs = [self._run(starts, inside, size, k) for k, size in enumerate(SIZES)]
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
            named = has_role(_producer(self.output), Role.PROBABILITY)
            return "probability" if named else ""  # no values to run it on, as on the meta device
        seen = [run[self.output] for run in runs]
        if not _is_real(seen[0]):
            return ""
        floats = [n for n in inside if _is_real(runs[0][n])]
        squashed = [n for n in floats if self._is_squashed(n, runs)]
        if squashed and _within(seen):
            return "probability"
        logs = [n for n in floats if self._is_logarithm(n, runs, squashed)]
        held = torch.cat([v[v.isfinite()].flatten() for v in seen])
        definite = bool((held >= -CLOSE).all() or (held <= CLOSE).all())
        return "log-probability" if logs and definite and _linear(logs, inside) else ""

    def _steps(self) -> tuple[list[fx.Node], list[fx.Node]]:
        """The scores that the output is made of without another weight, and what makes it of them,
        in graph order."""
        starts: set[fx.Node] = set()
        inside: set[fx.Node] = set()
        queue = [self.output]
        for node in queue:
            if self.labels.live.state(node) is State.CONSTANT or node in inside | starts:
                continue
            if node.op != "call_function" or (is_float(node) and self._weighs(node)):
                starts.add(node)
                continue
            inside.add(node)
            queue += node.all_input_nodes
        at = self.graph.places.__getitem__
        return sorted(starts, key=at), sorted(inside, key=at)

    def _weighs(self, node: fx.Node) -> bool:
        """Whether a weight has a part in a value: a parameter, or a constant that is no number."""
        return record_of(node) is None or any(
            self.constants.read_by(n)
            and (self.constants.number(n) is None or self.constants.read_by(n) & self.parameters)
            for n in node.all_input_nodes
            if self.labels.live.state(n) is State.CONSTANT and is_float(n)
        )

    def _run(
        self, starts: list[fx.Node], inside: list[fx.Node], size: float, seed: int
    ) -> dict[fx.Node, Any]:
        generator = torch.Generator().manual_seed(seed)
        given = dict(
            zip(
                (n.name for n in self.graph.placeholders),
                pytree.tree_leaves((self.graph.args, self.graph.kwargs)),
                strict=True,
            )
        )
        values: dict[fx.Node, Any] = {}
        for node in starts:
            if is_float(node):
                like = _tensor(node)
                drawn = torch.randn(hinted(like), generator=generator, dtype=torch.float64)
                values[node] = size * drawn.to(like.device)
            else:
                values[node] = given[node.name]

        def read(node: fx.Node) -> Any:
            return values[node] if node in values else self.constants.value(node)

        with torch.no_grad():
            for node in inside:
                args, kwargs = fx.map_arg((node.args, node.kwargs), read)
                made = node.target(*args, **kwargs)  # type: ignore[operator]
                values[node] = pytree.tree_map_only(Tensor, _wide, made)
        return values

    def _is_squashed(self, node: fx.Node, runs: list[dict[fx.Node, Any]]) -> bool:
        """Whether a value sums to one along a dimension, or is bounded, of each score alone."""
        seen = [run[node] for run in runs]
        if not _varies(seen):
            return False
        if _within(seen) and _sums_to_one(seen):
            return True
        live = self.labels.live
        region = region_at(
            self.graph, node, lambda n: live.state(n) is not State.CONSTANT, self.constants
        )
        if region is None or not (has_role(node, Role.PROBABILITY) or self._is_score(region.entry)):
            return False
        far = [region(region.zero + s * t) for s in (-1.0, 1.0) for t in (30.0, 1e3, 1e6)]
        finite = [v[v.isfinite()].abs().max() for v in far if v.isfinite().any()]
        return len(finite) == len(far) and float(max(finite)) < 1e3

    def _is_score(self, node: fx.Node) -> bool:
        """Whether weights made it: what is clamped of the input itself is an input still."""
        behind = [node]
        for n in behind:
            behind += [m for m in n.all_input_nodes if m not in behind]
        return any(n.op == "get_attr" for n in behind)

    def _is_logarithm(
        self, node: fx.Node, runs: list[dict[fx.Node, Any]], squashed: list[fx.Node]
    ) -> bool:
        made = [run[node].exp() for run in runs]
        if not _within(made) or not _varies(made):
            return False
        if _sums_to_one(made) or has_role(node, Role.PROBABILITY):
            return True
        return any(
            all(
                run[p].shape == v.shape and _alike(run[p], v)
                for run, v in zip(runs, made, strict=True)
            )
            for p in squashed
        )


def _producer(node: fx.Node) -> fx.Node:
    """The operation behind an output, past the structural ones."""
    while len(node.all_input_nodes) == 1:
        record = record_of(node)
        if record is None or record.algebra is not Algebra.STRUCTURAL:
            return node
        (node,) = node.all_input_nodes
    return node


def _linear(logs: list[fx.Node], inside: list[fx.Node]) -> bool:
    """Whether something is made of a logarithm by linear steps alone."""
    reached = set(logs)
    for node in inside:
        record = record_of(node)
        kept = record is not None and record.algebra in (
            Algebra.STRUCTURAL, Algebra.AFFINE, Algebra.MULTILINEAR,
        )  # fmt: skip
        if kept and reached & {*node.all_input_nodes}:
            reached.add(node)
    return inside[-1] in reached


def _tensor(node: fx.Node) -> Tensor:
    value = tensor_value(node)
    if value is None:
        raise ValueError(f"{node.name} is no tensor")
    return value


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and bool(value.numel())


def _wide(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def _within(seen: list[Tensor]) -> bool:
    """Between 0 and 1 at all sizes, wherever it is finite."""
    finite = [v[v.isfinite()] for v in seen]
    found = [v for v in finite if v.numel()]
    return len(found) > 1 and all(bool(((v >= -CLOSE) & (v <= 1 + CLOSE)).all()) for v in found)


def _varies(seen: list[Tensor]) -> bool:
    found = torch.cat([v[v.isfinite()].flatten() for v in seen])
    return found.numel() > 1 and float(found.max() - found.min()) > 1e-3


def _sums_to_one(seen: list[Tensor]) -> bool:
    """Along one dimension of more than one element."""
    held = [v for v in seen if bool(v.isfinite().all())]
    return any(
        seen[0].shape[dim] > 1
        and len(held) > 1
        and all(_alike(v.sum(dim), torch.ones(())) for v in held)
        for dim in range(seen[0].dim())
    )


def _alike(a: Tensor, b: Tensor) -> bool:
    return bool(((a - b).abs() <= CLOSE).all())
