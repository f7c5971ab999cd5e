"""One labelled image, and several of them as a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import InputError


@dataclass(frozen=True)
class Sample:
    """`image`: (3, H, W) float32 as a model takes it; `label`: its class; `mask`: (H, W) bool where
    the labelled object is, None where nobody knows; `others`: class -> (H, W) bool of further
    objects; `caption`: what the image shows, in words."""

    image: Tensor
    label: int
    mask: Tensor | None = None
    others: Mapping[int, Tensor] = field(default_factory=dict)
    caption: str | None = None


@dataclass(frozen=True)
class Batch:
    """`images`: (B, 3, H, W) float32; `labels`: (B,) int64; `masks`: (B, H, W) bool, or None unless
    every sample has one; `others` and `captions`: one entry a sample."""

    images: Tensor
    labels: Tensor
    masks: Tensor | None
    others: tuple[Mapping[int, Tensor], ...]
    captions: tuple[str | None, ...]

    def __len__(self) -> int:
        return len(self.labels)


def need_one_size(tensors: Sequence[Tensor], what: str) -> None:
    """Raises `InputError` unless there are tensors and all have one shape."""
    shapes = {tuple(t.shape) for t in tensors}
    if len(shapes) != 1:
        found = ", ".join(map(str, sorted(shapes))) or "no sample at all"
        raise InputError(f"a batch needs {what} of one size, got {found}; resize in the transform")


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples of one size as a batch; the `collate_fn` of a `torch.utils.data.DataLoader`.

    Raises `InputError` for none, or for images or masks of different sizes.
    """
    masks = [s.mask for s in samples if s.mask is not None]
    need_one_size([s.image for s in samples], "images")
    if len(masks) == len(samples):
        need_one_size(masks, "masks")
    return Batch(
        torch.stack([s.image for s in samples]),
        torch.tensor([s.label for s in samples]),
        torch.stack(masks) if len(masks) == len(samples) else None,
        tuple(s.others for s in samples),
        tuple(s.caption for s in samples),
    )
