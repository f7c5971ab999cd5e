"""Methods of values times their gradients: the input's, the biases', the blocks' inputs'.

Signed throughout: no method cuts off negative values but where its definition does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from .layouts import Cell, regrid
from .map import MethodResult
from .run import Record
from .structure import Block

TINY = 1e-30  # against 0 / 0 alone


def summed(r: Record, parts: Iterable[tuple[Cell, Tensor]]) -> MethodResult:
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
    return r.input * r.input_gradient


def _total(parts: Tensor) -> Tensor:
    return parts.flatten(1).sum(1, dtype=torch.float64)


def input_x_gradient(r: Record) -> MethodResult:
    """sum_c x dL/dx, at every pixel or token."""
    parts = _input(r)
    return MethodResult(r.anatomy.source.axes.on_grid(parts), (1.0, 1.0), _total(parts))


def fullgrad(r: Record) -> MethodResult:
    """x dL/dx and b dL/db of every bias, each where it lies."""
    products = _input(r)
    cell, grid = _first_grid(r)
    own = regrid(r.anatomy.source.axes.on_grid(products), (1.0, 1.0), cell, grid)
    parts = [own, *(regrid(v, c, cell, grid) for c, v in r.biases.items())]
    total = _total(products)
    return MethodResult(
        _total_of(parts), cell, total if r.bias_total is None else total + r.bias_total
    )


def _first_grid(r: Record) -> tuple[Cell, tuple[int, int]]:
    """The grid of the first block's input; the input's own where there is no block."""
    if not r.anatomy.blocks:
        return (1.0, 1.0), r.anatomy.size
    layout = r.anatomy.stream[r.anatomy.blocks[0].input]
    return layout.cell, layout.grid


# --------------------------------------------------------------------------- blocks


def _each(r: Record, node: str) -> Tensor:
    """h dL/dh, (B, tokens, channels)."""
    return r.values[node] * r.gradients[node]


def token_products(r: Record, node: str) -> Tensor:
    """sum_c h dL/dh, (B, tokens)."""
    return _each(r, node).sum(-1)


def embedding_x_gradient(r: Record) -> MethodResult:
    """Input x gradient at the first block's input."""
    return _at(r, r.anatomy.blocks[0])


def hirescam(r: Record) -> MethodResult:
    """Input x gradient at the last block's input."""
    return _at(r, r.anatomy.blocks[-1])


def _at(r: Record, block: Block) -> MethodResult:
    products = token_products(r, block.input)
    cell, canvas = r.on_canvas(block.input, products)
    return MethodResult(canvas, cell, _total(products))


def hirescam_plus(r: Record) -> MethodResult:
    """Input x gradient summed over the inputs of all blocks: FullGrad+ without its bias maps."""
    return summed(r, _of_blocks(r, token_products))


def fullgrad_plus(r: Record) -> MethodResult:
    """Input x gradient summed over the inputs of all blocks, and the maps of the biases behind the
    first one: those before it are in its value (LibraGrad)."""
    return summed(r, [*_of_blocks(r, token_products), *r.later.items()])


def _of_blocks(r: Record, tokens: Callable[[Record, str], Tensor]) -> Iterator[tuple[Cell, Tensor]]:
    """What `tokens` makes of every block's input, (B, tokens), where it lies."""
    return (r.on_canvas(b.input, tokens(r, b.input)) for b in r.anatomy.blocks)


def _weighted(h: Tensor, weights: Tensor) -> Tensor:
    """sum_c h w of one weight a channel, (B, tokens)."""
    return (h * weights).sum(-1)


def _gradcam(r: Record, node: str) -> Tensor:
    return _weighted(r.values[node], r.gradients[node].mean(1, keepdim=True))


def gradcam_plus(r: Record) -> MethodResult:
    """sum over blocks and channels of h mean_tokens(dL/dh)."""
    return summed(r, _of_blocks(r, _gradcam))


def _gradcam_plus_plus(r: Record, node: str) -> Tensor:
    h, g = r.values[node], r.gradients[node]
    below = 2 * g**2 + h.sum(1, keepdim=True) * g**3
    alpha = torch.where(below == 0, 0.0, g**2 / torch.where(below == 0, 1.0, below))
    return _weighted(h, (alpha * g.relu()).sum(1, keepdim=True))


def gradcam_plus_plus(r: Record) -> MethodResult:
    """sum_c h sum_tokens(a max(g, 0)) at the last block, g = dL/dh and
    a = g^2 / (2 g^2 + g^3 sum_tokens h)."""
    node = r.anatomy.blocks[-1].input
    cell, canvas = r.on_canvas(node, _gradcam_plus_plus(r, node))
    return MethodResult(canvas, cell)


def _xgradcam(r: Record, node: str) -> Tensor:
    h, g = r.values[node], r.gradients[node]
    size = h.abs()
    below = size.sum(1, keepdim=True).clamp(min=TINY)
    return _weighted(h, (g * size).sum(1, keepdim=True) / below)


def xgradcam_plus(r: Record) -> MethodResult:
    """sum over blocks and channels of h sum_tokens(|h| dL/dh) / sum_tokens |h|."""
    return summed(r, _of_blocks(r, _xgradcam))


def _signed_xgradcam(r: Record, node: str) -> Tensor:
    h, g = r.values[node], r.gradients[node]
    below = h.sum(1, keepdim=True)
    below = torch.where(below == 0, TINY, below)
    return _weighted(h, (g * h).sum(1, keepdim=True) / below)


def signed_xgradcam_plus(r: Record) -> MethodResult:
    """sum over blocks and channels of h sum_tokens(h dL/dh) / sum_tokens h, as Fu et al. have it
    for values that are never negative."""
    return summed(r, _of_blocks(r, _signed_xgradcam))


# --------------------------------------------------------------------------- channels


def hirescam_plus_l1(r: Record) -> MethodResult:
    """sum over blocks of sum_c |h dL/dh|."""
    return summed(r, _of_blocks(r, lambda r, node: _each(r, node).abs().sum(-1)))


def hirescam_plus_l2(r: Record) -> MethodResult:
    """sum over blocks of (sum_c (h dL/dh)^2)^1/2."""
    return summed(r, _of_blocks(r, lambda r, node: _each(r, node).norm(dim=-1)))


def hirescam_plus_positive(r: Record) -> MethodResult:
    """sum over blocks of sum_c max(h dL/dh, 0)."""
    return summed(r, _of_blocks(r, lambda r, node: _each(r, node).relu().sum(-1)))
