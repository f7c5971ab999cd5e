"""The methods, each a function of what one pass gathered; the table is at the end.

Signed throughout: no method cuts off negative values but where its definition does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from .layouts import Cell, Layout, regrid, scatter
from .map import MethodResult
from .run import Need, Record, Weights
from .sampled import Sampling, integrated_gradients, random_normal, smoothgrad
from .structure import Attention, Block

_TINY = 1e-30  # against 0 / 0 alone


@dataclass(frozen=True)
class Method:
    """A row of the table. Exactly one of two makes its maps: `function`, of the `Record` of one
    pass, for which `needs` says what is gathered; or `sampled`, which runs the model by itself.

    Raises ValueError where neither is given, or both.
    """

    name: str
    source: str
    needs: frozenset[Need] = frozenset()
    function: Callable[[Record], MethodResult] | None = None
    sampled: Callable[[Sampling], MethodResult] | None = None

    def __post_init__(self) -> None:
        if (self.function is None) == (self.sampled is None):
            given = "neither" if self.function is None else "both"
            raise ValueError(
                f"the method {self.name!r} has {given} of function= (of one pass) and sampled= (it "
                "runs the model by itself); give exactly one"
            )

    def result(self, record: Record | None, sampling: Sampling) -> MethodResult:
        """Its maps; `record` may be left out where it samples."""
        if self.sampled is not None:
            return self.sampled(sampling)
        assert self.function is not None and record is not None
        return self.function(record)


def _sum(r: Record, parts: Iterable[tuple[Cell, Tensor]]) -> MethodResult:
    """Canvases of several cell sizes as one, on the first block's grid; sums are kept.

    Without blocks of such cells (an earlier stage's, LeGrad's last one), on the smallest cells.
    """
    parts = list(parts)
    cell, grid = _first_grid(r)
    if cell not in {c for c, _ in parts}:
        cell, grid = min(((c, (v.shape[1], v.shape[2])) for c, v in parts), key=lambda p: p[0])
    return MethodResult(_total_of(regrid(v, c, cell, grid) for c, v in parts), cell)


def _total_of(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(tensors)).sum(0)


# --------------------------------------------------------------------------- input and biases


def _input(r: Record) -> Tensor:
    return r.image * r.image_gradient


def _total(parts: Tensor) -> Tensor:
    return parts.flatten(1).sum(1, dtype=torch.float64)


def input_x_gradient(r: Record) -> MethodResult:
    """sum_c x dL/dx, at every pixel."""
    parts = _input(r)
    return MethodResult(parts.sum(1), (1.0, 1.0), _total(parts))


def fullgrad(r: Record) -> MethodResult:
    """x dL/dx and b dL/db of every bias, each where it lies."""
    image = _input(r)
    cell, grid = _first_grid(r)
    own = regrid(image.sum(1), (1.0, 1.0), cell, grid)
    parts = [own, *(regrid(v, c, cell, grid) for c, v in r.biases.items())]
    total = _total(image)
    return MethodResult(
        _total_of(parts), cell, total if r.bias_total is None else total + r.bias_total
    )


def _first_grid(r: Record) -> tuple[Cell, tuple[int, int]]:
    """The grid of the first block's input; pixels where there is no block."""
    if not r.anatomy.blocks:
        return (1.0, 1.0), r.anatomy.image
    layout = r.anatomy.stream[r.anatomy.blocks[0].input]
    return layout.cell, layout.grid


# --------------------------------------------------------------------------- blocks


def _products(r: Record, node: str) -> Tensor:
    """sum_c h dL/dh, (B, tokens)."""
    return (r.values[node] * r.gradients[node]).sum(-1)


def embedding_x_gradient(r: Record) -> MethodResult:
    """Input x gradient at the first block's input."""
    return _at(r, r.anatomy.blocks[0])


def hirescam(r: Record) -> MethodResult:
    """Input x gradient at the last block's input."""
    return _at(r, r.anatomy.blocks[-1])


def _at(r: Record, block: Block) -> MethodResult:
    products = _products(r, block.input)
    cell, canvas = r.on_canvas(block.input, products)
    return MethodResult(canvas, cell, _total(products))


def fullgrad_plus(r: Record) -> MethodResult:
    """Input x gradient summed over the inputs of all blocks, and all bias maps."""
    blocks = [r.on_canvas(b.input, _products(r, b.input)) for b in r.anatomy.blocks]
    return _sum(r, [*blocks, *r.biases.items()])


def _gradcam(r: Record, block: Block) -> tuple[Cell, Tensor]:
    h, g = r.values[block.input], r.gradients[block.input]
    return r.on_canvas(block.input, (h * g.mean(1, keepdim=True)).sum(-1))


def _xgradcam(r: Record, block: Block) -> tuple[Cell, Tensor]:
    h, g = r.values[block.input], r.gradients[block.input]
    size = h.abs()
    weights = (g * size).sum(1, keepdim=True) / size.sum(1, keepdim=True).clamp(min=_TINY)
    return r.on_canvas(block.input, (h * weights).sum(-1))


def gradcam_plus(r: Record) -> MethodResult:
    """sum over blocks and channels of h mean_tokens(dL/dh)."""
    return _sum(r, (_gradcam(r, b) for b in r.anatomy.blocks))


def xgradcam_plus(r: Record) -> MethodResult:
    """sum over blocks and channels of h sum_tokens(|h| dL/dh) / sum_tokens |h|."""
    return _sum(r, (_xgradcam(r, b) for b in r.anatomy.blocks))


# --------------------------------------------------------------------------- attention


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
        own, product = r.on_canvas(block.output, _products(r, block.output))
        grid = int(product.shape[1]), int(product.shape[2])
        parts.append((own, regrid(weight, cell, own, grid) * product))
    return _sum(r, parts)


def legrad(r: Record) -> MethodResult:
    """sum over layers of mean_{heads, queries} max(dL_l/dA_l, 0), L_l the head on layer l."""
    return _sum(r, (_from_keys(w.site, w.gradient.relu().mean(2).mean(2)) for w in r.layers))


def _readout(r: Record) -> Tensor:
    """Which tokens of the stream's end the output reads, (B, n): where its gradient arrives,
    each of them alike: the class token, or all where they are averaged."""
    reads = (r.gradients[r.anatomy.tail] != 0).any(-1).to(r.image.dtype)
    return reads / reads.sum(1, keepdim=True).clamp(min=1)


Mix = Callable[[Weights], Tensor]


@dataclass(frozen=True)
class _Row:
    """Relevance of tokens, (B, n), how they lie in the image, and each one's cell, (n,)."""

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
    return r.image.new_full((r.image.shape[0], site.query_tokens), 1 / site.query_tokens)


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


def raw_attention(r: Record) -> MethodResult:
    """The last attention, averaged over heads, at the row that the output reads."""
    w = r.attention[-1]
    if w.site.step is None:
        row = _even(r, w.site)
    else:
        row = _start(r, _mean).onto(w.site.query_layout, w.site.query_cells)
    return MethodResult(w.site.key_canvas(_step(row, w, _mean)), w.site.key_layout.cell)


def rollout(r: Record) -> MethodResult:
    """The product over layers of (I + mean_heads A) / 2, at the row that the output reads."""
    return _carried(r, _mean, 0.5)


def genatt(r: Record) -> MethodResult:
    """The product over layers of I + mean_heads max(A dL/dA, 0), at the row the output reads."""
    return _carried(r, _relevance)


# --------------------------------------------------------------------------- TokenTM


def _norm(tokens: Tensor) -> Tensor:
    return tokens.norm(dim=-1)


def _transformation(before: Tensor, after: Tensor) -> Tensor:
    """|E'| / |E| times the softmax over tokens of cos(E, E'), (B, n)."""
    coherence = F.cosine_similarity(before, after, dim=-1).softmax(-1)
    return _norm(after) / _norm(before).clamp(min=_TINY) * coherence


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


# --------------------------------------------------------------------------- the table


def _one_pass(
    name: str, source: str, function: Callable[[Record], MethodResult], *needs: Need
) -> Method:
    return Method(name, source, frozenset(needs), function=function)


_IMAGE, _BLOCKS, _BIASES = Need.IMAGE, Need.BLOCKS, Need.BIASES
_ATTENTION, _GRADIENT, _LAYERS = Need.ATTENTION, Need.ATTENTION_GRADIENT, Need.LAYERS
_STREAM, _STEADY = Need.STREAM, Need.STEADY
_ROWS = (
    _one_pass("input-x-gradient", "Shrikumar et al. 2016", input_x_gradient, _IMAGE),
    _one_pass("embedding-x-gradient", "LibraGrad, CVPR 2025", embedding_x_gradient, _BLOCKS),
    _one_pass("fullgrad", "Srinivas & Fleuret, NeurIPS 2019", fullgrad, _IMAGE, _BIASES),
    _one_pass("fullgrad+", "LibraGrad, CVPR 2025", fullgrad_plus, _BLOCKS, _BIASES),
    _one_pass("gradcam+", "Selvaraju et al. 2017; LibraGrad", gradcam_plus, _BLOCKS),
    _one_pass("hirescam", "Draelos & Carin 2020", hirescam, _BLOCKS),
    _one_pass("xgradcam+", "Fu et al. 2020; LibraGrad", xgradcam_plus, _BLOCKS),
    _one_pass("attcat", "Qiang et al., NeurIPS 2022", attcat, _BLOCKS, _ATTENTION, _STREAM),
    _one_pass("genatt", "Chefer et al., ICCV 2021", genatt, _GRADIENT, _STREAM),
    _one_pass("tokentm", "Wu et al., CVPR 2024", tokentm, _BLOCKS, _GRADIENT, _STREAM, _STEADY),
    _one_pass("legrad", "Bousselham et al. 2024", legrad, _LAYERS),
    _one_pass("raw-attention", "", raw_attention, _ATTENTION),
    _one_pass("rollout", "Abnar & Zuidema 2020", rollout, _ATTENTION, _STREAM),
    Method("random", "", sampled=random_normal),
    Method("integrated-gradients", "Sundararajan et al. 2017", sampled=integrated_gradients),
    Method("smoothgrad", "Smilkov et al. 2017", sampled=smoothgrad),
)
METHODS: Mapping[str, Method] = {method.name: method for method in _ROWS}
