"""What a fused operation is and what a model spells in its place: one verdict, one gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fullgrad_theory as fgt

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

torch.manual_seed(0)
X = torch.randn(2, 6)
L = nn.Linear(6, 6).eval()
P, W = torch.randn(6), torch.rand(6) + 0.5
ZERO = torch.zeros(())
Function = Callable[[Tensor], Tensor]


def over(x: Tensor, function: Function) -> Tensor:
    """A value a row, at each place of the row."""
    return function(x).expand(2, 6)


def softmax(x: Tensor) -> Tensor:
    powers = (x - x.amax(-1, keepdim=True)).exp()
    return powers / powers.sum(-1, keepdim=True)


def softmax_of_a_detached_maximum(x: Tensor) -> Tensor:
    powers = (x - x.max(-1, keepdim=True).values.detach()).exp()
    return powers / powers.sum(-1, keepdim=True)


def whitened(x: Tensor, variance: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (variance + 1e-5).sqrt()


def heads(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x @ L.weight, x @ L.weight.T, x @ (L.weight * 2)


def attention(weights: Function) -> Function:
    def attend(x: Tensor) -> Tensor:
        query, key, value = heads(x)
        return weights(query @ key.T / math.sqrt(6)) @ value

    return attend


def attention_by_einsum(x: Tensor) -> Tensor:
    query, key, value = heads(x)
    scores = torch.einsum("ik,jk->ij", query, key) * 6**-0.5
    return torch.einsum("ij,jk->ik", scores.softmax(-1), value)


def grouped(x: Tensor) -> Tensor:
    rows = x.reshape(-1, 2, 3)
    return whitened(rows, rows.var(-1, unbiased=False, keepdim=True)).reshape(-1, 6) * W + P


def norm(x: Tensor) -> Tensor:
    return x.norm(dim=-1, keepdim=True)


FUSED: dict[str, tuple[Function, dict[str, Function]]] = {
    "hardtanh": (F.hardtanh, {
        "clamp": lambda x: x.clamp(-1, 1),
        "least and largest": lambda x: torch.minimum(torch.maximum(x, -W.sign()), W.sign()),
        "where": lambda x: torch.where(x > 1, 1.0, torch.where(x < -1, -1.0, x)),
        "two hinges": lambda x: (x + 1).relu() - (x - 1).relu() - 1,
        "two distances": lambda x: ((x + 1).abs() - (x - 1).abs()) / 2,
    }),
    "relu": (F.relu, {
        "a gate": lambda x: x * (x > 0),
        "where": lambda x: torch.where(x > 0, x, 0.0),
        "half of two": lambda x: (x + x.abs()) / 2,
        "maximum": lambda x: torch.maximum(x, ZERO),
        "by its sign": lambda x: x * (0.5 * (torch.sign(x) + 1)),
    }),
    "leaky relu": (lambda x: F.leaky_relu(x, 0.1), {
        "where": lambda x: torch.where(x > 0, x, 0.1 * x),
        "maximum": lambda x: torch.maximum(x, 0.1 * x),
        "two halves": lambda x: x.clamp(min=0) + 0.1 * x.clamp(max=0),
        "prelu": lambda x: F.prelu(x, torch.tensor([0.1])),
    }),
    "celu": (F.celu, {
        "expm1": lambda x: x.clamp(min=0) + torch.expm1(x.clamp(max=0)),
        "hinges": lambda x: F.relu(x) - F.relu(1 - torch.exp(x)),
        "where": lambda x: torch.where(x > 0, x, x.exp() - 1),
    }),
    "softplus": (F.softplus, {
        "its threshold": lambda x: torch.where(x > 20, x, torch.log1p(torch.exp(x))),
        "logaddexp": lambda x: torch.logaddexp(x, ZERO),
    }),
    "log sigmoid": (F.logsigmoid, {
        "softplus": lambda x: -F.softplus(-x),
        "a logarithm": lambda x: -torch.log(1 + torch.exp(-x)),
        "of a sigmoid": lambda x: torch.sigmoid(x).log(),
        "a difference": lambda x: x - F.softplus(x),
        "stable": lambda x: torch.minimum(x, ZERO) - torch.log1p(torch.exp(-x.abs())),
    }),
    "sinc": (torch.sinc, {
        "a quotient, and 1 at 0": lambda x: torch.where(
            x == 0, 1.0, torch.sin(math.pi * x) / (math.pi * x)),
    }),
    "tanhshrink": (F.tanhshrink, {"a difference": lambda x: x - torch.tanh(x)}),
    "softsign": (F.softsign, {
        "a quotient": lambda x: x / (1 + x.abs()),
        "a product": lambda x: x * torch.reciprocal(1 + x.abs()),
    }),
    "hardshrink": (F.hardshrink, {
        "where": lambda x: torch.where(x.abs() > 0.5, x, 0.0),
        "a gate": lambda x: x * (x.abs() > 0.5),
    }),
    "softshrink": (F.softshrink, {
        "sign": lambda x: torch.sign(x) * F.relu(x.abs() - 0.5),
        "hinges": lambda x: F.relu(x - 0.5) - F.relu(-x - 0.5),
        "less a clamp": lambda x: x - x.clamp(-0.5, 0.5),
        "where": lambda x: torch.where(x > 0.5, x - 0.5, torch.where(x < -0.5, x + 0.5, 0.0)),
    }),
    "silu": (F.silu, {
        "tanh": lambda x: x * 0.5 * (1 + torch.tanh(x / 2)),
        "reciprocal": lambda x: x * (1 + torch.exp(-x)).reciprocal(),
        "expit": lambda x: x * torch.special.expit(x),
        "an exponential": lambda x: x * (-F.softplus(-x)).exp(),
    }),
    "gelu": (F.gelu, {
        "ndtr": lambda x: x * torch.special.ndtr(x),
        "erfc": lambda x: x * 0.5 * torch.erfc(-x / math.sqrt(2)),
    }),
    "quick gelu": (lambda x: x * torch.sigmoid(1.702 * x), {
        "silu": lambda x: F.silu(1.702 * x) / 1.702,
        "a quotient": lambda x: x / (1 + torch.exp(-1.702 * x)),
    }),
    "sigmoid": (torch.sigmoid, {
        "a quotient": lambda x: torch.exp(x) / (1 + torch.exp(x)),
        "an exponential": lambda x: F.logsigmoid(x).exp(),
        "the softmax of two": lambda x: torch.stack([x, torch.zeros_like(x)]).softmax(0)[0],
        "the rest": lambda x: 1 - torch.sigmoid(-x),
    }),
    "tanh": (torch.tanh, {
        "sigmoid": lambda x: 2 * torch.sigmoid(2 * x) - 1,
        "a quotient": lambda x: (torch.exp(2 * x) - 1) / (torch.exp(2 * x) + 1),
        "hyperbolic": lambda x: torch.sinh(x) / torch.cosh(x),
        "the rest": lambda x: 1 - 2 / (torch.exp(2 * x) + 1),
    }),
    "cosh": (torch.cosh, {"a mean": lambda x: (x.exp() + (-x).exp()) / 2}),
    "sinh": (torch.sinh, {"a mean": lambda x: (x.exp() - (-x).exp()) / 2}),
    "abs": (torch.abs, {
        "maximum": lambda x: torch.maximum(x, -x),
        "sign": lambda x: x * x.sign(),
        "a root": lambda x: x.square().sqrt(),
        "where": lambda x: torch.where(x >= 0, x, -x),
    }),
    "cube": (lambda x: x**3, {
        "a product": lambda x: x * x * x,
        "a square": lambda x: x * x.square(),
    }),
    "reciprocal": (lambda x: (x.abs() + 0.1).reciprocal(), {
        "a quotient": lambda x: 1 / (x.abs() + 0.1),
        "a power": lambda x: (x.abs() + 0.1) ** -1,
        "a root": lambda x: torch.rsqrt((x.abs() + 0.1) ** 2),
    }),
    "layer norm": (lambda x: F.layer_norm(x, (6,), W, P), {
        "var": lambda x: whitened(x, x.var(-1, unbiased=False, keepdim=True)) * W + P,
        "a mean of squares": lambda x: whitened(
            x, (x - x.mean(-1, keepdim=True)).pow(2).mean(-1, keepdim=True)) * W + P,
        "two moments": lambda x: whitened(
            x, (x * x).mean(-1, keepdim=True) - x.mean(-1, keepdim=True) ** 2) * W + P,
        "native": lambda x: torch.native_layer_norm(x, (6,), W, P, 1e-5)[0],
    }),
    "rms norm": (lambda x: F.rms_norm(x, (6,), W, 1e-5), {
        "rsqrt": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * W,
        "a quotient": lambda x: x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-5) * W,
        "a norm": lambda x: x / (norm(x) ** 2 / 6 + 1e-5).sqrt() * W,
    }),
    "group norm": (lambda x: F.group_norm(x[..., None], 2, W, P)[..., 0], {"rows": grouped}),
    "batch norm": (lambda x: F.batch_norm(x, P, W, W, P), {
        "a quotient": lambda x: (x - P) / (W + 1e-5).sqrt() * W + P,
        "rsqrt": lambda x: (x - P) * torch.rsqrt(W + 1e-5) * W + P,
    }),
    "unit vectors": (lambda x: F.normalize(x, dim=-1), {
        "a norm": lambda x: x / norm(x),
        "clamped": lambda x: x / norm(x).clamp(min=1e-12),
        "rsqrt": lambda x: x * x.square().sum(-1, keepdim=True).rsqrt(),
        "a root": lambda x: x / x.square().sum(-1, keepdim=True).sqrt(),
        "maximum": lambda x: x / torch.maximum(norm(x), torch.tensor(1e-12)),
    }),
    "deviation": (lambda x: over(x, lambda x: x.std(-1, keepdim=True)), {
        "var": lambda x: over(x, lambda x: x.var(-1, keepdim=True).sqrt()),
        "squares": lambda x: over(
            x, lambda x: ((x - x.mean(-1, keepdim=True)).square().sum(-1, keepdim=True) / 5).sqrt()
        ),
    }),
    "cosine": (lambda x: over(x, lambda x: F.cosine_similarity(x, x.flip(-1) * W)[:, None]), {
        "unit vectors": lambda x: over(
            x, lambda x: (F.normalize(x) * F.normalize(x.flip(-1) * W)).sum(-1, keepdim=True)),
    }),
    "distances": (lambda x: torch.cdist(x, L.weight), {
        "a norm": lambda x: (x[:, None] - L.weight).norm(dim=-1),
        "a root": lambda x: (x[:, None] - L.weight).square().sum(-1).sqrt(),
    }),
    "softmax": (lambda x: x.softmax(-1), {
        "softmin": lambda x: F.softmin(-x, -1),
        "powers": lambda x: (e := x.exp()) / e.sum(-1, keepdim=True),
        "less the largest": softmax,
        "less the largest, detached": softmax_of_a_detached_maximum,
        "of its logarithm": lambda x: x.log_softmax(-1).exp(),
        "logsumexp": lambda x: (x - x.logsumexp(-1, keepdim=True)).exp(),
        "unit vectors": lambda x: F.normalize(x.exp(), p=1, dim=-1),
        "an inverse": lambda x: torch.einsum("ij,i->ij", e := x.exp(), 1 / e.sum(-1)),
    }),
    "log softmax": (lambda x: x.log_softmax(-1), {
        "logsumexp": lambda x: x - x.logsumexp(-1, keepdim=True),
        "a logarithm": lambda x: x.softmax(-1).log(),
        "of powers": lambda x: softmax(x).log(),
        "parts": lambda x: x - x.exp().sum(-1, keepdim=True).log(),
    }),
    "log sum exp": (lambda x: over(x, lambda x: x.logsumexp(-1, keepdim=True)), {
        "parts": lambda x: over(x, lambda x: x.exp().sum(-1, keepdim=True).log()),
        "less the largest": lambda x: over(
            x, lambda x: (x - (m := x.amax(-1, keepdim=True))).exp().sum(-1, keepdim=True).log()
            + m),
    }),
    "logaddexp": (lambda x: torch.logaddexp(x, x.flip(-1) * 2), {
        "parts": lambda x: (x.exp() + (x.flip(-1) * 2).exp()).log(),
        "logsumexp": lambda x: torch.stack([x, x.flip(-1) * 2]).logsumexp(0),
    }),
    "attention": (lambda x: F.scaled_dot_product_attention(*(h[None] for h in heads(x)))[0], {
        "softmax": attention(lambda s: s.softmax(-1)),
        "powers": attention(softmax),
        "einsum": attention_by_einsum,
    }),
    "addcmul": (lambda x: torch.addcmul(x, x, x.flip(-1)), {"parts": lambda x: x + x * x.flip(-1)}),
    "addcdiv": (lambda x: torch.addcdiv(x, x, L(x)), {"parts": lambda x: x + x / L(x)}),
    "addmm": (lambda x: torch.addmm(x, x @ L.weight[:, :2], L(x), alpha=0.5), {
        "parts": lambda x: x + 0.5 * (x @ L.weight[:, :2]) @ L(x),
    }),
    "a layer whose weights move": (lambda x: F.linear(x, x.T @ L(x), P), {
        "parts": lambda x: x @ (x.T @ L(x)).T + P,
    }),
    "lerp": (lambda x: torch.lerp(x, x.flip(-1), 0.3), {
        "parts": lambda x: x + 0.3 * (x.flip(-1) - x),
    }),
    "lerp by a weight that moves": (lambda x: torch.lerp(W, P, x), {
        "parts": lambda x: W + x * (P - W),
    }),
    "mean": (lambda x: over(x, lambda x: x.mean(-1, keepdim=True)), {
        "sum": lambda x: over(x, lambda x: x.sum(-1, keepdim=True) / 6),
        "pooling": lambda x: over(x, lambda x: F.adaptive_avg_pool1d(x[None], 1)[0]),
        "a product": lambda x: over(x, lambda x: x @ torch.full((6, 1), 1 / 6)),
    }),
    "largest": (lambda x: over(x, lambda x: x.amax(-1, keepdim=True)), {
        "max": lambda x: over(x, lambda x: x.max(-1, keepdim=True)[0]),
        "pooling": lambda x: over(x, lambda x: F.max_pool1d(x[None], 6)[0]),
        "sort": lambda x: over(x, lambda x: x.sort(-1)[0][..., -1:]),
        "topk": lambda x: over(x, lambda x: x.topk(1)[0]),
        "gather": lambda x: over(x, lambda x: x.gather(-1, x.argmax(-1, keepdim=True))),
    }),
    "linear": (L, {
        "matmul": lambda x: x @ L.weight.T + L.bias,
        "addmm": lambda x: torch.addmm(L.bias, x, L.weight.T),
        "einsum": lambda x: torch.einsum("bi,oi->bo", x, L.weight) + L.bias,
        "a sum": lambda x: (x[:, None] * L.weight).sum(-1) + L.bias,
        "a convolution": lambda x: F.conv1d(x[..., None], L.weight[..., None], L.bias)[..., 0],
    }),
    "glu": (lambda x: F.glu(torch.cat([L(x), x], -1), -1), {
        "a gate": lambda x: L(x) * torch.sigmoid(x),
    }),
    "a gated silu": (lambda x: F.silu(x) * L(x), {
        "a sigmoid": lambda x: x * torch.sigmoid(x) * L(x),
    }),
}  # fmt: skip
CASES = [(name, spelling) for name, (_, others) in FUSED.items() for spelling in others]


def seen(function: Function, policy: str) -> tuple[Any, ...]:
    """Both verdicts, and the gradient under the policy."""

    def model(x: Tensor) -> Tensor:
        return L(function(L(x)))  # type: ignore[no-any-return]

    plain = fgt.check_completeness(model, X, beside=())
    edited = fgt.check_completeness(model, X, policy=policy, beside=())
    x = X.double().requires_grad_()
    y = fgt.balance(model, X, policy)(x.float())
    (gradient,) = torch.autograd.grad(y, x, torch.cos(torch.arange(12.0)).reshape(2, 6))
    return plain.complete, edited.complete, gradient


@pytest.mark.parametrize("policy", ["libra", "integrated"])
@pytest.mark.parametrize(("name", "spelling"), CASES)
def test_a_spelling_has_the_verdict_and_the_gradient_of_the_fused(
    name: str, spelling: str, policy: str
) -> None:
    fused, others = FUSED[name]
    wanted, got = seen(fused, policy), seen(others[spelling], policy)
    assert got[:2] == wanted[:2]
    torch.testing.assert_close(got[2], wanted[2], rtol=1e-4, atol=1e-5)
