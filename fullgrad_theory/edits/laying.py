"""A cotangent laid out in memory as the value is, for kernels that misread any other.

torch's batch norm on the CPU (2.11 to 2.15) takes a cotangent whose strides fit two layouts for one
in the other: where an image is one pixel wide, or a sample alone, behind a transpose.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

from ..operators.calls import as_one_call, bound_once


@bound_once
class _LaidOut(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.strides = inputs[0].stride()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if grad.stride() == ctx.strides:
            return grad
        return grad.new_empty_strided(grad.shape, ctx.strides).copy_(grad)


@as_one_call
def laid_out(x: Tensor) -> Tensor:
    """x; in the backward, the same cotangent in x's strides."""
    return _LaidOut.apply(x)  # type: ignore[no-any-return,no-untyped-call]
