"""One call of a graph as a function of the float operands that move, in float64, and the points it
is probed at: its example values and ones near them, and random ones far from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..errors import InputError
from ..operators.calls import Call, Running

STEP = 0.02
"""how far from the example a near point is, relative"""


@dataclass(frozen=True)
class Point:
    """Values of the operands that move, and of the weights that differ from the example's."""

    operands: Mapping[str, Tensor]
    weights: Mapping[str, Tensor] = field(default_factory=dict)

    def moved(self, operands: Mapping[str, Tensor]) -> Point:
        """Other operands with the same weights."""
        return Point(operands, self.weights)

    @property
    def zeroed(self) -> Point:
        return self.moved({n: torch.zeros_like(u) for n, u in self.operands.items()})

    def scaled(self, powers: Mapping[str, Fraction], t: float) -> Point:
        """Every operand times t to its power; the others stay."""
        scaled = {n: u * t ** float(powers.get(n, Fraction(0))) for n, u in self.operands.items()}
        return self.moved(scaled)


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _wide(value: Tensor) -> Tensor:
    return value.detach().to(torch.complex128 if value.is_complex() else torch.float64)


def _paired(value: Any) -> Any:
    """A complex value as pairs of real ones, of which its backward is a real Jacobian."""
    is_complex = isinstance(value, Tensor) and value.is_complex()
    return torch.view_as_real(value.resolve_conj()) if is_complex else value


def _kept(example: Tensor, drawn: Tensor) -> Tensor:
    """What is drawn in the domain of the example: symmetric where that is."""
    square = example.dim() > 1 and example.shape[-1] == example.shape[-2] > 1
    symmetric = square and torch.allclose(example, example.mT, 1e-6, 1e-9)
    return (drawn + drawn.mT) / 2 if symmetric else drawn


class Probe:
    """The call at the values that reached it. `names`: the operands that it is a function of.

    `weights`: the float operands that do not move. `hidden`: whether an operand that moves is no
    float: nothing can be said of how. Complex operands and results are pairs of real ones.
    """

    def __init__(self, node: fx.Node, call: Call, values: Any, where: str, seed: int) -> None:
        self.node, self.call, self.where = node, call, where
        self.generator = torch.Generator().manual_seed(seed)
        args, kwargs = pytree.tree_map(lambda v: _wide(v) if _is_floating(v) else v, values)
        self.running = Running(call, node.target, args, kwargs)  # type: ignore[arg-type]
        given = {n: v for n, v in self.running.values.items() if _is_floating(v)}
        self.complex = {n for n, v in given.items() if v.is_complex()}
        floats = {n: _paired(v) for n, v in given.items()}
        self.weights = {n: v for n, v in floats.items() if n not in call.moving}
        self.example = Point({n: v for n, v in floats.items() if n in call.moving})
        self.names = sorted(self.example.operands)
        self.hidden = len(self.names) < len(call.moving)

    def __call__(self, point: Point) -> list[Any]:
        given = {**point.weights, **point.operands}
        as_given = {
            n: torch.view_as_complex(u.contiguous()) if n in self.complex else u
            for n, u in given.items()
        }
        return [_paired(v) for v in self.running.at(as_given)]

    def repeats(self) -> bool:
        """Whether values and gradients at one point are the same when it is called again."""
        first, again = (self.watched(self.example) for _ in range(2))
        for one, other in zip(first[1], again[1], strict=True):
            if not _is_floating(one):
                continue
            pairs = [(one.detach(), other.detach())]
            if one.requires_grad and one.shape == other.shape:
                c = self.noise(one)
                found = [self._gradients(v, x, c) for x, v in ((first[0], one), (again[0], other))]
                pairs += [(found[0][n], found[1][n]) for n in self.names]
            for a, b in pairs:
                same = a.shape == b.shape and torch.allclose(a, b, 1e-9, 1e-12, equal_nan=True)
                if not same:
                    return False
        return True

    def runs(self, point: Point) -> bool:
        """Whether it has finite values there."""
        try:
            with torch.no_grad():
                found = self(point)
        except (RuntimeError, ValueError):
            return False
        return all(bool(torch.isfinite(v).all()) for v in found if _is_floating(v))

    def value(self, point: Point, output: int) -> Tensor:
        """An output there; NaN where the point is outside of the operation's domain."""
        try:
            with torch.no_grad():
                return self(point)[output].double()
        except (RuntimeError, ValueError):
            with torch.no_grad():
                return torch.full_like(self(self.example)[output].double(), torch.nan)

    def pulled(
        self, point: Point, output: int, count: int = 1
    ) -> list[tuple[Tensor, dict[str, Tensor], Tensor]]:
        """`count` random cotangents c of one output v, each with the J_i^T c by operand, and v."""
        leaves, outputs = self.watched(point)
        value = outputs[output]
        cotangents = [self.noise(value) for _ in range(count)]
        return [(c, self._gradients(value, leaves, c), value.detach()) for c in cotangents]

    def slope(self, point: Point, output: int, cotangent: Tensor | None = None) -> Tensor:
        """J^T c in the only operand; c is 1 by default."""
        leaves, outputs = self.watched(point)
        c = torch.ones_like(outputs[output]) if cotangent is None else cotangent
        return self._gradients(outputs[output], leaves, c)[self.names[0]]

    def watched(self, point: Point) -> tuple[dict[str, Tensor], list[Any]]:
        """Leaves of autograd with a point's values, and the outputs there, on the tape."""
        leaves = {n: u.detach().clone().requires_grad_() for n, u in point.operands.items()}
        with torch.enable_grad():
            return leaves, self(point.moved(leaves))

    def _gradients(
        self, value: Tensor, leaves: Mapping[str, Tensor], cotangent: Tensor
    ) -> dict[str, Tensor]:
        try:
            found = torch.autograd.grad(
                value, list(leaves.values()), cotangent, allow_unused=True, retain_graph=True
            )
        except (RuntimeError, NotImplementedError) as error:
            raise InputError(
                f"{self.where}: its backward cannot be run ({str(error).splitlines()[0]}); "
                "give it one (register_autograd), or detach what it reads"
            ) from error
        pairs = zip(leaves.items(), found, strict=True)
        return {n: torch.zeros_like(u) if g is None else g for (n, u), g in pairs}

    def points(self) -> tuple[list[Point], list[Point]]:
        """Points near the example, and random ones; those where nothing finite comes out are left
        out."""
        count = len(self.names) + 2
        near = [self.example, *(self._drawn(self._near) for _ in range(count))]
        ones = dict.fromkeys(self.names, Fraction(1))
        far = [self._reweighed(self._drawn(self._near).scaled(ones, t)) for t in (0.5, 3.0)]
        for draw in (self._resampled, self._normal):
            far += [self._reweighed(self._drawn(draw)) for _ in range(count)]
        return list(filter(self.runs, near)), list(filter(self.runs, far))

    def noise(self, like: Tensor) -> Tensor:
        """Normal numbers of that shape, dtype and device; the draws of a probe are in order."""
        return torch.randn(like.shape, generator=self.generator, dtype=torch.float64).to(like)

    def _drawn(self, draw: Callable[[Tensor], Tensor]) -> Point:
        return Point({n: _kept(u, draw(u)) for n, u in self.example.operands.items()})

    def _near(self, u: Tensor) -> Tensor:
        return u * (1.0 + STEP * self.noise(u))

    def _resampled(self, u: Tensor) -> Tensor:
        """The example's own values in other places: whatever signs and ranges it needs it has."""
        index = torch.randint(u.numel(), (u.numel(),), generator=self.generator)
        return u.flatten()[index.to(u.device)].view(u.shape) * (1.0 + 0.1 * self.noise(u))

    def _normal(self, u: Tensor) -> Tensor:
        return (float(u.square().mean().sqrt()) or 1.0) * self.noise(u)

    def _reweighed(self, point: Point) -> Point:
        """The point with other weights than the example's: a few per cent off, none of them 0."""
        weights = {}
        for name, w in self.weights.items():
            off = w * (1.0 + 0.1 * self.noise(w))
            weights[name] = off if bool(w.any()) else off + 0.1 * self.noise(w)
        return Point(point.operands, weights)
