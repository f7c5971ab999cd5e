"""Piecewise linear operations over all real numbers, by z3: of degree 1 together with their bounds,
and nowhere with a jump, or with one where kernel.toml says that they have.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import product

import pytest
import torch
import z3
from torch import Tensor
from torch.nn import functional as F

from fullgrad_theory import kernel
from proofs.piecewise import (
    Piecewise,
    between,
    continuous,
    either,
    homogeneous,
    is_theorem,
    largest,
    ordered,
    running,
    size,
    smallest,
)

aten = torch.ops.aten
pytestmark = pytest.mark.slow

HOMOGENEOUS: dict[str, Piecewise] = {
    "relu.default": Piecewise(lambda u, c: [largest([u[0], 0])], torch.relu),
    "leaky_relu.default": Piecewise(
        lambda u, c: [either(u[0] > 0, u[0], u[0] / 4)], lambda x: F.leaky_relu(x, 0.25)
    ),
    "rrelu.default": Piecewise(
        lambda u, c: [either(u[0] > 0, u[0], u[0] * 3 / 8)], lambda x: F.rrelu(x, 0.25, 0.5)
    ),
    "prelu.default": Piecewise(
        lambda u, c: [either(u[0] > 0, u[0], -u[0] / 2)],
        lambda x: F.prelu(x, x.new_tensor([-0.5])),
    ),
    "abs.default": Piecewise(lambda u, c: [size(u[0])], torch.abs),
    "relu6.default": Piecewise(lambda u, c: [between(u[0], 0, c[0])], aten.relu6, 1, (6.0,)),
    "hardsigmoid.default": Piecewise(
        lambda u, c: [between(u[0] + c[0], 0, c[1]) / 6], aten.hardsigmoid, 1, (3.0, 6.0)
    ),
    "hardtanh.default": Piecewise(
        lambda u, c: [between(u[0], c[0], c[1])], lambda x: F.hardtanh(x, -1.0, 2.0), 1, (-1.0, 2.0)
    ),
    "clamp.default": Piecewise(
        lambda u, c: [between(u[0], c[0], c[1])], lambda x: x.clamp(-0.5, 1.5), 1, (-0.5, 1.5)
    ),
    "clamp_min.default": Piecewise(
        lambda u, c: [largest([u[0], c[0]])], lambda x: x.clamp_min(0.5), 1, (0.5,)
    ),
    "clamp_max.default": Piecewise(
        lambda u, c: [smallest([u[0], c[0]])], lambda x: x.clamp_max(0.5), 1, (0.5,)
    ),
    "clamp.Tensor": Piecewise(
        lambda u, c: [between(*u)], lambda x: torch.clamp(x[:1], x[1:2], x[2:]), 3
    ),
    "softshrink.default": Piecewise(
        lambda u, c: [u[0] - between(u[0], -c[0], c[0])], lambda x: F.softshrink(x, 0.5), 1, (0.5,)
    ),
    "maximum.default": Piecewise(
        lambda u, c: [largest(u)], lambda x: torch.maximum(x[:1], x[1:]), 2
    ),
    "minimum.default": Piecewise(
        lambda u, c: [smallest(u)], lambda x: torch.minimum(x[:1], x[1:]), 2
    ),
    "fmax.default": Piecewise(lambda u, c: [largest(u)], lambda x: torch.fmax(x[:1], x[1:]), 2),
    "fmin.default": Piecewise(lambda u, c: [smallest(u)], lambda x: torch.fmin(x[:1], x[1:]), 2),
    "max.default": Piecewise(lambda u, c: [largest(u)], torch.max, 3),
    "min.default": Piecewise(lambda u, c: [smallest(u)], torch.min, 3),
    "max.dim": Piecewise(lambda u, c: [largest(u)], lambda x: x.max(0).values, 3),
    "min.dim": Piecewise(lambda u, c: [smallest(u)], lambda x: x.min(0).values, 3),
    "amax.default": Piecewise(lambda u, c: [largest(u)], torch.amax, 3),
    "amin.default": Piecewise(lambda u, c: [smallest(u)], torch.amin, 3),
    "median.default": Piecewise(lambda u, c: [ordered(u)[1]], torch.median, 3),
    "kthvalue.default": Piecewise(
        lambda u, c: [ordered(u)[1]], lambda x: torch.kthvalue(x, 2).values, 3
    ),
    "sort.default": Piecewise(lambda u, c: ordered(u), lambda x: x.sort().values, 3),
    "sort.stable": Piecewise(lambda u, c: ordered(u), lambda x: x.sort(stable=True).values, 3),
    "msort.default": Piecewise(lambda u, c: ordered(u), torch.msort, 3),
    "topk.default": Piecewise(lambda u, c: ordered(u)[:0:-1], lambda x: torch.topk(x, 2).values, 3),
    "cummax.default": Piecewise(
        lambda u, c: running(u, largest), lambda x: torch.cummax(x, 0).values, 3
    ),
    "cummin.default": Piecewise(
        lambda u, c: running(u, smallest), lambda x: torch.cummin(x, 0).values, 3
    ),
    "max_pool1d.default": Piecewise(
        lambda u, c: [largest(u[:2]), largest(u[1:])],
        lambda x: F.max_pool1d(x[None], 2, stride=1),
        3,
    ),
    "adaptive_max_pool1d.default": Piecewise(
        lambda u, c: [largest(u[:2]), largest(u[2:])],
        lambda x: F.adaptive_max_pool1d(x[None], 2),
        4,
    ),
}
LIPSCHITZ = {"softshrink.default": 2.0}
"""how steep they are, where more than 1; a sum of two of slope 1"""
JUMPS: dict[str, Piecewise] = {
    "threshold.default": Piecewise(
        lambda u, c: [either(u[0] > 1, u[0], 0.5)], lambda x: F.threshold(x, 1.0, 0.5)
    ),
    "frac.default": Piecewise(
        lambda u, c: [either(u[0] < 0, u[0] + z3.ToInt(-u[0]), u[0] - z3.ToInt(u[0]))], torch.frac
    ),
    "remainder.Scalar": Piecewise(
        lambda u, c: [u[0] - z3.ToInt(u[0])], lambda x: torch.remainder(x, 1.0)
    ),
    "hardshrink.default": Piecewise(
        lambda u, c: [either(size(u[0]) > 0.5, u[0], 0)], lambda x: F.hardshrink(x, 0.5)
    ),
}


@pytest.mark.parametrize("name", HOMOGENEOUS)
def test_of_degree_1_with_its_bounds_over_all_numbers(name: str) -> None:
    (row,) = kernel.meanings()[f"aten.{name}"]
    assert row["rule"].startswith("self")
    assert "+" in row["rule"] or not HOMOGENEOUS[name].constants  # its bounds are counted
    assert is_theorem(homogeneous(HOMOGENEOUS[name]))


@pytest.mark.parametrize("name", HOMOGENEOUS)
def test_it_jumps_nowhere(name: str) -> None:
    assert is_theorem(continuous(HOMOGENEOUS[name], LIPSCHITZ.get(name, 1.0)))


@pytest.mark.parametrize("name", JUMPS)
def test_it_jumps(name: str) -> None:
    """However steep a slope may be; so that a constant there is not said to be a bias leaf."""
    assert not is_theorem(continuous(JUMPS[name], 1e6))
    first = next(iter(kernel.meanings().get(f"aten.{name}", ())), {"rule": "self"})["rule"]
    assert "1^0" in first or first == "self"  # a constant that jumps; a value, or zero


@pytest.mark.parametrize("name", [n for n, o in HOMOGENEOUS.items() if o.constants])
def test_with_its_bounds_held_fixed_it_is_not(name: str) -> None:
    """They have to be counted."""
    operation, t, u = HOMOGENEOUS[name], z3.Real("t"), z3.Real("u")
    bounds = [z3.RealVal(Fraction(c)) for c in operation.constants]
    (scaled,), (value,) = operation.formula([t * u], bounds), operation.formula([u], bounds)
    assert not is_theorem(z3.Implies(t > 0, scaled == t * value))


def lattice(count: int) -> Tensor:
    """All points of a lattice that holds every place where one of them turns, ties included."""
    ticks = [k / 4 for k in range(-32, 33)] if count == 1 else [-1.5, -0.5, 0.0, 0.5, 2.0]
    return torch.tensor([*product(ticks, repeat=count)], dtype=torch.float64)


@pytest.mark.parametrize("name", [*HOMOGENEOUS, *JUMPS])
def test_torch_computes_the_formula(name: str) -> None:
    operation = (HOMOGENEOUS | JUMPS)[name]
    constants = [z3.RealVal(Fraction(c)) for c in operation.constants]
    for point in lattice(operation.count):
        given = [z3.RealVal(Fraction(x)) for x in point.tolist()]
        meant = [z3.simplify(e).as_fraction() for e in operation.formula(given, constants)]
        made = operation.call(point).reshape(-1).tolist()
        assert [float(m) for m in meant] == pytest.approx(made, abs=1e-15)
