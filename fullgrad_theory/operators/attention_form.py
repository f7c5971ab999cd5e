"""Attention whose weights are held fixed: its value by ATen's kernel, its gradient P^T g alone."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import pad

from . import fused
from .calls import as_one_call, bound_once, is_batched, is_transformed, wide_dtype
from .record import Frozen

aten = torch.ops.aten

BLOCK = 2**20
"""attention weights at once in the backward of `attention`: they fit into a cache"""


@bound_once
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
        lse: Tensor | None,
    ) -> Tensor:
        return computed.view_as(computed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        value, _, query, key, mask, ctx.is_causal, ctx.scale, lse = inputs
        ctx.value_shape = value.shape
        ctx.save_for_backward(query, key, mask, lse)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, mask, lse = ctx.saved_tensors
        given = query, key, mask, grad, ctx.is_causal, ctx.scale
        if fused.takes(query, key, mask, grad):
            dv = fused.transposed_attention(*given, lse)
        else:
            dv = _transposed_attention(*given)
        heads, own = dv.shape[-3:-2], ctx.value_shape[-3:-2]
        if heads and own and heads != own:  # grouped or shared
            dv = dv.unflatten(-3, (*own, -1)).sum(-3)
        return dv.sum_to_size(ctx.value_shape), *[None] * 7


def _transposed_attention(
    query: Tensor, key: Tensor, mask: Tensor | None, grad: Tensor, is_causal: bool, scale: float
) -> Tensor:
    """P^T grad, with P = softmax(query key^T scale + mask) in float32 or wider.

    By blocks of heads, or of one head's queries: BLOCK weights at once, however many tokens.
    """
    dtype = grad.dtype
    wide = wide_dtype(dtype)
    length, source = query.shape[-2], key.shape[-2]
    lead = grad.shape[:-2]
    if 0 in (*grad.shape, source):
        return grad.new_zeros(*lead, source, grad.shape[-1])
    if lead and key.dim() > 2 and key.shape[-3] != lead[-1]:
        key = key.repeat_interleave(lead[-1] // key.shape[-3], -3)
    q = query.expand(*lead, *query.shape[-2:]).reshape(-1, length, query.shape[-1]).to(wide) * scale
    k = key.expand(*lead, *key.shape[-2:]).reshape(-1, source, key.shape[-1]).to(wide)
    g = grad.reshape(-1, length, grad.shape[-1]).to(wide)
    index = None
    if mask is not None:
        mask = mask.expand(*mask.shape[:-2], length, source)
        own = mask.shape[:-2]
        index = torch.arange(math.prod(own), device=mask.device).view(own).expand(lead).reshape(-1)
        mask = mask.reshape(-1, length, source)
    heads = max(1, BLOCK // max(1, length * source))
    rows = max(1, length if heads > 1 else min(length, BLOCK // source))
    parts = []
    for i in range(0, q.shape[0], heads):
        part = None
        for j in range(0, length, rows):
            # a causal query sees no key behind it
            seen = min(source, j + rows) if is_causal else source
            scores = torch.bmm(q[i : i + heads, j : j + rows], k[i : i + heads, :seen].mT)
            if is_causal:
                scores = scores.masked_fill(_behind(j, scores), -math.inf)
            if mask is None or index is None:
                weights = scores.softmax(-1)
            else:
                added = _added(mask[index[i : i + heads], j : j + rows, :seen], wide)
                weights = aten._safe_softmax.default(scores + added, -1)
            own_rows = g[i : i + heads].narrow(1, j, scores.shape[1])
            product = torch.bmm(weights.mT, own_rows)
            product = pad(product, (0, 0, 0, source - seen))
            part = product if part is None else part + product
        parts.append(k.new_zeros(1, source, g.shape[-1]) if part is None else part)
    dv = torch.cat(parts).reshape(*lead, source, grad.shape[-1])
    return dv.to(dtype)


def _behind(first: int, scores: Tensor) -> Tensor:
    """Which keys lie behind the queries from `first` on."""
    return torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(first + 1)


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What a mask adds to the scores."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask.logical_not(), -math.inf)


_MEANS_IT: dict[str, bool] = {}
"""by the name of a forward kernel: whether what it keeps is what `_log_sum_exp` takes it for"""


def _log_sum_exp(computed: Tensor, query: Tensor, key: Tensor, scale: float) -> Tensor | None:
    """That of the scores, (batch, heads, queries), where a GPU's forward has kept it.

    No document says what each kernel keeps, so the last query of its first call is looked at.
    """
    if not computed.is_cuda or torch.compiler.is_compiling() or is_batched(computed):
        return None
    kept, rows = getattr(computed.grad_fn, "_saved_logsumexp", None), computed.shape[:-1]
    if not isinstance(kept, Tensor) or kept.dtype != torch.float32 or kept.numel() != rows.numel():
        return None
    kept = kept.detach().reshape(rows)
    kernel = computed.grad_fn.name() if computed.grad_fn is not None else ""
    if kernel not in _MEANS_IT:
        if torch.cuda.is_current_stream_capturing():
            return None
        first = (0,) * (query.dim() - 2)
        q, k = query.detach()[first][-1].double(), key.detach()[first].double()
        expected = (k @ q * scale).logsumexp(0)
        apart = (kept[first][-1] - expected).abs()
        _MEANS_IT[kernel] = bool(apart < 0.02 * (1 + expected.abs()))
    return kept if _MEANS_IT[kernel] else None


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

    P is recomputed from query and key (in float32 for 16-bit dtypes), a block at a time: memory
    grows with the tokens, not with their square. On a GPU one Triton kernel does it. Fully masked
    rows weigh nothing. Saves query, key, mask. A mask that asks for a gradient gets ATen's.
    Raises ValueError for dropout. Autograd refuses in-place writes to the result.
    """
    if dropout_p:
        raise ValueError(f"attention with dropout_p={dropout_p} is random: call model.eval() first")
    if attn_mask is not None and (attn_mask.requires_grad or is_transformed()):
        held = query.detach(), key.detach(), value, attn_mask, 0.0, is_causal
        return aten.scaled_dot_product_attention.default(*held, scale=scale, enable_gqa=enable_gqa)
    # called here and not in the Function, so that grad mode and requires_grad choose the kernel
    computed = aten.scaled_dot_product_attention.default(
        query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    if scale is None:
        scale = query.shape[-1] ** -0.5
    sees_all = not is_causal or query.shape[-2] == key.shape[-2]  # the last query, every key
    asked = attn_mask is None and sees_all
    lse = _log_sum_exp(computed, query, key, scale) if asked else None
    computed = computed.detach()
    # under autocast the weights are those of the rounded query and key
    q, k = query.detach().to(computed.dtype), key.detach().to(computed.dtype)
    if not q.is_cuda:  # the blocks need them so, and views of a fused projection keep all of it
        q, k = q.contiguous(), k.contiguous()
    return _Attention.apply(value, computed, q, k, attn_mask, is_causal, scale, lse)


HELD_WEIGHTS = Frozen(attention, exact=True, held=("query", "key"))
