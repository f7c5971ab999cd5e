"""Methods that run the model by themselves, integrated gradients and SmoothGrad, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..extras import require
from .axes import Axes
from .layouts import Cell
from .map import MethodResult

Score = Callable[[Tensor], Tensor]
"""inputs (n, ...) -> the value that is explained, (n,)"""
STEPS, SAMPLES, NOISE = 50, 25, 0.15


@dataclass(frozen=True)
class Sampling:
    """What such a method is given: `inputs`, images or embedded tokens, and what their dimensions
    mean; the score of sample i's target as `scores(i)`; the tokens' `grid` and `cell`; and a
    `seed`, of which sample i has the i-th next."""

    inputs: Tensor
    axes: Axes
    scores: Callable[[int], Score]
    grid: tuple[int, int]
    cell: Cell
    seed: int


def random_normal(given: Sampling) -> MethodResult:
    """Normal numbers on the grid of tokens, which say nothing of the model."""
    count = given.inputs.shape[0]
    draws = [torch.Generator().manual_seed(given.seed + i) for i in range(count)]
    values = torch.stack([torch.randn(given.grid, generator=g) for g in draws])
    return MethodResult(values.to(given.inputs), given.cell)


def integrated_gradients(given: Sampling) -> MethodResult:
    """x times the mean gradient from 0 to x (Sundararajan et al. 2017), at every place.

    What f is at 0 has no place and counts in the total, as a bias's share does.
    """
    captum = require("captum.attr", "methods")
    parts, origins = [], []
    for i, one in enumerate(given.inputs.split(1)):
        score, zero = given.scores(i), torch.zeros_like(one)
        made = captum.IntegratedGradients(score, multiply_by_inputs=True)
        parts.append(made.attribute(one, zero, n_steps=STEPS, internal_batch_size=1).detach())
        with torch.no_grad():
            origins.append(score(zero))
    found = torch.cat(parts)
    total = found.flatten(1).sum(1) + torch.cat(origins)
    return MethodResult(given.axes.on_grid(found), (1.0, 1.0), total)


def smoothgrad(given: Sampling) -> MethodResult:
    """The mean gradient over noisy inputs (Smilkov et al. 2017), at every place.

    The noise is normal, its deviation 0.15 of the input's range.
    """
    captum = require("captum.attr", "methods")
    parts = []
    for i, one in enumerate(given.inputs.split(1)):
        tunnel = captum.NoiseTunnel(captum.Saliency(given.scores(i)))
        with torch.random.fork_rng(devices=[one.device] if one.is_cuda else []):
            torch.manual_seed(given.seed + i)
            made = tunnel.attribute(
                one,
                nt_type="smoothgrad",
                nt_samples=SAMPLES,
                nt_samples_batch_size=1,
                stdevs=NOISE * float(one.max() - one.min()),
                abs=False,
            )
        parts.append(made.detach())
    return MethodResult(given.axes.on_grid(torch.cat(parts)), (1.0, 1.0))
