"""The layout of a value: which of its elements belong to which cell of a grid over the image."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from . import boxes as bx

Cell = tuple[float, float]


@dataclass(frozen=True)
class Layout:
    """`index`: the cell of each element of one sample's value, row by row, or -1 for none; of size
    1 along dimensions that do not matter (channels). `cell`: height and width of a cell in pixels;
    `canvas`: rows and columns that cover the image; `grid`: those that are in use. `batch`: the
    dimension that holds the batch, and how many entries a sample has there; None where the value
    is of one sample."""

    index: Tensor
    shape: torch.Size
    cell: Cell
    canvas: tuple[int, int]
    grid: tuple[int, int]
    batch: tuple[int, int] | None

    @property
    def placed(self) -> bool:
        """Whether any element has a place."""
        return bool((self.index >= 0).any())

    def split(self, values: Tensor) -> Tensor:
        """(..., batch * k, ...) -> (batch, *shape of one sample)."""
        if self.batch is None:
            return values.unsqueeze(0)
        dim, each = self.batch
        return values.unflatten(dim, (-1, each)).movedim(dim, 0)

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


def layout(
    boxes: Tensor | None, shape: torch.Size, image: tuple[int, int], batch: tuple[int, int] | None
) -> Layout:
    """The layout that a value's boxes give it. A box as large as the image is no place."""
    height, width = image
    boxes = bx.empty(len(shape)) if boxes is None else boxes
    top, bottom, left, right = boxes.unbind(0)
    placed = ~bx.is_empty(boxes) & ((bottom - top) * (right - left) < height * width)
    if not bool(placed.any()):
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


def regrid(values: Tensor, cell: Cell, onto: Cell, grid: tuple[int, int]) -> Tensor:
    """(batch, h, w) of cells of one size, onto a grid of another; sums are kept.

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
