"""The paper's eight architectures and its four ViT sizes, in timm's own classes, made small.

Every builder names the family's timm model as the paper used it and changes sizes alone: images
of 64 x 64, patches of 8, so an 8 x 8 grid. What makes the family stays: class tokens, rotary and
relative positions, gated MLPs, layer scales (from 0.1 on, for the trainings are short), pooling.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
from timm.layers import GluMlp
from timm.models.mlp_mixer import MlpMixer
from torch import nn

from fullgrad_theory.data import CLASSES
from fullgrad_theory.errors import unknown_name

from .fit import FULL, Recipe, Trained, classify, fit

IMAGE, PATCH = 64, 8
Builder = Callable[[], nn.Module]


def _vit(name: str, dim: int = 64, depth: int = 4, heads: int = 4, **family: Any) -> nn.Module:
    return timm.create_model(
        name,
        img_size=IMAGE,
        patch_size=PATCH,
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
        num_classes=len(CLASSES),
        **family,
    )


def _mixer(dim: int = 64, depth: int = 4, **family: Any) -> nn.Module:
    """timm's entries fix the patch size, so its class is called as they call it."""
    return MlpMixer(
        num_classes=len(CLASSES),
        img_size=IMAGE,
        patch_size=PATCH,
        num_blocks=depth,
        embed_dim=dim,
        **family,
    )


ARCHITECTURES: dict[str, Builder] = {
    "vit": partial(_vit, "vit_base_patch16_224"),
    "eva2": partial(_vit, "eva02_small_patch14_336"),
    "beit2": partial(_vit, "beitv2_large_patch16_224", init_values=0.1),
    "flexivit": partial(_vit, "flexivit_large"),
    "siglip": partial(_vit, "vit_so400m_patch14_siglip_gap_378"),
    "clip": partial(_vit, "vit_huge_patch14_clip_224"),
    "deit3": partial(_vit, "deit3_huge_patch14_224", init_values=0.1),
    "gmixer": partial(_mixer, mlp_ratio=(1.0, 4.0), mlp_layer=GluMlp, act_layer=nn.SiLU),
    "mixer": _mixer,
}
"""Family -> builder: the eight of the paper, and the mixer without gates beside its own."""

SIZES: dict[str, Builder] = {
    "vit-tiny": partial(_vit, "vit_tiny_patch16_224", dim=32, heads=2),
    "vit-small": partial(_vit, "vit_small_patch16_224", dim=48, heads=3),
    "vit-base": ARCHITECTURES["vit"],
    "vit-large": partial(_vit, "vit_large_patch16_224", dim=80, depth=6, heads=5),
}
"""Size -> builder: in the order of the real ones, closer together; heads are 16 wide."""

BUILDERS: dict[str, Builder] = ARCHITECTURES | SIZES


def train(name: str, folder: str | Path, recipe: Recipe = FULL) -> Trained:
    """The trained model with its figures: from `folder`, or trained now and kept there.

    Raises `UnknownNameError` for a name that is not in `ARCHITECTURES` or `SIZES`.
    """
    if name not in BUILDERS:
        raise unknown_name("model", name, BUILDERS)
    build = BUILDERS[name]
    first = next(other for other in BUILDERS if BUILDERS[other] is build)  # trained once
    return fit(first, build, classify, recipe, Path(folder))


def load(name: str, folder: str | Path, recipe: Recipe = FULL) -> nn.Module:
    """The model that `train` returns, in eval mode."""
    return train(name, folder, recipe).model
