"""Any image transform, applied to an image and to the masks that belong to it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InputError
from ..extras import require

if TYPE_CHECKING:
    from PIL import Image

Transform = Callable[["Image.Image"], Tensor]
"""From an RGB picture to (3, H, W) float32: `timm.data.create_transform(...)`, torchvision's."""


def to_tensor(image: Image.Image) -> Tensor:
    """(3, H, W) float32 in [-1, 1], the picture's own size: the transform where none is given."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def apply(
    image: Image.Image, masks: Mapping[int, NDArray[np.bool_]], transform: Transform | None
) -> tuple[Tensor, dict[int, Tensor]]:
    """The image, and each (H, W) mask as bool of the image's new size.

    A mask goes through the very same transform as a black and white picture, with the same random
    numbers. Where the result is nearer to what white becomes than to what black becomes is object;
    so resizing, cropping, flipping and normalising need no case of their own.
    """
    transform = transform or to_tensor
    with _same_numbers() as again:

        def run(picture: Image.Image) -> Tensor:
            again()
            return transform(picture)

        result = run(image)
        if not isinstance(result, Tensor) or result.dim() != 3:
            raise InputError(
                f"the transform must end in a (3, H, W) tensor, got {type(result).__name__}; "
                "add torchvision.transforms.ToTensor()"
            )
        if not masks:
            return result, {}
        pillow = require("PIL.Image", "vision")
        black, white = (run(pillow.new("RGB", image.size, (v, v, v))) for v in (0, 255))
        middle = (black + white) / 2
        moved = {
            key: ((run(pillow.fromarray(mask).convert("RGB")) - middle) * (white - black) > 0).all(
                0
            )
            for key, mask in masks.items()
        }
    return result, moved


@contextmanager
def _same_numbers() -> Iterator[Callable[[], None]]:
    """Yields what rewinds the random streams (Python's, numpy's, torch's) to where they stand."""
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002

    def rewind() -> None:
        random.setstate(state[0])
        np.random.set_state(state[1])  # noqa: NPY002
        torch.set_rng_state(state[2])

    yield rewind
