"""FullGrad+ as LibraGrad's code has it, written out on the model itself.

The reference runs the user's own module: what enters each block and what every linear layer and
norm gives is kept, and autograd differentiates the very forward, or one whose functions LibraGrad
replaces. It reads no graph, and shares no code with the library.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.layers import GluMlp
from timm.models.mlp_mixer import MlpMixer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fullgrad_theory import Explainer, softmax_weighted

pytestmark = pytest.mark.slow


def small(name: str, **options: Any) -> nn.Module:
    given = {"depth": 2, "img_size": 32, "embed_dim": 32, "num_heads": 2, "num_classes": 5}
    return timm.create_model(name, **(given | options))


def mixer(**options: Any) -> nn.Module:
    return MlpMixer(
        num_classes=5, img_size=32, patch_size=16, num_blocks=2, embed_dim=16, **options
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "ViT": lambda: small("vit_tiny_patch16_224"),
    "ViT, averaged": lambda: small(
        "vit_tiny_patch16_224", class_token=False, global_pool="avg", fc_norm=True
    ),
    "SigLIP": lambda: small("vit_base_patch16_siglip_224"),
    "SigLIP, averaged": lambda: small("vit_so400m_patch14_siglip_gap_378", img_size=28),
    "CLIP": lambda: small("vit_base_patch16_clip_224"),
    "BEiT": lambda: small("beitv2_base_patch16_224"),
    "EVA-02": lambda: small("eva02_tiny_patch14_224", img_size=28, embed_dim=48),
    "MLP-Mixer": mixer,
    "MLP-Mixer, gated": lambda: mixer(mlp_layer=GluMlp, act_layer=nn.SiLU, mlp_ratio=(1.0, 4.0)),
}


class Written(TorchFunctionMode):
    """Keeps each linear layer's and norm's bias beside what it gave, once a block has begun; under
    `libra` it holds what LibraGrad prunes, and halves the gradient of gates."""

    def __init__(self, libra: bool) -> None:
        super().__init__()
        self.libra, self.begun = libra, False
        self.biases: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            out = self.run(func, args, kwargs)
        bias = {F.linear: 2, F.layer_norm: 3}.get(func)
        if self.begun and bias is not None:
            given = args[bias] if len(args) > bias else kwargs.get("bias")
            if given is not None and out.requires_grad:  # not that of a pool's own query
                self.biases.append((given, out))
        return out

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if not self.libra:
            return func(*args, **kwargs)
        if func is F.layer_norm:
            return self.norm(*args, **kwargs)
        if func in (F.gelu, F.silu):
            y = func(*args, **kwargs)
            return args[0] * (y / args[0]).detach()
        if func is F.scaled_dot_product_attention:
            q, k, v = args[:3]
            scale = kwargs.get("scale") or q.shape[-1] ** -0.5
            scores, mask = q @ k.mT * scale, kwargs.get("attn_mask")
            scores = scores if mask is None else scores + mask
            return scores.softmax(-1).detach() @ v
        if func in (Tensor.mul, Tensor.__mul__, torch.mul):
            a, b = args
            if isinstance(b, Tensor) and a.requires_grad and b.requires_grad:
                return (a * b.detach() + a.detach() * b) / 2
        return func(*args, **kwargs)

    @staticmethod
    def norm(x: Tensor, shape: Any, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        sigma = (centred.square().mean(-1, keepdim=True) + eps).sqrt().detach()
        return centred / sigma * weight + bias


def fullgrad_plus(
    model: nn.Module, image: Tensor, score: Callable[[Tensor], Tensor], libra: bool
) -> tuple[Tensor, Tensor]:
    """Its map (B, h, w), and the sum over blocks of h dL/dh alone."""
    written, inputs = Written(libra), []

    def enter(block: nn.Module, args: tuple[Tensor, ...]) -> None:
        written.begun = True
        inputs.append(args[0])

    model.requires_grad_(False)
    handles = [b.register_forward_pre_hook(enter) for b in model.blocks]  # type: ignore[union-attr]
    with written:
        logits = model(image.clone().requires_grad_())
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(logits, model(image), rtol=1e-12, atol=1e-12)
    outs = [out for _, out in written.biases]
    found = torch.autograd.grad(
        score(logits).sum(), [*inputs, *outs], allow_unused=True, materialize_grads=True
    )
    count, channels = inputs[0].shape[1:]
    patches = count - getattr(model, "num_prefix_tokens", 0)
    products = sum((h * g).sum(-1) for h, g in zip(inputs, found, strict=False))
    total = products
    for (bias, out), g in zip(written.biases, found[len(inputs) :], strict=True):
        part = bias * g
        if out.shape[1:-1] == (count,):  # a row a token
            total = total + part.sum(-1)
        elif out.shape[1:] == (channels, count):  # a mixer's, a column a token
            total = total + part.sum(1)
    side = int(patches**0.5)
    maps = [t[:, -patches:].reshape(-1, side, side).detach() for t in (total, products)]
    return maps[0], maps[1]


def raw(logits: Tensor) -> Tensor:
    return logits[[0, 1], [3, 1]]


def weighted(logits: Tensor) -> Tensor:
    """LibraGrad's z - softmax(z) z, of the same classes; the softmax is held."""
    return logits[[0, 1], [3, 1]] - (logits.softmax(-1).detach() * logits).sum(-1)


@pytest.mark.parametrize("name", MODELS)
def test_fullgrad_plus_is_the_authors(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    size = 28 if name in ("SigLIP, averaged", "EVA-02") else 32
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    for policy in ("plain", "libra"):
        explain = Explainer(model, x, policy)
        for target, score in (([3, 1], raw), (softmax_weighted([3, 1]), weighted)):
            whole, bare = fullgrad_plus(model, x, score, policy == "libra")
            found = explain(x, ["fullgrad+", "hirescam+"], target)
            scale = float(whole.abs().max())
            for method, wanted in (("fullgrad+", whole), ("hirescam+", bare)):
                off = (found[method].values - wanted).abs().max()
                assert float(off) <= 1e-12 * scale, (policy, method)
            assert float((whole - bare).abs().max()) > 1e-3 * scale
