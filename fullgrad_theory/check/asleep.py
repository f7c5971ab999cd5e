"""The user's model where no gradient reaches: which of its tensors are which values of the trace.

The model runs under a mode that sees every tensor which its code hands to torch or gets from it.
One that is a sleeping value of the trace gets a random cotangent, there and here; behind one the
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
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..operators.calls import is_ray, is_transformed
from .listening import Sleep, Trait, trait_of
from .numeric import paired


class Seen(TorchFunctionMode):
    """Keeps each tensor of the given shapes that functions of torch are given or return.

    `found`: a copy of each, which leads to it in the backward, as it is when it is first seen: the
    user's code may write to it later.
    """

    def __init__(self, shapes: Collection[torch.Size]) -> None:
        super().__init__()
        self.shapes = shapes
        self.found: dict[GradientEdge, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._see((args, kwargs))
        result = func(*args, **kwargs)
        self._see(result)
        return result

    def _see(self, values: Any) -> None:
        if not torch.is_grad_enabled() or is_transformed():
            return
        for value in pytree.tree_leaves(values):
            if not is_ray(value) or value.shape not in self.shapes or value.grad_fn is None:
                continue
            edge = GradientEdge(value.grad_fn, value.output_nr)
            if edge not in self.found:
                self.found[edge] = value.clone()

    def behind(self, outputs: Iterable[Tensor]) -> dict[GradientEdge, Tensor]:
        """What was found and is part of the outputs, in the order of the code."""
        reached = set(_nodes_behind(outputs))
        return {edge: copy for edge, copy in self.found.items() if edge.node in reached}


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

    `asleep`: one of them is, and it gets the `cotangent`. `behind`: one of them is behind a
    sleeping one, and their cotangents are compared.
    """

    edge: GradientEdge
    own: Tensor
    names: tuple[str, ...]
    asleep: str | None
    behind: bool
    cotangent: Tensor

    def is_seen_by(self, others: Iterable[Sleeper]) -> bool:
        """Whether a cotangent of it reaches one of the others, which may be the same value: that
        one's tells what there is to tell, and its own is a part of the value's."""
        alike = [o.edge for o in others if o.names == self.names and o.edge != self.edge]
        if not alike:
            return False
        total = paired([self.cotangent], [self.own])
        found = torch.autograd.grad(total, alike, retain_graph=True, allow_unused=True)
        return any(g is not None and bool(g.all()) for g in found)


@contextmanager
def heard(edges: Iterable[GradientEdge]) -> Iterator[dict[GradientEdge, Tensor]]:
    """The cotangents of tensors in the next backward, as the hooks on them leave them."""
    found: dict[GradientEdge, Tensor] = {}

    def hook(edge: GradientEdge, grads: tuple[Tensor | None, ...]) -> None:
        if (g := grads[edge.output_nr]) is not None:
            found[edge] = g

    handles = [edge.node.register_prehook(partial(hook, edge)) for edge in edges]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def sleepers_of(found: dict[GradientEdge, Tensor], sleep: Sleep, seed: int) -> list[Sleeper]:
    """The tensors that are sleeping values, or behind one.

    Equal values (zeros, mostly) are told apart by the order of the code, which both follow.
    """
    generator = torch.Generator().manual_seed(seed + 2)
    by_shape: dict[torch.Size, list[tuple[int, str, Trait]]] = {}
    for place, (name, trait) in enumerate(sleep.traits.items()):
        by_shape.setdefault(trait.shape, []).append((place, name, trait))
    sleepers: list[Sleeper] = []
    last = 0
    for edge, own in found.items():
        mine = trait_of(own)
        fitting = [(p, n) for p, n, t in by_shape.get(own.shape, ()) if t.fits(mine)]
        if not fitting:
            continue
        fitting.sort(key=lambda f: (f[0] < last, f[0]))
        last = max(last, fitting[0][0])
        names = tuple(name for _, name in fitting)
        asleep = next((n for n in names if n in sleep.asleep), None)
        behind = any(n in sleep.behind for n in names)
        if asleep is not None or behind:
            cotangent = _balanced(own, mine, generator)
            sleepers.append(Sleeper(edge, own, names, asleep, behind, cotangent))
    return sleepers


def _balanced(value: Tensor, trait: Trait, generator: torch.Generator) -> Tensor:
    """A random cotangent, as small as the value is large: none covers the others' rounding."""
    mean = trait.size / max(1, value.numel())
    draw = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
    return draw / mean if mean > 0.0 else draw
