"""One call of a graph as a function of the float operands that move, in float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..errors import InputError
from ..operators.calls import Call


@dataclass(frozen=True)
class Point:
    """Values of the operands that move, and of the weights that differ from the example's."""

    operands: Mapping[str, Tensor]
    weights: Mapping[int, Tensor] = field(default_factory=dict)

    def moved(self, operands: Mapping[str, Tensor]) -> Point:
        """Other operands with the same weights."""
        return Point(operands, self.weights)

    @property
    def watched(self) -> Point:
        """The same values as leaves of autograd."""
        return self.moved(
            {n: u.detach().clone().requires_grad_() for n, u in self.operands.items()}
        )

    @property
    def zeroed(self) -> Point:
        return self.moved({n: torch.zeros_like(u) for n, u in self.operands.items()})

    def scaled(self, powers: Mapping[str, Fraction], t: float) -> Point:
        """Every operand times t to its power; the others stay."""
        scaled = {n: u * t ** float(powers.get(n, Fraction(0))) for n, u in self.operands.items()}
        return self.moved(scaled)


@dataclass(frozen=True)
class Pulled:
    """A random cotangent c of one output v, the J_i^T c by operand, and v itself."""

    cotangent: Tensor
    gradients: Mapping[str, Tensor]
    value: Tensor


class Probe:
    """The call at the values that reached it. `names`: the operands that it is a function of.

    `weights`: the places of the float tensors that do not move, among the flattened arguments
    `flat`. `hidden`: whether an operand that moves is no float: nothing can be said of how.
    """

    def __init__(
        self,
        node: fx.Node,
        call: Call,
        values: tuple[Any, Any],
        where: str,
        generator: torch.Generator,
    ) -> None:
        self.node, self.call, self.where, self.generator = node, call, where, generator
        self.flat, self.spec = pytree.tree_flatten(values)
        self.nodes, _ = pytree.tree_flatten((node.args, node.kwargs))
        self.places: dict[str, int] = {}
        self.weights: list[int] = []
        self.hidden = False
        self._sort()
        self.names = sorted(self.places)
        self.example = Point({n: self.flat[i] for n, i in self.places.items()})

    def _sort(self) -> None:
        """Which argument is an operand that moves, and which a weight; floats in float64."""
        names: dict[int, list[str]] = {}
        for operand in self.call.operands:
            if operand.name in self.call.moving:
                names.setdefault(id(operand.node), []).append(operand.name)
        for place, (node, value) in enumerate(zip(self.nodes, self.flat, strict=True)):
            floating = isinstance(value, Tensor) and value.is_floating_point()
            if floating:
                self.flat[place] = value.detach().double()
            if id(node) in names and floating:
                self.places[names[id(node)].pop(0)] = place
            elif id(node) in names:
                self.hidden = True
            elif floating:
                self.weights.append(place)

    def __call__(self, point: Point) -> list[Any]:
        """Its outputs there."""
        flat = list(self.flat)
        for place, tensor in point.weights.items():
            flat[place] = tensor
        for name, tensor in point.operands.items():
            flat[self.places[name]] = tensor
        args, kwargs = pytree.tree_unflatten(flat, self.spec)
        value = self.node.target(*args, **kwargs)  # type: ignore[operator]
        return list(value) if isinstance(value, (tuple, list)) else [value]

    def runs(self, point: Point) -> bool:
        """Whether it has finite values there."""
        try:
            with torch.no_grad():
                found = self(point)
        except (RuntimeError, ValueError):
            return False
        return all(
            bool(torch.isfinite(v).all())
            for v in found
            if isinstance(v, Tensor) and v.is_floating_point()
        )

    def value(self, point: Point, output: int) -> Tensor:
        with torch.no_grad():
            return self(point)[output].double()

    def pulled(self, point: Point, output: int, count: int) -> list[Pulled]:
        """Vector-Jacobian products of one output with `count` random cotangents."""
        watched = point.watched
        with torch.enable_grad():
            value = self(watched)[output]
        rows = []
        for k in range(count):
            cotangent = self.noise(value)
            gradients = self._gradients(value, watched, cotangent, retain=k < count - 1)
            rows.append(Pulled(cotangent, gradients, value.detach()))
        return rows

    def slope(self, point: Point, output: int, cotangent: Tensor | None = None) -> Tensor:
        """J^T c in the only operand; c is 1 by default."""
        watched = point.watched
        with torch.enable_grad():
            value = self(watched)[output]
        cotangent = torch.ones_like(value) if cotangent is None else cotangent
        return self._gradients(value, watched, cotangent)[self.names[0]]

    def _gradients(
        self, value: Tensor, watched: Point, cotangent: Tensor, retain: bool = False
    ) -> dict[str, Tensor]:
        leaves = list(watched.operands.values())
        try:
            found = torch.autograd.grad(
                value, leaves, cotangent, allow_unused=True, retain_graph=retain
            )
        except (RuntimeError, NotImplementedError) as error:
            raise InputError(
                f"{self.where}: its backward cannot be run ({str(error).splitlines()[0]}); "
                "give it one (register_autograd), or detach what it reads"
            ) from error
        pairs = zip(watched.operands.items(), found, strict=True)
        return {n: torch.zeros_like(u) if g is None else g for (n, u), g in pairs}

    def noise(self, like: Tensor) -> Tensor:
        """Normal numbers of that shape, dtype and device; the draws of a probe are in order."""
        return torch.randn(like.shape, generator=self.generator, dtype=torch.float64).to(like)
