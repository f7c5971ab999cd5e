"""An attribution map: how much each place in an input contributes to an output."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from .axes import IMAGE, Axes
from .layouts import Cell, regrid

_SMOOTH = {1: "linear", 2: "bicubic"}
"""how a map is drawn larger, by how many dimensions of places it has"""


@dataclass(frozen=True)
class MethodResult:
    """What a method found: `values` (B, h, w) of cells of some size in pixels (of a sequence one
    row of tokens), and the total, (B,), where it has a sum to keep."""

    values: Tensor
    cell: Cell
    total: Tensor | None = None


@dataclass(frozen=True)
class Map:
    """`values`: (B, h, w) on the token grid, or (B, H, W) pixels; of a text (B, T). `output`: (B,),
    the target's value; `target`: (B,), its index, None where it is no class of a row of them.
    `image`: (H, W), or (T,); `cell`: height and width in pixels of one of the values; `tiled`: of
    what the model's tokens cover, from the top left, where that is not the image. `axes`: what the
    input's dimensions mean; a map has its places.

    `total`: (B,), the sum of all contributions where the method has a sum to keep (those of prefix
    tokens, pooled vectors and head biases among them, which have no place on the grid), else None.
    """

    method: str
    values: Tensor
    output: Tensor
    target: Tensor | None
    total: Tensor | None
    image: tuple[int, ...]
    cell: tuple[float, ...] = (1.0, 1.0)
    tiled: tuple[float, ...] | None = None
    axes: Axes = IMAGE

    @property
    def error(self) -> Tensor | None:
        """|output - total| / |output|, (B,); None where no total is defined."""
        return None if self.total is None else (self.output - self.total).abs() / self.output.abs()

    def pixels(self, size: tuple[int, ...] | None = None) -> Tensor:
        """(B, H, W): bicubic up to `size`, by default the image's; (B, T) of a sequence, linear.
        Values are interpolated, not shared out: they keep their height, not their sum. Pixels that
        no token covers are 0."""
        size = size or self.image
        if tuple(self.values.shape[1:]) == tuple(size):
            return self.values
        covered = [
            round(wanted * min(1.0, count * each / whole))
            for wanted, count, each, whole in zip(
                size, self.values.shape[1:], self.cell, self.image, strict=True
            )
        ]
        up = F.interpolate(
            self.values[:, None], size=covered, mode=_SMOOTH[len(covered)], align_corners=False
        )
        missing = [(0, whole - part) for whole, part in zip(size, covered, strict=True)]
        return F.pad(up[:, 0], [by for pair in reversed(missing) for by in pair])

    def tokens(self, grid: tuple[int, ...]) -> Tensor:
        """(B, h, w): summed down, or spread evenly, onto a grid of h x w cells over the part of the
        image that the model's tokens cover; its sum is kept. Of a sequence (B, n)."""
        sizes = zip(self.tiled or self.image, grid, strict=True)
        return regrid(self.values, self.cell, [whole / count for whole, count in sizes], grid)
