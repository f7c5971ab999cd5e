"""Plans written into models: the forward bit for bit, the backward edited, the model untouched."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from small_models import SMALL, small
from torch import nn

import fullgrad_theory as fgt
from fullgrad_theory.backward.balanced import rewrite
from fullgrad_theory.errors import DerivativeError, InputError, PlanError


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SMALL)
def test_forward_is_bitwise_equal(name: str, dtype: torch.dtype) -> None:
    model, x = small(name)
    model, x = model.to(dtype), x.to(dtype)
    balanced = fgt.balance(model, x)
    for batch in (x, x[:1], torch.cat([x, x, x])):
        with torch.no_grad():
            assert torch.equal(balanced(batch), model(batch))
        grown = batch.clone().requires_grad_()
        assert torch.equal(balanced(grown), model(grown))


@pytest.mark.parametrize("name", SMALL)
def test_forward_is_bitwise_equal_under_autocast(name: str) -> None:
    model, x = small(name)
    balanced = fgt.balance(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        grown = x.clone().requires_grad_()
        ours, theirs = balanced(grown), model(grown)
        assert torch.equal(ours, theirs)
    (g,) = torch.autograd.grad(ours.float().sum(), grown)
    assert torch.isfinite(g).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_plain_autograd_confirms_completeness(name: str) -> None:
    """Shares no code with the checker: with every additive parameter zeroed <x, grad> is the
    output; with them, adding <b, grad_b> of every additive parameter is."""
    model, x = small(name)
    model, x = model.double(), x.double()

    def additive(model: nn.Module) -> list[nn.Parameter]:
        multiplied = ("gamma", "norm.weight", "relative_position_bias_table")
        return [
            p
            for n, p in model.named_parameters()
            if (p.dim() == 1 and not n.endswith("weight") and "gamma" not in n)
            or (n in ("cls_token", "pos_embed") and not any(m in n for m in multiplied))
        ]

    weights = torch.randn(2, 7, dtype=torch.float64)

    def parts(model: nn.Module, balanced: nn.Module) -> tuple[float, float, float]:
        leaf = x.clone().requires_grad_()
        logit = (balanced(leaf) * weights).sum()
        biases = additive(model)
        g, *gs = torch.autograd.grad(logit, [leaf, *biases], allow_unused=True)
        return (
            float(logit.detach()),
            float((g * leaf).sum()),
            sum(float((a * b).sum()) for a, b in zip(gs, biases, strict=True) if a is not None),
        )

    balanced = fgt.balance(model, x)
    logit, through_input, through_biases = parts(model, balanced)
    assert abs(through_biases) > 1e-3 * abs(logit)
    assert through_input + through_biases == pytest.approx(logit, rel=1e-9)
    plain_logit, plain_input, plain_biases = parts(model, model)
    assert abs(plain_input + plain_biases - plain_logit) > 1e-2 * abs(plain_logit)
    bare = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in additive(bare):
            parameter.zero_()
    logit, through_input, _ = parts(bare, fgt.balance(bare, x))
    assert through_input == pytest.approx(logit, rel=1e-9)


@pytest.mark.slow
def test_the_users_model_is_untouched() -> None:
    model, x = small("vit")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    identities = {n: id(p) for n, p in model.named_parameters()}
    flags = {
        n: (m.training, len(m._forward_hooks), len(m._backward_hooks))
        for n, m in model.named_modules()
    }
    grown = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(model(grown).sum(), grown)
    balanced = fgt.balance(model, x)
    balanced(grown).sum().backward()
    fgt.check_completeness(model, x, policy="libra")
    fgt.fullgrad(balanced, x, target=1)
    model.zero_grad()
    again = x.clone().requires_grad_()
    (h,) = torch.autograd.grad(model(again).sum(), again)
    assert torch.equal(g, h)
    assert {n: id(p) for n, p in model.named_parameters()} == identities
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert flags == {
        n: (m.training, len(m._forward_hooks), len(m._backward_hooks))
        for n, m in model.named_modules()
    }
    shared = {id(p) for p in balanced.parameters()}
    assert shared <= set(identities.values())


@pytest.mark.slow
def test_compiles_without_a_graph_break() -> None:
    model, x = small("vit")
    balanced = fgt.balance(model, x)
    compiled = torch.compile(balanced, fullgraph=True, backend="aot_eager")
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    (g,) = torch.autograd.grad(balanced(a)[:, 0].sum(), a)
    (h,) = torch.autograd.grad(compiled(b)[:, 0].sum(), b)
    torch.testing.assert_close(g, h, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_pickles_and_copies() -> None:
    model, x = small("eva")
    balanced = fgt.balance(model, x)
    for other in (copy.deepcopy(balanced), pickle.loads(pickle.dumps(balanced))):
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        assert torch.equal(other(a), balanced(b))
        (g,) = torch.autograd.grad(other(a)[:, 0].sum(), a)
        (h,) = torch.autograd.grad(balanced(b)[:, 0].sum(), b)
        torch.testing.assert_close(g, h)
        with pytest.raises(InputError, match="balance"):
            fgt.fullgrad(other, x)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))])
def test_a_copy_is_judged_by_the_backward_that_it_has(again: Callable[[Any], Any]) -> None:
    """It has no graph of its own: what its rules are the trace does not say, its gradient does."""
    model, x = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3)).eval(), torch.randn(2, 4)
    assert fgt.check_completeness(again(fgt.balance(model, x)), x, beside=()).complete is True
    without = fgt.balance(model, x, replace(fgt.derive_rules(model, x), edits=(), reasons={}))
    assert fgt.check_completeness(again(without), x, beside=()).complete is False


def test_second_derivatives_are_refused() -> None:
    model, x = small("vit")
    balanced = fgt.balance(model.double(), x.double())
    leaf = x.double().requires_grad_()
    (g,) = torch.autograd.grad(balanced(leaf)[:, 0].sum(), leaf, create_graph=True)
    with pytest.raises(DerivativeError, match="edits in its backward"):
        torch.autograd.grad((g * leaf).sum(), leaf)


def test_pruned_branches_leave_the_backward() -> None:
    def gated(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(x @ w)

    x, w = torch.randn(2, 4), torch.randn(4, 4)
    graph = fgt.trace(lambda x: gated(x, w), x)
    plan = fgt.derive_rules(graph)
    assert [type(e).__name__ for e in plan] == ["Prune"]
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(fgt.balance(graph)(leaf).sum(), leaf)
    torch.testing.assert_close(g, torch.sigmoid(x @ w))


def test_edges_of_list_arguments_and_scaled_edges() -> None:
    graph = fgt.trace(lambda x: torch.cat([x, x * x]), torch.randn(2, 3))
    edits = (fgt.Prune("cat", "tensors[1]"), fgt.Scale("cat", Fraction(1, 4), "tensors[0]"))
    leaf = torch.randn(2, 3, requires_grad=True)
    (g,) = torch.autograd.grad(rewrite(graph, edits)(leaf).sum(), leaf)
    torch.testing.assert_close(g, torch.full((2, 3), 0.25))


def test_a_plan_that_does_not_fit_is_refused() -> None:
    graph = fgt.trace(torch.relu, torch.randn(2, 3))
    with pytest.raises(PlanError, match="nowhere"):
        rewrite(graph, (fgt.Secant("nowhere"),))
    with pytest.raises(PlanError, match="no edge"):
        rewrite(graph, (fgt.Prune("relu", "other"),))


def test_a_shape_the_model_was_not_traced_for_is_refused() -> None:
    model, x = small("vit")
    with pytest.raises(InputError, match="64, 64"):
        fgt.balance(model, x)(torch.randn(2, 3, 32, 32))
