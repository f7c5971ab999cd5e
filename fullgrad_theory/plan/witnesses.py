"""What is seen of one output of a call at the points where it is probed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import torch
from torch import Tensor

from .equations import Equations
from .probe import Point, Probe, Pulled

AGREES = 1e-5
"""relative gap of a directional derivative to its central difference"""
SCALES = (0.5, 0.8, 1.25, 2.0)
STEPS = 64
"""of the sum that the integral of f' is taken by"""


@dataclass(frozen=True)
class Witness:
    """One output of a probe, near the example and far: by Euler's equations, finite differences
    and scaling. `alone`: the call has no other output; only then f(0) is looked at."""

    probe: Probe
    output: int
    near: tuple[Point, ...]
    far: tuple[Point, ...]
    alone: bool

    @property
    def everywhere(self) -> tuple[Point, ...]:
        return self.near + self.far

    def value(self, point: Point) -> Tensor:
        return self.probe.value(point, self.output)

    def rise(self, point: Point) -> Tensor:
        """f(u) - f(0)."""
        return self.value(point) - self.value(point.zeroed)

    def pull(self, point: Point) -> Pulled:
        (pulled,) = self.probe.pulled(point, self.output, 1)
        return pulled

    # ------------------------------------------------------------------ its degrees

    def rows(self, points: Sequence[Point], from_origin: bool = False) -> Tensor:
        """A row (<c, v>, -<J_1^T c, u_1>, ...) a point and cotangent, relative to the largest.

        `from_origin`: v - f(0) for v.
        """
        names, found = self.probe.names, []
        for point in points:
            shift = self.value(point.zeroed) if from_origin else 0.0
            for pulled in self.probe.pulled(point, self.output, len(names) + 2):
                c, v = pulled.cotangent, pulled.value
                right = float((c * (v - shift)).sum())
                left = [float((pulled.gradients[n] * point.operands[n]).sum()) for n in names]
                size = float((c * v).abs().sum()) or 1.0
                found.append([right / size, *(-x / size for x in left)])
        return torch.tensor(found, dtype=torch.float64).reshape(-1, 1 + len(names))

    @cached_property
    def gap(self) -> float:
        """The median gap of <J^T c, w> to the central difference of <c, v> along w."""
        gaps = [self._gap(point) for point in self.everywhere]
        return sorted(gaps)[len(gaps) // 2]

    @property
    def is_derivative(self) -> bool:
        """Whether its backward is that of its forward."""
        return self.gap <= AGREES

    def _gap(self, point: Point) -> float:
        """The lesser of two step widths; infinite where neither is a number."""
        pulled = self.pull(point)
        way = {n: self.probe.noise(u) * u.abs().mean() for n, u in point.operands.items()}
        slope = sum(float((pulled.gradients[n] * w).sum()) for n, w in way.items())
        best = float("inf")
        for h in (1e-4, 1e-6):
            ahead, behind = (
                self.value(point.moved({n: u + s * h * way[n] for n, u in point.operands.items()}))
                for s in (1.0, -1.0)
            )
            difference = float((pulled.cotangent * (ahead - behind)).sum()) / (2.0 * h)
            size = max(abs(slope), abs(difference), 1e-12)
            best = min(best, abs(slope - difference) / size)
        return best if best == best else float("inf")

    def scales(self, equations: Equations, from_origin: bool) -> bool:
        """v(t^e u) = t^d v(u) for solutions (d, e) of the equations, or the same of v - f(0)."""
        if not equations.determine:
            return True
        some = self.everywhere[:3] + self.everywhere[-3:]
        return all(
            self._scales(
                point, degree, dict(zip(self.probe.names, powers, strict=True)), from_origin
            )
            for degree, *powers in equations.solutions()
            for point in some
        )

    def _scales(
        self, point: Point, degree: Fraction, powers: Mapping[str, Fraction], from_origin: bool
    ) -> bool:
        value = self.value(point)
        origin = self.value(point.zeroed) if from_origin else 0.0
        for t in SCALES:
            moved = point.scaled(powers, t)
            if not self.probe.runs(moved):
                continue
            wanted = (value - origin) * t ** float(degree)
            off = (self.value(moved) - origin - wanted).abs().max()
            if float(off) > 1e-8 * max(float(wanted.abs().max()), float(value.abs().max())):
                return False
        return True

    def additive(self) -> bool:
        """Whether f(u + w) - f(u) - f(w) + f(0) = 0 at two points and the first one's weights."""
        points = self.far or self.near
        point, other = points[0], points[0].moved(points[-1].operands)
        both = point.moved({n: u + other.operands[n] for n, u in point.operands.items()})
        total, *parts = (self.value(p) for p in (both, point, other, point.zeroed))
        off = (total - parts[0] - parts[1] + parts[2]).abs().max()
        return float(off) <= 1e-9 * (float(total.abs().max()) or 1.0)

    # ------------------------------------------------------------------ its f(0)

    @cached_property
    def origin(self) -> Tensor | None:
        """f(0), None where it is not finite."""
        zero = self.probe.example.zeroed
        return self.value(zero) if self.alone and self.probe.runs(zero) else None

    @property
    def has_bias(self) -> bool:
        """Whether f(0) is other than 0, and does not depend on what is hidden."""
        return self.origin is not None and bool(self.origin.any()) and not self.probe.hidden

    def bias(self) -> str:
        """The name of the one constant operand that f(0) is linear in, '' where there is none."""
        probe, zero, fitting = self.probe, self.probe.example.zeroed, []
        names = {id(o.node): o.name for o in probe.call.operands if o.node is not None}
        for place in probe.weights:
            twice = self.value(Point(zero.operands, {place: 2.0 * probe.flat[place]}))
            if torch.allclose(twice, 2.0 * self.value(zero), rtol=1e-9, atol=0.0):
                fitting.append(names[id(probe.nodes[place])])
        return fitting[0] if len(fitting) == 1 else ""

    # ------------------------------------------------------------------ elementwise

    def elementwise(self, points: Sequence[Point]) -> bool:
        """Whether each output depends on the one input in its place, forward and backward."""
        probe = self.probe
        if len(probe.names) > 1 or probe.hidden or "[" in probe.names[0]:
            return False
        return all(self._elementwise(point) for point in points[:3])

    def _elementwise(self, point: Point) -> bool:
        ((name, u),), pulled = point.operands.items(), self.pull(point)
        if pulled.value.shape != u.shape:
            return False
        mask = torch.rand(u.shape, generator=self.probe.generator).to(u) < 0.5
        moved = self.value(point.moved({name: torch.where(mask, u * 1.3 + 0.1, u)}))
        slope = self.probe.slope(point, self.output, pulled.cotangent * mask)
        return torch.equal(moved[~mask], pulled.value[~mask]) and not bool(slope[~mask].any())

    def continuous(self) -> bool:
        """Whether f(u) - f(0) is the integral of f' from 0, so that the secant is its mean."""
        return all(self._continuous(point) for point in self.everywhere)

    def _continuous(self, point: Point) -> bool:
        ((name, u),), rise = point.operands.items(), self.rise(point)
        total = torch.zeros_like(u)
        for k in range(STEPS):
            at = point.moved({name: u * ((k + 0.5) / STEPS)})
            total += self.probe.slope(at, self.output) / STEPS
        off = (total * u - rise).abs().max()
        return float(off) <= 2e-2 * (float(rise.abs().max()) or 1.0)

    def is_secant(self) -> bool:
        """Whether J~ u = f(u) - f(0), element by element."""
        return self.elementwise(self.everywhere) and all(map(self._is_secant, self.everywhere))

    def _is_secant(self, point: Point) -> bool:
        (u,), slope = point.operands.values(), self.probe.slope(point, self.output)
        return torch.allclose(slope * u, self.rise(point), rtol=1e-8, atol=1e-10)
