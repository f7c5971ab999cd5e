"""Methods of attention: its maps and their gradients, summed over layers or carried through them.

A product of attention matrices is never formed: a row of relevance is carried from the output down.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from .layouts import Cell, Layout, regrid, scatter
from .map import MethodResult
from .products import TINY, summed, token_products
from .run import Record, Vectors, Weights
from .structure import Attention


def _from_keys(site: Attention, per_key: Tensor) -> tuple[Cell, Tensor]:
    """(B, windows, k) summed per key token, as its cell and (B, h, w)."""
    tokens = scatter(per_key.flatten(1), site.keys.flatten(), site.key_tokens)
    return site.key_layout.cell, site.key_canvas(tokens)


def attcat(r: Record) -> MethodResult:
    """sum over blocks of mean_{heads, queries}(A) times input x gradient at the block's output."""
    parts = []
    for w in r.attention:
        if w.site.step is None:
            continue
        block = next(b for b in r.anatomy.blocks if r.anatomy.steps[w.site.step] in b.steps)
        received = w.map.mean(2).mean(2)  # (B, windows, keys)
        cell, weight = _from_keys(w.site, received)
        own, product = r.on_canvas(block.output, token_products(r, block.output))
        grid = int(product.shape[1]), int(product.shape[2])
        parts.append((own, regrid(weight, cell, own, grid) * product))
    return summed(r, parts)


def legrad(r: Record) -> MethodResult:
    """sum over layers of mean_{heads, queries} max(dL_l/dA_l, 0), L_l the head on layer l."""
    return summed(r, (_from_keys(w.site, w.gradient.relu().mean(2).mean(2)) for w in r.layers))


def _product(w: Weights) -> Tensor:
    """mean_heads A dL/dA."""
    return (w.map * w.gradient).mean(2)


def gradsam(r: Record) -> MethodResult:
    """The mean over layers, heads and queries of A max(dL/dA, 0)."""
    parts = ((w.site, w.map * w.gradient.relu()) for w in r.attention)
    found = summed(r, (_from_keys(site, m.mean(2).mean(2)) for site, m in parts))
    return replace(found, values=found.values / len(r.attention))


def _readout(r: Record) -> Tensor:
    """Which tokens of the stream's end the output reads, (B, n): where its gradient arrives,
    each of them alike: the class token, or all where they are averaged."""
    reads = (r.gradients[r.anatomy.tail] != 0).any(-1).to(r.input.dtype)
    return reads / reads.sum(1, keepdim=True).clamp(min=1)


Mix = Callable[[Weights], Tensor]


@dataclass(frozen=True)
class _Row:
    """Relevance of tokens, (B, n), how they lie in the input, and each one's cell, (n,)."""

    tokens: Tensor
    layout: Layout
    cells: Tensor

    def onto(self, layout: Layout, cells: Tensor) -> Tensor:
        """The row over other tokens: a larger cell's share is spread evenly over what it covers.

        Prefix tokens go to prefix tokens where both have equally many, else they end here.
        """
        same = self.layout.cell == layout.cell and self.layout.canvas == layout.canvas
        if same and torch.equal(self.cells, cells):
            return self.tokens
        here = scatter(self.tokens, self.cells, math.prod(self.layout.canvas))
        grid = here.unflatten(1, self.layout.canvas)
        there = regrid(grid, self.layout.cell, layout.cell, layout.canvas).flatten(1)
        known = cells >= 0
        sharing = torch.bincount(cells[known], minlength=there.shape[1]).clamp(min=1)
        found = _at_tokens(there / sharing.to(there), cells)
        if int((~known).sum()) == int((self.cells < 0).sum()):
            prefix = ~known.to(found.device)
            found[:, prefix] = self.tokens[:, (self.cells < 0).to(found.device)]
        return found


def _of_stream(tokens: Tensor, layout: Layout) -> _Row:
    return _Row(tokens, layout, layout.index.flatten())


def _step(row: Tensor, w: Weights, mix: Mix) -> Tensor:
    """row M, with M of shape (B, windows, q, k): (B, query tokens) -> (B, key tokens)."""
    moved = torch.einsum("bwq,bwqk->bwk", _at_tokens(row, w.site.queries), mix(w).to(row))
    return scatter(moved.flatten(1), w.site.keys.flatten(), w.site.key_tokens)


def _at_tokens(row: Tensor, index: Tensor) -> Tensor:
    """(B, n) at `index` (windows, k); a window's padding reads nothing."""
    padded = F.pad(row, (0, 1))
    return padded[:, index.to(row.device).remainder(padded.shape[1])]


def _residual(row: Tensor, w: Weights, mix: Mix) -> Tensor:
    """row (I + M)."""
    site, moved = w.site, _step(row, w, mix)
    return row + _Row(moved, site.key_layout, site.key_cells).onto(
        site.query_layout, site.query_cells
    )


def _even(r: Record, site: Attention) -> Tensor:
    """All queries of a pooling attention alike."""
    return r.input.new_full((r.output.shape[0], site.query_tokens), 1 / site.query_tokens)


def _start(r: Record, mix: Mix, factor: float = 1.0) -> _Row:
    """The row to start from: of the head's own attention, where it pools by it, or `_readout`.

    A class token that reads the tokens is one of them: its row is carried by I + M, too.
    """
    row: _Row | None = None
    for w in reversed([w for w in r.attention if w.site.node in r.anatomy.pooling]):
        site = w.site
        start = _Row(_even(r, site), site.query_layout, site.query_cells) if row is None else row
        tokens = _step(start.onto(site.query_layout, site.query_cells), w, mix)
        if not site.latent:
            tokens = factor * (tokens + start.onto(site.key_layout, site.key_cells))
        row = _Row(tokens, site.key_layout, site.key_cells)
    if row is None:
        return _of_stream(_readout(r), r.anatomy.stream[r.anatomy.tail])
    return row


def _carried(r: Record, mix: Mix, factor: float = 1.0) -> MethodResult:
    """A row of relevance, carried from the output down through (I + M) of every attention."""
    row = _start(r, mix, factor)
    for w in reversed([w for w in r.attention if w.site.step is not None]):
        site = w.site
        tokens = row.onto(site.query_layout, site.query_cells)
        row = _Row(factor * _residual(tokens, w, mix), site.query_layout, site.query_cells)
        last = site
    return MethodResult(last.query_canvas(row.tokens), last.query_layout.cell)


def _mean(w: Weights) -> Tensor:
    return w.map.mean(2)


def _relevance(w: Weights) -> Tensor:
    """mean_heads max(A dL/dA, 0)."""
    return (w.map * w.gradient).relu().mean(2)


def _last(r: Record, mix: Mix) -> MethodResult:
    """The last attention, mixed over heads, at the row that the output reads."""
    w = r.attention[-1]
    if w.site.step is None:
        row = _even(r, w.site)
    else:
        row = _start(r, mix).onto(w.site.query_layout, w.site.query_cells)
    return MethodResult(w.site.key_canvas(_step(row, w, mix)), w.site.key_layout.cell)


def raw_attention(r: Record) -> MethodResult:
    """mean_heads A of the last attention, at the row that the output reads."""
    return _last(r, _mean)


def attention_gradient(r: Record) -> MethodResult:
    """mean_heads dL/dA of the last attention, at the row that the output reads."""
    return _last(r, lambda w: w.gradient.mean(2))


def attention_x_gradient(r: Record) -> MethodResult:
    """mean_heads A dL/dA of the last attention, at the row that the output reads."""
    return _last(r, _product)


def rollout(r: Record) -> MethodResult:
    """The product over layers of (I + mean_heads A) / 2, at the row that the output reads."""
    return _carried(r, _mean, 0.5)


def genatt(r: Record) -> MethodResult:
    """The product over layers of I + mean_heads max(A dL/dA, 0), at the row the output reads."""
    return _carried(r, _relevance)


# --------------------------------------------------------------------------- vectors


def _mixed(r: Record, of: Callable[[Vectors], Tensor]) -> MethodResult:
    """The product over layers of matrices whose rows are made to sum to 1, at the row that the
    output reads; residual branches are in the matrices."""
    row = _start(r, _mean)
    for v in reversed(r.vectors):
        site, matrix = v.site, of(v)
        share = matrix / matrix.sum(-1, keepdim=True).clamp(min=TINY)
        tokens = row.onto(site.query_layout, site.query_cells)
        row = _Row(
            (tokens[:, None] @ share[:, 0].to(tokens))[:, 0], site.key_layout, site.key_cells
        )
    site = r.vectors[0].site
    return MethodResult(site.key_canvas(row.tokens), site.key_layout.cell)


def globenc(r: Record) -> MethodResult:
    """The product of |T_ij| / sum_k |T_ik|, T the vectors that tokens give each other."""
    return _mixed(r, lambda v: v.norm)


def alti(r: Record) -> MethodResult:
    """The product of max(|y_i|_1 - |y_i - T_ij|_1, 0), rows made to sum to 1."""
    return _mixed(r, lambda v: v.near)


# --------------------------------------------------------------------------- TokenTM


def _norm(tokens: Tensor) -> Tensor:
    return tokens.norm(dim=-1)


def _transformation(before: Tensor, after: Tensor) -> Tensor:
    """|E'| / |E| times the softmax over tokens of cos(E, E'), (B, n)."""
    coherence = F.cosine_similarity(before, after, dim=-1).softmax(-1)
    return _norm(after) / _norm(before).clamp(min=TINY) * coherence


def tokentm(r: Record) -> MethodResult:
    """Relevance through attention and MLPs, weighted by how tokens change in length and angle."""
    row = _start(r, _relevance)
    for number, step in reversed(list(enumerate(r.anatomy.steps))):
        before, after = r.values[step.before], r.values[step.after]
        change = _transformation(before, after)
        layout = r.anatomy.stream[step.before]
        row = _of_stream(row.onto(layout, layout.index.flatten()), layout)
        attention = [w for w in r.attention if w.site.step == number]
        if not attention:
            row = _of_stream(row.tokens * (1 + change), layout)
        for w in reversed(attention):
            site = w.site
            own = _of_stream(change, layout).onto(site.key_layout, site.key_cells)
            tokens = row.onto(site.query_layout, site.query_cells)
            tokens = _residual(tokens, w, partial(_transformed, own))
            row = _Row(tokens, site.query_layout, site.query_cells)
    start = r.values[r.anatomy.steps[0].before]
    layout = r.anatomy.stream[r.anatomy.steps[0].before]
    tokens = row.onto(layout, layout.index.flatten())
    return MethodResult(layout.on_canvas(tokens * _norm(start)), layout.cell)


def _transformed(change: Tensor, w: Weights) -> Tensor:
    """(mean_heads A W) mean_heads max(dL/dA, 0), W the change of the token that is read."""
    read = _at_tokens(change, w.site.keys)
    return w.map.mean(2) * read[:, :, None] * w.gradient.relu().mean(2)
