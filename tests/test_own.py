"""The user's own backward and values, compared at the tolerance that is claimed."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from planted import times
from torch import Tensor, nn

import fullgrad_theory as fgt

torch.manual_seed(0)
X = torch.randn(2, 5)
IDS = torch.tensor([[1, 4, 2], [7, 7, 0]])
W = nn.Linear(5, 5).eval()
TABLE = nn.Embedding(9, 5).eval()
TABLE_FROZEN = nn.Embedding(9, 5).eval().requires_grad_(False)


def hooked(x: Tensor, factor: float) -> Tensor:
    y = x * 1.0
    if y.requires_grad:
        y.register_hook(lambda g: g * factor)
    return y


def check(function: Callable[..., Any], *inputs: Tensor) -> bool | None:
    return fgt.check_completeness(function, inputs, beside=()).complete


Lie = Callable[[Tensor, float], Tensor]
PLACES: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "behind a float": (lambda lie, x: W(lie(x)), (X,)),
    "behind an embedding": (lambda lie, ids: W(lie(TABLE(ids))), (IDS,)),
    "behind a frozen embedding": (lambda lie, ids: W(lie(TABLE_FROZEN(ids))), (IDS,)),
    "in a branch": (lambda lie, x: W(x) + lie(W(x).relu()), (X,)),
    "beside a cast": (lambda lie, x: W(lie(x)) + W(x.bfloat16().to(x.dtype)), (X,)),
    "beside a mask that is cast": (
        lambda lie, x: lie(W(x)) * torch.ones(5, dtype=torch.bfloat16).to(x.dtype),
        (X,),
    ),
    "small beside a large one": (lambda lie, a, b: a + W(lie(b)) * 1e-8, (X, X.flip(0) * 1e8)),
    "large beside a small one": (lambda lie, a, b: lie(W(a)) * 1e-8 + b * 1e-8, (X, X * 1e3)),
}


@pytest.mark.parametrize("lie", [times, hooked])
@pytest.mark.parametrize("place", PLACES)
def test_a_wrong_backward_is_seen_wherever_it_is(place: str, lie: Lie) -> None:
    function, inputs = PLACES[place]
    for factor in (3.0, 1.15, 1.0 + 1e-5, 1.0 - 1e-6):
        assert check(partial(function, partial(lie, factor=factor)), *inputs) is not True
    assert check(partial(function, partial(lie, factor=1.0)), *inputs) is True


def test_a_block_in_inference_mode_is_seen() -> None:
    def model(ids: Tensor) -> Tensor:
        h = TABLE(ids)
        with torch.inference_mode():
            held = (h * 0.5).clone()
        return W(h) + W(held.clone())

    assert check(model, IDS) is not True
    assert check(lambda ids: W(TABLE(ids)) + W(TABLE(ids) * 0.5), IDS) is True


def test_an_autocast_region_gives_no_allowance() -> None:
    def model(factor: float, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = W(x)
        return times(y.to(x.dtype), factor)

    assert check(partial(model, 1.15), X) is not True
    assert check(partial(model, 1.0), X) is True


OTHERWISE: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "a dtype": (
        lambda x: x * 2 if x.dtype is torch.float64 else x * x,
        lambda x: x * 2 if x.dim() == 2 else x * x,
    ),
    "chance": (lambda x: W(x) + random.random(), lambda x: W(x) + 0.5),
    "a scale by chance": (lambda x: W(x) * random.random(), lambda x: W(x) * 0.5),
    "whether it is exported": (
        lambda x: x * 2 if torch.compiler.is_exporting() else x * x,
        lambda x: x * 2,
    ),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_a_model_that_is_another_in_the_audit_is_not_judged(name: str) -> None:
    lie, truth = OTHERWISE[name]
    report = fgt.check_completeness(lie, X, beside=())
    # x*x, which it is in use, is incomplete whatever else is found
    assert report.complete is (False if name == "a dtype" else None), str(report)
    assert report.problems
    assert check(truth, X) is True


class Held(nn.Module):
    """A layer whose parameters have to stay in a domain."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.part = nn.Parameter(torch.tensor([1e-4, 0.5, 0.9, 0.999, 1e-6]))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return x * self.function(self.part, x)


DOMAINS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a root of a variance": lambda v, x: v.sqrt(),
    "its inverse": lambda v, x: v.rsqrt(),
    "its logarithm": lambda v, x: v.log(),
    "a logit": lambda v, x: torch.logit(v),
    "an arc cosine": lambda v, x: torch.acos(v),
}


@pytest.mark.parametrize("name", DOMAINS)
def test_noise_stays_in_the_domain(name: str) -> None:
    report = fgt.check_completeness(Held(DOMAINS[name]).eval(), X, beside=())
    assert report.complete is True and not report.notes, str(report)


def test_what_overflows_in_its_own_dtype_is_not_judged() -> None:
    def model(x: Tensor) -> Tensor:
        large = (x * 1e8).half()
        return W((large - large * 0.5).to(x.dtype) * 1e-8)

    assert check(model, X) is None
    assert check(lambda x: W((x * 1e2).half().to(x.dtype)), X) is True


def test_what_another_operation_takes_back_is_not_shown() -> None:
    report = fgt.check_completeness(lambda x: torch.logit(W(x).sigmoid()), X, unknown="measure")
    assert report.complete is None and any("takes back" in n for n in report.notes), str(report)


@pytest.mark.parametrize("name", ["function", "forward", "training", "beside"])
def test_a_module_that_is_closed_over_may_have_any_name(name: str) -> None:
    space: dict[str, Any] = {}
    exec(f"def make({name}):\n    return lambda x: {name}(x)", space)
    model = space["make"](nn.Linear(5, 5).eval())
    assert fgt.check_completeness(model, torch.randn(2, 5), beside=()).complete is True


def test_compiled_models_and_closures_are_judged() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 2)).eval()
    for given in (lambda x: model(x), partial(model), model.forward, torch.compile(model)):
        report = fgt.check_completeness(given, X, policy="libra", beside=())
        assert report.complete is True, str(report)
