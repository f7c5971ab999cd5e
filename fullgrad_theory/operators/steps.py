"""What a kernel computes, in operations that have degrees; their values have other last bits.

A trace holds the steps beside the kernel: the value stays the kernel's, the gradient is theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import linear

from .algebra import Algebra
from .calls import as_one_call, bound_once, overload
from .record import Operator


@bound_once
class _Bits(Function):
    """One value with the gradient of another."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, other: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.dtype = inputs[1].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, grad.to(ctx.dtype)


@as_one_call
def with_bits_of(made: Tensor, kernel: Tensor) -> Tensor:
    """The value of `kernel`, bit for bit, with the gradient of `made`, of the same shape."""
    return _Bits.apply(kernel.detach(), made)


BITS = Operator(
    f"{with_bits_of.__module__}.{with_bits_of.__name__}",
    Algebra.STRUCTURAL,
    "arg0*arg1^0",
    proved=True,
)


def glu(self: Tensor, dim: int = -1) -> Tensor:
    """aten.glu: the first half along `dim` times the sigmoid of the second."""
    value, gate = self.chunk(2, dim)
    return value * gate.sigmoid()


def lerp(self: Tensor, end: Tensor, weight: Tensor) -> Tensor:
    """aten.lerp.Tensor, affine in its weight: `self` is the bias leaf then."""
    return self + weight * (end - self)


def and_bias(op: str) -> Callable[..., Tensor]:
    """A linear layer or a convolution, and then its bias."""

    def layer(
        input: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any, **named: Any
    ) -> Tensor:
        made: Tensor = overload(op)(input, weight, None, *rest, **named)
        if bias is None:
            return made
        return made + bias.reshape(-1, *[1] * max(weight.dim() - 2, 0))

    return layer


def added_to(product: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """A product that is added to something, as addmm is, in two operations."""

    def added(
        self: Tensor,
        one: Tensor,
        other: Tensor,
        *,
        beta: float = 1,
        alpha: float = 1,
        value: float = 1,
    ) -> Tensor:
        made = product(one, other)
        made = made if alpha * value == 1 else made * (alpha * value)
        if beta == 0:  # what is in it then does not matter, be it NaN
            return made
        return made + (self if beta == 1 else self * beta)

    return added


def lstm_cell(
    input: Tensor,
    hx: Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """aten.lstm_cell: h and c of (batch, hidden), by the formula of torch.nn.LSTMCell."""
    h, c = hx
    i, f, g, o = (linear(input, w_ih, b_ih) + linear(h, w_hh, b_hh)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru_cell(times: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """h of (batch, hidden), by the formula of torch.nn.GRUCell. `times(gate, value)` is their
    product: torch's layer has its factors in another order, by which a plan names them."""

    def cell(
        input: Tensor,
        hx: Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Tensor:
        r, z, n = linear(input, w_ih, b_ih).chunk(3, -1)
        by_r, by_z, by_n = linear(hx, w_hh, b_hh).chunk(3, -1)
        n = (n + times((by_r + r).sigmoid(), by_n)).tanh()
        return (hx - n) * (by_z + z).sigmoid() + n

    return cell


gru_cell = _gru_cell(lambda gate, value: gate * value)


def _rnn_cell(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def cell(input: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, *b: Tensor) -> Tensor:
        b_ih, b_hh = b or (None, None)
        return function(linear(input, w_ih, b_ih) + linear(hx, w_hh, b_hh))

    return cell


def _layers(cell: Callable[..., Any], states: int) -> Callable[..., tuple[Tensor, ...]]:
    """Layers of a cell over a sequence, without dropout: the outputs, and the last states."""

    def layers(
        input: Tensor,
        hx: Any,
        params: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> tuple[Tensor, ...]:
        steps = input.unbind(1 if batch_first else 0)
        starts = hx if states > 1 else [hx]
        projects = states > 1 and starts[0].shape[-1] != starts[1].shape[-1]
        weights = iter(params)
        last: list[list[Tensor]] = []
        for _ in range(num_layers):
            ways = []
            for backwards in range(1 + bidirectional):
                state = [of_kind[len(last)] for of_kind in starts]
                own = [next(weights) for _ in range(2 + 2 * has_biases)]
                project = next(weights) if projects else None
                made = []
                for x in reversed(steps) if backwards else steps:
                    found = cell(x, state if states > 1 else state[0], *own)
                    state = list(found) if states > 1 else [found]
                    if project is not None:
                        state[0] = linear(state[0], project)
                    made.append(state[0])
                ways.append(made[::-1] if backwards else made)
                last.append(state)
            steps = tuple(
                torch.cat(at, -1) if bidirectional else at[0] for at in zip(*ways, strict=True)
            )
        output = torch.stack(steps, 1 if batch_first else 0)
        return output, *(torch.stack(of_kind) for of_kind in zip(*last, strict=True))

    return layers


lstm = _layers(lstm_cell, 2)
gru = _layers(_gru_cell(lambda gate, value: value * gate), 1)
rnn_tanh = _layers(_rnn_cell(torch.tanh), 1)
rnn_relu = _layers(_rnn_cell(torch.relu), 1)
