"""A balanced backward is differentiated once: what would be wrong is refused, first gradients
are the same bits."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fullgrad_theory as fgt
from fullgrad_theory.errors import DerivativeError


class Weighted(nn.Module):
    def __init__(self, of: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.norm, self.of = nn.Linear(6, 6), nn.LayerNorm(6), of

    def forward(self, x: Tensor) -> Tensor:
        return self.of(self.linear(x))


def attention(u: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(u, u, u)


MODELS: dict[str, tuple[Callable[[Tensor], Tensor], str, type[fgt.FullgradError] | type]] = {
    "prune": (lambda u: u * torch.sigmoid(u), "decompx", fgt.Prune),
    "prune attention": (attention, "libra", fgt.Prune),
    "prune all but one": (lambda u: u.softmax(-1) * u, "libra", fgt.Prune),
    "scale": (lambda u: u * u, "libra", fgt.Scale),
    "secant": (torch.tanh, "libra", fgt.Secant),
    "freeze": (lambda u: nn.functional.layer_norm(u, (6,)), "libra", fgt.FreezeScale),
    "integrate": (lambda u: u.softmax(-1), "integrated", fgt.Integrate),
}
X = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))


def made(name: str) -> tuple[nn.Module, fgt.Balanced]:
    of, policy, kind = MODELS[name]
    torch.manual_seed(0)
    model = Weighted(of).eval()
    balanced = fgt.balance(model, X, policy)
    assert any(isinstance(edit, kind) for edit in balanced.plan)
    return model, balanced


@pytest.mark.parametrize("name", MODELS)
def test_a_second_derivative_is_refused(name: str) -> None:
    """By the input, by a parameter, and by whatever asks for all of them."""
    model, balanced = made(name)
    leaf = X.clone().requires_grad_()

    def contributions() -> Tensor:
        (g,) = torch.autograd.grad(balanced(leaf).square().sum(), leaf, create_graph=True)
        return (g * leaf).square().sum()

    for by in ([leaf], [model.linear.weight], [model.linear.bias], [*model.linear.parameters()]):
        with pytest.raises(DerivativeError, match=r"edits in its backward \(.*create_graph=True"):
            torch.autograd.grad(contributions(), by)
    with pytest.raises(DerivativeError):
        contributions().backward()
    with pytest.raises(DerivativeError):  # of a parameter's own gradient
        (g,) = torch.autograd.grad(
            balanced(X).square().sum(), model.linear.weight, create_graph=True
        )
        torch.autograd.grad(g.square().sum(), model.linear.weight)
    with pytest.raises(DerivativeError):
        torch.autograd.functional.hessian(lambda x: balanced(x).square().sum(), X)
    with pytest.raises(DerivativeError):
        torch.func.hessian(lambda x: balanced(x).square().sum())(X)


@pytest.mark.parametrize("name", MODELS)
def test_the_first_derivative_has_the_bits_of_the_graph(name: str) -> None:
    model, balanced = made(name)

    def gradients(run: Callable[[Tensor], Tensor], **how: Any) -> list[Tensor]:
        leaf = X.clone().requires_grad_()
        return [*torch.autograd.grad(run(leaf).sum(), [leaf, *model.linear.parameters()], **how)]

    for how in ({}, {"create_graph": True}):
        for ours, own in zip(
            gradients(balanced, **how), gradients(balanced.fx, **how), strict=True
        ):
            assert torch.equal(ours, own)


def test_what_is_linear_in_a_gradient_is_differentiated() -> None:
    """By the cotangent, and by what a gradient is weighed with: no second derivative is asked."""
    _, balanced = made("freeze")
    leaf, weights = X.clone().requires_grad_(), torch.randn(6, requires_grad=True)
    cotangent = torch.randn(3, 4, 6).requires_grad_()
    (g,) = torch.autograd.grad(balanced(leaf), leaf, cotangent, create_graph=True)
    (by_weights,) = torch.autograd.grad((g * weights).sum(), weights, retain_graph=True)
    torch.testing.assert_close(by_weights, g.sum((0, 1)))
    (pushed,) = torch.autograd.grad(g.sum(), cotangent)
    assert pushed.abs().max() > 0


def test_nothing_stays_on_what_the_user_gave() -> None:
    model, balanced = made("secant")
    leaf = X.clone().requires_grad_()
    balanced(leaf).sum().backward()
    balanced(leaf)
    assert not leaf._backward_hooks
    assert not any(p._backward_hooks for p in model.parameters())
    same = fgt.balance(lambda x: (x, torch.tanh(x)), X)
    assert not same(leaf)[0]._backward_hooks or same(leaf)[0] is not leaf


def test_a_model_without_edits_is_differentiated_as_ever() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)).eval()
    balanced = fgt.balance(model, X)
    assert not balanced.plan.edits

    def slope(run: Callable[[Tensor], Tensor]) -> Tensor:
        leaf = X.clone().requires_grad_()
        (g,) = torch.autograd.grad(run(leaf).square().sum(), leaf, create_graph=True)
        (h,) = torch.autograd.grad((g * leaf).square().sum(), model[0].weight)
        return h

    torch.testing.assert_close(slope(balanced), slope(model))


@pytest.mark.parametrize("name", MODELS)
def test_forward_mode_is_refused_by_name(name: str) -> None:
    _, balanced = made(name)
    with pytest.raises(DerivativeError, match=r"forward mode.*vjp"):
        torch.func.jvp(balanced, (X,), (X,))
    parameters = dict(balanced.named_parameters())
    with pytest.raises(DerivativeError, match="forward mode"):
        torch.func.jvp(
            lambda p: torch.func.functional_call(balanced, p, (X,)), (parameters,), (parameters,)
        )
    with torch.autograd.forward_ad.dual_level(), pytest.raises(DerivativeError):
        balanced(torch.autograd.forward_ad.make_dual(X, X))


@pytest.mark.parametrize("name", MODELS)
def test_torch_func_is_right_or_refused_by_name(name: str) -> None:
    model, balanced = made(name)
    leaf = X.clone().requires_grad_()
    (expected,) = torch.autograd.grad(balanced(leaf).sum(), leaf)
    transformed: list[Callable[[], Tensor]] = [
        lambda: torch.func.grad(lambda x: balanced(x).sum())(X),
        lambda: torch.func.vjp(balanced, X)[1](torch.ones(3, 4, 6))[0],
        lambda: torch.func.jacrev(lambda x: balanced(x).sum())(X),
        lambda: torch.vmap(torch.func.grad(lambda x: balanced(x[None]).sum()))(X),
    ]
    for run in transformed:
        try:
            found = run()
        except DerivativeError as error:
            assert "torch.func does not transform it" in str(error)
            assert name == "integrate" or "atching" in str(error)
        else:
            torch.testing.assert_close(found, expected)
    try:
        several = torch.vmap(balanced)(torch.stack([X, 2.0 * X]))
    except DerivativeError as error:
        assert "vmap" in str(error) or "atching" in str(error)
    else:
        torch.testing.assert_close(several, torch.stack([model(X), model(2.0 * X)]))


def test_the_slope_that_was_wrong() -> None:
    """Of |contributions|^2, against finite differences: a held factor is not what autograd sees."""

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(x * self.w)

    model, x = Gate().eval(), torch.randn(2, 4, dtype=torch.float64)
    w, balanced = model.w, fgt.balance(model, x, "decompx")

    def energy(graph: bool) -> Tensor:
        leaf = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(balanced(leaf).sum(), leaf, create_graph=graph)
        return (g * leaf).square().sum()

    with pytest.raises(DerivativeError):
        torch.autograd.grad(energy(True), w)
    values = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            w += step
        values.append(energy(False))
    assert abs(values[0] - values[1]) > 1e-7  # autograd's slope of it is 0


def test_a_factor_of_the_edit_is_named() -> None:
    graph = fgt.trace(lambda x: (x * x) * 2.0, X)
    plan = fgt.derive_rules(graph)
    (edit,) = plan
    assert isinstance(edit, fgt.Scale) and edit.factor == Fraction(1, 2)
    leaf = X.clone().requires_grad_()
    (g,) = torch.autograd.grad(fgt.balance(graph, policy=plan)(leaf).sum(), leaf, create_graph=True)
    with pytest.raises(DerivativeError, match=str(edit)):
        g.sum().backward()
