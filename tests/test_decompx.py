"""DecompX's decomposition of tokens into vectors, propagated forward as its paper has it.

Every token's vector is kept as a sum over the tokens that it came from, and a part of the biases
(Modarressi et al. 2023, without the shares of the biases): layers are linear in each part,
attention and the norms' deviations are held, an activation is a factor, f(z) / z. The policy
`decompx` gives the same numbers by one backward. No code is shared.
"""

from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fullgrad_theory import Explainer

pytestmark = pytest.mark.slow


class Parts:
    """`each`: (B, sources, tokens, channels), whose last source is the biases."""

    def __init__(self, each: Tensor) -> None:
        self.each = each

    @property
    def whole(self) -> Tensor:
        return self.each.sum(1)

    def plus(self, other: Parts) -> Parts:
        return Parts(self.each + other.each)

    def linear(self, layer: nn.Linear) -> Parts:
        return Parts(self.each @ layer.weight.T).shifted(layer.bias)

    def shifted(self, bias: Tensor) -> Parts:
        each = self.each.clone()
        each[:, -1] += bias
        return Parts(each)

    def norm(self, layer: nn.LayerNorm) -> Parts:
        deviation = (self.whole.var(-1, correction=0, keepdim=True) + layer.eps).sqrt()
        centred = self.each - self.each.mean(-1, keepdim=True)
        return Parts(centred / deviation[:, None] * layer.weight).shifted(layer.bias)

    def gelu(self) -> Parts:
        return Parts(self.each * (F.gelu(self.whole) / self.whole)[:, None])


def attend(block: nn.Module, parts: Parts) -> Parts:
    qkv = parts.linear(block.attn.qkv).each.chunk(3, -1)
    heads = block.attn.num_heads
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(-2, -3) for t in qkv)
    q, k = q.sum(1), k.sum(1)  # attention is of the whole, and held
    a = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
    mixed = a[:, None] @ v
    return Parts(mixed.transpose(-2, -3).flatten(-2)).linear(block.attn.proj)


def decomposed(model: nn.Module, tokens: Tensor) -> Tensor:
    """The logits' parts, (B, sources, classes), of a model whose blocks begin with `tokens`."""
    batch, count, dim = tokens.shape
    each = torch.zeros(batch, count + 1, count, dim, dtype=tokens.dtype)
    for source in range(count):
        each[:, source, source] = tokens[:, source]
    parts = Parts(each)
    for block in model.blocks:
        parts = parts.plus(attend(block, parts.norm(block.norm1)))
        hidden = parts.norm(block.norm2).linear(block.mlp.fc1).gelu()
        parts = parts.plus(hidden.linear(block.mlp.fc2))
    if isinstance(model.norm, nn.LayerNorm):
        parts = parts.norm(model.norm)
    first = model.num_prefix_tokens
    read = parts.each[:, :, :1] if model.global_pool == "token" else parts.each[:, :, first:]
    pooled = Parts(read.mean(2, keepdim=True))
    if isinstance(model.fc_norm, nn.LayerNorm):
        pooled = pooled.norm(model.fc_norm)
    return pooled.linear(model.head).each[:, :, 0]


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_the_policy_is_the_decomposition_into_vectors(pool: str) -> None:
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(
        img_size=(32, 48), depth=3, embed_dim=16, num_heads=2, num_classes=5, global_pool=pool,
        class_token=pool == "token",
    ).double().eval()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        x = torch.randn(2, 3, 32, 48, dtype=torch.float64)
        given: list[Tensor] = []
        handle = model.blocks[0].register_forward_pre_hook(lambda _, args: given.append(args[0]))
        logits = model(x)
        handle.remove()
        parts = decomposed(model, given[0])
    torch.testing.assert_close(parts.sum(1), logits, rtol=1e-12, atol=1e-12)
    for target in (0, 3):
        found = Explainer(model, x, "decompx")(x, "embedding-x-gradient", target)
        own = parts[:, :-1, target]
        patches = own[:, model.num_prefix_tokens :].reshape(2, 2, 3)
        one = found["embedding-x-gradient"]
        torch.testing.assert_close(one.values, patches, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(one.total, own.sum(1), rtol=1e-9, atol=1e-12)
