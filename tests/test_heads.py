"""Outputs that are probabilities in disguise are named; bounded and positive ones are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fullgrad_theory as fgt

torch.manual_seed(0)
X = torch.randn(2, 5)
LAYERS = nn.ModuleList(nn.Linear(5, 4) for _ in range(3)).eval().requires_grad_(False)
A, B, C = LAYERS
VALUES = torch.arange(4.0)
Function = Callable[[Tensor], object]

PROBABILITIES: dict[str, Function] = {
    "softmax": lambda x: A(x).softmax(-1),
    "softmax times one": lambda x: A(x).softmax(-1) * 1.0,
    "its largest": lambda x: A(x).softmax(-1).max(-1).values,
    "its largest as amax": lambda x: A(x).softmax(-1).amax(-1),
    "an ensemble's mean": lambda x: (A(x).softmax(-1) + B(x).softmax(-1)) / 2,
    "an ensemble stacked": lambda x: torch.stack([A(x).softmax(-1), B(x).softmax(-1)]).mean(0),
    "exponentials": lambda x: (e := A(x).exp()) / e.sum(-1, keepdim=True),
    "stable exponentials": lambda x: (
        (e := (A(x) - A(x).amax(-1, keepdim=True)).exp()) / e.sum(-1, keepdim=True)
    ),
    "one minus sigmoid": lambda x: 1 - A(x).sigmoid(),
    "one minus sigmoid, a tensor": lambda x: torch.ones(4) - A(x).sigmoid(),
    "hardsigmoid": lambda x: F.hardsigmoid(A(x)),
    "a clamp": lambda x: A(x).clamp(0, 1),
    "a tanh": lambda x: (A(x).tanh() + 1) / 2,
    "an arc tangent": lambda x: A(x).atan() / torch.pi + 0.5,
    "softmin": lambda x: F.softmin(A(x), -1),
    "a clamped sigmoid": lambda x: A(x).sigmoid().clamp(0, 1),
    "both classes": lambda x: torch.stack([1 - A(x).sigmoid(), A(x).sigmoid()], -1),
    "a temperature": lambda x: (A(x) / 0.7).softmax(-1),
    "reshaped": lambda x: A(x).softmax(-1).reshape(4, 2).to(torch.float64)[1:],
    "in columns": lambda x: torch.cat([A(x).softmax(-1), B(x).sigmoid()], -1),
    "a logarithm and back": lambda x: A(x).log_softmax(-1).exp(),
    "relu scores": lambda x: (r := A(x).relu() + 1e-9) / r.sum(-1, keepdim=True),
    "a product": lambda x: A(x).sigmoid() * B(x).softmax(-1),
    "a sigmoid spelled": lambda x: 1 / (1 + torch.exp(-A(x))),
    "one of its entries": lambda x: A(x).softmax(-1)[:, 2],
    "the sum of two": lambda x: A(x).softmax(-1)[:, :2].sum(-1),
    "squared": lambda x: A(x).sigmoid() ** 2,
    "erf": lambda x: 0.5 * (1 + torch.erf(A(x))),
    "without weights": lambda x: x.softmax(-1) * 1.0,
    "under a learned threshold": lambda x: (z := A(x)).softmax(-1) * (z > VALUES),
    "a sigmoid without weights": lambda x: 1 - x.sigmoid(),
}
LOGARITHMS: dict[str, Function] = {
    "log_softmax": lambda x: A(x).log_softmax(-1),
    "its negative": lambda x: -A(x).log_softmax(-1),
    "a logarithm": lambda x: A(x).softmax(-1).log(),
    "a logarithm of a sigmoid": lambda x: A(x).sigmoid().log(),
    "logsigmoid": lambda x: F.logsigmoid(A(x)),
    "spelled": lambda x: (z := A(x)) - z.logsumexp(-1, keepdim=True),
    "one entry": lambda x: A(x).log_softmax(-1)[:, 1],
}
HONEST: dict[str, Function] = {
    "logits": lambda x: A(x),
    "small logits": lambda x: A(x) * 1e-3 + 0.5,
    "a weight since": lambda x: C(F.pad(A(x).softmax(-1), (0, 1))),
    "attention": lambda x: (A(x) @ B(x).mT).softmax(-1) @ C(x),
    "a gate": lambda x: A(x) * B(x).sigmoid(),
    "silu": lambda x: F.silu(A(x)),
    "tanh": lambda x: A(x).tanh(),
    "an embedding": lambda x: F.normalize(A(x), dim=-1),
    "a positive embedding": lambda x: F.normalize(A(x).relu(), dim=-1),
    "relu": lambda x: A(x).relu(),
    "less than nothing": lambda x: -A(x).relu(),
    "softplus": lambda x: F.softplus(A(x)),
    "exponential": lambda x: A(x).exp(),
    "an expectation": lambda x: A(x).softmax(-1) @ VALUES,
    "a norm": lambda x: A(x).norm(dim=-1),
    "a clamped input": lambda x: x.clamp(0, 1),
    "centred": lambda x: A(x) - A(x).mean(-1, keepdim=True),
}


def heads(function: Function) -> list[str]:
    report = fgt.check_completeness(function, X, numeric=False, beside=())
    return [p for p in report.problems if "statement about logits" in p]


@pytest.mark.parametrize("name", PROBABILITIES)
def test_a_probability_is_named(name: str) -> None:
    (said,) = heads(PROBABILITIES[name])
    assert "is a probability" in said


@pytest.mark.parametrize("name", LOGARITHMS)
def test_a_log_probability_is_named(name: str) -> None:
    (said,) = heads(LOGARITHMS[name])
    assert "is a log-probability" in said


@pytest.mark.parametrize("name", HONEST)
def test_what_is_none_is_not(name: str) -> None:
    assert not heads(HONEST[name])


def test_each_output_is_told_apart() -> None:
    (said,) = heads(lambda x: {"boxes": B(x), "scores": A(x).sigmoid()})
    assert "output 1, sigmoid" in said


@pytest.mark.parametrize("policy", [None, "libra"])
def test_the_verdict_is_not_complete(policy: str | None) -> None:
    report = fgt.check_completeness(lambda x: A(x).clamp(0, 1), X, policy=policy, beside=())
    assert report.complete is not True
