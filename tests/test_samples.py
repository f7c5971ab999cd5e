"""What a sample is, and what a target names: found in the graph, and one thing everywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from small_models import small
from torch import Tensor, nn

import fullgrad_theory as fgt
from fullgrad_theory.errors import InputError, NonFiniteError

DOUBLE = torch.float64
pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor")


def linear() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    return layers.eval().double(), torch.randn(3, 5, dtype=DOUBLE)


def by_hand(balanced: nn.Module, x: Tensor, pick: Callable[[Tensor], Tensor]) -> Tensor:
    """Input times gradient of one number, by autograd over the balanced module alone."""
    given = x.detach().clone().requires_grad_()
    (g,) = torch.autograd.grad(pick(balanced(given)), given)
    return g * given.detach()


# --------------------------------------------------------------------------- samples


class Sorted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sort(0).values


class Graph(nn.Module):
    """One round of messages along the edges between nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.message = nn.Linear(5, 4).double()
        self.register_buffer("edges", torch.tensor([[0, 1, 1], [1, 0, 1]]))

    def forward(self, x: Tensor) -> Tensor:
        sent = self.message(x)[self.edges[0]]
        return torch.zeros(x.shape[0], 4, dtype=x.dtype).index_add(0, self.edges[1], sent)


MEET: dict[str, Any] = {
    "cumsum": lambda x: x.cumsum(0),
    "sort": Sorted().eval(),
    "contrastive": lambda x: x @ x.t(),
    "flatten": lambda x: 2 * x.flatten(),
    "turned around": lambda x: x[[1, 0]],
    "one of them": lambda x: 3 * x[0],
    "the largest": lambda x: x.amax(0),
    "their mean": lambda x: x - x.mean(0),
    "all in one number": lambda x: x.sum(),
    "a graph's nodes": Graph().eval(),
    "softmax over them": lambda x: x * x.detach().softmax(0),
    "a maximum that is not there": lambda x: torch.maximum(x, x.flip(0) - 100),
}


@pytest.mark.parametrize("name", MEET)
def test_where_samples_meet_the_whole_is_one(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, dtype=DOUBLE)
    balanced = fgt.balance(MEET[name], x, "plain")
    parts = fgt.fullgrad(balanced, x)
    assert (parts.samples, parts.batch, parts.output.shape) == (1, None, ())
    torch.testing.assert_close(parts.output, balanced(x).max())
    torch.testing.assert_close(parts.input, by_hand(balanced, x, torch.max))
    at = tuple(int(i) for i in torch.unravel_index(balanced(x).argmin(), balanced(x).shape))
    least = fgt.fullgrad(balanced, x, at)
    torch.testing.assert_close(least.output, balanced(x).min())
    torch.testing.assert_close(least.input, by_hand(balanced, x, torch.min))


@pytest.mark.parametrize("batch", [1, 3])
def test_a_layer_that_takes_the_sequence_first(batch: int) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dtype=DOUBLE)
    model = nn.TransformerEncoder(layer, 1).eval()
    x = torch.randn(5, batch, 8, dtype=DOUBLE)
    balanced = fgt.balance(model, x)
    parts = fgt.fullgrad(balanced, x, (4, 0, 3))
    assert parts.samples == 1
    torch.testing.assert_close(parts.input, by_hand(balanced, x, lambda o: o[4, 0, 3]))
    torch.testing.assert_close(parts.total, parts.output, rtol=1e-10, atol=0)
    if batch > 1:
        each = fgt.fullgrad(balanced, x, (4, 3))
        assert (each.samples, each.batch) == (3, 1)
        torch.testing.assert_close(each.output, model(x)[4, :, 3])
        torch.testing.assert_close(each.total, each.output, rtol=1e-10, atol=0)
        torch.testing.assert_close(
            each.input[:, 1], by_hand(balanced, x, lambda o: o[4, 1, 3])[:, 1]
        )
        torch.testing.assert_close(fgt.fullgrad(balanced, x, (4, 3), batch=1).total, each.total)


def test_the_batch_may_stand_elsewhere_in_the_output() -> None:
    x = torch.randn(2, 5, dtype=DOUBLE)
    parts = fgt.fullgrad(lambda x: 3 * x.t() + 1, x, 4)
    assert (parts.samples, parts.batch) == (2, 1)
    torch.testing.assert_close(parts.output, 3 * x[:, 4] + 1)
    torch.testing.assert_close(parts.total, parts.output)


def test_an_input_that_all_samples_share() -> None:
    """Its contributions are told apart by a backward for each of them."""
    x, shared = torch.randn(3, 4, dtype=DOUBLE), torch.randn(1, 4, dtype=DOUBLE)
    balanced = fgt.balance(lambda x, shared: 2 * x + shared, (x, shared))
    parts = fgt.fullgrad(balanced, (x, shared), 1)
    assert parts.samples == 3
    torch.testing.assert_close(parts.total, 2 * x[:, 1] + shared[:, 1])
    torch.testing.assert_close(parts.input[1][0, 1], 3 * shared[0, 1])


def test_a_batch_that_is_named() -> None:
    x = torch.randn(2, 5, dtype=DOUBLE)
    balanced = fgt.balance(lambda x: x.cumsum(0), x)
    each = fgt.fullgrad(balanced, x, 1, batch=1)
    torch.testing.assert_close(each.output, x.cumsum(0)[1])
    torch.testing.assert_close(each.total, each.output)
    with pytest.raises(InputError, match="samples meet along this dimension"):
        fgt.fullgrad(balanced, x, batch=0)
    with pytest.raises(InputError, match="no such dimension"):
        fgt.fullgrad(balanced, x, batch=2)
    whole = fgt.fullgrad(lambda x: 2 * x, x, (1, 4), batch=None)
    assert whole.output.shape == () and whole.samples == 1
    torch.testing.assert_close(whole.total, 2 * x[1, 4])


def test_inputs_of_one_dimension_or_none() -> None:
    time = torch.randn(4, dtype=DOUBLE)
    parts = fgt.fullgrad(lambda t: 2 * t + 1, time)
    assert parts.samples == 4
    torch.testing.assert_close(parts.total, 2 * time + 1)
    alone = fgt.fullgrad(lambda t: 2 * t + 1, torch.tensor(3.0))
    assert alone.output.shape == () and float(alone.total) == 7.0


def test_the_real_part_of_a_complex_output() -> None:
    x = torch.randn(2, 5, dtype=DOUBLE)
    balanced = fgt.balance(torch.fft.fft, x)
    parts = fgt.fullgrad(balanced, x, 2)
    torch.testing.assert_close(parts.output, torch.fft.fft(x)[:, 2].real)
    torch.testing.assert_close(parts.total, parts.output)
    other = fgt.fullgrad(balanced, x, lambda o: o[:, 2].imag)
    torch.testing.assert_close(other.total, torch.fft.fft(x)[:, 2].imag)


def test_what_is_not_finite_is_said() -> None:
    x = torch.randn(2, 5)
    with pytest.raises(NonFiniteError, match="the input x holds NaN"):
        fgt.fullgrad(lambda x: 2 * x, x * float("nan"))
    with pytest.raises(NonFiniteError, match=r"begins at sqrt .*test_samples\.py"):
        fgt.fullgrad(lambda x: (x - 100).sqrt(), x)
    with pytest.raises(NonFiniteError, match="no finite gradient"):
        fgt.fullgrad(lambda x: (x - x.detach()).norm(dim=1).sqrt(), x)


# --------------------------------------------------------------------------- a baseline


def test_what_differs_from_a_baseline() -> None:
    model, x = linear()
    balanced, origin = fgt.balance(model, x), torch.zeros(1, 5, dtype=DOUBLE)
    parts = fgt.fullgrad(balanced, x, baseline=origin)
    best = model(x).argmax(1)
    wanted = model(x)[range(3), best] - model(origin.expand_as(x))[range(3), best]
    torch.testing.assert_close(parts.output, wanted.detach())
    torch.testing.assert_close(parts.total, parts.output)
    at, there = (fgt.fullgrad(balanced, v, best) for v in (x, origin.expand_as(x)))
    torch.testing.assert_close(parts.input, at.input - there.input)
    assert float(parts.biases["2.bias"].abs().max()) == 0.0
    with pytest.raises(InputError, match="balanced for inputs of shape"):
        fgt.fullgrad(balanced, x, baseline=torch.zeros(1, 4, dtype=DOUBLE))
    with pytest.raises(NonFiniteError, match="at the baseline"):
        fgt.fullgrad(lambda x: x / x.norm(dim=1, keepdim=True), x, baseline=origin)


# --------------------------------------------------------------------------- targets


def softmax_of(o: Tensor, at: list[int]) -> Tensor:
    p = o.detach().softmax(1)
    return o[range(3), at] - (p * o).sum(1)


TARGETS: dict[str, tuple[Any, Callable[[Tensor], Tensor]]] = {
    "none": (None, lambda o: o.amax(1)),
    "the word": ("prediction", lambda o: o.amax(1)),
    "an int": (1, lambda o: o[:, 1]),
    "from the end": (-1, lambda o: o[:, 2]),
    "a tensor of no dimension": (torch.tensor(1), lambda o: o[:, 1]),
    "numpy's int": (np.int64(1), lambda o: o[:, 1]),
    "a list": ([1, 0, 2], lambda o: o[range(3), [1, 0, 2]]),
    "a tensor": (torch.tensor([1, 0, 2]), lambda o: o[range(3), [1, 0, 2]]),
    "an array": (np.array([1, 0, 2]), lambda o: o[range(3), [1, 0, 2]]),
    "a tuple": ((1,), lambda o: o[:, 1]),
    "a tuple a sample": ([(1,), (0,), (2,)], lambda o: o[range(3), [1, 0, 2]]),
    "a mask": (torch.tensor([True, False, True]), lambda o: o[:, 0] + o[:, 2]),
    "weights": (torch.tensor([0.5, 0.0, -2.0]), lambda o: 0.5 * o[:, 0] - 2 * o[:, 2]),
    "weights a sample": (torch.eye(3), lambda o: o.diagonal()),
    "a function": (lambda o: o[:, 0] - o[:, 1], lambda o: o[:, 0] - o[:, 1]),
    "a contrast": (fgt.contrast(1, 0), lambda o: o[:, 1] - o[:, 0]),
    "against the others": (fgt.contrast(1), lambda o: o[:, 1] - (o[:, 0] + o[:, 2]) / 2),
    "a contrast a sample": (
        fgt.contrast([1, 0, 2], "prediction"),
        lambda o: o[range(3), [1, 0, 2]] - o.amax(1),
    ),
    "the softmax's weighting": (fgt.softmax_weighted(1), lambda o: softmax_of(o, [1, 1, 1])),
    "of the prediction": (
        fgt.softmax_weighted(),
        lambda o: softmax_of(o, o.argmax(1).tolist()),
    ),
}


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_of_fullgrad(name: str) -> None:
    target, pick = TARGETS[name]
    model, x = linear()
    balanced = fgt.balance(model, x)
    parts = fgt.fullgrad(balanced, x, target)
    torch.testing.assert_close(parts.output, pick(model(x)).detach())
    torch.testing.assert_close(parts.total, parts.output, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(parts.input, by_hand(balanced, x, lambda o: pick(o).sum()))


def test_the_softmax_s_weighting_is_the_gradient_of_the_log_probability() -> None:
    model, x = linear()
    balanced = fgt.balance(model, x)
    parts = fgt.fullgrad(balanced, x, fgt.softmax_weighted([1, 0, 2]))
    wanted = by_hand(balanced, x, lambda o: o.log_softmax(1)[range(3), [1, 0, 2]].sum())
    torch.testing.assert_close(parts.input, wanted)


def test_a_contrast_of_a_token_is_with_its_own_position() -> None:
    x = torch.randn(2, 3, 4, dtype=DOUBLE)
    parts = fgt.fullgrad(lambda x: 2 * x, x, fgt.contrast((1, 2)))
    torch.testing.assert_close(parts.output, 2 * x[:, 1, 2] - 2 * x[:, 1, [0, 1, 3]].mean(1))
    each = fgt.fullgrad(lambda x: 2 * x, x, [(1, 2), (0, 3)])
    torch.testing.assert_close(each.output, torch.stack([2 * x[0, 1, 2], 2 * x[1, 0, 3]]))


def test_a_mask_leaves_out_what_is_not_finite() -> None:
    x = torch.randn(2, 3, dtype=DOUBLE)
    hidden = torch.tensor([0.0, 0.0, -torch.inf], dtype=DOUBLE)
    parts = fgt.fullgrad(lambda x: 2 * x + hidden, x, torch.tensor([True, True, False]))
    torch.testing.assert_close(parts.output, 2 * x[:, :2].sum(1))
    torch.testing.assert_close(parts.total, parts.output)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (7, "out of range for 3 classes"),
        ((), "out of range"),
        ([1, 0], "2 targets, not one for each of the 3 samples"),
        (True, "whole number, not True"),
        (1.5, "whole number, not 1.5"),
        ("cat", "not 'cat'"),
        (torch.ones(4), "weights of shape .* fit"),
        (torch.ones(3, 3, dtype=torch.long), "a mask is boolean"),
        (torch.full((3,), torch.nan), "finite"),
        (lambda o: o.sum(), "one number a sample"),
        (lambda o: 1.0, "returns a tensor, not float"),
        (fgt.contrast(lambda o: o[:, 0]), "not of a function"),
        ([None, 1, 2], "one a sample"),
    ],
)
def test_a_target_that_means_nothing_is_refused(target: Any, words: str) -> None:
    model, x = linear()
    with pytest.raises(InputError, match=words):
        fgt.fullgrad(fgt.balance(model, x), x, target)


VISION: dict[str, Any] = {
    "a list": [1, 0],
    "a tensor of no dimension": torch.tensor(1),
    "a tuple": (1,),
    "weights": torch.tensor([0.5, 0.0, -2.0, 0.0, 0.0]),
    "a function": lambda o: o[:, 0] - o[:, 1],
    "a contrast": fgt.contrast([1, 0], 3),
    "the softmax's weighting": fgt.softmax_weighted(),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VISION)
def test_a_target_of_explain_is_that_of_fullgrad(name: str) -> None:
    model, x = small("vit")
    model, x = model.double(), torch.cat([x, x.flip(-1)])[:2].double()
    classes = model(x).shape[1]
    target = VISION[name]
    if isinstance(target, Tensor) and target.dim():
        target = torch.nn.functional.pad(target, (0, classes - 5)) if classes > 5 else target
    balanced = fgt.balance(model, x)
    parts = fgt.fullgrad(balanced, x, target)
    maps = fgt.Explainer(balanced)(x, ("fullgrad", "integrated-gradients"), target)
    for found in maps.values():
        torch.testing.assert_close(found.output, parts.output)
    torch.testing.assert_close(maps["fullgrad"].total, parts.total, rtol=1e-6, atol=1e-9)
