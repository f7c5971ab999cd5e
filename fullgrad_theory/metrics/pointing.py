"""The pointing game: does a map's maximum lie on the object?"""

from __future__ import annotations

import torch
from torch import Tensor

from .upsample import on_masks


def pointing_game(values: Tensor, masks: Tensor, tolerance: int = 0) -> Tensor:
    """1 where the map's highest pixel is on the object, else 0, per image: (B,); mean = accuracy.

    `values` (B, h, w), upsampled bicubically to the boolean `masks` (B, H, W). `tolerance`: a hit
    counts up to so many pixels away (Euclidean; the original game used 15). Higher is better. NaN
    where a mask is empty. Zhang et al. 2018, Top-down neural attention by excitation backprop.
    """
    pixels, masks = on_masks(values, masks)
    hits = [_hit(p, m, tolerance) for p, m in zip(pixels, masks, strict=True)]
    return torch.tensor(hits, dtype=torch.float64)


def _hit(pixels: Tensor, mask: Tensor, tolerance: int) -> float:
    if not bool(mask.any()):
        return float("nan")
    row, column = divmod(int(pixels.argmax()), mask.shape[1])
    away = (mask.nonzero() - torch.tensor([row, column])).square().sum(1).min()
    return float(away <= tolerance**2)
