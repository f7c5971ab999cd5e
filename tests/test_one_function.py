"""One function, one verdict: what a value is decides, and not how a model spells it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fullgrad_theory as fgt
from fullgrad_theory.check.report import Verdict

torch.manual_seed(0)
X = torch.randn(2, 5)
C = torch.tensor([0.1, 0.2, 0.3, -0.4, 0.5])
P = nn.Parameter(torch.tensor([0.7, -0.2, 0.1, 0.4, -0.9]))
W, V = nn.Linear(5, 5), nn.Linear(5, 5)
Function = Callable[..., Tensor]


class Powers(nn.Module):
    """Generalised mean pooling, its exponent a parameter."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor([p]))

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(min=1e-6).pow(self.p).mean(-1, keepdim=True).pow(1.0 / self.p)


def set_to(value: float) -> Function:
    def model(x: Tensor) -> Tensor:
        y = x * 1
        y[x > 0] = value
        return y

    return model


COMPLETE: dict[str, Function] = {
    "relu6": F.relu6,
    "relu6 as a clamp": lambda x: x.clamp(0, 6),
    "relu6 as a module": nn.ReLU6().eval(),
    "hardsigmoid": F.hardsigmoid,
    "hardsigmoid as a clamp": lambda x: torch.clamp(x + 3, 0, 6) / 6,
    "a clamp spelled": lambda x: torch.where(x > 1, 1.0, x),
    "a clamp on both sides": lambda x: torch.where(x > 1, 1.0, torch.where(x < -1, -1.0, x)),
    "a clamp at each place's own": lambda x: torch.where(x > C, C, x),
    "a clamp at a parameter": lambda x: torch.where(x > P, x, P),
    "a hinge": lambda x: torch.where(2 * x + 1 > 0, 2 * x + 1, 0.0),
    "leaky relu spelled": lambda x: torch.where(W(x) > 0, h := W(x), 0.1 * h) * 0 + W(x),
    "relu by zeros": lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
    "relu by a zero tensor": lambda x: torch.where(x > 0, x, torch.tensor(0.0)),
    "relu in place": set_to(0.0),
    "a constant condition": lambda x: x.masked_fill(C > 0, 3.0),
    "a threshold without a jump": lambda x: F.threshold(x, 1.0, 1.0),
    "a gate of zeros and ones": lambda x: W(x) * (x > 0),
    "the mean of the positive": lambda x: x[x > 0].mean(),
    "no NaN": lambda x: torch.where(x.isnan(), 0.0, x),
    "no NaN and nothing infinite": lambda x: torch.nan_to_num(x, 0.0, 1e4, -1e4),
    "nothing infinite": lambda x: torch.where(x == math.inf, 1e4, x),
    "a clamp that keeps NaN": lambda x: torch.where((x >= -1) | x.isnan(), x, -1.0),
    "one place, where nothing changes": lambda x: torch.where(x == 0.25, 0.25, x),
    "nothing and a value": lambda x: x * 0 + W(x),
    "a tensor for an exponent": lambda x: x.abs().pow(torch.tensor(2.0)).sum(-1) ** 0.5,
    "a learned mean": Powers(3.0).eval(),
    "x log c": lambda x: torch.xlogy(x, torch.tensor(3.0)),
    "x log c, a number": lambda x: torch.special.xlogy(x, 3.0),
    "x log of what is held": lambda x: torch.xlogy(x, (x * x + 1).detach()),
    "x log of degree 0": lambda x: torch.special.xlogy(x, 2 + x / x.abs().sum()),
    "x log1p of degree 0": lambda x: torch.special.xlog1py(x, x.abs() / x.norm()),
    "an angle for a weight": lambda x: torch.atan2(x, x.flip(-1)) * x,
    "a root of a determinant": lambda x: torch.linalg.det(
        x.reshape(1, 2, 5)[..., :2] + W(x)[..., :2]
    ).abs()
    ** 0.5,
    "a root of a product": lambda x: x.abs().prod(-1) ** 0.2,
    "a bias in a divisor": lambda x: x * x.flip(-1) / (x + P),
    "a number for a weight": lambda x: W(x) * x.mean().item(),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPLETE)
def test_is_complete(name: str) -> None:
    report = fgt.check_completeness(COMPLETE[name], X, beside=())
    assert report.complete is True, str(report)


def both(x: Tensor) -> Tensor:
    return torch.stack([x, x + 5])


OPAQUE: dict[str, Function] = {
    "a number read off a value": lambda x: x + 5 * x.abs().max().item(),
    "a count": lambda x: x + (x > 0).nonzero().shape[0],
    "one over a count": lambda x: x + 1 / (x > 0).nonzero().shape[0],
    "the length of a selection": lambda x: x + x[x > 0].shape[0],
    "ones, as many as are positive": lambda x: x + torch.ones_like(x[x > 0]).sum(),
    "full": lambda x: x + torch.full((5,), x.mean().item()),
    "full like": lambda x: x + torch.full_like(x, x.mean().item()),
    "new full": lambda x: x + x.new_full((5,), x.mean().item()),
    "filled": lambda x: x + torch.ones(5).fill_(x.mean().item()),
    "a tensor of a number": lambda x: x + torch.tensor(x.mean().item()),
    "a range": lambda x: x + torch.arange(x.abs().max().item() + 3)[:5].sum(),
    "a bound": lambda x: x.clamp(max=x.mean().item()),
    "a factor of a constant": lambda x: torch.add(x, torch.ones(5), alpha=x.mean().item()),
    "a factor of a product": lambda x: torch.addcmul(
        x, torch.ones(5), torch.ones(5), value=x.mean().item()
    ),
    "a constant on the way": lambda x: torch.lerp(torch.ones(2, 5), x, x.mean().item()),
    "a step beside a value": lambda x: x + 5 * (x > 0),
    "a step by where": lambda x: torch.where(x > 0, x + 5, x),
    "a step by a sum": lambda x: torch.where(x.sum() > 0, x + 5, x),
    "a step of numbers": lambda x: x + torch.where(x > 0, 5.0, 0.0),
    "a step to a constant": lambda x: torch.where(x > 1, 2.0, x),
    "a small step to a parameter": lambda x: torch.where(x > P, P + 1e-3, x),
    "one place": lambda x: torch.where(x == 0, 2.0, x),
    "a step of a millionth, far out": lambda x: torch.where(x > 10, x + 1e-6, x) + x.relu() + 20,
    "a steep step": lambda x: torch.where(x > 0.1, 1e3 * x + 1e-5, 1e3 * x),
    "one place off zero": lambda x: torch.where(x - 0.3 == 0, 2.0, x),
    "one place that is hard to hit": lambda x: torch.where(0.1 * x - 0.7 == 0, 2.0, x),
    "one place, by not": lambda x: torch.where((x - 0.3).logical_not(), 2.0, x),
    "steps behind a condition": lambda x: torch.where(x > 0, x + x.floor(), x),
    "the rest of a number": torch.frac,
    "two layers": lambda x: torch.where(x > 0, W(x), V(x)),
    "filled where it is positive": lambda x: x.masked_fill(x > 0, 3.0),
    "written where it is positive": set_to(3.0),
    "scattered": lambda x: x.scatter(1, x.argmax(1, keepdim=True), 5.0),
    "a threshold": lambda x: F.threshold(x, 1.0, 0.5),
    "a remainder": lambda x: torch.remainder(x, 1.0),
    "a remainder of the other sign": lambda x: torch.fmod(x, 1.0),
    "a remainder spelled": lambda x: x - x.floor(),
    "a lookup": lambda x: x + torch.arange(5.0)[x.argmax(-1)][:, None],
    "a step by gather": lambda x: both(x).gather(0, (x > 0).long()[None])[0],
    "a step by an index": lambda x: both(x)[(x.sum() > 0).long()],
    "a step by places": lambda x: both(x)[
        (x > 0).long(), torch.arange(2)[:, None], torch.arange(5)
    ],
    "a step by a mask": lambda x: both(x)[torch.stack([x <= 0, x > 0])].sum(),
    "a step by numbered places": lambda x: both(x).take(
        (x > 0).long() * 10 + torch.arange(10).view(2, 5)
    ),
    "a step by places along": lambda x: both(x).take_along_dim((x > 0).long()[None], 0)[0],
    "a step by rows": lambda x: torch.cat([x, x + 5]).index_select(0, (x[:, 0] > 0).long() * 2),
    "a step by a table": lambda x: F.embedding((x > 0).long(), both(x[0])),
    "a step by a bag": lambda x: F.embedding_bag((x > 0).long(), both(x[0])),
    "a step by a number": lambda x: both(x)[(x.sum() > 0).long().item()],
    "a step by a part": lambda x: torch.cat([x, x + 5]).narrow(
        0, 2 * (x.sum() > 0).long().item(), 2
    ),
    "a step to a constant by gather": lambda x: torch.stack([x, torch.full((2, 5), 5.0)]).gather(
        0, (x > 0).long()[None]
    )[0],
    "a step into what is padded": lambda x: F.pad(x, (1, 1), value=3.0)[:, (x.sum(0) > 0).long()],
    "a step between two layers": lambda x: torch.stack([W(x), V(x)])[(x.sum() > 0).long()],
}


@pytest.mark.parametrize("name", OPAQUE)
def test_hides_what_the_input_decides(name: str) -> None:
    report = fgt.check_completeness(OPAQUE[name], X, beside=())
    assert report.complete is False, str(report)
    assert any(n.verdict is Verdict.OPAQUE for n in report.nodes), str(report)


PICKS: dict[str, Function] = {
    "among multiples": lambda x: torch.stack([x, 2 * x]).gather(0, (x > 0).long()[None])[0],
    "a value or zero": lambda x: torch.stack([x, torch.zeros(2, 5)])[(x.sum() > 0).long()],
    "rows of one layer": lambda x: W(x).gather(1, x.topk(2, 1).indices),
    "layers behind their gates": lambda x: (
        torch.stack([W(x), V(x)]) * torch.stack([x > 0, x <= 0])
    ).sum(0),
    "parts or zero": lambda x: both(x).masked_fill(torch.stack([x, x]) > 0, 0.0),
    "parts or zero by where": lambda x: torch.where(torch.stack([x, x]) > 0, both(x), 0.0),
    "a cat of zeros": lambda x: torch.cat([x * x.abs(), torch.zeros(2, 5)]).sum(0) / x.abs().sum(0),
}


@pytest.mark.parametrize("name", PICKS)
def test_a_choice_among_products_is_a_product(name: str) -> None:
    report = fgt.check_completeness(PICKS[name], X, beside=())
    assert report.complete is True, str(report)


def test_a_constant_that_is_looked_at_where_the_input_says() -> None:
    picture = torch.randn(1, 1, 4, 4)
    report = fgt.check_completeness(
        lambda x: F.grid_sample(picture, x.sign().view(1, 5, 1, 2), align_corners=False),
        torch.randn(2, 5),
        beside=(),
    )
    assert report.complete is False


def test_an_input_of_integers_selects_nothing_that_is_attributed() -> None:
    """A padding mask is fixed where attribution starts, at the embedding."""
    table = nn.Embedding(10, 5).eval()

    def model(ids: Tensor) -> Tensor:
        return W(table(ids).masked_fill((ids > 7)[..., None], 3.0))

    assert fgt.check_completeness(model, torch.randint(0, 10, (2, 4)), beside=()).complete is True


# --------------------------------------------------------------------------- spelled out


SPELLED: dict[str, tuple[Function, Function]] = {
    "gelu of GPT-2": (
        lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        lambda x: F.gelu(x, approximate="tanh"),
    ),
    "gelu by erf": (lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))), F.gelu),
    "silu": (lambda x: x * torch.sigmoid(x), F.silu),
    "silu as a quotient": (lambda x: x / (1 + torch.exp(-x)), F.silu),
    "mish": (lambda x: x * torch.tanh(torch.log1p(torch.exp(x))), F.mish),
    "hardswish": (lambda x: x * F.relu6(x + 3) / 6, F.hardswish),
    "hardswish by a clamp": (lambda x: x * torch.clamp(x + 3, 0, 6) / 6, F.hardswish),
    "softplus": (lambda x: torch.log(1 + torch.exp(x)), F.softplus),
    "softplus by log1p": (lambda x: torch.log1p(torch.exp(x)), F.softplus),
    "softplus, stable": (lambda x: x.relu() + torch.log1p(torch.exp(-x.abs())), F.softplus),
    "sigmoid": (lambda x: 1 / (1 + torch.exp(-x)), torch.sigmoid),
    "sigmoid as a quotient": (lambda x: (e := torch.exp(x)) / (1 + e), torch.sigmoid),
    "sigmoid by tanh": (lambda x: 0.5 * (torch.tanh(x / 2) + 1), torch.sigmoid),
    "tanh": (lambda x: (torch.exp(x) - torch.exp(-x)) / (torch.exp(x) + torch.exp(-x)), torch.tanh),
    "elu": (lambda x: torch.where(x > 0, x, torch.exp(x) - 1), F.elu),
    "log sigmoid": (lambda x: torch.log(torch.sigmoid(x)), F.logsigmoid),
    "log1p": (lambda x: torch.log(1 + x.abs()), lambda x: torch.log1p(x.abs())),
    "square": (lambda x: x * x, torch.square),
    "expm1": (lambda x: torch.exp(x) - 1, torch.expm1),
}


def gradient(function: Function, policy: str) -> Tensor:
    x = X.double().requires_grad_()
    model: Any = fgt.balance(lambda u: function(u) * P.double(), x.detach(), policy)
    return torch.autograd.grad(model(x).sum(), x)[0]


@pytest.mark.parametrize("policy", ["libra", "integrated", "attnlrp", "decompx", "without-gate"])
@pytest.mark.parametrize("name", SPELLED)
def test_has_the_rule_of_the_fused_one(name: str, policy: str) -> None:
    spelled, fused = SPELLED[name]
    torch.testing.assert_close(gradient(spelled, policy), gradient(fused, policy))


WHOLE: dict[str, Function] = {
    "a kernel of Student's": lambda x: 1 / (1 + x**2),
    "an inverse root": lambda x: (1 + x**2).rsqrt(),
    "a saturating square": lambda x: x**2 / (1 + x**2),
    "an inverse distance": lambda x: 1 / (1 + x.abs()),
    "a logarithm of a sign": lambda x: torch.sign(x) * torch.log(1 + x.abs()),
    "log cosh": lambda x: torch.log(torch.cosh(x)),
    "an exponential inside": lambda x: torch.tanh(torch.exp(x)),
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_has_no_degree_in_parts_has_the_secant_of_the_whole(name: str) -> None:
    function, x = WHOLE[name], X.double().requires_grad_()
    (found,) = torch.autograd.grad(fgt.balance(function, x.detach())(x).sum(), x)
    secant = (function(x) - function(torch.zeros_like(x))) / x
    torch.testing.assert_close(found, secant)
    assert fgt.check_completeness(function, X, policy="libra", beside=()).complete is True


def test_a_soft_codebook_has_a_plan() -> None:
    def model(x: Tensor) -> Tensor:
        near = 1 / (1 + torch.cdist(x, P.expand(4, -1) + torch.arange(4.0)[:, None]) ** 2)
        return near / near.sum(-1, keepdim=True) @ torch.arange(12.0).reshape(4, 3)

    assert fgt.check_completeness(model, X, policy="libra", beside=()).complete is True


def test_what_has_another_gradient_than_a_softmax_is_none() -> None:
    """Its value is a softmax's, and its sum carries no gradient."""

    def model(x: Tensor) -> Tensor:
        powers = W(x).exp()
        return V(powers / powers.sum(-1, keepdim=True).detach())

    plan = fgt.derive_rules(model, X)
    assert not any(isinstance(edit, fgt.Integrate) for edit in plan), str(plan)
    assert fgt.check_completeness(model, X, policy="libra", beside=()).complete is True


STEPS: dict[str, Function] = {
    "a choice": lambda x: torch.where(x > 0.1, x.sigmoid() + 1e-5, x.sigmoid()),
    "a low threshold": lambda x: torch.where(x > 5, x, torch.log1p(x.exp())),
    "a logarithm": lambda x: torch.log(1 + x.exp() + 1e-4 * (x > 0.2)),
    "a sum of powers": lambda x: torch.where(x > 0.2, x.exp() + 1e-4, x.exp()).sum(-1).log(),
    "a hole": lambda x: torch.where(x == 0, 1.001, torch.sin(x) / x),
    "a rounding": lambda x: torch.log(1 + torch.round(x, decimals=5).exp()),
}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_no_whole_hides_a_step(name: str) -> None:
    for policy in ("libra", "integrated"):
        report = fgt.check_completeness(
            lambda x: 3 * STEPS[name](W(x)), X, policy=policy, beside=()
        )
        assert report.complete is False, str(report)


@pytest.mark.parametrize("name", SPELLED)
def test_is_complete_under_its_plan(name: str) -> None:
    report = fgt.check_completeness(
        lambda x: SPELLED[name][0](W(x)) * P, X, policy="libra", beside=()
    )
    assert report.complete is True, str(report)


def test_a_folded_function_is_saved_with_its_plan(tmp_path: Any) -> None:
    spelled, _ = SPELLED["softplus"]
    plan = fgt.derive_rules(spelled, X)
    (edit,) = plan.edits
    assert len(edit.folds) == 3 and edit.origin == pytest.approx(math.log(2.0))
    plan.save(tmp_path / "plan.json")
    again = fgt.Plan.load(tmp_path / "plan.json")
    assert again == plan and fgt.check_completeness(spelled, X, policy=again).complete is True
    false = replace(plan, edits=(replace(edit, origin=0.0),), reasons={})
    assert fgt.check_completeness(spelled, X, policy=false).complete is not True


# --------------------------------------------------------------------------- layers in parts


TOKENS = torch.randn(2, 3, 5, dtype=torch.float64)
QUERY, KEY, VALUE = (torch.randn(5, 5, dtype=torch.float64) for _ in range(3))
GAIN, SHIFT = torch.rand(5, dtype=torch.float64) + 0.5, torch.randn(5, dtype=torch.float64)


def _layer_norm(x: Tensor) -> Tensor:
    d = x - x.mean(-1, keepdim=True)
    return d / (d.square().mean(-1, keepdim=True) + 1e-5).sqrt() * GAIN + SHIFT


def _scores(x: Tensor) -> Tensor:
    return (x @ QUERY) @ (x @ KEY).mT / math.sqrt(5)


def _attention(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*((x @ w)[:, None] for w in (QUERY, KEY, VALUE)))[:, 0]


def _stable(x: Tensor) -> Tensor:
    e = torch.exp(_scores(x) - _scores(x).amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True)


IN_PARTS: dict[str, tuple[Function, Function]] = {
    "layer norm": (_layer_norm, lambda x: F.layer_norm(x, (5,), GAIN, SHIFT)),
    "layer norm by its variance": (
        lambda x: (x - x.mean(-1, keepdim=True))
        * torch.rsqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5) * GAIN + SHIFT,
        lambda x: F.layer_norm(x, (5,), GAIN, SHIFT),
    ),
    "rms norm": (
        lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * GAIN,
        lambda x: F.rms_norm(x, (5,), GAIN, 1e-6),
    ),
    "attention": (lambda x: _scores(x).softmax(-1) @ (x @ VALUE), _attention),
    "attention, its softmax too": (lambda x: _stable(x) @ (x @ VALUE), _attention),
    "a unit vector": (
        lambda x: x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12),
        lambda x: F.normalize(x, dim=-1),
    ),
    "a cosine": (
        lambda x: (F.normalize(x @ QUERY, dim=-1) @ F.normalize(GAIN, dim=-1))[..., None],
        lambda x: F.cosine_similarity(x @ QUERY, GAIN, dim=-1)[..., None],
    ),
    "a distance": (
        lambda x: (x - x @ QUERY + 1e-6).norm(dim=-1, keepdim=True),
        lambda x: F.pairwise_distance(x, x @ QUERY)[..., None],
    ),
    "a cross product": (
        lambda x: torch.linalg.cross(x[..., :3], x[..., 2:]),
        lambda x: torch.cross(x[..., :3], x[..., 2:], dim=-1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", IN_PARTS)
def test_a_layer_in_parts_has_the_gradient_of_the_whole(name: str) -> None:
    found = []
    for function in IN_PARTS[name]:
        x = TOKENS.clone().requires_grad_()
        y = fgt.balance(function, TOKENS)(x)
        cotangent = torch.arange(1.0, 1.0 + y.shape[-1], dtype=torch.float64).expand(y.shape)
        found.append(torch.autograd.grad(y, x, cotangent)[0])
        assert fgt.check_completeness(function, TOKENS, policy="libra", beside=()).complete is True
    torch.testing.assert_close(*found)
