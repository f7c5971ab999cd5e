"""Maps of a few scenes, kept as numbers, for the figures to be drawn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from fullgrad_theory import softmax_weighted
from fullgrad_theory.data import Sample

from .measure import crowded, scenes
from .ready import Ready
from .setup import METHODS, Setup

Arrays = dict[str, np.ndarray]
POLICIES = ("plain", "libra")


def heatmaps(models: Mapping[str, Ready], setup: Setup) -> Arrays:
    """`image/i`, and `map/model/method/policy/i`: every method of the first two models, FullGrad+
    of the others, of the prediction, its logit weighted by the softmax as in the tables."""
    samples = scenes(setup.images)[: setup.scenes]
    arrays = _images(samples)
    x = torch.stack([s.image for s in samples])
    for number, (name, ready) in enumerate(models.items()):
        methods = ready.applying(METHODS) if number < 2 else ("fullgrad+",)
        for policy in POLICIES:
            for method, found in ready.explainer(policy)(x, methods, softmax_weighted()).items():
                for i, values in enumerate(found.values):
                    arrays[f"map/{name}/{method}/{policy}/{i}"] = values.numpy().astype(np.float32)
    return arrays


def highlights(ready: Ready, setup: Setup) -> Arrays:
    """`image/i`, and `map/class/policy/i` for the class of every object there."""
    samples = crowded(setup.objects)[: setup.scenes]
    arrays = _images(samples)
    for i, sample in enumerate(samples):
        classes = [sample.label, *sample.others]
        x = sample.image.expand(len(classes), -1, -1, -1)
        for policy in POLICIES:
            found = ready.explainer(policy)(x, ("fullgrad+",), torch.tensor(classes))["fullgrad+"]
            for label, values in zip(classes, found.values, strict=True):
                arrays[f"map/{label}/{policy}/{i}"] = values.numpy().astype(np.float32)
    return arrays


def _images(samples: Sequence[Sample]) -> Arrays:
    return {
        f"image/{i}": ((s.image.permute(1, 2, 0).numpy() + 1) * 127.5).round().astype(np.uint8)
        for i, s in enumerate(samples)
    }
