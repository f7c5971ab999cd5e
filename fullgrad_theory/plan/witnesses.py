"""What is seen of one output of a call at the points where it is probed: linear equations between
degrees, read off measured rows in rational numbers, finite differences, and scaling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import product

import torch
from torch import Tensor

from ..operators.relations import Relation
from .probe import Point, Probe

ZERO_TOLERANCE = 1e-8
"""singular values below this, relative to the largest, are none"""
RATIONAL_TOLERANCE = 1e-6
FINEST = 24
"""the largest denominator of a coefficient"""
AGREES = 1e-5
"""relative gap of a directional derivative to its central difference"""
SCALES = (0.5, 0.8, 1.25, 2.0)
STEPS = 64
"""of the sum that the integral of f' is taken by"""


@dataclass(frozen=True)
class Equations:
    """The reduced rows of a matrix over (d, e_1, ..., e_n), the output's degree and the operands'.

    Without rows where they are not `rational`.
    """

    rows: tuple[tuple[Fraction, ...], ...]
    rational: bool = True

    @classmethod
    def of(cls, rows: Tensor) -> Equations:
        """The equations that hold for the degrees, each row a measurement of sum = 0."""
        if not bool(rows.any()):
            return cls(())
        matrix = _reduced(rows)
        exact = [[Fraction(float(x)).limit_denominator(FINEST) for x in row] for row in matrix]
        rounded = torch.tensor([[float(x) for x in row] for row in exact], dtype=torch.float64)
        rational = bool(((rounded - matrix).abs() < RATIONAL_TOLERANCE).all())
        return cls(tuple(map(tuple, exact)) if rational else (), rational)

    @property
    def determine(self) -> bool:
        """Whether the output's degree follows from the operands'."""
        return bool(self.rows) and self.rows[0][0] == 1

    @property
    def degree_free(self) -> bool:
        """Whether the output's degree can be other than 0."""
        return self.determine and any(self.rows[0][1:])

    def relation(self, names: Sequence[str]) -> Relation:
        """d as a sum of operand degrees, once a further equation; what can only be 0 in `zero`."""
        if not self.determine:
            return Relation(zero=tuple(sorted(names)))
        lead, *others = (
            {n: c for n, c in zip(names, row[1:], strict=True) if c} for row in self.rows
        )
        lead = {name: -c for name, c in lead.items()}
        zero = [name for row in others if len(row) == 1 for name in row]
        ties = [row for row in others if len(row) != 1]
        sums = [lead, *(_sum(lead, tie) for tie in ties)]
        if not lead and ties:  # d = 0, and the degrees of operands are tied to each other
            sums = [scaled for tie in ties for scaled in (tie, _sum(tie, tie))]
        terms = tuple(tuple(sorted(s.items())) for s in sums if s)
        return Relation(tuple(dict.fromkeys(terms)), tuple(sorted(zero)))

    def solutions(self) -> list[tuple[Fraction, ...]]:
        """A basis of the solutions (d, e_1, ..., e_n): one a column without a pivot."""
        width = len(self.rows[0])
        pivots = [next(i for i, x in enumerate(row) if x) for row in self.rows]
        found = []
        for free in (i for i in range(width) if i not in pivots):
            solution = [Fraction(int(i == free)) for i in range(width)]
            for row, pivot in zip(self.rows, pivots, strict=True):
                solution[pivot] = -row[free]
            found.append(tuple(solution))
        return found


def _sum(a: Mapping[str, Fraction], b: Mapping[str, Fraction]) -> dict[str, Fraction]:
    total = {n: a.get(n, Fraction(0)) + b.get(n, Fraction(0)) for n in [*a, *b]}
    return {n: c for n, c in total.items() if c}


def _reduced(rows: Tensor) -> Tensor:
    """A basis of the row space in reduced echelon form."""
    _, sizes, basis = torch.linalg.svd(rows, full_matrices=False)
    rank = int((sizes > ZERO_TOLERANCE * sizes[0]).sum())
    matrix = basis[:rank].clone()
    row = 0
    for column in range(matrix.shape[1]):
        if row == rank:
            break
        best = row + int(matrix[row:, column].abs().argmax())
        if float(matrix[best, column].abs()) < 1e-7:
            continue
        matrix[[row, best]] = matrix[[best, row]]
        matrix[row] /= matrix[row, column].clone()
        others = [i for i in range(rank) if i != row]
        matrix[others] -= matrix[others, column : column + 1] * matrix[row]
        row += 1
    return matrix


@dataclass(frozen=True)
class Witness:
    """One output of a probe, near the example and far: by Euler's equations, finite differences
    and scaling. `alone`: the call has no other output; only then f(0) is looked at."""

    probe: Probe
    output: int
    near: Sequence[Point]
    far: Sequence[Point]
    alone: bool

    @property
    def everywhere(self) -> list[Point]:
        return [*self.near, *self.far]

    def value(self, point: Point) -> Tensor:
        return self.probe.value(point, self.output)

    def rise(self, point: Point) -> Tensor:
        """f(u) - f(0)."""
        return self.value(point) - self.value(point.zeroed)

    def rows(self, points: Sequence[Point], from_origin: bool = False) -> Tensor:
        """A row (<c, v>, -<J_1^T c, u_1>, ...) a point and cotangent, relative to the largest.

        `from_origin`: v - f(0) for v.
        """
        names, found = self.probe.names, []
        for point in points:
            shift = self.value(point.zeroed) if from_origin else 0.0
            for c, gradients, v in self.probe.pulled(point, self.output, len(names) + 2):
                right = float((c * (v - shift)).sum())
                left = [float((gradients[n] * point.operands[n]).sum()) for n in names]
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
        ((c, gradients, _),) = self.probe.pulled(point, self.output)
        way = {n: self.probe.noise(u) * u.abs().mean() for n, u in point.operands.items()}
        slope = sum(float((gradients[n] * w).sum()) for n, w in way.items())
        best = float("inf")
        for h in (1e-4, 1e-6):
            ahead, behind = (
                self.value(point.moved({n: u + s * h * way[n] for n, u in point.operands.items()}))
                for s in (1.0, -1.0)
            )
            difference = float((c * (ahead - behind)).sum()) / (2.0 * h)
            size = max(abs(slope), abs(difference), 1e-12)
            best = min(best, abs(slope - difference) / size)
        return best if best == best else float("inf")

    def scales(self, equations: Equations, from_origin: bool) -> bool:
        """v(t^e u) = t^d v(u) for solutions (d, e) of the equations, or the same of v - f(0)."""
        if not equations.determine:
            return True
        some = self.everywhere[:3] + self.everywhere[-3:]
        for (degree, *powers), point, t in product(equations.solutions(), some, SCALES):
            moved = point.scaled(dict(zip(self.probe.names, powers, strict=True)), t)
            if self.probe.runs(moved):
                value = self.value(point)
                origin = self.value(point.zeroed) if from_origin else 0.0
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
        zero = self.probe.example.zeroed
        fitting = []
        for name, weight in self.probe.weights.items():
            twice = self.value(Point(zero.operands, {name: 2.0 * weight}))
            if torch.allclose(twice, 2.0 * self.value(zero), rtol=1e-9, atol=0.0):
                fitting.append(name)
        return fitting[0] if len(fitting) == 1 else ""

    def elementwise(self, points: Sequence[Point]) -> bool:
        """Whether each output depends on the one input in its place, forward and backward."""
        probe = self.probe
        if len(probe.names) > 1 or probe.hidden or "[" in probe.names[0]:
            return False
        return all(self._elementwise(point) for point in points[:3])

    def _elementwise(self, point: Point) -> bool:
        ((name, u),) = point.operands.items()
        ((c, _, v),) = self.probe.pulled(point, self.output)
        if v.shape != u.shape:
            return False
        mask = torch.rand(u.shape, generator=self.probe.generator).to(u) < 0.5
        moved = self.value(point.moved({name: torch.where(mask, u * 1.3 + 0.1, u)}))
        slope = self.probe.slope(point, self.output, c * mask)
        return torch.equal(moved[~mask], v[~mask]) and not bool(slope[~mask].any())

    def continuous(self) -> bool:
        """Whether f(u) - f(0) is the integral of f' from 0, so that the secant is its mean."""
        for point in self.everywhere:
            ((name, u),), rise = point.operands.items(), self.rise(point)
            total = torch.zeros_like(u)
            for k in range(STEPS):
                at = point.moved({name: u * ((k + 0.5) / STEPS)})
                total += self.probe.slope(at, self.output) / STEPS
            off = (total * u - rise).abs().max()
            if not float(off) <= 2e-2 * (float(rise.abs().max()) or 1.0):
                return False
        return True

    def is_secant(self) -> bool:
        """Whether J~ u = f(u) - f(0), element by element."""
        if not self.elementwise(self.everywhere):
            return False
        for point in self.everywhere:
            (u,), slope = point.operands.values(), self.probe.slope(point, self.output)
            if not torch.allclose(slope * u, self.rise(point), rtol=1e-8, atol=1e-10):
                return False
        return True
