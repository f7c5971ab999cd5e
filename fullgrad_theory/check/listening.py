"""What of a traced graph no gradient reaches: through zeros nothing is seen.

A use of a value whose cotangent has a zero hides what a backward does there. Such a value is made
an output of its own, under a random cotangent, and then everything before it is seen.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
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

    `mixed`: its product with random numbers; `size`: the sum of its magnitudes; both, and `total`,
    of its finite entries. `infinite`: how many others there are.
    """

    shape: torch.Size
    mixed: float
    total: float
    size: float
    infinite: int

    @property
    def mean(self) -> float:
        """Of the magnitudes."""
        return self.size / max(1, self.shape.numel())

    def fits(self, other: Trait, floor: float) -> bool:
        """Whether both are the same value, but for rounding: of the value, and of larger ones that
        left it, an entry by `floor`."""
        apart = max(
            abs(self.mixed - other.mixed),
            abs(self.total - other.total),
            abs(self.size - other.size),
        )
        allowed = CLOSE * (self.size + other.size) + floor * self.shape.numel()
        return (self.shape, self.infinite) == (other.shape, other.infinite) and apart <= allowed


def trait_of(value: Tensor) -> Trait:
    """Of a real or complex tensor."""
    value = value.detach()
    flat = (torch.view_as_real(value.resolve_conj()) if value.is_complex() else value).reshape(-1)
    size, infinite = float(flat.abs().sum()), 0
    if not size < float("inf"):
        infinite = int((~flat.isfinite()).sum())
        flat = flat.nan_to_num(0.0, 0.0, 0.0)
        size = float(flat.abs().sum())
    first = flat[: 1 << 20]
    draw = long_draw(0)[: len(first)].to(first)
    return Trait(value.shape, float(first @ draw), float(flat.sum()), size, infinite)


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
        self.uses: list[_Use] = []

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
        alias = value.view_as(value)
        use = _Use(read.name, by.name, tuple(part.name for part in by.users))
        self.uses.append(use)
        # of the use, not of the run: a hook that held this could not be freed with its tensor
        alias.register_hook(partial(_hear, use))
        return alias

    def _watch(self, n: fx.Node, value: Any) -> None:
        listened, self.listens = self.listens, False  # it reads operands that it does not use
        super()._watch(n, value)
        self.listens = listened

    @property
    def asleep(self) -> Sleep:
        """After the backward: what got zeros, and what is behind it."""
        deaf = [use for use in self.uses if not use.everywhere]
        return Sleep(
            self.traits,
            {use.name: use.by for use in reversed(deaf)},
            {name for use in deaf for name in (use.by, *use.parts)} & self.traits.keys(),
            any(use.heard and not use.anywhere for use in deaf),
        )


@dataclass(frozen=True)
class Sleep:
    """Values that no gradient reaches, or not everywhere.

    `traits`: of all that ask for a gradient; `asleep`: those of which a use gets zeros, with the
    node that uses them; `behind`: what such nodes give, and whose own cotangent they may hide;
    `whole`: a use gets nothing but zeros.
    """

    traits: Mapping[str, Trait] = field(default_factory=dict)
    asleep: Mapping[str, str] = field(default_factory=dict)
    behind: Collection[str] = ()
    whole: bool = False


@dataclass
class _Use:
    """Of the value `name` by a node, some outputs of which may have names, too: where its cotangent
    is not zero."""

    name: str
    by: str
    parts: tuple[str, ...]
    heard: bool = False
    everywhere: bool = False
    anywhere: bool = False


def _hear(use: _Use, g: Tensor | None) -> None:
    if g is not None:
        use.heard, use.everywhere, use.anywhere = True, bool(g.all()), bool(g.any())
