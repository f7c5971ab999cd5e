"""What the dimensions of an input mean: samples, places, features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError


@dataclass(frozen=True)
class Axes:
    """The dimensions of an input by what they mean. The first holds the samples. A map lives on the
    `places`: one dimension (a text's tokens, time) or two (rows and columns); `features` (channels,
    an embedding) are summed at each place. `called`: what a sample is, for messages.

    Inside of this package places are rows and columns always: a sequence is one row.
    """

    places: tuple[int, ...]
    features: tuple[int, ...] = ()
    called: str = "input"

    def fit(self, rank: int) -> None:
        """Raises `InputError` where these are not all dimensions of a value, each once."""
        named = (0, *self.places, *self.features)
        if sorted(named) != list(range(rank)) or not 1 <= len(self.places) <= 2:
            raise InputError(
                f"axes name each dimension behind the batch once, 1 to {rank - 1}, one or two of "
                f"them as places; not places {self.places} and features {self.features}"
            )

    def rows(self, shape: Sequence[int]) -> tuple[int, int]:
        """How many rows and columns of places a value of this shape has."""
        *first, columns = (int(shape[dim]) for dim in self.places)
        return (first[0] if first else 1), columns

    def on_grid(self, values: Tensor) -> Tensor:
        """The values summed over features: (batch, rows, columns)."""
        moved = values.permute(0, *self.features, *self.places)
        moved = moved.reshape(moved.shape[0], -1, *moved.shape[moved.dim() - len(self.places) :])
        return moved.sum(1).unflatten(1, (1, -1)) if len(self.places) == 1 else moved.sum(1)

    def joined(self, values: Sequence[Tensor]) -> Tensor:
        """Several values of the same places as one, side by side along the first feature."""
        return values[0] if len(values) == 1 else torch.cat([*values], self.features[0])

    def parted(self, value: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        """What was joined, in parts as wide as these."""
        if len(like) == 1:
            return [value]
        dim = self.features[0]
        return list(value.split([part.shape[dim] for part in like], dim))

    def off_grid(self, grid: Tensor) -> Tensor:
        """(batch, rows, columns) as (batch, *places)."""
        return grid.flatten(1, -len(self.places))


IMAGE = Axes((2, 3), (1,), called="image")
"""(B, C, H, W)"""
TOKENS = Axes((1,), (2,), called="text")
"""(B, T, width): embedded tokens, or any sequence of vectors"""


def usual(rank: int) -> Axes | None:
    """What the dimensions of a value of so many mean, where nobody says it."""
    return {4: IMAGE, 3: TOKENS}.get(rank)
