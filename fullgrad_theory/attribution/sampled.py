"""Methods that run the model by themselves, integrated gradients and SmoothGrad, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..extras import require
from .layouts import Cell
from .map import MethodResult

Score = Callable[[Tensor], Tensor]
"""images (n, C, H, W) -> the value that is explained, (n,)"""
STEPS, SAMPLES, NOISE = 50, 25, 0.15


@dataclass(frozen=True)
class Sampling:
    """What such a method is given: `images` (B, C, H, W), the score of sample i's target as
    `scores(i)`, the tokens' `grid` and `cell`, and a `seed`, of which sample i has the i-th next.
    """

    images: Tensor
    scores: Callable[[int], Score]
    grid: tuple[int, int]
    cell: Cell
    seed: int


def random_normal(given: Sampling) -> MethodResult:
    """Normal numbers on the grid of tokens, which say nothing of the model."""
    count = given.images.shape[0]
    draws = [torch.Generator().manual_seed(given.seed + i) for i in range(count)]
    values = torch.stack([torch.randn(given.grid, generator=g) for g in draws])
    return MethodResult(values.to(given.images), given.cell)


def integrated_gradients(given: Sampling) -> MethodResult:
    """x times the mean gradient from 0 to x (Sundararajan et al. 2017), at every pixel.

    What f is at 0 has no place and counts in the total, as a bias's share does.
    """
    captum = require("captum.attr", "methods")
    parts, origins = [], []
    for i, image in enumerate(given.images.split(1)):
        score, zero = given.scores(i), torch.zeros_like(image)
        made = captum.IntegratedGradients(score, multiply_by_inputs=True)
        parts.append(made.attribute(image, zero, n_steps=STEPS, internal_batch_size=1).detach())
        with torch.no_grad():
            origins.append(score(zero))
    found = torch.cat(parts)
    return MethodResult(found.sum(1), (1.0, 1.0), found.flatten(1).sum(1) + torch.cat(origins))


def smoothgrad(given: Sampling) -> MethodResult:
    """The mean gradient over noisy images (Smilkov et al. 2017), at every pixel.

    The noise is normal, its deviation 0.15 of the image's range.
    """
    captum = require("captum.attr", "methods")
    parts = []
    for i, image in enumerate(given.images.split(1)):
        tunnel = captum.NoiseTunnel(captum.Saliency(given.scores(i)))
        with torch.random.fork_rng(devices=[image.device] if image.is_cuda else []):
            torch.manual_seed(given.seed + i)
            made = tunnel.attribute(
                image,
                nt_type="smoothgrad",
                nt_samples=SAMPLES,
                nt_samples_batch_size=1,
                stdevs=NOISE * float(image.max() - image.min()),
                abs=False,
            )
        parts.append(made.detach())
    return MethodResult(torch.cat(parts).sum(1), (1.0, 1.0))
