"""A method's integral along the ray from a baseline to the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..backward.targets import Target
from ..errors import InputError
from .explainer import Explainer
from .map import Map
from .run import chosen_of
from .sampled import STEPS


def mean_along_ray(
    explainer: Explainer,
    x: Tensor,
    methods: str | Sequence[str] = "fullgrad+",
    target: Target = None,
    *,
    steps: int = STEPS,
    baseline: Tensor | float = 0.0,
    seed: int = 0,
) -> dict[str, Map]:
    """The mean of each method's maps at x0 + a (x - x0), a from 0 to 1: integrated gradients of any
    method, as LibraGrad's code has them (h_a dL/dh_a, with the h of every point a of the ray).

    x: (B, C, H, W); `baseline`: x0, of a shape that fits x. The target is that of the images
    themselves, a softmax's weights too. `steps` points of Gauss and Legendre, which cost one pass
    each; a map's `output` is that of the image, and no total is kept. Raises what `Explainer` does.
    """
    if steps < 1:
        raise InputError(f"an integral needs at least one step, got {steps}")
    with torch.no_grad():
        scores = torch.cat([explainer.scores(image) for image in x.split(1)])
        chosen = chosen_of(scores, target)
    output = chosen.of(scores)
    places, weights = np.polynomial.legendre.leggauss(steps)
    sums: dict[str, Tensor] = {}
    made: dict[str, Map] = {}
    for place, weight in zip((places + 1) / 2, weights / 2, strict=True):
        made = explainer(baseline + float(place) * (x - baseline), methods, chosen, seed)
        for name, found in made.items():
            part = float(weight) * found.values
            sums[name] = sums[name] + part if name in sums else part
    return {
        name: replace(found, values=sums[name], output=output, total=None)
        for name, found in made.items()
    }
