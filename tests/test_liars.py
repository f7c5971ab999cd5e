"""No liar is called complete, no honest twin is refused, and the liars do lie."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

import fullgrad_theory as fgt
from fullgrad_theory.testing.liars import KINDS, Liar, lying_models, outcomes

pytestmark = pytest.mark.filterwarnings("ignore")


def check(liar: Liar) -> None:
    (_, lied, _), (_, told, said) = outcomes(liar)
    assert lied is not True, liar
    assert told is True, (liar.twin, said)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind(kind: str) -> None:
    check(Liar(kind))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(9))
@pytest.mark.parametrize(
    "kind", ["a number read off", "a step", "a curve", "a Function that sleeps"]
)
def test_kinds_of_many_forms(kind: str, seed: int) -> None:
    check(Liar(kind, 0.3, seed=seed * 5 + seed))


@pytest.mark.slow
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[*HealthCheck])
@given(liar=lying_models())
def test_no_liar_is_complete_and_no_twin_refused(liar: Liar) -> None:
    check(liar)


GRADIENT = (
    "a Function", "a Function, one element", "a Function's bias", "a tensor hook",
    "a hook of a module", "a pre-hook of a module", "no gradient", "a detach", "a number read off",
)  # fmt: skip


def missing(model: nn.Module, x: Tensor) -> float:
    """|<c, f> - <x, G_x> - sum <b, G_b>| of <c, f>, by autograd in float64 and nothing else."""
    model, x = copy.deepcopy(model).double(), x.double().requires_grad_()
    y = model(x)
    c = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    biases = [p for n, p in model.named_parameters() if n.endswith("bias")]
    leaves = [x, *biases]
    found = torch.autograd.grad((c * y).sum(), leaves, allow_unused=True)
    parts = sum(
        float((g * u).detach().sum()) for g, u in zip(found, leaves, strict=True) if g is not None
    )
    return abs(float((c * y).detach().sum()) - parts) / float((c * y).detach().abs().sum())


@pytest.mark.parametrize("kind", GRADIENT)
def test_they_do_lie(kind: str) -> None:
    """Another witness, which knows nothing of the library; 0.75 is the twin's own constant."""
    liar = Liar(kind, 1e-3, seed=4)
    assert missing(liar.model(), liar.inputs()) > 1e-6
    if kind != "a number read off":
        assert missing(liar.twin.model(), liar.inputs()) < 1e-12


@pytest.mark.parametrize("size", [1e-6, 1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("cast", ["", "bfloat16", "autocast"])
def test_at_any_size(size: float, ids: bool, cast: str) -> None:
    check(Liar("a Function, one element", size, ids=ids, cast=cast))


def test_a_small_branch_that_carries_half_is_seen() -> None:
    for kind in ("a Function", "a tensor hook", "a Function's bias"):
        check(Liar(kind, 1e-3, faint=True))


def test_a_liar_is_drawn_from_its_parts() -> None:
    liar = Liar("a step")
    assert liar.twin.honest and liar.twin.twin == liar.twin
    assert fgt.check_completeness(liar.twin.model(), liar.inputs(), beside=()).complete is True
