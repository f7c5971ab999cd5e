"""Segmentation: do the highest values of a map lie on the object?"""

from __future__ import annotations

import torch
from torch import Tensor

from ..extras import require
from .upsample import on_masks


def segmentation_ap(values: Tensor, masks: Tensor) -> Tensor:
    """Average precision of the map as a score for "this pixel is the object", per image: (B,).

    `values` (B, h, w), upsampled bicubically to the boolean `masks` (B, H, W). Higher is better; a
    random map gets the mask's share of the image. NaN where a mask is empty. The sum over
    thresholds of (recall step) x precision, scikit-learn's `average_precision_score`; used for
    attribution maps by Chefer et al. 2021 (arXiv:2012.09838).
    """
    score = require("sklearn.metrics", "measure").average_precision_score
    pixels, masks = on_masks(values, masks)
    scores = [
        score(mask.flatten().numpy(), pixel.flatten().numpy()) if bool(mask.any()) else float("nan")
        for pixel, mask in zip(pixels, masks, strict=True)
    ]
    return torch.tensor(scores, dtype=torch.float64)
