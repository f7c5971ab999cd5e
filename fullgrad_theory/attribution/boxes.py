"""Boxes of places, one for every element of a value: where in the input the element belongs.

A tensor of shape (4, *shape), the value's dimensions or 1 where the box is the same along them;
the four planes are top, bottom, left, right, of pixels in an image, of tokens in the one row that a
text is. An empty box belongs nowhere (a class token, a constant); the whole is as good as nowhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .axes import Axes

_EMPTY = (math.inf, -math.inf, math.inf, -math.inf)


def places(shape: Sequence[int], axes: Axes) -> Tensor:
    """The boxes of an input of this shape: one place an element, one sample below the other, so
    that a box tells its sample as well."""
    height, width = axes.rows(shape)

    def along(dim: int, count: int) -> Tensor:
        return torch.arange(count).view([-1 if d == dim else 1 for d in range(len(shape))])

    y, x = height * along(0, shape[0]), along(axes.places[-1], width)
    if len(axes.places) > 1:
        y = y + along(axes.places[0], height)
    y, x = torch.broadcast_tensors(y, x)
    return torch.stack([y, y + 1, x, x + 1]).float()


def empty(rank: int) -> Tensor:
    """Boxes that are all empty, for a value of so many dimensions."""
    return torch.tensor(_EMPTY).reshape(4, *[1] * rank)


def is_empty(boxes: Tensor) -> Tensor:
    """Which boxes are empty; of shape `boxes.shape[1:]`."""
    return (boxes[0] >= boxes[1]) | (boxes[2] >= boxes[3])


def tidy(boxes: Tensor) -> Tensor:
    """The same boxes: empty ones in one form, dimensions along which nothing changes of size 1."""
    boxes = torch.where(is_empty(boxes), empty(boxes.dim() - 1), boxes)
    for dim in range(1, boxes.dim()):
        first = boxes.narrow(dim, 0, min(1, boxes.shape[dim]))
        if boxes.shape[dim] > 1 and bool((boxes == first).all()):
            boxes = first
    return boxes


def union(boxes: Tensor, dims: Sequence[int]) -> Tensor:
    """The smallest boxes around those along `dims` of the value, which are kept with size 1."""
    for dim in dims:
        at = dim + 1 if dim >= 0 else dim
        low, high = boxes[[0, 2]].amin(at, keepdim=True), boxes[[1, 3]].amax(at, keepdim=True)
        boxes = torch.stack([low[0], high[0], low[1], high[1]])
    return boxes


def around(first: Tensor, second: Tensor) -> Tensor:
    """The smallest boxes around two of each."""
    both = torch.stack(torch.broadcast_tensors(first, second), 1)
    return union(both, (0,)).squeeze(1)


def meet(first: Tensor, second: Tensor) -> Tensor:
    """What two say of one element: the overlap; where one is empty, or they disagree, the other
    (the first)."""
    rank = max(first.dim(), second.dim()) - 1
    first, second = (
        b.reshape(4, *[1] * (rank - b.dim() + 1), *b.shape[1:]) for b in (first, second)
    )
    overlap = torch.stack(
        [
            torch.maximum(first[0], second[0]),
            torch.minimum(first[1], second[1]),
            torch.maximum(first[2], second[2]),
            torch.minimum(first[3], second[3]),
        ]
    )
    kept = torch.where(is_empty(first), second, first)
    return tidy(torch.where(is_empty(overlap), kept, overlap))
