"""torchvision's architectures, with random weights, and the inputs of each kind."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from ..extras import require
from .rows import Architecture

_FRAMES = 16
_SIDE = 224
_FLOW = 128
"""the least side that RAFT takes"""


def listed() -> Iterator[Architecture]:
    """All that torchvision has, by the file that defines them."""
    vision = require("torchvision", "vision")
    version = f"torchvision {vision.__version__}"
    for name in vision.models.list_models():
        where = vision.models.get_model_builder(name).__module__
        family = where.removeprefix("torchvision.models.")
        yield Architecture("torchvision", name, family, version, name)


def built(name: str, meta: bool) -> tuple[Any, Any]:
    """A model in eval mode with random weights, on the meta device or the cpu, and its inputs."""
    import torch

    models = require("torchvision.models", "vision")
    torch.manual_seed(0)
    builder = models.get_model_builder(name)
    # a detector's backbone would be downloaded otherwise
    more = {"weights_backbone": None} if "backbone" in str(inspect.signature(builder)) else {}
    with torch.device("meta" if meta else "cpu"):
        model = builder(weights=None, **more).eval()
        return model, _inputs(name, builder.__module__, models)


def _inputs(name: str, where: str, models: Any) -> Any:
    """At the size that its published weights were made for."""
    import torch

    preset = getattr(list(models.get_model_weights(name))[-1].transforms, "keywords", {})
    crop = preset.get("crop_size", _SIDE)
    height, width = crop if isinstance(crop, (tuple, list)) else (crop, crop)
    if ".detection." in where:
        return ([torch.randn(3, height, width)],)
    if ".video." in where:
        return (torch.randn(1, 3, _FRAMES, height, width),)
    if ".optical_flow." in where:
        return tuple(torch.randn(1, 3, _FLOW, _FLOW) for _ in range(2))
    return (torch.randn(1, 3, height, width),)
