"""The inputs of a model, as the command line names them: `2,16:int64`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """One argument of a model: sizes, and its dtype where it is not the model's."""

    sizes: tuple[int, ...]
    dtype: torch.dtype | None = None

    @classmethod
    def parse(cls, text: str) -> Shape:
        """`'1,3,224,224'` or `'2,16:int64'`; raises `InputError`."""
        sizes, _, kind = text.partition(":")
        numbers = [part.strip() for part in sizes.split(",")]
        if not all(n.isdecimal() and int(n) > 0 for n in numbers):
            raise InputError(f"{text!r} is no shape; write sizes above 0 like 1,3,224,224")
        return cls(tuple(map(int, numbers)), _dtype(kind) if kind else None)


def _dtype(name: str) -> torch.dtype:
    import torch

    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise InputError(f"{name!r} is no dtype of torch; try float32, int64 or bool")
    return found


def draw(
    shapes: Sequence[Shape], device: torch.device, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, ...]:
    """Seeded tensors of these shapes: normal in `dtype`, integers and bools from {0, 1}.

    0 and 1 are valid as token ids, as classes and as a mask, whatever the vocabulary.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)

    def one(shape: Shape) -> Tensor:
        kind = shape.dtype or dtype
        if kind.is_floating_point or kind.is_complex:
            wide = torch.complex64 if kind.is_complex else torch.float32
            tensor = torch.randn(shape.sizes, generator=generator, dtype=wide)
        else:
            tensor = torch.randint(0, 2, shape.sizes, generator=generator)
        return tensor.to(device, kind)

    return tuple(map(one, shapes))
