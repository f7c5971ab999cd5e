"""What nobody registered takes one entry: an elementwise operation, a norm, a softmax, a view."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fullgrad_theory as fgt
from fullgrad_theory import Algebra, Role
from fullgrad_theory.operators import lookup, register, registry, views

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def registry_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


@pytest.fixture
def scale_norm() -> Iterator[None]:
    """g x / sqrt(mean x^2 + eps), as an operation of its own."""

    @torch.library.custom_op("fgt_entry::scale_norm", mutates_args=())
    def norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
        return gain * x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()

    norm.register_fake(lambda x, gain, eps: torch.empty_like(x))

    def setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*inputs[:2])
        ctx.eps = inputs[2]

    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        leaves = [t.detach().requires_grad_() for t in ctx.saved_tensors]
        with torch.enable_grad():
            x, gain = leaves
            value = gain * x * (x.square().mean(-1, keepdim=True) + ctx.eps).rsqrt()
        return *torch.autograd.grad(value, leaves, grad), None

    norm.register_autograd(backward, setup_context=setup)
    yield


def complete(model, x: Tensor, **options) -> fgt.Plan:  # type: ignore[no-untyped-def]
    """Check, derive and balance: complete, the forward bit for bit, contributions that add up."""
    if options.pop("unknown", True):
        with pytest.raises(fgt.FullgradError, match="not registered"):
            fgt.check_completeness(model, x)
    options["entry"]()
    report = fgt.check_completeness(model, x, policy="libra")
    assert report.complete, str(report)
    assert report.error is not None and report.error < 1e-10
    balanced = fgt.balance(model, x)
    assert torch.equal(balanced(x), model(x))
    parts = fgt.fullgrad(balanced, x)
    assert parts.error.max() < 1e-4
    return balanced.plan


def test_an_elementwise_operation() -> None:
    plan = complete(
        lambda x: torch.special.i1(x).sum(-1, keepdim=True),
        torch.randn(2, 5),
        entry=lambda: register("aten.special_i1.default", Algebra.ZERO_ORIGIN),
    )
    assert [edit.kind for edit in plan] == ["secant"]


def test_an_elementwise_operation_that_is_not_zero_at_zero() -> None:
    complete(
        lambda x: torch.special.erfcx(x).sum(-1, keepdim=True),
        torch.randn(2, 5),
        entry=lambda: register("aten.special_erfcx.default", Algebra.ELEMENTWISE, origin=1.0),
    )


def test_a_norm(scale_norm: None) -> None:
    gain = torch.rand(5) + 0.5
    plan = complete(
        lambda x: torch.ops.fgt_entry.scale_norm(x, gain.to(x), 1e-3).cumsum(-1),
        torch.randn(2, 5),
        entry=lambda: register(
            "fgt_entry.scale_norm.default",
            Algebra.NORMALISER,
            "x*gain",
            frozen=lambda x, gain, eps: (
                gain * x * (x.square().mean(-1, keepdim=True) + eps).rsqrt().detach()
            ),
        ),
    )
    assert [edit.kind for edit in plan] == ["freeze"]


def test_a_softmax() -> None:
    def model(x: Tensor) -> Tensor:
        return torch.special.softmax(x @ x.mT, -1) @ x

    x = torch.randn(2, 3, 5)
    assert fgt.derive_rules(model, x).edits  # torch makes it of one that is known
    plan = complete(
        model,
        x,
        unknown=False,
        entry=lambda: register(
            "aten.special_softmax.default", Algebra.SMOOTH, roles=(Role.SOFTMAX, Role.PROBABILITY)
        ),
    )
    assert [edit.kind for edit in plan] == ["prune"]
    head = fgt.check_completeness(lambda x: torch.special.softmax(x, -1), torch.randn(2, 5))
    assert "probability" in " ".join(head.problems)


def test_a_view() -> None:
    """What is written through it comes back: one entry says how."""

    def model(x: Tensor) -> Tensor:
        y = x * 2.0
        torch.linalg.diagonal(y).mul_(3.0)
        return y.sum(-1)

    x = torch.randn(2, 4, 4)
    assert fgt.check_completeness(model, x).complete  # torch makes it of one that is known
    register(
        "aten.linalg_diagonal.default",
        Algebra.STRUCTURAL,
        view=views.scattered(aten.diagonal_scatter.default),
    )
    report = fgt.check_completeness(model, x)
    assert report.complete, str(report)
    assert torch.equal(fgt.balance(model, x)(x), model(x))


# --------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        (("aten.special_i1.default", Algebra.ZERO_ORIGIN, "xx*gaet"), {}, "it takes self"),
        (("aten.special_i1.default", Algebra.ZERO_ORIGIN, "self**"), {}, "no degree rule"),
        (("aten.special_erfcx.default", Algebra.ELEMENTWISE), {}, "origin=f(0)"),
        (("aten.special_i1.default", Algebra.ZERO_ORIGIN), {"origin": 1.0}, "ELEMENTWISE"),
        (("aten.native_group_norm.default", Algebra.NORMALISER, "input*weight"), {}, "frozen="),
        (("aten.no_such_thing.default", Algebra.STRUCTURAL), {}, "torch knows no operation"),
        (("special_i1", Algebra.STRUCTURAL), {}, "write its overload as torch prints it"),
        (("aten.gelu.default", Algebra.STRUCTURAL), {}, "registered already"),
        (("aten.cross.default", Algebra.MULTILINEAR), {}, "takes self, other, dim"),
        (("aten.special_softmax.default", Algebra.SMOOTH), {"vanishes": "x"}, "it takes self, dim"),
    ],
)
def test_what_is_forgotten_is_refused(arguments, options, words) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=words.replace("(", r"\(").replace(")", r"\)")):
        register(*arguments, **options)
    assert arguments[0] == "aten.gelu.default" or lookup(arguments[0]) is None


def test_the_hint_shows_the_real_arguments() -> None:
    with pytest.raises(fgt.FullgradError) as caught:
        fgt.check_completeness(lambda x: torch.special.zeta(x, x * 2), torch.rand(2, 3) + 2)
    assert "register('aten.special_zeta.default', Algebra.HOMOGENEOUS, 'self + other')" in str(
        caught.value
    )
    assert "self, other" in str(caught.value)
