"""Every registered operation's class lemma, on its samples, over symbols.

The residual of `symbolic.residual` is 0 for all values of the tensors (in the sample's
region, where the operation compares) and for all degrees its relation allows.
"""

from __future__ import annotations

from functools import cache

import pytest
import sympy as sp
import torch

from fullgrad_theory.operators import Algebra, lookup, registered
from fullgrad_theory.testing.sample_calls import call, samples
from proofs.symbolic import (
    Region,
    bound_arguments,
    from_torch,
    meaning,
    residual,
    vanishes,
)

GRADIENTLESS = {Algebra.FREEZING, Algebra.FACTORY}
NAMES = [o.name for o in registered() if o.algebra is not Algebra.COMPOSITE]
CARRYING = [name for name in NAMES if lookup(name).algebra not in GRADIENTLESS]  # type: ignore[union-attr]

pytestmark = pytest.mark.filterwarnings("ignore")


@cache
def residuals(name: str) -> tuple[sp.Expr, ...]:
    operator = lookup(name)
    assert operator is not None
    return tuple(
        expression
        for sample in samples(name, torch.Generator().manual_seed(0))
        if sample.live
        for mode in operator.modes(call(name, sample))
        for expression in residual(name, sample, mode.edit)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", CARRYING)
def test_lemma(name: str) -> None:
    """Its residual is identically 0: this is what `proved` in its record means."""
    assert all(map(vanishes, residuals(name)))


@pytest.mark.parametrize("name", [n for n in NAMES if n not in CARRYING])
def test_gradientless_results_are_locally_constant(name: str) -> None:
    """A frozen result holds no symbol of its operands, `detach` (constant by definition) aside."""
    if "detach" in name or lookup(name).algebra is Algebra.FACTORY:  # type: ignore[union-attr]
        return
    for sample in samples(name, torch.Generator().manual_seed(0)):
        arguments = {n: from_torch(v) for n, v in bound_arguments(name, sample).items()}
        result = meaning(name)(Region(), arguments)
        leaves = result if isinstance(result, (list, tuple)) else [result]
        assert not any(
            getattr(e, "free_symbols", None) for x in leaves for e in getattr(x, "flat", [])
        )


@pytest.mark.slow
def test_the_ledger() -> None:
    """Every record says `proved` that is judged by the tests above, and no other."""
    assert {o.name for o in registered() if o.proved} == set(NAMES)
    # a residual must exist where the class promises more than degree 0
    silent = {Algebra.SINGULAR, Algebra.COMPOSITE, *GRADIENTLESS}
    promising = [o.name for o in registered() if o.algebra not in silent]
    empty = [name for name in promising if not residuals(name)]
    assert empty == ["aten.where.Scalar"]  # it chooses between two numbers
