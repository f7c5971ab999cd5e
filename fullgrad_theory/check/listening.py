"""What of a traced graph no gradient reaches: through zeros nothing is seen.

A use of a value whose cotangent has a zero hides what a backward does there. Such a value is made
an output of its own, under a random cotangent, and then everything before it is seen.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from ..backward.running import OnBias, Run
from ..operators.calls import is_ray
from .numeric import float_leaves, long_draw
from .subject import Subject

CLOSE = 1e-9
"""of a tensor's sum of magnitudes: the same value computed twice differs by less"""


@dataclass(frozen=True)
class Trait:
    """By what a value is known again: two tensors that agree in all of it are one value.

    `mixed`: its product with random numbers; `size`: the sum of its magnitudes.
    """

    shape: torch.Size
    mixed: float
    total: float
    size: float

    def fits(self, other: Trait) -> bool:
        """Whether both are the same value, but for rounding."""
        apart = max(
            abs(self.mixed - other.mixed),
            abs(self.total - other.total),
            abs(self.size - other.size),
        )
        return self.shape == other.shape and apart <= CLOSE * (self.size + other.size)


def trait_of(value: Tensor) -> Trait:
    """Of a real or complex tensor; not finite where it is not."""
    value = value.detach()
    flat = (torch.view_as_real(value.resolve_conj()) if value.is_complex() else value).reshape(-1)
    first = flat[: 1 << 20]
    draw = long_draw(0)[: len(first)].to(first)
    return Trait(value.shape, float(first @ draw), float(flat.sum()), float(flat.abs().sum()))


class Listening(Run):
    """A run that hears whether every use of a value gets a cotangent without a zero.

    `takes`: names of the values to keep, in `taken`.
    """

    def __init__(
        self, subject: Subject, on_bias: OnBias, listens: bool = False, takes: Collection[str] = ()
    ) -> None:
        super().__init__(subject.module, subject.graph, subject.labels, on_bias)
        self.listens, self.takes = listens, frozenset(takes)
        self.taken: dict[str, Tensor] = {}
        self.traits: dict[str, Trait] = {}
        self.uses: list[tuple[str, _Use]] = []

    def run_node(self, n: fx.Node) -> Any:
        before = len(self.uses)
        value = super().run_node(n)
        if n.op != "output" and not any(t.requires_grad for t in float_leaves(value)):
            del self.uses[before:]  # a comparison, a detach: no gradient is to come
        if n.name in self.takes:
            self.taken[n.name] = value
        return value

    def map_nodes_to_values(self, args: Any, n: fx.Node) -> Any:
        """The values of a call's operands, each tensor's as a use of its own."""
        if not self.listens:
            return super().map_nodes_to_values(args, n)
        return fx.node.map_arg(args, lambda read: self._used(read, n))

    def _used(self, read: fx.Node, by: fx.Node) -> Any:
        value = self.env[read]
        if not is_ray(value) or not value.requires_grad:
            return value
        if read.name not in self.traits:
            self.traits[read.name] = trait_of(value)
        alias, use = value.view_as(value), _Use(by.name)
        self.uses.append((read.name, use))
        # of the use, not of the run: a hook that held this could not be freed with its tensor
        alias.register_hook(partial(_hear, use))
        return alias

    def _watch(self, n: fx.Node, value: Any) -> None:
        listened, self.listens = self.listens, False  # it reads operands that it does not use
        super()._watch(n, value)
        self.listens = listened

    @property
    def asleep(self) -> dict[str, Asleep]:
        """After the backward: each finite value of which a use got a zero."""
        uses: dict[str, list[_Use]] = {name: [] for name in self.traits}
        for name, use in self.uses:
            uses[name].append(use)
        return {
            name: Asleep(
                self.traits[name],
                next(use.by for use in found if not use.everywhere),
                not all(use.anywhere for use in found),
            )
            for name, found in uses.items()
            if self.traits[name].size < float("inf") and not all(use.everywhere for use in found)
        }


@dataclass(frozen=True)
class Asleep:
    """A value of which a use, the first `by` this node, gets a cotangent with zeros; `whole`: one
    gets nothing but zeros."""

    trait: Trait
    by: str
    whole: bool


@dataclass
class _Use:
    """Where the cotangent of a use of a value, by a node, is not zero."""

    by: str
    everywhere: bool = False
    anywhere: bool = False


def _hear(use: _Use, g: Tensor | None) -> None:
    if g is not None:
        use.everywhere, use.anywhere = bool(g.all()), bool(g.any())
