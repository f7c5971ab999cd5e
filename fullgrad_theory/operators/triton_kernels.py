"""The kernels of `fused`, in Triton. Imported where they run: on a GPU, or in its interpreter."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def _masked(
    s, mask, mask_rows, mask_columns, rows, columns, length, source,
    MASK: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Scores in base 2 with what masks them; `rows` are the places of queries and `columns` of
    keys, each in the shape in which it meets the other; what a query does not see is -inf."""
    seen = (rows < length) & (columns < source)
    if MASK == 1:
        seen &= tl.load(mask + rows * mask_rows + columns * mask_columns, seen, other=0) != 0
    if MASK == 2:
        added = tl.load(mask + rows * mask_rows + columns * mask_columns, seen, other=0.0)
        s += added.to(tl.float32) * LOG2E
    if CAUSAL:
        seen &= columns <= rows
    return tl.where(seen, s, -float("inf"))


@triton.jit
def _log_sum_exp(
    Q, K, MASKS, LSE, scale,
    qb, qh, qm, qd, kb, kh, kn, kd, mb, mh, mm, mn,
    heads, group, length, source, D,
    BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """log sum_keys exp(score) of a block of queries, +inf where they see no key."""
    both = tl.program_id(1).to(tl.int64)
    b, h = both // heads, both % heads
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    d = tl.arange(0, BD)
    q = tl.load(
        Q + b * qb + h * qh + m[:, None] * qm + d[None, :] * qd,
        (m[:, None] < length) & (d[None, :] < D), other=0.0,
    )  # fmt: skip
    keys = K + b * kb + (h // group) * kh
    masks = MASKS + b * mb + h * mh
    most = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    end = tl.minimum(source, (tl.program_id(0) + 1) * BM) if CAUSAL else source
    for start in range(0, end, BN):
        n = start + tl.arange(0, BN)
        k = tl.load(
            keys + d[:, None] * kd + n[None, :] * kn,
            (d[:, None] < D) & (n[None, :] < source), other=0.0,
        )  # fmt: skip
        s = tl.dot(q, k, input_precision=PRECISION) * scale
        s = _masked(
            s, masks, mm, mn, m[:, None], n[None, :], length, source, MASK, CAUSAL
        )  # fmt: skip
        now = tl.maximum(most, tl.max(s, 1))
        finite = tl.where(now == -float("inf"), 0.0, now)
        total = total * tl.exp2(most - finite) + tl.sum(tl.exp2(s - finite[:, None]), 1)
        most = now
    power = most + tl.log2(tl.where(total > 0, total, 1.0))
    value = tl.where(total > 0, power / LOG2E, float("inf"))
    tl.store(LSE + both * length + m, value, m < length)


@triton.jit
def _transposed_product(
    Q, K, MASKS, LSE, G, OUT, scale,
    qb, qh, qm, qd, kb, kh, kn, kd, mb, mh, mm, mn, gb, gh, gm, ge, ob, oh, on, oe,
    heads, group, length, source, D, E,
    BD: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P^T g of a block of keys: over the queries, exp(score - log-sum-exp) times the cotangent."""
    both = tl.program_id(1).to(tl.int64)
    b, h = both // heads, both % heads
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    d = tl.arange(0, BD)
    e = tl.arange(0, BE)
    k = tl.load(
        K + b * kb + (h // group) * kh + n[:, None] * kn + d[None, :] * kd,
        (n[:, None] < source) & (d[None, :] < D), other=0.0,
    )  # fmt: skip
    queries, cotangents = Q + b * qb + h * qh, G + b * gb + h * gh
    masks = MASKS + b * mb + h * mh
    total = tl.zeros([BN, BE], tl.float32)
    begin = (tl.program_id(0) * BN) // BM * BM if CAUSAL else 0
    for start in range(begin, length, BM):
        m = start + tl.arange(0, BM)
        q = tl.load(
            queries + d[:, None] * qd + m[None, :] * qm,
            (d[:, None] < D) & (m[None, :] < length), other=0.0,
        )  # fmt: skip
        # of queries that are none the log-sum-exp is infinite: no mask is needed for the edge
        lse = tl.load(LSE + both * length + m, m < length, other=float("inf")) * LOG2E
        s = tl.dot(k, q, input_precision=PRECISION) * scale
        if CAUSAL or MASK > 0:
            s = _masked(
                s, masks, mm, mn, m[None, :], n[:, None], length, source, MASK, CAUSAL
            )  # fmt: skip
        p = tl.exp2(s - lse[None, :])
        g = tl.load(
            cotangents + m[:, None] * gm + e[None, :] * ge,
            (m[:, None] < length) & (e[None, :] < E), other=0.0,
        )  # fmt: skip
        total += tl.dot(p.to(g.dtype), g, input_precision=PRECISION)
    tl.store(
        OUT + b * ob + h * oh + n[:, None] * on + e[None, :] * oe,
        total.to(OUT.dtype.element_ty), (n[:, None] < source) & (e[None, :] < E),
    )  # fmt: skip


def _sizes(width: int, single: bool) -> dict[str, int]:
    """Of blocks of queries (BM) and keys (BN), by the width of a head and whether it is float32:
    what they share must fit into 99 KB on most cards."""
    if width <= 64:
        sizes = (32, 64, 4, 3) if single else (64, 128, 4, 3)
    elif width <= 128:
        sizes = (32, 64, 8, 1) if single else (64, 64, 8, 2)
    else:
        sizes = (32, 32, 8, 1) if single else (32, 64, 8, 2)
    return dict(zip(("BM", "BN", "num_warps", "num_stages"), sizes, strict=True))


def transposed_attention(
    query: Tensor, key: Tensor, mask: Tensor | None, grad: Tensor, lse: Tensor | None,
    is_causal: bool, scale: float, out: Tensor,
) -> None:  # fmt: skip
    """P^T grad into `out`. Four dimensions each, batch and heads before tokens; key may have fewer
    heads; `mask` is expanded to (batch, heads, length, source). `lse`: of the forward, if kept."""
    batch, heads, length, width = query.shape
    source, depth = key.shape[-2], grad.shape[-1]
    single = query.dtype == torch.float32
    exact = single and not torch.backends.cuda.matmul.allow_tf32
    sizes = _sizes(max(width, depth), single)
    settings: dict[str, Any] = {
        "BD": max(16, triton.next_power_of_2(width)),
        "MASK": 0 if mask is None else 1 if mask.dtype == torch.bool else 2,
        "CAUSAL": is_causal,
        "PRECISION": "ieee" if exact else "tf32",
        **sizes,
    }
    masks = query if mask is None else mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    steps = masks.stride() if mask is not None else (0, 0, 0, 0)
    shape = heads, heads // key.shape[1], length, source, width
    given = *query.stride(), *key.stride(), *steps
    scale *= math.log2(math.e)
    if lse is None:
        lse = query.new_empty(batch, heads, length, dtype=torch.float32)
        grid = triton.cdiv(length, sizes["BM"]), batch * heads
        _log_sum_exp[grid](query, key, masks, lse, scale, *given, *shape, **settings)
    grid = triton.cdiv(source, sizes["BN"]), batch * heads
    _transposed_product[grid](
        query, key, masks, lse.contiguous(), grad, out, scale,
        *given, *grad.stride(), *out.stride(), *shape, depth,
        BE=max(16, triton.next_power_of_2(depth)), **settings,
    )  # fmt: skip


@triton.jit
def _gelu_product(G, U, OUT, count, TANH: tl.constexpr, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < count
    u = tl.load(U + places, inside, other=0.0).to(tl.float32)
    g = tl.load(G + places, inside, other=0.0).to(tl.float32)
    if TANH:
        gate = tl.sigmoid(1.5957691216057308 * u * (1.0 + 0.044715 * u * u))
    else:
        gate = 0.5 * (1.0 + tl.erf(u * 0.7071067811865476))
    tl.store(OUT + places, (g * gate).to(OUT.dtype.element_ty), inside)


def gelu_product(grad: Tensor, u: Tensor, tanh: bool, out: Tensor) -> None:
    """grad * gelu(u)/u into `out`, all of them contiguous and of one shape."""
    count = u.numel()
    _gelu_product[(triton.cdiv(count, 1024),)](grad, u, out, count, TANH=tanh, BLOCK=1024)
