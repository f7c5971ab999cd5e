"""The layout of a value: which of its elements belong to which cell of a grid over the input.

The input is an image, of rows and columns of pixels, or a sequence: one row of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from . import boxes as bx

Cell = tuple[float, float]


@dataclass(frozen=True)
class Batch:
    """Dimension `dim` of a value holds the batch, with `each` entries a sample; `major`: a sample's
    entries follow each other, else they lie a batch size apart."""

    dim: int
    each: int
    major: bool

    def split(self, values: Tensor) -> Tensor:
        """(..., batch and each, ...) -> (batch, ..., each, ...)."""
        if self.major:
            return values.unflatten(self.dim, (-1, self.each)).movedim(self.dim, 0)
        return values.unflatten(self.dim, (self.each, -1)).movedim(self.dim + 1, 0)


@dataclass(frozen=True)
class Layout:
    """`index`: the cell of each element of one sample's value, row by row, or -1 for none; of size
    1 along dimensions that do not matter (channels). `cell`: height and width of a cell in pixels;
    `canvas`: rows and columns that cover the input; `grid`: those that are in use. `batch`: how
    samples are told apart, None where the value is of one sample."""

    index: Tensor
    shape: torch.Size
    cell: Cell
    canvas: tuple[int, int]
    grid: tuple[int, int]
    batch: Batch | None

    @property
    def placed(self) -> bool:
        """Whether any element has a place."""
        return bool((self.index >= 0).any())

    def split(self, values: Tensor) -> Tensor:
        """The values of a batch as (batch, *shape of one sample)."""
        return values.unsqueeze(0) if self.batch is None else self.batch.split(values)

    def place(self, values: Tensor) -> Tensor:
        """The values summed up per cell, shape (batch, *canvas); those without a place left out."""
        rows = self._channels_last(self.split(values)).sum(-1)
        return self.on_canvas(rows)

    def on_canvas(self, tokens: Tensor) -> Tensor:
        """One number a token, (batch, tokens), summed per cell: (batch, *canvas)."""
        cells = scatter(tokens, self.index.flatten(), math.prod(self.canvas))
        return cells.unflatten(1, self.canvas)

    def tokens(self, values: Tensor) -> Tensor:
        """(batch, tokens, channels): tokens in the value's own order, prefix tokens included."""
        return self._channels_last(self.split(values))

    def _channels_last(self, values: Tensor) -> Tensor:
        own = [d for d, size in enumerate(self.index.shape) if size > 1]
        rest = [d for d in range(self.index.dim()) if d not in own]
        moved = values.permute(0, *(d + 1 for d in (*own, *rest)))
        return moved.reshape(values.shape[0], self.index.numel(), -1)


def scatter(rows: Tensor, index: Tensor, cells: int) -> Tensor:
    """(batch, n) summed into (batch, cells) by `index` (n,); -1 is dropped."""
    into = rows.new_zeros(rows.shape[0], cells + 1)
    return into.index_add_(1, index.to(rows.device).remainder(cells + 1), rows)[:, :cells]


def layout(boxes: Tensor, shape: torch.Size, size: tuple[int, int], batch: Batch | None) -> Layout:
    """The layout that one sample's boxes give; `size`: rows and columns of the input.

    A box around all the others, next to which the input has no room for a second one, is no place:
    a pooled vector's, a class token's behind attention. It need not reach the image's last pixels.
    Nor is one box for all elements: they are a token's that the head picked.
    """
    height, width = size
    top, bottom, left, right = boxes.unbind(0)
    whole = bx.union(boxes, range(boxes.dim() - 1))
    alone = (2 * (bottom - top) > height) & (2 * (right - left) > width)
    placed = ~bx.is_empty(boxes) & ~(alone & (boxes == whole).all(0))
    if placed.numel() == 1 or not bool(placed.any()):
        nowhere = torch.full([1] * len(shape), -1)
        return Layout(nowhere, shape, (float(height), float(width)), (1, 1), (1, 1), batch)
    tall = float((bottom - top)[placed].max())
    wide = float((right - left)[placed].max())
    canvas = math.ceil(height / tall), math.ceil(width / wide)
    rows = torch.where(placed, (top + bottom) / 2 / tall, 0.0).floor().long()
    columns = torch.where(placed, (left + right) / 2 / wide, 0.0).floor().long()
    grid = int(rows[placed].max()) + 1, int(columns[placed].max()) + 1
    index = torch.where(placed, rows * canvas[1] + columns, -1)
    return Layout(index, shape, (tall, wide), canvas, grid, batch)


def batch_of(boxes: Tensor, height: int, dim: int, each: int) -> Batch | None:
    """How two samples lie along a dimension, by the boxes of both, the second one below the first
    one; None where they say nothing, and entries are folded, or are mixed up."""
    if each == 1:
        return Batch(dim, 1, True)
    which = ((boxes[0] + boxes[1]) / 2 / height).floor().movedim(dim, -1)
    known = ~bx.is_empty(boxes).movedim(dim, -1)
    entries = torch.arange(2 * each)
    for major, sample in ((True, entries // each), (False, entries % 2)):
        if bool(known.any()) and bool((which == sample)[known].all()):
            return Batch(dim, each, major)
    return None


def regrid(
    values: Tensor, cell: Sequence[float], onto: Sequence[float], grid: Sequence[int]
) -> Tensor:
    """(batch, h, w) of cells of one size, onto a grid of another; sums are kept. One or more
    dimensions of places.

    A larger cell is spread evenly over the smaller ones that it covers.
    """
    for dim, (have, want) in enumerate(zip(cell, onto, strict=True), 1):
        values = _resize(values, dim, have, want, grid[dim - 1])
    return values


def _resize(values: Tensor, dim: int, have: float, want: float, size: int) -> Tensor:
    count = values.shape[dim]
    if have == want:
        many = 1
    elif have > want and (have / want).is_integer():
        many = int(have / want)
        values = values.repeat_interleave(many, dim) / many
    elif (want / have).is_integer():
        each = int(want / have)
        values = pad(values, dim, -count % each)
        values = values.unflatten(dim, (-1, each)).sum(dim + 1)
    else:  # shares of overlap
        edges = torch.arange(count, dtype=torch.float64, device=values.device) * have
        bins = torch.arange(size, dtype=torch.float64, device=values.device) * want
        low = torch.maximum(edges[:, None], bins)
        high = torch.minimum(edges[:, None] + have, bins + want)
        share = ((high - low).clamp(min=0) / have).to(values)
        return (values.movedim(dim, -1) @ share).movedim(-1, dim)
    return pad(values, dim, size - values.shape[dim])


def pad(values: Tensor, dim: int, by: int) -> Tensor:
    """Zeros behind the last entry, or entries taken off where `by` is negative."""
    return F.pad(values, [0, 0] * (values.dim() - 1 - dim) + [0, by])
