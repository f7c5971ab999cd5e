"""Attention whose weights are held fixed: its value by ATen's kernel, its gradient P^T g alone."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .calls import as_one_call, wide_dtype
from .record import Frozen

aten = torch.ops.aten

CHUNK = 2**22
"""Most attention weights held at once in the backward of `attention`, for more than one head."""


class _Attention(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        value: Tensor,
        computed: Tensor,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        scale: float,
    ) -> Tensor:
        return computed.view_as(computed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        value, _, query, key, mask, ctx.is_causal, ctx.scale = inputs
        ctx.value_shape = value.shape
        ctx.save_for_backward(query, key, mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, mask = ctx.saved_tensors
        dv = _transposed_attention(query, key, mask, grad, ctx.is_causal, ctx.scale)
        if dv.dim() > 2 and ctx.value_shape[-3] != dv.shape[-3]:  # grouped or shared heads
            dv = dv.unflatten(-3, (ctx.value_shape[-3], -1)).sum(-3)
        return dv.sum_to_size(ctx.value_shape), None, None, None, None, None, None


def _transposed_attention(
    query: Tensor, key: Tensor, mask: Tensor | None, grad: Tensor, is_causal: bool, scale: float
) -> Tensor:
    """P^T grad, with P = softmax(query key^T scale + mask) in float32 or wider, head by head."""
    dtype = grad.dtype
    wide = wide_dtype(dtype)
    length, source = query.shape[-2], key.shape[-2]
    lead = grad.shape[:-2]
    if lead and key.dim() > 2 and key.shape[-3] != lead[-1]:
        key = key.repeat_interleave(lead[-1] // key.shape[-3], -3)
    if is_causal:
        mask = torch.ones(length, source, dtype=torch.bool, device=query.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=wide).masked_fill(mask.logical_not(), -math.inf)
    q = query.expand(*lead, *query.shape[-2:]).reshape(-1, length, query.shape[-1]).to(wide)
    k = key.expand(*lead, *key.shape[-2:]).reshape(-1, source, key.shape[-1]).to(wide)
    g = grad.reshape(-1, length, grad.shape[-1]).to(wide)
    index = None
    if mask is not None:
        mask = mask.to(wide).expand(*mask.shape[:-2], length, source)
        own = mask.shape[:-2]
        index = torch.arange(math.prod(own), device=mask.device).view(own).expand(lead).reshape(-1)
        mask = mask.reshape(-1, length, source)
    step = max(1, CHUNK // max(1, length * source))
    parts = []
    for i in range(0, q.shape[0], step):
        scores = torch.bmm(q[i : i + step] * scale, k[i : i + step].mT)
        if mask is None or index is None:
            weights = scores.softmax(-1)
        else:
            weights = aten._safe_softmax.default(scores + mask[index[i : i + step]], -1)
        parts.append(torch.bmm(weights.mT, g[i : i + step]))
    dv = torch.cat(parts).reshape(*lead, source, grad.shape[-1])
    return dv.to(dtype)


@as_one_call
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """aten.scaled_dot_product_attention with query and key pruned: dV = P^T g alone.

    P is recomputed from query and key (in float32 for 16-bit dtypes), at most CHUNK weights at a
    time; fully masked rows weigh nothing. Saves query, key, mask. A mask that asks for a gradient
    gets ATen's. Raises ValueError for dropout. Autograd refuses in-place writes to the result.
    """
    if dropout_p:
        raise ValueError(f"attention with dropout_p={dropout_p} is random: call model.eval() first")
    if attn_mask is not None and attn_mask.requires_grad:
        held = query.detach(), key.detach(), value, attn_mask, 0.0, is_causal
        return aten.scaled_dot_product_attention.default(*held, scale=scale, enable_gqa=enable_gqa)
    # called here and not in the Function, so that grad mode and requires_grad choose the kernel
    computed = aten.scaled_dot_product_attention.default(
        query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
    ).detach()
    if scale is None:
        scale = query.shape[-1] ** -0.5
    # under autocast the weights are those of the rounded query and key
    q, k = query.detach().to(computed.dtype), key.detach().to(computed.dtype)
    return _Attention.apply(value, computed, q, k, attn_mask, is_causal, scale)


HELD_WEIGHTS = Frozen(attention, exact=True, held=("query", "key"))
