"""The image tower of a CLIP as a classifier whose classes are texts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fullgrad_theory.data import CLASSES

from .clip import Clip, tokens

PROMPTS = tuple(f"a {name}" for name in CLASSES)
"""One for each class, so that a class is also a prompt's index."""


class Prompted(nn.Module):
    """`forward(images (B, 3, H, W))` -> (B, texts): the cosines of images and texts."""

    texts: Tensor

    def __init__(self, clip: Clip, prompts: Sequence[str] = PROMPTS) -> None:
        super().__init__()
        self.image = clip.image
        with torch.no_grad():
            self.register_buffer("texts", clip.encode_text(tokens(prompts)))
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.image(images), dim=-1) @ self.texts.T
