"""Registered operations beside their other spellings: in place, as a method, as torch decomposes
them. Same verdict as it is and under libra, and the same gradient under libra and integrated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._refs
from torch import Tensor
from torch._decomp import decomposition_table

import fullgrad_theory as fgt
from fullgrad_theory.errors import TraceError, UnregisteredOperationError
from fullgrad_theory.operators import Algebra, registered
from fullgrad_theory.testing.sample_calls import Sample, overload, samples

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SILENT = (Algebra.FREEZING, Algebra.FACTORY, Algebra.COMPOSITE)
NAMES = [o.name for o in registered() if o.algebra not in SILENT and o.name.startswith("aten.")]
Spelling = Callable[..., Any]


def in_place(name: str) -> Spelling | None:
    """The operation that writes its result to its first operand, on a copy of that."""
    _, base, kind = name.split(".")
    packet = getattr(torch.ops.aten, f"{base}_", None)
    if packet is None or kind not in packet.overloads():
        return None
    return lambda x, *args, **kwargs: getattr(packet, kind)(x.clone(), *args, **kwargs)


def as_method(name: str) -> Spelling | None:
    method = getattr(Tensor, name.split(".")[1], None)
    return method if callable(method) else None


def decomposed(name: str) -> Spelling | None:
    return decomposition_table.get(overload(name))


def reference(name: str) -> Spelling | None:
    """torch's own reference implementation in Python."""
    base = name.split(".")[1]
    rooms = (torch._refs, torch._refs.nn.functional, torch._refs.special, torch._refs.linalg)
    names = (base, base.removeprefix("linalg_"), base.removeprefix("special_"))
    found = (getattr(room, n, None) for room in rooms for n in names)
    return next((f for f in found if callable(f)), None)


SPELLINGS = {
    "in place": in_place,
    "as a method": as_method,
    "decomposed": decomposed,
    "reference": reference,
}


def sample(name: str) -> tuple[Sample, Tensor] | None:
    """A call whose first operand is a tensor that carries the input."""
    for drawn in samples(name, torch.Generator().manual_seed(3)):
        first = drawn.args[0] if drawn.args else None
        if isinstance(first, Tensor) and first.is_floating_point() and drawn.live:
            return drawn, first
    return None


def seen(spelling: Spelling, drawn: Sample, x: Tensor) -> tuple[Any, ...]:
    """Both verdicts, the value, and the gradients under the policies that have a plan."""

    def model(u: Tensor) -> Any:
        made = spelling(u, *drawn.args[1:], **drawn.kwargs)
        return made[0] if isinstance(made, (tuple, list)) else made

    plain = fgt.check_completeness(model, x, beside=(), unknown="measure")
    edited = fgt.check_completeness(model, x, policy="libra", beside=(), unknown="measure")
    plans = [edited.plan]
    if edited.plan is not None:
        plans.append(fgt.derive_rules(model, x, "integrated", unknown="measure"))
    gradients = [gradient(model, x, plan) for plan in plans if plan is not None]
    return plain.complete, edited.complete, model(x), gradients


def gradient(model: Any, x: Tensor, plan: Any) -> Tensor:
    leaf = x.clone().requires_grad_()
    y = fgt.balance(model, x, plan, unknown="measure")(leaf)
    cotangent = torch.cos(torch.arange(y.numel(), dtype=torch.float64)).reshape(y.shape)
    (found,) = torch.autograd.grad(y, leaf, cotangent.to(y.dtype), materialize_grads=True)
    return found


_SHRINKS = (
    "where(|x| > c, x - sign(x) c, 0): the sign's jump is behind the condition, and not looked for"
)
OTHERWISE = {
    ("aten.group_norm.default", "reference"): "it is native_group_norm, which nobody registered",
    ("aten.softshrink.default", "decomposed"): _SHRINKS,
    ("aten.softshrink.default", "reference"): _SHRINKS,
}
"""spellings that are known to be judged otherwise, and why"""
REFUSES = (
    RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError, AssertionError,
)  # fmt: skip
AT_THE_DOOR = (TraceError, UnregisteredOperationError)
"""what a spelling may be refused by: anything later is a fault"""
CASES = [(n, s) for n in NAMES for s, find in SPELLINGS.items() if find(n) and sample(n)]


@pytest.mark.parametrize(("name", "spelling"), CASES)
def test_a_spelling_has_the_verdict_of_the_operation(name: str, spelling: str) -> None:
    found = sample(name)
    other = SPELLINGS[spelling](name)
    assert found is not None and other is not None
    drawn, x = found
    try:
        wanted = seen(overload(name), drawn, x)
    except AT_THE_DOOR as error:
        pytest.skip(f"refused: {error}"[:100])
    try:
        leaf = x.clone().requires_grad_()
        value = other(leaf, *drawn.args[1:], **drawn.kwargs)
        value = value[0] if isinstance(value, (tuple, list)) else value
        torch.autograd.grad(value, leaf, torch.ones_like(value), allow_unused=True)
    except REFUSES:
        pytest.skip("it takes other arguments, or torch has no derivative of it, as of its prims")
    if value.shape != wanted[2].shape or not torch.allclose(value, wanted[2], equal_nan=True):
        pytest.skip("it is another operation")
    if (name, spelling) in OTHERWISE:
        pytest.skip(OTHERWISE[name, spelling])
    try:
        got = seen(other, drawn, x)
    except AT_THE_DOOR as error:
        pytest.skip(f"refused, and said why: {error}"[:100])
    assert got[:2] == wanted[:2]
    # torch's hardsigmoid keeps 1/6 in float32
    torch.testing.assert_close(got[3], wanted[3], rtol=1e-8, atol=1e-8)
