"""Segmentation: do the highest values of a map lie on the object?

By every threshold (average precision), or by one: the map's own mean, above which is foreground.
"""

from __future__ import annotations

from collections.abc import Callable

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


def segmentation_iou(values: Tensor, masks: Tensor) -> Tensor:
    """Intersection over union of foreground and of background, their mean, per image: (B,).

    `values` (B, h, w), upsampled bicubically to the boolean `masks` (B, H, W); foreground is what
    is above the map's mean (Chefer et al. 2021, who add intersections and unions up over the data
    set before they divide). Higher is better. NaN where a mask is empty.
    """
    return _at_the_mean(values, masks, lambda a, b: (_iou(a, b) + _iou(~a, ~b)) / 2)


def segmentation_accuracy(values: Tensor, masks: Tensor) -> Tensor:
    """Share of the pixels that are on the right side of the map's mean, per image: (B,).

    As `segmentation_iou`; the pixel accuracy of Chefer et al. 2021.
    """
    return _at_the_mean(values, masks, lambda a, b: (a == b).double().mean())


def segmentation_f1(values: Tensor, masks: Tensor) -> Tensor:
    """2 |a & b| / (|a| + |b|), a the pixels above the map's mean and b the mask, per image: (B,).

    As `segmentation_iou`; the Dice coefficient.
    """
    return _at_the_mean(
        values, masks, lambda a, b: 2 * (a & b).sum().double() / (a.sum() + b.sum())
    )


def _iou(a: Tensor, b: Tensor) -> Tensor:
    """Of two sets that are empty it is 1: nothing was to be found, and nothing was."""
    union = (a | b).sum()
    return (a & b).sum().double() / union if union else torch.ones((), dtype=torch.float64)


def _at_the_mean(
    values: Tensor, masks: Tensor, score: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    pixels, masks = on_masks(values, masks)
    found = pixels > pixels.mean((1, 2), keepdim=True)
    scores = [
        float(score(a, mask)) if bool(mask.any()) else float("nan")
        for a, mask in zip(found, masks, strict=True)
    ]
    return torch.tensor(scores, dtype=torch.float64)
