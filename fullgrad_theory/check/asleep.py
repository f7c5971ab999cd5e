"""The own backward where no gradient reaches: values of the trace as outputs of their own.

The user's model runs under a mode that sees every tensor which its code hands to torch or gets
from it. One that is a sleeping value of the trace gets a cotangent in both, and the gradients by
inputs and parameters have to be the same.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..operators.calls import is_ray, is_transformed
from .listening import Asleep, Trait, trait_of

Edge = tuple[Any, int]
"""a node of the autograd graph, and which of its outputs"""


class Seen(TorchFunctionMode):
    """Keeps each tensor of the given shapes that functions of torch are given or return.

    `found`: a copy of each, which leads to it in the backward, as it is when it is first seen: the
    user's code may write to it later.
    """

    def __init__(self, shapes: Collection[torch.Size]) -> None:
        super().__init__()
        self.shapes = shapes
        self.found: dict[Edge, Tensor] = {}

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
            edge = (value.grad_fn, value.output_nr)
            if edge not in self.found:
                self.found[edge] = value.clone()

    def behind(self, outputs: Iterable[Tensor]) -> list[Tensor]:
        """What was found and is part of the outputs, in the order of the code."""
        reached = set(_nodes_behind(outputs))
        return [copy for (node, _), copy in self.found.items() if node in reached]


def _nodes_behind(outputs: Iterable[Tensor]) -> Iterator[Any]:
    """The nodes of the autograd graph of tensors."""
    queue, known = [o.grad_fn for o in outputs if o.grad_fn is not None], set[Any]()
    while queue:
        node = queue.pop()
        if node not in known:
            known.add(node)
            yield node
            queue += [n for n, _ in node.next_functions if n is not None]


@dataclass(frozen=True)
class Pair:
    """A tensor of the user's model with a random cotangent, and the values of the trace that it
    may be: the most likely first, the others because they are as large in all ways."""

    own: Tensor
    cotangent: Tensor
    names: tuple[str, ...]


def pairs_of(found: list[Tensor], asleep: Mapping[str, Asleep], seed: int) -> list[Pair]:
    """Each tensor that is a sleeping value, with a cotangent under which all count alike.

    Equal values (zeros, mostly) are told apart by the order of the code, which both follow.
    """
    generator = torch.Generator().manual_seed(seed + 2)
    by_shape: dict[torch.Size, list[tuple[int, str, Trait]]] = {}
    for place, (name, value) in enumerate(asleep.items()):
        by_shape.setdefault(value.trait.shape, []).append((place, name, value.trait))
    pairs: list[Pair] = []
    last = 0
    for own in found:
        trait = trait_of(own)
        fitting = [(p, n) for p, n, t in by_shape.get(own.shape, ()) if t.fits(trait)]
        if fitting:
            fitting.sort(key=lambda f: (f[0] < last, f[0]))
            last = max(last, fitting[0][0])
            pairs.append(Pair(own, _balanced(own, trait, generator), tuple(n for _, n in fitting)))
    return pairs


def _balanced(value: Tensor, trait: Trait, generator: torch.Generator) -> Tensor:
    """A random cotangent, as small as the value is large: none covers the others' rounding."""
    mean = trait.size / max(1, value.numel())
    draw = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
    return draw / mean if mean > 0.0 else draw
