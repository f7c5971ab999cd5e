"""An attribution map: how much each place in an image contributes to an output."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .layout import regrid


@dataclass(frozen=True)
class Map:
    """`values`: (B, h, w) on the token grid, or (B, H, W) pixels. `output`: (B,), the target's
    value; `target`: (B,), its index, None where the output has one value only. `image`: (H, W).

    `total`: (B,), the sum of all contributions where the method has a sum to keep (those of prefix
    tokens, pooled vectors and head biases among them, which have no place on the grid), else None.
    """

    method: str
    values: Tensor
    output: Tensor
    target: Tensor | None
    total: Tensor | None
    image: tuple[int, int]
    cell: tuple[float, float] = (1.0, 1.0)

    @property
    def error(self) -> Tensor | None:
        """|output - total| / |output|, (B,); None where no total is defined."""
        return None if self.total is None else (self.output - self.total).abs() / self.output.abs()

    def pixels(self, size: tuple[int, int] | None = None) -> Tensor:
        """(B, H, W): bicubic up to `size`, by default the image's. Values are interpolated, not
        shared out: they keep their height, not their sum."""
        size = size or self.image
        if tuple(self.values.shape[1:]) == tuple(size):
            return self.values
        up = F.interpolate(self.values[:, None], size=size, mode="bicubic", align_corners=False)
        return up[:, 0]

    def tokens(self, grid: tuple[int, int]) -> Tensor:
        """(B, h, w): summed down, or spread evenly, onto a grid of h x w; the sum is kept."""
        rows, columns = grid
        have = 1.0 / self.values.shape[1], 1.0 / self.values.shape[2]
        if have == (1.0 / rows, 1.0 / columns):
            return self.values
        scale = rows * self.values.shape[1], columns * self.values.shape[2]
        onto = float(scale[0] // rows), float(scale[1] // columns)
        cell = float(scale[0] // self.values.shape[1]), float(scale[1] // self.values.shape[2])
        return regrid(self.values, cell, onto, grid)

    def to(self, *args: object) -> Map:
        """The map with its tensors moved or cast, as `Tensor.to`."""
        moved = {
            name: value.to(*args) if isinstance(value, Tensor) else value
            for name, value in self.__dict__.items()
        }
        if isinstance(moved["target"], Tensor):
            moved["target"] = moved["target"].to(torch.long)
        return Map(**moved)
