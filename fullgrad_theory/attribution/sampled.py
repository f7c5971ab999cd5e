"""Methods that run the model many times: integrated gradients and SmoothGrad, by captum."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

Score = Callable[[Tensor], Tensor]
STEPS, SAMPLES, NOISE = 50, 25, 0.15


def integrated_gradients(score: Score, image: Tensor) -> Tensor:
    """x times the mean gradient from 0 to x (Sundararajan et al. 2017), of the image's shape."""
    from captum.attr import IntegratedGradients

    found = IntegratedGradients(score, multiply_by_inputs=True).attribute(
        image, baselines=torch.zeros_like(image), n_steps=STEPS, internal_batch_size=len(image)
    )
    return cast(Tensor, found.detach())


def smoothgrad(score: Score, image: Tensor, seed: int) -> Tensor:
    """The mean gradient over noisy images (Smilkov et al. 2017), of the image's shape.

    The noise is normal, its deviation 0.15 of the image's range.
    """
    from captum.attr import NoiseTunnel, Saliency

    tunnel = NoiseTunnel(Saliency(score))
    parts = []
    for index, one in enumerate(image):
        spread = NOISE * float(one.max() - one.min())
        with torch.random.fork_rng(devices=[image.device] if image.is_cuda else []):
            torch.manual_seed(seed + index)
            parts.append(
                tunnel.attribute(
                    one[None],
                    nt_type="smoothgrad",
                    nt_samples=SAMPLES,
                    nt_samples_batch_size=1,
                    stdevs=spread,
                    abs=False,
                )
            )
    return torch.cat(parts).detach()
