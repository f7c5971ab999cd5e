"""A small CLIP on the scenes' captions: a timm ViT and a tiny text transformer, one space."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fullgrad_theory.data import CLASSES
from fullgrad_theory.data.scenes import OBJECTS, caption
from fullgrad_theory.errors import InputError

from .fit import FULL, Data, Recipe, Task, Trained, fit, held_out

WORDS = ("", "a", "and", ",", *dict.fromkeys(word for name in CLASSES for word in name.split()))
"""The vocabulary; word 0 fills a caption up to `LENGTH`."""
LENGTH = 4 * OBJECTS - 1


def tokens(captions: Sequence[str]) -> Tensor:
    """(N, LENGTH) int64. Raises `InputError` for a word that no caption of a scene has."""
    said = [text.replace(",", " ,").split() for text in captions]
    strange = sorted({word for row in said for word in row} - set(WORDS))
    if strange:
        raise InputError(
            f"no scene's caption has the words {', '.join(strange)}; known: {' '.join(WORDS[1:])}"
        )
    rows = [[WORDS.index(word) for word in row] for row in said]
    return torch.tensor([row + [0] * (LENGTH - len(row)) for row in rows])


class Clip(nn.Module):
    """`forward(images (N, 3, 64, 64), tokens (M, LENGTH))` -> (N, M), scaled cosines."""

    def __init__(self, dim: int = 64, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.image = timm.create_model(
            "vit_base_patch16_clip_224",
            img_size=64,
            patch_size=8,
            embed_dim=dim,
            depth=depth,
            num_heads=heads,
            num_classes=dim,
        )
        self.words = nn.Embedding(len(WORDS), dim)
        self.places = nn.Parameter(torch.randn(LENGTH, dim) * 0.02)
        layer = nn.TransformerEncoderLayer(
            dim, heads, 4 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.text = nn.TransformerEncoder(layer, 2, nn.LayerNorm(dim), enable_nested_tensor=False)
        self.head = nn.Linear(dim, dim, bias=False)
        self.scale = nn.Parameter(torch.tensor(2.3))

    def encode_text(self, texts: Tensor) -> Tensor:
        """(M, dim), of length one."""
        filled = texts != 0
        seen = self.text(
            self.words(texts) + self.places[: texts.shape[1]], src_key_padding_mask=~filled
        )
        weight = filled / filled.sum(1, keepdim=True)
        return F.normalize(self.head((seen * weight[..., None]).sum(1)), dim=-1)

    def encode_image(self, images: Tensor) -> Tensor:
        """(N, dim), of length one."""
        return F.normalize(self.image(images), dim=-1)

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        return (
            self.scale.exp().clamp(max=100) * self.encode_image(images) @ self.encode_text(texts).T
        )


def captions(data: Data) -> list[str]:
    """What the images show, in words."""
    return [caption(row) for row in data.classes.tolist()]


def _contrast(model: nn.Module, data: Data, smoothing: float) -> Tensor:
    """Contrastive both ways; images of one caption are each other's right answer."""
    words = tokens(captions(data))
    scores = model(data.inputs, words)
    same = (words[:, None] == words[None]).all(2).float()
    wanted = same / same.sum(1, keepdim=True)
    return (
        F.cross_entropy(scores, wanted, label_smoothing=smoothing)
        + F.cross_entropy(scores.T, wanted, label_smoothing=smoothing)
    ) / 2


@torch.no_grad()
def _retrieval(model: nn.Module, recipe: Recipe) -> dict[str, float]:
    """`retrieval`: the image's own caption comes first among all different captions of the held-out
    images; `of 32`: among those of 32 images; `accuracy`: its largest object's name comes first
    among the names of all classes."""
    assert isinstance(model, Clip)
    data = held_out(recipe)
    said = captions(data)
    choices = sorted(set(said))
    images = torch.cat(
        [model.encode_image(data[i : i + 250].inputs) for i in range(0, len(data), 250)]
    )
    texts = model.encode_text(tokens(choices))
    right = torch.tensor([choices.index(s) for s in said])
    scores = images @ texts.T
    names = model.encode_text(tokens([f"a {name}" for name in CLASSES]))
    few = 0
    for start in range(0, len(data), 32):
        rows = slice(start, start + 32)
        among = torch.zeros(len(choices), dtype=torch.bool)
        among[right[rows]] = True
        few += int((scores[rows].masked_fill(~among, -2).argmax(1) == right[rows]).sum())
    return {
        "accuracy": float(((images @ names.T).argmax(1) == data.classes[:, 0]).float().mean()),
        "retrieval": float((scores.argmax(1) == right).float().mean()),
        "of 32": few / len(data),
    }


match = Task(_contrast, _retrieval)


def load_clip(folder: str | Path, recipe: Recipe = FULL) -> Clip:
    """The trained pair of towers in eval mode: from `folder`, or trained now and kept there."""
    return train_clip(Path(folder), recipe).model  # type: ignore[return-value]


def train_clip(folder: Path, recipe: Recipe = FULL) -> Trained:
    """The same with its figures."""
    return fit("clip-towers", Clip, match, recipe, folder)
