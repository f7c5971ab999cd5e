"""Integrated Jacobians against averages of dense ones, closed forms, and what must be refused."""

from __future__ import annotations

import pickle
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from planted import GATES
from small_models import small
from torch import Tensor, nn

import fullgrad_theory as fgt
from fullgrad_theory.edits.integrating import integrate
from fullgrad_theory.errors import (
    InputError,
    NonConvergenceWarning,
    NonFiniteError,
    NoPlanError,
    PlanError,
    UnknownNameError,
)
from fullgrad_theory.plan.labelling import degrees
from fullgrad_theory.plan.plan import fingerprint

aten = torch.ops.aten
CONVERGED = pytest.mark.filterwarnings("error::fullgrad_theory.errors.NonConvergenceWarning")


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# --------------------------------------------------------------------------- the definition


def averaged(function: Callable[..., Tensor], *operands: Tensor) -> list[Tensor]:
    """(J(0) + 4 J(1/2n) + 2 J(1/n) + ... + J(1)) / 6n: Simpson's rule, 201 dense Jacobians."""
    n = 100
    total: list[Tensor] = []
    for k in range(2 * n + 1):
        weight = (1 if k in (0, 2 * n) else 4 if k % 2 else 2) / (6 * n)
        at = tuple(u * (k / (2 * n)) for u in operands)
        found = torch.autograd.functional.jacobian(function, at)
        total = (
            [a + weight * f for a, f in zip(total, found, strict=True)]
            if total
            else [weight * f for f in found]
        )
    return total


def dense(op: str, function: Callable[..., Tensor], *operands: Tensor) -> list[Tensor]:
    """The library's Jacobian of `function`, which calls `op` by way of the edit."""
    graph = fgt.trace(function, operands)
    (node,) = (n for n in graph.nodes if str(graph.nodes[n].target) == op)
    plan = replace(PLAN, edits=(fgt.Integrate(node),), fingerprint=fingerprint(graph))
    model = fgt.balance(graph, policy=plan)
    return list(torch.autograd.functional.jacobian(lambda *u: model(*u), operands))


PLAN = fgt.derive_rules(lambda x: x * 2, torch.ones(2))
Q, K, V = normal(1, 3, 4), normal(1, 5, 4, seed=1), normal(1, 5, 2, seed=2)
X = normal(2, 4)
DEFINED: dict[str, tuple[str, Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "softmax": ("aten.softmax.int", lambda x: x.softmax(-1), (X,)),
    "log softmax": ("aten.log_softmax.int", lambda x: x.log_softmax(-1), (X,)),
    "logsumexp": ("aten.logsumexp.default", lambda x: x.logsumexp(-1), (X,)),
    "logaddexp": ("aten.logaddexp.default", torch.logaddexp, (X, normal(2, 4, seed=1))),
    "products": ("aten.cumprod.default", lambda x: x.cumprod(-1), (X,)),
    "power": ("aten.pow.Scalar", lambda x: 2.0**x, (X,)),
    "attention": (
        "aten.scaled_dot_product_attention.default",
        F.scaled_dot_product_attention,
        (Q, K, V),
    ),
}


@CONVERGED
@pytest.mark.parametrize("name", DEFINED)
def test_is_the_average_of_dense_jacobians(name: str) -> None:
    op, function, operands = DEFINED[name]
    ours = dense(op, function, *operands)
    for a, b in zip(ours, averaged(function, *operands), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    dims = [u.dim() for u in operands]
    value, start = function(*operands), function(*(u * 0 for u in operands))
    carried = sum(torch.tensordot(j, u, d) for j, u, d in zip(ours, operands, dims, strict=True))
    torch.testing.assert_close(carried, value - start, rtol=1e-12, atol=1e-12)


def gradient(op: str, along: tuple[str, ...], u: Tensor, *rest: object) -> Tensor:
    leaf = u.clone().requires_grad_()
    out = integrate(op, along, "here", leaf, *rest)
    (found,) = torch.autograd.grad(out.sum(), leaf)
    return found


@CONVERGED
@pytest.mark.parametrize("op", ["gelu", "silu", "tanh", "sigmoid", "exp", "softplus", "erf"])
def test_the_secant_is_its_closed_form(op: str) -> None:
    u = torch.tensor([-8.0, -1.5, -0.1, 0.0, 0.3, 2.0, 9.0], dtype=torch.float64)
    name = f"aten.{op}.default"
    wanted = GATES[name](u)
    torch.testing.assert_close(gradient(name, ("self",), u), wanted, rtol=1e-10, atol=1e-12)


@CONVERGED
def test_the_scale_is_its_closed_form() -> None:
    """J/2 for a product of two, J/d for a function of degree d."""
    a, b = X.clone().requires_grad_(), normal(2, 4, seed=1).requires_grad_()
    out = integrate("aten.mul.Tensor", ("self", "other"), "here", a, b)
    for found, other in zip(torch.autograd.grad(out.sum(), (a, b)), (b, a), strict=True):
        torch.testing.assert_close(found, other / 2, rtol=1e-13, atol=1e-13)
    u = X.abs() + 0.1
    for degree in (1.0, 2.0, 3.0, 5.0):
        found = gradient("aten.pow.Tensor_Scalar", ("self",), u, degree)
        torch.testing.assert_close(found, u ** (degree - 1), rtol=1e-12, atol=1e-12)


@CONVERGED
def test_a_peaked_softmax_and_a_kink_converge() -> None:
    u = 30 * normal(2, 6)
    leaf = u.clone().requires_grad_()
    out = integrate("aten.softmax.int", ("self",), "here", leaf, -1)
    for cotangent in (normal(2, 6, seed=3), normal(2, 6, seed=4)):
        (g,) = torch.autograd.grad(out, leaf, cotangent, retain_graph=True)
        rise = ((u.softmax(-1) - 1 / 6) * cotangent).sum()
        torch.testing.assert_close((g * u).sum(), rise, rtol=1e-10, atol=1e-11)
    q, k, v = (30 * normal(1, 4, 8, seed=s) for s in range(3))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = integrate(
        "aten.scaled_dot_product_attention.default", ("query", "key", "value"), "here", *leaves
    )
    grads = torch.autograd.grad(out, leaves, normal(1, 4, 8, seed=5))
    carried = sum((g * t).sum() for g, t in zip(grads, leaves, strict=True))
    torch.testing.assert_close(carried, (out * normal(1, 4, 8, seed=5)).sum(), rtol=1e-9, atol=0)
    bent = torch.tensor([-0.5, 2.0, 4.0], dtype=torch.float64)
    found = gradient("aten.softshrink.default", ("self",), bent, 1.0)
    torch.testing.assert_close(found, F.softshrink(bent, 1.0) / bent, rtol=0, atol=1e-9)


@CONVERGED
def test_other_dtypes() -> None:
    """float32 to 1e-6, and bfloat16 to its own precision: the quadrature is in float32."""
    u = 3 * X
    wanted = gradient("aten.logsumexp.default", ("self",), u, [-1])
    for dtype, atol in ((torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)):
        found = gradient("aten.logsumexp.default", ("self",), u.to(dtype), [-1])
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), wanted, rtol=1e-2, atol=atol)


@CONVERGED
def test_second_derivatives() -> None:
    """The gradient's own gradient, against central differences along a direction."""
    weights, direction = normal(1, 4, seed=7), normal(1, 4, seed=9)

    def first(u: Tensor, again: bool = False) -> Tensor:
        out = integrate("aten.logsumexp.default", ("self",), "here", u, [-1])
        (g,) = torch.autograd.grad(out.sum(), u, create_graph=again)
        return (g * weights).sum()

    u = X[:1].clone().requires_grad_()
    (second,) = torch.autograd.grad(first(u, again=True), u)
    step = 1e-4
    ends = [first((X[:1] + s * direction).requires_grad_()) for s in (step, -step)]
    difference = (ends[0] - ends[1]) / (2 * step)
    torch.testing.assert_close((second * direction).sum(), difference, rtol=1e-6, atol=1e-8)


@CONVERGED
def test_a_mask_restricts_and_is_not_scaled() -> None:
    """-inf among the scores: the ray starts at the mean over what is not masked."""
    scores = X.clone()
    scores[:, 2] = -torch.inf
    leaf = scores.clone().requires_grad_()
    out = integrate("aten.softmax.int", ("self",), "here", leaf, -1)
    cotangent = normal(2, 4, seed=8)
    (g,) = torch.autograd.grad(out, leaf, cotangent)
    kept = [0, 1, 3]
    rise = (cotangent * scores.softmax(-1)).sum() - (cotangent[:, kept] / 3).sum()
    torch.testing.assert_close((g[:, kept] * scores[:, kept]).sum(), rise, rtol=1e-11, atol=1e-12)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    weights = normal(8, 24, seed=4)

    def causal(x: Tensor) -> Tensor:
        q, k, v = F.linear(x, weights.mT).chunk(3, -1)
        scores = (q @ k.mT).masked_fill(~mask, -torch.inf)
        return scores.softmax(-1) @ v

    report = fgt.check_completeness(causal, normal(2, 5, 8), policy="integrated")
    assert report.complete, report.problems


# --------------------------------------------------------------------------- honesty


@pytest.mark.slow
def test_what_does_not_converge_says_so() -> None:
    """Many kinks on one ray: a warning, and a verdict that is not complete."""
    torch.manual_seed(0)
    inner = nn.Sequential(
        nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)
    )
    model, x = nn.Sequential(inner, nn.Linear(3, 2)).double().eval(), torch.randn(2, 3).double()
    plan = fgt.integrate(model, x, "0")
    report = fgt.check_completeness(model, x, policy=plan)
    assert report.complete is False
    assert "did not converge" in " ".join(report.problems)
    assert fgt.Verdict.UNKNOWN in {n.verdict for n in report.nodes}
    with pytest.warns(NonConvergenceWarning, match="did not converge"):
        fgt.balance(model, x, plan)(x.requires_grad_()).sum().backward()


def test_a_singular_ray_is_refused() -> None:
    """By the tables before, and by the backward where an operation is called there all the same."""
    for function in (torch.log, torch.logit, lambda x: torch.atan2(x, x.flip(-1) + 1)):
        with pytest.raises(NoPlanError):
            fgt.derive_rules(function, torch.rand(2, 3))
    graph = fgt.trace(torch.log, torch.rand(2, 3))
    with pytest.raises(PlanError, match="does not take the edit 'integrate'"):
        degrees(graph, (fgt.Integrate("log"),))
    leaf = torch.tensor([2.0], dtype=torch.float64).requires_grad_()
    out = integrate("aten.log.default", ("self",), "the log", leaf)
    with pytest.raises(NonFiniteError, match="the log"):
        torch.autograd.grad(out.sum(), leaf)


def test_an_origin_that_depends_on_the_input_is_refused() -> None:
    """logaddexp(x, frozen): at x = 0 it is not a constant, and nobody would attribute that."""
    graph = fgt.trace(lambda x: torch.logaddexp(x, x.detach()), X)
    found = degrees(graph, (fgt.Integrate("logaddexp"),)).findings
    assert found["logaddexp"].opaque
    graph = fgt.trace(lambda x: torch.logaddexp(x, x * x), X)
    reason = degrees(graph, (fgt.Integrate("logaddexp"),)).findings
    assert any("not alike" in f.reason for f in reason.values())
    with pytest.raises(NoPlanError):
        fgt.derive_rules(lambda x: torch.logaddexp(x, x.detach()), X)


def test_attention_may_hold_what_is_frozen() -> None:
    """With values at 0 attention is 0, whatever query and key are."""
    x = normal(2, 5, 4)

    def keys_alone(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x.detach() + 1, 2 * x, x)

    def no_values(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, 2 * x, x.detach())

    report = fgt.check_completeness(keys_alone, x, policy="integrated")
    assert report.complete and [str(e) for e in report.plan] == [  # type: ignore[union-attr]
        "integrate scaled_dot_product_attention"
    ]
    graph = fgt.trace(no_values, x)
    assert degrees(graph, (fgt.Integrate("scaled_dot_product_attention"),)).findings
    with pytest.raises(NoPlanError):
        fgt.derive_rules(no_values, x, "integrated")


def test_constant_values_make_a_bias_leaf() -> None:
    """Query and key live, the values a constant: f(0), their mean, is a bias leaf."""
    values = normal(2, 5, 3, seed=3)

    def constant(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, 2 * x, values)

    balanced = fgt.balance(constant, normal(2, 5, 4), "integrated")
    parts = fgt.fullgrad(balanced, normal(2, 5, 4), (1, 2))
    assert parts.error.max() < 1e-11
    torch.testing.assert_close(parts.biases["f(0)"].sum((1, 2)), values.mean(1)[:, 2])


# --------------------------------------------------------------------------- recurrences and models

RECURRENT: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: nn.LSTM(3, 4, 2, bidirectional=True, batch_first=True),
    "projected lstm": lambda: nn.LSTM(3, 4, proj_size=2),
    "gru": lambda: nn.GRU(3, 4, 2, bidirectional=True),
}


class Last(nn.Module):
    """All results of a recurrence read at once."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        out, state = self.cell(x)
        states = state if isinstance(state, tuple) else (state,)
        return out.sum() + sum(s.square().sum().sqrt() for s in states)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECURRENT)
def test_recurrences_are_complete(name: str) -> None:
    torch.manual_seed(0)
    model, x = RECURRENT[name]().eval(), torch.randn(2, 2, 3)
    plan = fgt.derive_rules(model, x)
    assert {type(e) for e in plan} == {fgt.Prune, fgt.Secant}  # gates held, gate by gate
    report = fgt.check_completeness(model, x, policy=plan)
    assert report.complete and report.error < 1e-10, report.problems  # type: ignore[operator]
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        given = x.to(dtype)
        balanced = fgt.balance(model.to(dtype), given, plan)
        for requires_grad in (False, True):
            ours = balanced(given.clone().requires_grad_(requires_grad))[0]
            assert torch.equal(ours, model(given.clone().requires_grad_(requires_grad))[0])


def test_a_recurrence_has_the_bias_leaves_of_its_steps() -> None:
    torch.manual_seed(0)
    model = Last(nn.LSTM(3, 4)).eval().double()
    x = normal(5, 2, 3)
    parts = fgt.fullgrad(fgt.balance(model, x), x)
    assert {k.split(" @ ")[0] for k in parts.biases} >= {"cell.bias_ih_l0", "cell.bias_hh_l0"}
    assert parts.error < 1e-10
    assert fgt.check_completeness(model, x, policy="libra").complete


@pytest.mark.slow
def test_a_vit_under_integrated(tmp_path: Path) -> None:
    model, x = small("vit")
    plan = fgt.derive_rules(model, x, "integrated")
    assert Counter(type(e).__name__ for e in plan) == {
        "FreezeScale": 5,
        "Integrate": 2,
        "Secant": 2,
    }
    report = fgt.check_completeness(model, x, policy=plan)
    assert report.complete and report.error < 1e-10, report.problems  # type: ignore[operator]
    judged = {n.op: n.verdict for n in report.nodes}
    assert judged["aten.scaled_dot_product_attention.default"] is fgt.Verdict.NUMERIC
    balanced = fgt.balance(model, x, plan)
    assert torch.equal(balanced(x), model(x))
    again = pickle.loads(pickle.dumps(balanced))
    with warnings.catch_warnings():
        warnings.simplefilter("error", NonConvergenceWarning)
        grads = []
        for module in (balanced, again):
            leaf = x.clone().requires_grad_()
            grads.append(torch.autograd.grad(module(leaf)[0, 3], leaf)[0])
    assert torch.equal(*grads)
    plan.save(tmp_path / "plan.json")
    assert fgt.Plan.load(tmp_path / "plan.json") == plan


# --------------------------------------------------------------------------- sub-layers


class Block(nn.Module):
    """A residual MLP without a closed form of its own, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Softmax(-1))
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([x, self.mlp(x)], -1))


def test_a_sub_layer_is_one_function(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Block().eval().double(), normal(2, 4)
    plan = fgt.integrate(model, x, "mlp")
    (edit,) = plan.edits
    assert isinstance(edit, fgt.Integrate) and len(edit.region) == 4
    plan.save(tmp_path / "plan.json")
    assert fgt.Plan.load(tmp_path / "plan.json") == plan
    assert fgt.check_completeness(model, x, policy=plan).complete
    balanced = fgt.balance(model, x, plan)
    assert torch.equal(balanced(x), model(x))
    found = torch.autograd.functional.jacobian(lambda u: balanced(u), x)
    inner = averaged(model.mlp, x)[0]
    wanted = torch.einsum("oi,biax->boax", model.head.weight[:, 4:], inner).detach()
    eye = torch.eye(2, dtype=torch.float64)
    wanted = wanted + torch.einsum("oi,bc->boci", model.head.weight[:, :4], eye).detach()
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-9)
    parts = fgt.fullgrad(balanced, x, 1)
    assert parts.error.max() < 1e-11 and "f(0)" in parts.biases
    report = fgt.check_completeness(balanced, x)
    assert report.complete and pickle.loads(pickle.dumps(balanced))(x).equal(model(x))


@pytest.mark.slow
def test_a_sub_layer_of_a_vit() -> None:
    model, x = small("vit")
    plan = fgt.integrate(model, x, "blocks.1.mlp")
    assert Counter(type(e).__name__ for e in plan) == {
        "FreezeScale": 5, "Prune": 4, "Secant": 1, "Integrate": 1
    }  # fmt: skip
    report = fgt.check_completeness(model, x, policy=plan)
    assert report.complete, report.problems


class Odd(nn.Module):
    """Two values leave; something is rounded on the way; the region is dead under a policy."""

    def __init__(self) -> None:
        super().__init__()
        self.two, self.step = Two(), Step()

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.two(x)
        return a + b + self.step(x)


class Two(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.tanh(), x.sin()


class Step(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.round()


def test_what_is_no_function_of_its_own_is_refused() -> None:
    model, x = Odd().eval(), normal(2, 4)
    with pytest.raises(InputError, match="left at"):
        fgt.integrate(model, x, "two")
    with pytest.raises(InputError, match="carries no gradient"):
        fgt.integrate(model, x, "step")
    with pytest.raises(UnknownNameError, match="did you mean step"):
        fgt.integrate(model, x, "stp")
    with pytest.raises(PlanError, match="not of this graph"):
        degrees(fgt.trace(model, x), (fgt.Integrate("sin", ("nothing",)),))
    with pytest.raises(NoPlanError, match="no gradient passes"):
        fgt.integrate(Block().eval().double(), x, "mlp", "plain")
