"""timm's own classes at small sizes, with parameters moved away from degenerate initial values."""

from __future__ import annotations

from collections.abc import Callable

import timm
import torch
from timm.layers import GluMlp
from timm.models.mlp_mixer import MlpMixer
from torch import nn

SMALL: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: timm.create_model(
        "vit_tiny_patch16_224", depth=2, img_size=64, num_classes=7, embed_dim=96
    ),
    "eva": lambda: timm.create_model(
        "eva02_tiny_patch14_224", depth=2, img_size=56, num_classes=7, embed_dim=96
    ),
    "beit": lambda: timm.create_model(
        "beitv2_base_patch16_224", depth=2, img_size=64, num_classes=7, embed_dim=64, num_heads=2
    ),
    "gmixer": lambda: MlpMixer(
        num_classes=7,
        img_size=64,
        num_blocks=2,
        embed_dim=48,
        mlp_ratio=(1.0, 4.0),
        mlp_layer=GluMlp,
        act_layer=nn.SiLU,
    ),
}


def small(name: str, seed: int = 0) -> tuple[nn.Module, torch.Tensor]:
    """The model in eval mode and a batch of two images for it."""
    torch.manual_seed(seed)
    model = SMALL[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    size = 56 if name == "eva" else 64
    return model, torch.randn(2, 3, size, size)
