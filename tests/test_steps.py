"""The steps of a kernel beside the kernel: the same values, its bits in the forward."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fullgrad_theory as fgt
from fullgrad_theory.operators import steps

LAYERS: dict[str, tuple[Callable[..., Any], Callable[..., nn.RNNBase]]] = {
    "LSTM": (steps.lstm, nn.LSTM),
    "LSTM with projections": (steps.lstm, lambda *a, **k: nn.LSTM(*a, **k, proj_size=2)),
    "GRU": (steps.gru, nn.GRU),
    "RNN": (steps.rnn_tanh, nn.RNN),
    "RNN with relu": (steps.rnn_relu, lambda *a, **k: nn.RNN(*a, **k, nonlinearity="relu")),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_those_of_torch(name: str) -> None:
    ours, make = LAYERS[name]
    for bias, bidirectional, first, count in product((True, False), (True, False), (0, 1), (1, 2)):
        options = {"bias": bias, "bidirectional": bidirectional, "batch_first": bool(first)}
        layer = make(3, 4, count, **options).double()
        x = torch.randn(5, 6, 3, dtype=torch.float64)
        made, states = layer(x)
        states = states if isinstance(states, tuple) else (states,)
        starts = tuple(map(torch.randn_like, states))
        hx = starts if len(starts) > 1 else starts[0]
        made, states = layer(x, hx)
        states = states if isinstance(states, tuple) else (states,)
        weights = layer._flat_weights
        found = ours(x, hx, weights, bias, count, 0.0, False, bidirectional, bool(first))
        for a, b in zip((made, *states), found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_cells_are_those_of_torch(bias: bool) -> None:
    x, h, c = (torch.randn(2, 3, dtype=torch.float64) for _ in range(3))
    for ours, make, state in (
        (steps.lstm_cell, nn.LSTMCell, (h, c)),
        (steps.gru_cell, nn.GRUCell, h),
    ):
        cell: Any = make(3, 3, bias=bias).double()
        weights = (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)
        torch.testing.assert_close(cell(x, state), ours(x, state, *weights))
    torch.testing.assert_close(F.glu(torch.cat([x, h], -1)), steps.glu(torch.cat([x, h], -1)))


class Last(nn.Module):
    """All that a recurrence returns, added up."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        made, state = self.cell(x)
        states = state if isinstance(state, tuple) else (state,)
        return made.sum((0, 1)) + sum(s.sum((0, 1)).mean() for s in states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", LAYERS)
def test_the_forward_has_the_bits_of_the_kernel(name: str, dtype: torch.dtype) -> None:
    model = Last(LAYERS[name][1](5, 5)).eval().to(dtype)
    x = torch.randn(3, 2, 5).to(dtype)
    balanced = fgt.balance(model, x)
    assert torch.equal(balanced(x), model(x))


def test_a_kernel_has_the_gradient_that_its_parts_have() -> None:
    def spelled(x: Tensor) -> Tensor:
        value, gate = x.chunk(2, -1)
        return value * torch.sigmoid(gate)

    for policy in ("libra", "integrated"):
        x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
        fused, parts = (fgt.balance(f, x, policy)(x) for f in (F.glu, spelled))
        (a,), (b,) = (torch.autograd.grad(y.sum(), x) for y in (fused, parts))
        torch.testing.assert_close(a, b)
        assert bool(a.any())


def test_a_summand_without_a_part_is_left_out() -> None:
    """As in attention by baddbmm, whose first operand is memory that nobody wrote."""
    made = steps.added_to(torch.bmm)(
        torch.full((1, 2, 2), torch.nan), *torch.ones(2, 1, 2, 2), beta=0, alpha=0.5
    )
    assert torch.equal(made, torch.ones(1, 2, 2))


def test_weights_made_of_a_kernel_move() -> None:
    ones = torch.ones(4, dtype=torch.float64)

    def model(x: Tensor) -> Tensor:
        return F.linear(x, F.glu(torch.cat([x, x], -1), -1), ones)

    def parts(x: Tensor) -> Tensor:
        return F.linear(x, F.glu(torch.cat([x, x], -1), -1)) + ones

    x = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    (a,), (b,) = (
        torch.autograd.grad(fgt.balance(f, x.detach())(x).sum(), x) for f in (model, parts)
    )
    torch.testing.assert_close(a, b)
