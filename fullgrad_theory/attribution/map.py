"""An attribution map: how much each place in an image contributes to an output."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from .layouts import Cell, regrid


@dataclass(frozen=True)
class MethodResult:
    """What a method found: `values` (B, h, w) of cells of some size in pixels, and the total, (B,),
    where it has a sum to keep."""

    values: Tensor
    cell: Cell
    total: Tensor | None = None


@dataclass(frozen=True)
class Map:
    """`values`: (B, h, w) on the token grid, or (B, H, W) pixels. `output`: (B,), the target's
    value; `target`: (B,), its index, None where the output has one value only. `image`: (H, W);
    `cell`: height and width in pixels of one of the values; `tiled`: of what the model's tokens
    cover, from the top left, where that is not the image.

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
    tiled: tuple[float, float] | None = None

    @property
    def error(self) -> Tensor | None:
        """|output - total| / |output|, (B,); None where no total is defined."""
        return None if self.total is None else (self.output - self.total).abs() / self.output.abs()

    def pixels(self, size: tuple[int, int] | None = None) -> Tensor:
        """(B, H, W): bicubic up to `size`, by default the image's. Values are interpolated, not
        shared out: they keep their height, not their sum. Pixels that no token covers are 0."""
        size = size or self.image
        if tuple(self.values.shape[1:]) == tuple(size):
            return self.values
        covered = [
            round(wanted * min(1.0, count * each / whole))
            for wanted, count, each, whole in zip(
                size, self.values.shape[1:], self.cell, self.image, strict=True
            )
        ]
        up = F.interpolate(self.values[:, None], size=covered, mode="bicubic", align_corners=False)
        return F.pad(up[:, 0], (0, size[1] - covered[1], 0, size[0] - covered[0]))

    def tokens(self, grid: tuple[int, int]) -> Tensor:
        """(B, h, w): summed down, or spread evenly, onto a grid of h x w cells over the part of the
        image that the model's tokens cover; its sum is kept."""
        height, width = self.tiled or self.image
        return regrid(self.values, self.cell, (height / grid[0], width / grid[1]), grid)
