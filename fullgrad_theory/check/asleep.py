"""The user's model where no gradient reaches: which of its tensors are which values of the trace.

The model runs under a mode that sees every tensor that an operation reads, whoever calls it. One
that is a sleeping value of the trace gets a random cotangent, there and here; behind one the
cotangents are compared, as a dead operation passes none of them on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..operators.calls import is_ray
from .listening import Sleep, Trait, trait_of
from .numeric import Noise


@dataclass(frozen=True)
class Found:
    """A tensor of the user's model, as it was when it was first read.

    `like`: of its shape and dtype; `finite`: where it is, if not everywhere.
    """

    edge: GradientEdge
    trait: Trait
    like: Tensor
    finite: Tensor | None


class Seen(TorchDispatchMode):
    """Finds each tensor of the given shapes that an operation reads and that has a gradient."""

    def __init__(self, shapes: Collection[torch.Size]) -> None:
        super().__init__()
        self.shapes = shapes
        self.found: dict[GradientEdge, Found] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.see((args, kwargs))
        return func(*args, **kwargs)

    def see(self, values: Any) -> None:
        """Tensors in nested containers."""
        for value in pytree.tree_leaves(values):
            if not is_ray(value) or value.shape not in self.shapes or value.grad_fn is None:
                continue
            edge = GradientEdge(value.grad_fn, value.output_nr)
            if edge not in self.found:
                value, trait = value.detach(), trait_of(value)
                like = value.new_empty(()).expand(value.shape)
                finite = value.isfinite() if trait.infinite else None
                self.found[edge] = Found(edge, trait, like, finite)

    def behind(self, outputs: Iterable[Tensor]) -> list[Found]:
        """What was found and is part of the outputs, in the order of the code."""
        reached = set(_nodes_behind(outputs))
        return [found for edge, found in self.found.items() if edge.node in reached]


def _nodes_behind(outputs: Iterable[Tensor]) -> Iterator[Any]:
    """The nodes of the autograd graph of tensors."""
    queue, known = [o.grad_fn for o in outputs if o.grad_fn is not None], set[Any]()
    while queue:
        node: Any = queue.pop()
        if node not in known:
            known.add(node)
            yield node
            queue += [n for n, _ in node.next_functions if n is not None]


@dataclass(frozen=True)
class Sleeper:
    """A tensor of the user's model, and the values of the trace that it may be, the most likely one
    first: they agree in all that is known of them.

    `asleep`: one of them that is. `behind`: one of them is behind a sleeping one. `unit`: a random
    cotangent, 0 where the tensor is infinite.
    """

    found: Found
    names: tuple[str, ...]
    asleep: str | None
    behind: bool
    unit: Tensor

    def cotangent(self, balanced: bool) -> Tensor:
        """A random one; `balanced`: as small as the value is large."""
        mean = self.found.trait.mean if balanced else 0.0
        return self.unit / mean if mean > 0.0 else self.unit

    def passes_all(self) -> bool:
        """Whether what made the tensor hands on all of a cotangent: what is done to that behind it
        is seen before it."""
        node = self.found.edge.node
        before = [GradientEdge(n, i) for n, i in node.next_functions if n is not None]
        if not before:
            return True
        given = self.unit.masked_fill(self.unit == 0, 1.0)
        passed = torch.autograd.grad(
            [self.found.edge], before, [given], retain_graph=True, allow_unused=True
        )
        return all(g is None or bool(g.all()) for g in passed)


def sleepers_of(found: Iterable[Found], sleep: Sleep, seed: int) -> list[Sleeper]:
    """The tensors that are sleeping values, or behind one.

    Equal values (zeros, mostly) are told apart by the order of the code, which both follow.
    """
    by_shape: dict[torch.Size, list[tuple[int, str, Trait]]] = {}
    for place, (name, trait) in enumerate(sleep.traits.items()):
        by_shape.setdefault(trait.shape, []).append((place, name, trait))
    means = sorted(trait.mean for trait in sleep.traits.values())
    floor = 1e-13 * means[len(means) // 2]
    noise = Noise(seed + 2)
    sleepers: list[Sleeper] = []
    last = 0
    for own in found:
        shape = own.trait.shape
        fitting = [(p, n) for p, n, t in by_shape.get(shape, ()) if t.fits(own.trait, floor)]
        if not fitting:
            continue
        fitting.sort(key=lambda f: (f[0] < last, f[0]))
        last = max(last, fitting[0][0])
        names = tuple(name for _, name in fitting)
        asleep = next((n for n in names if n in sleep.asleep), None)
        behind = any(n in sleep.behind for n in names)
        if asleep is not None or behind:
            unit = noise.like(own.like)
            if own.finite is not None:
                unit = unit.where(own.finite, 0.0)
            sleepers.append(Sleeper(own, names, asleep, behind, unit))
    return sleepers


@contextmanager
def heard(edges: Iterable[GradientEdge]) -> Iterator[dict[GradientEdge, Tensor]]:
    """The cotangents of tensors in the next backward, as the hooks on them leave them."""
    passed: dict[GradientEdge, Tensor] = {}

    def hook(edge: GradientEdge, grads: tuple[Tensor | None, ...]) -> None:
        if (g := grads[edge.output_nr]) is not None:
            passed[edge] = g

    handles = [edge.node.register_prehook(partial(hook, edge)) for edge in edges]
    try:
        yield passed
    finally:
        for handle in handles:
            handle.remove()
