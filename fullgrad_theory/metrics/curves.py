"""Deletion curves, and the numbers read off them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

FRACTIONS = tuple(i / 10 for i in range(1, 10))
"""The shares of the patches that are removed: 10 % to 90 %."""


@dataclass(frozen=True)
class Curves:
    """What a model says of B images while patches are removed, in both orders.

    `mif`, `lif`: log-probability of the target, (B, F), with the most and the least influential
    patches removed first; `mif_correct`, `lif_correct`: whether the target is the prediction.
    `start`, `start_correct`: the same of the whole image, (B,). `fractions`: F removed shares.
    """

    fractions: tuple[float, ...]
    start: Tensor
    start_correct: Tensor
    mif: Tensor
    lif: Tensor
    mif_correct: Tensor
    lif_correct: Tensor


def mif_accuracy(curves: Curves) -> Tensor:
    """Share of the fractions at which the target is still predicted, most influential first: (B,).

    Lower is better. Samek et al. 2017 (arXiv:1509.06321), Chefer et al. 2021 (arXiv:2012.09838).
    """
    return curves.mif_correct.double().mean(1)


def mif_accuracy_drop(curves: Curves) -> Tensor:
    """How far accuracy falls, most influential first: accuracy of the whole minus `mif_accuracy`.

    (B,), higher is better: as LibraGrad (arXiv:2411.16760) reports it.
    """
    return curves.start_correct.double() - mif_accuracy(curves)


def lif_accuracy(curves: Curves) -> Tensor:
    """Share of the fractions at which the target is still predicted, least influential first: (B,).

    Higher is better. Chefer et al. 2021 (there: negative perturbation).
    """
    return curves.lif_correct.double().mean(1)


def aopc(curves: Curves, order: str = "mif") -> Tensor:
    """Mean fall of the target's probability over the fractions, p(x) - p(x with k removed): (B,).

    Higher is better for "mif", lower for "lif". Samek et al. 2017 (area over the perturbation
    curve); the step with nothing removed, always 0 there, is left out of the mean.
    """
    return (curves.start.double().exp()[:, None] - _of(curves, order).exp()).mean(1)


def log_odds(curves: Curves, order: str = "mif") -> Tensor:
    """Mean of log p(x with k removed) - log p(x) over the fractions: (B,).

    Lower is better for "mif", higher for "lif". Shrikumar et al. 2017 (arXiv:1704.02685), in the
    form of Chen et al. 2020 (LOdds, arXiv:2004.02015). Natural logarithm.
    """
    return (_of(curves, order) - curves.start.double()[:, None]).mean(1)


def srg(curves: Curves, of: str = "probability") -> Tensor:
    """Symmetric relevance gain: area under the LIF curve minus that under the MIF curve, (B,).

    Higher is better, a random order gets 0 on average. Areas by the trapezoid rule over the
    measured fractions, divided by their range: in [-1, 1]. `of`: "probability" or "accuracy".
    Bluecher et al. 2024 (arXiv:2401.06654).
    """
    if of == "accuracy":
        lif, mif = curves.lif_correct.double(), curves.mif_correct.double()
    else:
        lif, mif = curves.lif.double().exp(), curves.mif.double().exp()
    width = curves.fractions[-1] - curves.fractions[0]
    gain = (lif - mif).cpu().numpy()
    if width == 0:
        return torch.from_numpy(gain[:, 0])
    return torch.from_numpy(np.trapezoid(gain, curves.fractions, axis=1) / width)


def auc(curves: Curves, order: str = "mif") -> Tensor:
    """Area under the target's probability from the whole image (0 %) to the last fraction, (B,).

    Lower is better for "mif", higher for "lif". Trapezoids, divided by the range that they cover:
    in [0, 1]. The deletion area of Petsiuk et al. 2018 (arXiv:1806.07421) but for the end, where no
    patch is left and a model of tokens has no input.
    """
    heights = torch.cat([curves.start[:, None].double(), _of(curves, order)], 1).exp()
    shares = (0.0, *curves.fractions)
    area = np.trapezoid(heights.cpu().numpy(), shares, axis=1)
    return torch.from_numpy(area / shares[-1])


def _of(curves: Curves, order: str) -> Tensor:
    return {"mif": curves.mif, "lif": curves.lif}[order].double()
