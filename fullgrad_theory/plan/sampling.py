"""Where a call is probed: at its example values and near them, and at random ones far from them."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction

import torch
from torch import Tensor

from .probe import Point, Probe

STEP = 0.02
"""how far from the example a near point is, relative"""


def points(probe: Probe) -> tuple[tuple[Point, ...], tuple[Point, ...]]:
    """Points at the example, and random ones; those where nothing finite comes out are left out."""
    count = len(probe.names) + 2
    near = [probe.example, *(_near(probe) for _ in range(count))]
    ones = dict.fromkeys(probe.names, Fraction(1))
    far = [_with_weights(probe, _near(probe).scaled(ones, t)) for t in (0.5, 3.0)]
    far += [_with_weights(probe, _resampled(probe)) for _ in range(count)]
    far += [_with_weights(probe, _normal(probe)) for _ in range(count)]
    return _that_run(probe, near), _that_run(probe, far)


def _that_run(probe: Probe, candidates: Iterable[Point]) -> tuple[Point, ...]:
    return tuple(point for point in candidates if probe.runs(point))


def _near(probe: Probe) -> Point:
    example = probe.example.operands
    return Point({n: u * (1.0 + STEP * probe.noise(u)) for n, u in example.items()})


def _resampled(probe: Probe) -> Point:
    """The example's own values in other places: whatever signs and ranges it needs it has."""

    def draw(u: Tensor) -> Tensor:
        index = torch.randint(u.numel(), (u.numel(),), generator=probe.generator)
        return u.flatten()[index.to(u.device)].view(u.shape) * (1.0 + 0.1 * probe.noise(u))

    return Point({n: draw(u) for n, u in probe.example.operands.items()})


def _normal(probe: Probe) -> Point:
    """Normal numbers as large as the example's values."""
    example = probe.example.operands
    size = {n: float(u.square().mean().sqrt()) or 1.0 for n, u in example.items()}
    return Point({n: size[n] * probe.noise(u) for n, u in example.items()})


def _with_weights(probe: Probe, point: Point) -> Point:
    """The point with other weights than the example's: a few per cent off, none of them 0."""

    def draw(w: Tensor) -> Tensor:
        off = w * (1.0 + 0.1 * probe.noise(w))
        return off if bool(w.any()) else off + 0.1 * probe.noise(w)

    return Point(point.operands, {i: draw(probe.flat[i]) for i in probe.weights})
