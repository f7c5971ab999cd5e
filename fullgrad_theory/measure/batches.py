"""Samples, read in batches and looked at as they come."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from ..data.sample import need_one_size
from ..errors import InputError, NonFiniteError
from ..graph.foreign import met


class Sample(Protocol):
    """What is evaluated on: `data.Sample`, or anything with these attributes."""

    @property
    def image(self) -> Tensor: ...
    @property
    def label(self) -> int: ...
    @property
    def mask(self) -> Tensor | None: ...


class Samples(Protocol):
    """A sequence of samples, or a torch Dataset of them."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Sample: ...


@dataclass(frozen=True)
class Batch:
    """Samples that were read: `images` (B, 3, H, W), `labels` (B,), `masks` (B, h, w)."""

    indices: range
    images: Tensor
    labels: Tensor
    masks: Tensor

    @property
    def digest(self) -> str:
        """What tells these samples from others."""
        return digest([self.images, self.labels, self.masks])

    def need_classes(self, classes: int) -> None:
        """Every label is a class: a negative one would silently count from the last."""
        for index, label in zip(self.indices, self.labels.tolist(), strict=True):
            if not 0 <= label < classes:
                raise InputError(
                    f"sample {index} has the label {label}, the model {classes} classes: labels "
                    f"must be 0 to {classes - 1} for target='label'"
                )


@dataclass(frozen=True)
class Reader:
    """Reads batches of at most `size` samples, each known by where it starts."""

    samples: Samples
    size: int

    @property
    def starts(self) -> range:
        return range(0, len(self.samples), self.size)

    @cached_property
    def first(self) -> Tensor:
        """The first image, (3, H, W), for which the model is tried; all others have its size."""
        image = _sample(self.samples, 0).image
        need_finite(image[None], "the image", range(1))
        return image

    def read(self, start: int) -> Batch:
        """The batch that starts there."""
        indices = range(start, min(start + self.size, len(self.samples)))
        found = [_sample(self.samples, i) for i in indices]
        images = [s.image for s in found]
        need_one_size([self.first, *images], "images")
        x = torch.stack(images)
        need_finite(x, "the image", indices)
        return Batch(indices, x, torch.tensor([int(s.label) for s in found]), _masks(found))


def need_finite(values: Tensor, what: str, indices: range) -> None:
    """Raise `NonFiniteError` with the sample's number; `values`: one row a sample."""
    broken = ~values.detach().flatten(1).isfinite().all(1)
    if bool(broken.any()):
        raise NonFiniteError(
            f"{what} of sample {indices[int(broken.nonzero()[0])]} holds NaN or Inf; leave the "
            "sample out, or look at what made it"
        )


def digest(tensors: Iterable[Tensor]) -> str:
    """Of shapes, dtypes and bits."""
    found = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().flatten()
        found.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return found.hexdigest()[:16]


def _sample(samples: Samples, index: int) -> Sample:
    """One sample; an error where it is not made like one."""
    with met(f"sample {index} cannot be read", unless=(OSError,)):  # a disk may come back
        sample = samples[index]
    lacking = [name for name in ("image", "label", "mask") if not hasattr(sample, name)]
    if lacking:
        raise InputError(
            f"sample {index} is a {type(sample).__name__} without {', '.join(lacking)}; every "
            "sample has an image, a label and a mask (or None), as data.Sample does"
        )
    if not isinstance(sample.image, Tensor) or sample.image.dim() != 3:
        shape = tuple(getattr(sample.image, "shape", ())) or type(sample.image).__name__
        raise InputError(f"sample {index} needs an image tensor (3, H, W), its image is {shape}")
    return sample


def _masks(samples: Sequence[Sample]) -> Tensor:
    """(B, h, w), of the image's size or of the masks' own; empty where a sample has none."""
    given = [s.mask.bool().cpu() for s in samples if s.mask is not None]
    size = given[0].shape if given else samples[0].image.shape[-2:]
    empty = torch.zeros(size, dtype=torch.bool)
    need_one_size([empty, *given], "masks")
    return torch.stack([empty if s.mask is None else s.mask.bool().cpu() for s in samples])
