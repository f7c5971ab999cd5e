"""Backward kernels for GPUs: one launch where PyTorch's own operations take several.

Each has a slow form beside it that shares no code (`attention_form`, `gates`), and is taken only
where `takes` or `takes_gelu` says so.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from .calls import is_batched

WIDEST = 256
"""dimensions of a head at most"""
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@cache
def _able(device: torch.device) -> bool:
    """Whether Triton is there, and compiles for a GPU of that age."""
    return find_spec("triton") is not None and (
        torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    )


def takes(query: Tensor, key: Tensor, mask: Tensor | None, grad: Tensor) -> bool:
    """Whether `transposed_attention` can be given these: on a GPU, 16 bits or float32, all (batch,
    heads, tokens, width), heads that fit."""
    return (
        grad.is_cuda
        and _able(grad.device)
        and query.dim() == key.dim() == grad.dim() == 4
        and query.dtype == key.dtype == grad.dtype
        and grad.dtype in _DTYPES
        and max(query.shape[-1], grad.shape[-1]) <= WIDEST
        and query.shape[:2] == grad.shape[:2]
        and key.shape[0] == grad.shape[0]
        and grad.shape[1] % key.shape[1] == 0
        and 0 not in grad.shape
    )


def transposed_attention(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    grad: Tensor,
    is_causal: bool,
    scale: float,
    lse: Tensor | None = None,
) -> Tensor:
    """P^T grad, (batch, heads, source, width), with P = softmax(query key^T scale + mask), never
    stored: two products, or three where the forward's log-sum-exp `lse` was not kept."""
    given = query, key, mask, grad, is_causal, scale, lse
    return _transposed_attention(*given) if _direct(grad, query) else _attention_op(*given)


def _transposed_attention(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    grad: Tensor,
    is_causal: bool,
    scale: float,
    lse: Tensor | None,
) -> Tensor:
    from . import triton_kernels

    if mask is not None:
        mask = mask.expand(*grad.shape[:2], query.shape[-2], key.shape[-2])
    out = _empty(key, grad)
    triton_kernels.transposed_attention(query, key, mask, grad, lse, is_causal, scale, out)
    return out


_attention_op = torch.library.custom_op(
    "fullgrad_theory::transposed_attention", _transposed_attention, mutates_args=()
)


_attention_op.register_fake(lambda query, key, mask, grad, *rest: _empty(key, grad))


def _direct(*values: Tensor) -> bool:
    """Whether a kernel is launched at once: an operation of one's own costs more than the launch,
    and is needed for what compiles or maps it alone."""
    return not torch.compiler.is_compiling() and not any(map(is_batched, values))


def _empty(key: Tensor, grad: Tensor) -> Tensor:
    """Heads behind tokens in memory, as the projection that made them has them."""
    batch, heads, _, width = grad.shape
    return grad.new_empty(batch, key.shape[-2], heads, width).transpose(1, 2)


def takes_gelu(grad: Tensor, u: Tensor) -> bool:
    """Whether `gelu_product` can be given these."""
    return (
        u.is_cuda
        and _able(u.device)
        and u.dtype == grad.dtype
        and u.dtype in _DTYPES
        and u.is_contiguous()
        and grad.is_contiguous()
        and u.shape == grad.shape
        and u.numel() > 0
    )


def gelu_product(grad: Tensor, u: Tensor, tanh: bool) -> Tensor:
    """grad * gelu(u)/u in float32, rounded once; `tanh`: of that approximation."""
    from . import triton_kernels

    out = torch.empty_like(u)
    triton_kernels.gelu_product(grad, u, tanh, out)
    return out
