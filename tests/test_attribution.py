"""Attribution maps, each method against a slow reference written from its definition.

The reference runs a timm ViT line by line with plain autograd: every bias is a leaf expanded to the
tokens, attention is explicit, relevance is a product of matrices. It shares no code with the
library, which reads a traced graph and carries one row.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import pytest
import timm
import torch
from timm.models.mlp_mixer import MlpMixer
from timm.models.swin_transformer import window_partition, window_reverse
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fullgrad_theory as fgt
from fullgrad_theory.attribution import METHODS, Explainer, Map, Method, explain, mean_along_ray
from fullgrad_theory.attribution import explainer as explainers
from fullgrad_theory.errors import InputError, UnknownNameError

GRADIENT = [name for name, method in METHODS.items() if method.function is not None]
LAST_ATTENTION = ["raw-attention", "attention-gradient", "attention-x-gradient"]
ATTENTION = ["attcat", "genatt", "tokentm", "legrad", "gradsam", "rollout", *LAST_ATTENTION]
VECTORS = ["globenc", "alti"]


def shaken(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Parameters away from their initial values, which are often 0."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def vit(**options: object) -> nn.Module:
    """A ViT with a class token, registers and a grid of 2 x 3."""
    given = {"depth": 3, "img_size": (32, 48), "embed_dim": 16, "num_heads": 2, "num_classes": 5}
    torch.manual_seed(0)
    return timm.models.VisionTransformer(**(given | options))  # type: ignore[arg-type]


def images(*size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(2)).to(dtype)


# --------------------------------------------------------------------------- the slow reference


@dataclass
class Slow:
    """One forward of a timm ViT, line by line; `libra` holds fixed what LibraGrad prunes."""

    model: nn.Module
    libra: bool
    biases: list[tuple[Tensor, bool]] = field(default_factory=list)  # leaf, whether of tokens
    attention: list[Tensor] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    middles: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    before: int = 0  # how many of the biases are before the first block

    def bias(self, value: Tensor, shape: torch.Size, tokens: bool = True) -> Tensor:
        leaf = value.detach().expand(shape).clone().requires_grad_()
        self.biases.append((leaf, tokens))
        return leaf

    def linear(self, layer: nn.Linear, x: Tensor, tokens: bool = True) -> Tensor:
        out = x @ layer.weight.T
        return out if layer.bias is None else out + self.bias(layer.bias, out.shape, tokens)

    def norm(self, layer: nn.LayerNorm, x: Tensor, tokens: bool = True) -> Tensor:
        sigma = (x.var(-1, correction=0, keepdim=True) + layer.eps).sqrt()
        sigma = sigma.detach() if self.libra else sigma
        out = (x - x.mean(-1, keepdim=True)) / sigma * layer.weight
        return out + self.bias(layer.bias, out.shape, tokens)

    def gelu(self, x: Tensor) -> Tensor:
        return x * (F.gelu(x) / x).detach() if self.libra else F.gelu(x)

    def block(self, block: nn.Module, x: Tensor) -> Tensor:
        self.inputs.append(x)
        batch, n, dim = x.shape
        heads = block.attn.num_heads
        qkv = self.linear(block.attn.qkv, self.norm(block.norm1, x))
        q, k, v = qkv.reshape(batch, n, 3, heads, -1).permute(2, 0, 3, 1, 4)
        a = (q @ k.transpose(-1, -2) / math.sqrt(dim // heads)).softmax(-1)
        a = a.detach().requires_grad_() if self.libra else a
        self.attention.append(a)
        x = x + self.linear(block.attn.proj, (a @ v).transpose(1, 2).reshape(batch, n, dim))
        self.middles.append(x)
        hidden = self.gelu(self.linear(block.mlp.fc1, self.norm(block.norm2, x)))
        x = x + self.linear(block.mlp.fc2, hidden)
        self.outputs.append(x)
        return x

    def head(self, x: Tensor) -> Tensor:
        m = self.model
        x = self.norm(m.norm, x) if isinstance(m.norm, nn.LayerNorm) else x
        x = x[:, 0] if m.global_pool == "token" else x[:, m.num_prefix_tokens :].mean(1)
        x = self.norm(m.fc_norm, x, False) if isinstance(m.fc_norm, nn.LayerNorm) else x
        return self.linear(m.head, x, False)

    def run(self, image: Tensor) -> Tensor:
        m = self.model
        conv = m.patch_embed.proj
        x = F.conv2d(image, conv.weight, None, conv.stride).flatten(2).transpose(1, 2)
        x = x + self.bias(conv.bias, x.shape)
        prefix = [t for t in (m.cls_token, m.reg_token) if t is not None]
        batch = x.shape[0]
        leaves = [self.bias(t, torch.Size((batch, *t.shape[1:])), False) for t in prefix]
        x = torch.cat([*leaves, x], 1)
        x = x + self.bias(m.pos_embed, x.shape)
        self.before = len(self.biases)
        for block in m.blocks:
            x = self.block(block, x)
        return self.head(x)


class Reference:
    """All methods from one run of `Slow`; maps have shape (B, 2, 3)."""

    def __init__(self, model: nn.Module, image: Tensor, target: list[int], libra: bool) -> None:
        self.slow, self.model = Slow(model, libra), model
        self.image = image.clone().requires_grad_()
        logits = self.slow.run(self.image)
        torch.testing.assert_close(logits, model(image))  # it is the same model
        self.target, self.prefix = target, model.num_prefix_tokens
        self.score = logits[range(len(target)), target].sum()
        self.token_pool = model.global_pool == "token"

    def grad(self, *of: Tensor, score: Tensor | None = None) -> list[Tensor]:
        score = self.score if score is None else score
        found = torch.autograd.grad(score, of, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(t) if g is None else g for t, g in zip(of, found, strict=True)]

    def grid(self, tokens: Tensor) -> Tensor:
        return tokens[:, self.prefix :].reshape(-1, 2, 3).detach()

    def pixel_products(self) -> Tensor:
        return (self.image * self.grad(self.image)[0]).detach()

    def bias_products(self, first: int = 0) -> tuple[Tensor, Tensor]:
        """Per token (B, n), patches last; and the sum of them all (B,); from the first-th on."""
        biases = self.slow.biases[first:]
        leaves = [leaf for leaf, _ in biases]
        n = self.slow.inputs[0].shape[1]
        tokens = torch.zeros(len(self.target), n, dtype=self.image.dtype)
        total = torch.zeros(len(self.target), dtype=self.image.dtype)
        for (leaf, placed), g in zip(biases, self.grad(*leaves), strict=True):
            product = (leaf * g).detach()
            total += product.flatten(1).sum(1)
            if placed:
                rows = product.sum(-1)
                tokens[:, n - rows.shape[1] :] += rows
        return tokens, total

    def products(self, values: list[Tensor]) -> list[Tensor]:
        grads = self.grad(*values)
        return [(v * g).sum(-1).detach() for v, g in zip(values, grads, strict=True)]

    def relevance(self, layers: list[Tensor]) -> Tensor:
        """The rows that the output reads of the product of all layers' matrices (B, n, n)."""
        product = layers[0]
        for layer in layers[1:]:
            product = layer @ product
        return product[:, 0] if self.token_pool else product[:, self.prefix :].mean(1)

    def method(self, name: str) -> Tensor:
        return getattr(self, name.replace("-", "_").replace("+", "_plus"))().detach()

    def input_x_gradient(self) -> Tensor:
        return self.pixel_products().sum(1)

    def embedding_x_gradient(self) -> Tensor:
        return self.grid(self.products(self.slow.inputs)[0])

    def hirescam(self) -> Tensor:
        return self.grid(self.products(self.slow.inputs)[-1])

    def fullgrad(self) -> Tensor:
        pixels = self.pixel_products().sum(1).reshape(-1, 2, 16, 3, 16).sum((2, 4))
        return pixels + self.grid(self.bias_products()[0])

    def fullgrad_plus(self) -> Tensor:
        later = self.bias_products(self.slow.before)[0]
        return self.grid(sum(self.products(self.slow.inputs)) + later)

    def hirescam_plus(self) -> Tensor:
        return self.grid(sum(self.products(self.slow.inputs)))

    def mixed(self, channels: Callable[[Tensor], Tensor]) -> Tensor:
        """Channels of h dL/dh mixed one token after the other."""
        total = torch.zeros(self.slow.inputs[0].shape[:2], dtype=self.image.dtype)
        for h, g in zip(self.slow.inputs, self.grad(*self.slow.inputs), strict=True):
            for i, sample in enumerate((h * g).detach()):
                total[i] += torch.stack([channels(token) for token in sample])
        return self.grid(total)

    def l1_hirescam_plus(self) -> Tensor:
        return self.mixed(lambda token: torch.linalg.vector_norm(token, 1))

    def l2_hirescam_plus(self) -> Tensor:
        return self.mixed(lambda token: torch.linalg.vector_norm(token, 2))

    def relu_hirescam_plus(self) -> Tensor:
        return self.mixed(lambda token: token[token > 0].sum())

    def gradcam_plus(self) -> Tensor:
        found = zip(self.slow.inputs, self.grad(*self.slow.inputs), strict=True)
        return self.grid(sum(torch.einsum("bnc,bc->bn", h, g.mean(1)) for h, g in found))

    def xgradcam_plus(self) -> Tensor:
        total = 0
        for h, g in zip(self.slow.inputs, self.grad(*self.slow.inputs), strict=True):
            share = h.abs() / h.abs().sum(1, keepdim=True)
            total = total + torch.einsum("bnc,bc->bn", h, (share * g).sum(1))
        return self.grid(total)

    def signed_xgradcam_plus(self) -> Tensor:
        """Fu et al. 2020, equation 7: w_k = sum_ij (F_ij^k / sum_ij F^k) dS/dF_ij^k."""
        total = 0
        for h, g in zip(self.slow.inputs, self.grad(*self.slow.inputs), strict=True):
            share = h / h.sum(1, keepdim=True)
            total = total + torch.einsum("bnc,bc->bn", h, (share * g).sum(1))
        return self.grid(total)

    def gradcam_plus_plus(self) -> Tensor:
        """Chattopadhay et al. 2018, equations 5 and 19 with Y = exp(S); no ReLU at the end."""
        h = self.slow.inputs[-1]
        g = self.grad(h)[0]
        found = torch.zeros(h.shape[:2], dtype=h.dtype)
        for b in range(h.shape[0]):
            for k in range(h.shape[2]):
                a, d = h[b, :, k], g[b, :, k]
                weight = 0.0
                for i in range(len(a)):
                    if d[i] > 0:
                        alpha = d[i] ** 2 / (2 * d[i] ** 2 + a.sum() * d[i] ** 3)
                        weight = weight + alpha * d[i]
                found[b] += weight * a.detach()
        return self.grid(found)

    def attcat(self) -> Tensor:
        products = self.products(self.slow.outputs)
        pairs = zip(self.slow.attention, products, strict=True)
        return self.grid(sum(a.mean((1, 2)) * p for a, p in pairs))

    def raw_attention(self) -> Tensor:
        return self.grid(self.relevance([self.slow.attention[-1].mean(1)]))

    def gradsam(self) -> Tensor:
        """Barkan et al. 2021: the mean over layers, heads and queries of A ReLU(dL/dA)."""
        pairs = zip(self.slow.attention, self.grad(*self.slow.attention), strict=True)
        parts = [head for a, g in pairs for head in (a * g * (g > 0)).unbind(1)]
        return self.grid(torch.stack(parts).mean((0, 2)))

    def attention_gradient(self) -> Tensor:
        return self.grid(self.relevance([self.grad(self.slow.attention[-1])[0].mean(1)]))

    def attention_x_gradient(self) -> Tensor:
        a = self.slow.attention[-1]
        return self.grid(self.relevance([(a * self.grad(a)[0]).mean(1)]))

    def rollout(self) -> Tensor:
        eye = torch.eye(self.slow.attention[0].shape[-1], dtype=self.image.dtype)
        return self.grid(self.relevance([(a.mean(1) + eye) / 2 for a in self.slow.attention]))

    def genatt(self) -> Tensor:
        grads = self.grad(*self.slow.attention)
        eye = torch.eye(grads[0].shape[-1], dtype=self.image.dtype)
        pairs = zip(self.slow.attention, grads, strict=True)
        return self.grid(self.relevance([eye + (a * g).clamp(min=0).mean(1) for a, g in pairs]))

    def vectors(self, of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Pair by pair: T_ij = sum_h A_ij W_O^h v_j + [i = j] x_i, and the sum y_i."""
        layers = []
        s = self.slow
        for block, x, a, y in zip(self.model.blocks, s.inputs, s.attention, s.middles, strict=True):
            batch, n, dim = x.shape
            v = block.attn.qkv(block.norm1(x))[..., 2 * dim :]
            wide = dim // block.attn.num_heads
            layer = torch.zeros(batch, n, n, dtype=x.dtype)
            for i in range(n):
                for j in range(n):
                    given = x[:, i].clone() if i == j else torch.zeros(batch, dim, dtype=x.dtype)
                    for h in range(block.attn.num_heads):
                        at = slice(h * wide, (h + 1) * wide)
                        moved = v[:, j, at] @ block.attn.proj.weight[:, at].T
                        given = given + a[:, h, i, j, None] * moved
                    layer[:, i, j] = of(given, y[:, i])
            layers.append(layer / layer.sum(-1, keepdim=True))
        return self.grid(self.relevance(layers))

    def globenc(self) -> Tensor:
        """Modarressi et al. 2022, of norms before the sub-layers: |T_ij| and the residual alone."""
        return self.vectors(lambda given, y: given.norm(dim=-1))

    def alti(self) -> Tensor:
        """Ferrando et al. 2022, equations 8 and 9."""
        return self.vectors(
            lambda given, y: (y.abs().sum(-1) - (y - given).abs().sum(-1)).clamp(min=0)
        )

    def tokentm(self) -> Tensor:
        s = self.slow
        eye = torch.eye(s.inputs[0].shape[1], dtype=self.image.dtype)

        def change(before: Tensor, after: Tensor) -> Tensor:
            cosine = (before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1))
            length = after.norm(dim=-1) / before.norm(dim=-1)
            return torch.diag_embed(length * cosine.exp() / cosine.exp().sum(-1, keepdim=True))

        layers = [torch.diag_embed(s.inputs[0].norm(dim=-1))]
        grads = self.grad(*s.attention)
        for x, a, g, mid, out in zip(
            s.inputs, s.attention, grads, s.middles, s.outputs, strict=True
        ):
            moved = (a.mean(1) @ change(x, mid)) * g.clamp(min=0).mean(1)
            layers += [eye + moved, eye + change(mid, out)]
        return self.grid(self.relevance(layers))

    def legrad(self) -> Tensor:
        total = 0
        for a, out in zip(self.slow.attention, self.slow.outputs, strict=True):
            logits = self.slow.head(out)
            score = logits[range(len(self.target)), self.target].sum()
            total = total + self.grad(a, score=score)[0].clamp(min=0).mean((1, 2))
        return self.grid(total)


CASES: dict[str, Callable[[], nn.Module]] = {
    "class token": lambda: vit(reg_tokens=2),
    "average": lambda: vit(class_token=False, global_pool="avg", fc_norm=True),
}


@pytest.fixture(scope="module", params=[(c, p) for c in CASES for p in (None, "libra")])
def pair(request: pytest.FixtureRequest) -> tuple[dict[str, Map], Reference]:
    case, policy = request.param
    model = shaken(CASES[case]())
    x, target = images(2, 3, 32, 48), [3, 1]
    fast = Explainer(model, x, policy)(x, GRADIENT, target)
    return fast, Reference(model, x, target, policy == "libra")


@pytest.mark.slow
@pytest.mark.parametrize("name", GRADIENT)
def test_a_method_is_its_definition(name: str, pair: tuple[dict[str, Map], Reference]) -> None:
    fast, slow = pair
    torch.testing.assert_close(fast[name].values, slow.method(name), rtol=1e-9, atol=1e-12)
    assert fast[name].values.abs().max() > 0


def test_totals_count_what_has_no_place(pair: tuple[dict[str, Map], Reference]) -> None:
    fast, slow = pair
    pixels = slow.pixel_products().flatten(1).sum(1)
    torch.testing.assert_close(fast["input-x-gradient"].total, pixels)
    torch.testing.assert_close(fast["fullgrad"].total, pixels + slow.bias_products()[1])
    found = fast["fullgrad"]
    placed = found.values.flatten(1).sum(1)
    assert (placed - found.total).abs().max() > 1e-6  # the head's bias at least
    for name in ("embedding-x-gradient", "hirescam"):
        where = 0 if name == "embedding-x-gradient" else -1
        summed = slow.products(slow.slow.inputs)[where].sum(1)
        torch.testing.assert_close(fast[name].total, summed)


# --------------------------------------------------------------------------- windows, hierarchy


def swin(size: tuple[int, int] = (56, 84)) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=size, window_size=7, depths=(2, 1),
        embed_dim=8, num_heads=(2, 2), num_classes=5,
    )  # fmt: skip


class SlowSwin:
    """Hooks on a copy of a Swin: block inputs, expanded bias leaves and attention, window-reversed
    by timm's own function. Gradients are those of the copy, whose backward is the real one."""

    def __init__(self, model: nn.Module, image: Tensor, target: int) -> None:
        self.model = copy.deepcopy(model)
        self.blocks = [b for layer in self.model.layers for b in layer.blocks]
        self.inputs: list[Tensor] = []
        self.attention: list[Tensor] = []
        self.outputs: list[Tensor] = []
        for block in self.blocks:
            block.register_forward_pre_hook(lambda _, args: self.inputs.append(args[0]))
            block.register_forward_hook(lambda _, args, out: self.outputs.append(out))
            block.attn.fused_attn = False
            block.attn.attn_drop.register_forward_hook(
                lambda _, args, out: self.attention.append(out)
            )
        self.score = self.model(image.clone().requires_grad_())[:, target].sum()

    def grads(self, values: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.score, values, retain_graph=True)

    def keys(self, block: nn.Module, per_key: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B * windows, 49) back on the image's grid."""
        windows = per_key.reshape(-1, 7, 7, 1)
        back = window_reverse(windows, (7, 7), *grid)
        shifts = [s if isinstance(s, int) else int(s) for s in block.shift_size]
        return torch.roll(back, shifts, (1, 2))[..., 0]

    def matrix(self, block: nn.Module, mixed: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B * windows, 49, 49) as (B, n, n)."""
        count = grid[0] * grid[1]
        numbers = torch.arange(count).reshape(1, *grid, 1)
        shifted = torch.roll(numbers, [-int(s) for s in block.shift_size], (1, 2))
        index = window_partition(shifted, (7, 7)).flatten(1)  # (windows, 49)
        full = mixed.new_zeros(mixed.shape[0] // len(index), count, count)
        for i, part in enumerate(mixed):
            where = index[i % len(index)]
            full[i // len(index)][where[:, None], where[None]] = part
        return full


@pytest.mark.slow
def test_blocks_of_windows_and_of_later_stages() -> None:
    model, x, graph = traced("swin")
    fast = Explainer(graph)(x, ["hirescam", "embedding-x-gradient", "gradcam+"], 2)
    slow = SlowSwin(model, x, 2)
    grads = slow.grads(slow.inputs)
    products = [(h * g).sum(-1) for h, g in zip(slow.inputs, grads, strict=True)]
    torch.testing.assert_close(fast["embedding-x-gradient"].values, products[0])
    torch.testing.assert_close(fast["hirescam"].values, products[-1])
    cams = [
        (h * g.mean((1, 2), keepdim=True)).sum(-1) for h, g in zip(slow.inputs, grads, strict=True)
    ]
    fine = cams[2].repeat_interleave(2, 1).repeat_interleave(2, 2)[:, :14, :21] / 4
    torch.testing.assert_close(fast["gradcam+"].values, cams[0] + cams[1] + fine)


def test_attention_in_windows() -> None:
    model, x, graph = traced("swin")
    fast = Explainer(graph)(x, ["attcat", "genatt", "rollout"], 2)
    slow = SlowSwin(model, x, 2)
    grids = [(14, 21), (14, 21), (7, 14)]  # the last stage is padded from 7 x 11
    products = [
        (h * g).sum(-1) for h, g in zip(slow.outputs, slow.grads(slow.outputs), strict=True)
    ]
    assert products[-1].shape[1:] == (7, 11)
    received = [
        slow.keys(b, a.mean((1, 2)), grid)
        for b, a, grid in zip(slow.blocks, slow.attention, grids, strict=True)
    ]
    last = received[2][:, :, :11] * products[2]
    fine = last.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, :14, :21] / 4
    expected = received[0] * products[0] + received[1] * products[1] + fine
    torch.testing.assert_close(fast["attcat"].values, expected)

    gradients = slow.grads(slow.attention)

    def carried(mixed: list[Tensor], half: float) -> Tensor:
        full = [
            slow.matrix(b, m, grid) for b, m, grid in zip(slow.blocks, mixed, grids, strict=True)
        ]
        kept = torch.arange(7 * 14).reshape(7, 14)[:, :11].flatten()
        last = full[2][:, kept][:, :, kept]
        row = torch.full((2, 1, 77), 1 / 77, dtype=x.dtype)
        row = half * (row + row @ last)
        coarse = row.reshape(2, 7, 11)
        row = coarse.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, :, :21] / 4
        row = row.reshape(2, 1, -1)
        for m in (full[1], full[0]):
            row = half * (row + row @ m)
        return row.reshape(2, 14, 21)

    torch.testing.assert_close(
        fast["rollout"].values, carried([a.mean(1) for a in slow.attention], 0.5)
    )
    pairs = zip(slow.attention, gradients, strict=True)
    mixed = [(a * g).clamp(min=0).mean(1) for a, g in pairs]
    torch.testing.assert_close(fast["genatt"].values, carried(mixed, 1.0))


@pytest.mark.slow
def test_a_windows_biases_are_put_where_they_lie() -> None:
    """`fullgrad`'s maps, each of its node's shape, put back by timm's window_reverse."""
    model, x = shaken(swin((56, 56))), images(2, 3, 56, 56)
    balanced = fgt.balance(model, x)
    found = Explainer(balanced)(x, ["fullgrad+", "fullgrad"], 2)
    copied = copy.deepcopy(model)
    blocks = [b for layer in copied.layers for b in layer.blocks]
    slow = SlowSwin(model, x, 2)
    parts = fgt.fullgrad(balanced, x, target=2)  # maps in windows, which are reversed here
    grids = {0: (14, 14), 1: (14, 14), 2: (7, 7)}
    expected = torch.zeros(2, 14, 14, dtype=x.dtype)
    for name, product in parts.biases.items():
        if name.startswith("head"):
            continue
        if ".downsample.norm" in name:  # four finer tokens side by side, columns first
            four = product.unflatten(-1, (2, 2, -1)).sum(-1)  # (2, 7, 7, column, row)
            expected += four.permute(0, 1, 4, 2, 3).reshape(2, 14, 14)
            continue
        rows = product.sum(1) if name == "patch_embed.proj.bias" else product.sum(-1)
        owner = name.split(".")
        number = 2 if owner[:2] == ["layers", "1"] else int(owner[3]) if "blocks" in owner else 0
        if ".attn." in name:
            rows = slow.keys(blocks[number], rows, grids[number])
        rows = rows.reshape(2, *((7, 7) if rows[0].numel() == 49 else (14, 14)))
        if rows.shape[1] == 7:
            rows = rows.repeat_interleave(2, 1).repeat_interleave(2, 2) / 4
        expected += rows
    pixels = parts.input.sum(1).reshape(2, 14, 4, 14, 4).sum((2, 4))
    torch.testing.assert_close(found["fullgrad"].values, pixels + expected)
    torch.testing.assert_close(found["fullgrad"].total, parts.total)


# --------------------------------------------------------------------------- architectures


def mixer(**options: object) -> nn.Module:
    return MlpMixer(num_classes=5, img_size=32, patch_size=8, num_blocks=2, embed_dim=16, **options)


def small(name: str, **options: object) -> nn.Module:
    given = {"depth": 2, "img_size": 32, "embed_dim": 32, "num_heads": 2, "num_classes": 5}
    return timm.create_model(name, **(given | options))


GAP = "vit_so400m_patch14_siglip_gap_378"
ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], tuple[int, int], tuple[int, int]]] = {
    "vit": (lambda: vit(reg_tokens=2), (32, 48), (2, 3)),
    "eva": (lambda: small("eva02_tiny_patch14_224", img_size=28, embed_dim=48), (28, 28), (2, 2)),
    "beit": (lambda: small("beitv2_base_patch16_224"), (32, 32), (2, 2)),
    "flexivit": (lambda: small("flexivit_small", img_size=(32, 48)), (32, 48), (2, 3)),
    "siglip": (lambda: small("vit_base_patch16_siglip_224", img_size=(32, 48)), (32, 48), (2, 3)),
    "siglip-gap": (lambda: small(GAP, img_size=28), (28, 28), (2, 2)),
    "clip": (lambda: small("vit_base_patch16_clip_224"), (32, 32), (2, 2)),
    "deit3": (lambda: small("deit3_small_patch16_224"), (32, 32), (2, 2)),
    "mixer": (mixer, (32, 32), (4, 4)),
    "gmixer": (
        lambda: mixer(mlp_layer=timm.layers.GluMlp, act_layer=nn.SiLU, mlp_ratio=(1.0, 4.0)),
        (32, 32),
        (4, 4),
    ),
    "swin": (swin, (56, 84), (14, 21)),
    "convnext": (
        lambda: timm.create_model(
            "convnext_atto", depths=(1, 1, 1, 1), dims=(4, 8, 8, 8), num_classes=5
        ),
        (64, 96),
        (16, 24),
    ),
    "resnet": (
        lambda: timm.create_model("resnet10t", channels=(4, 4, 8, 8), stem_width=4, num_classes=5),
        (64, 96),
        (16, 24),
    ),
}  # fmt: skip


@cache
def traced(name: str) -> tuple[nn.Module, Tensor, fgt.ComputationGraph]:
    """A model in float64, two images and its graph, which takes most of the time."""
    build, size, _ = ARCHITECTURES[name]
    torch.manual_seed(0)
    model, x = shaken(build()), images(2, 3, *size)
    return model, x, fgt.trace(model, x)


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture(name: str) -> None:
    """Grids, completeness, batches, and which methods apply."""
    _, size, grid = ARCHITECTURES[name]
    model, x, graph = traced(name)
    explainer = Explainer(graph, policy="libra")
    assert explainer.grid == grid
    has_attention = name not in ("mixer", "gmixer", "convnext", "resnet")
    names = [n for n in GRADIENT if has_attention or n not in (*ATTENTION, *VECTORS)]
    names = [n for n in names if name != "swin" or n not in VECTORS]  # windows
    assert set(explainer.applying()) == {*names, "random", "integrated-gradients", "smoothgrad"}
    found = explainer(x, names, [4, 0])
    torch.testing.assert_close(found["fullgrad"].output, model(x)[[0, 1], [4, 0]])
    for method, one in found.items():
        rows, columns = one.values.shape[1:]
        if method == "input-x-gradient":
            assert (rows, columns) == size
        elif method in ("hirescam", "gradcam++", "legrad", *LAST_ATTENTION):  # the last stage alone
            assert rows <= grid[0] and columns <= grid[1]
        else:
            assert (rows, columns) == grid
        assert one.values.isfinite().all() and one.values.abs().max() > 0
        assert one.pixels().shape == (2, *size)
    alone = explainer(x[1:], names, 0)
    for method in names:
        torch.testing.assert_close(
            alone[method].values[0], found[method].values[1], atol=1e-9, rtol=0
        )
    assert (found["fullgrad"].error < 1e-10).all()
    plain = Explainer(graph)(x, "fullgrad", [4, 0])["fullgrad"]
    assert bool((plain.error < 1e-10).all()) == (name == "resnet")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "gmixer", "resnet"])
def test_single_precision_and_a_model_that_is_left_alone(name: str) -> None:
    build, size, _ = ARCHITECTURES[name]
    torch.manual_seed(0)
    model, x = shaken(build(), torch.float32), images(2, 3, *size, dtype=torch.float32)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    modules = [(m, dict(m.__dict__)) for m in model.modules()]
    logits, given = model(x), x.clone()
    explainer = Explainer(model, x, "libra")
    found = explainer(x, [m for m in explainer.applying() if m in GRADIENT])["fullgrad"]
    assert torch.equal(found.output, logits.amax(1)) and torch.equal(x, given)
    assert (found.error < 1e-5).all()
    assert not x.requires_grad and x.grad is None
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    for module, attributes in modules:
        assert module.__dict__.keys() == attributes.keys()
        assert not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def test_attention_of_a_pooling_head() -> None:
    """SigLIP's head attends to the tokens; LeGrad takes its map, from every layer's tokens."""
    model, x, graph = traced("siglip")
    x = x[:1]
    found = Explainer(graph)(x, ["raw-attention", "legrad", "rollout"], 1)
    pool, maps, states = model.attn_pool, [], []
    for block in model.blocks:
        block.register_forward_hook(lambda _, args, out: states.append(out))
    model(x)
    total, last = 0, None
    for state in states:
        n, dim = state.shape[1:]
        tokens = model.norm(state)
        q = pool.q(pool.latent.expand(1, -1, -1)).reshape(
            1, -1, pool.num_heads, dim // pool.num_heads
        )
        kv = pool.kv(tokens).reshape(1, n, 2, pool.num_heads, -1).permute(2, 0, 3, 1, 4)
        k, v = kv
        a = (pool.q_norm(q.transpose(1, 2)) @ pool.k_norm(k).mT * pool.scale).softmax(-1)
        a = a.detach().requires_grad_()
        y = pool.proj((a @ v).transpose(1, 2).reshape(1, -1, dim))
        y = y + pool.mlp(pool.norm(y))
        logits = model.head(model.fc_norm(y[:, 0]))
        total = total + torch.autograd.grad(logits[0, 1], a)[0].clamp(min=0).mean((1, 2))
        maps.append(a)
        last = logits
    torch.testing.assert_close(last, model(x))
    torch.testing.assert_close(found["legrad"].values, total.reshape(1, 2, 3))
    raw = maps[-1].detach().mean(1)[:, 0].reshape(1, 2, 3)
    torch.testing.assert_close(found["raw-attention"].values, raw)


def test_a_model_of_ones_own_without_module_paths() -> None:
    """Folded heads and torch's own attention; joins in forward() itself are blocks of their own."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 8, 4, 4)
            self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))
            self.attentions = nn.ModuleList(
                nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2)
            )
            self.head = nn.Linear(8, 3)

        def forward(self, image: Tensor) -> Tensor:
            x = self.patches(image).flatten(2).mT
            for norm, attention in zip(self.norms, self.attentions, strict=True):
                y = norm(x)
                x = x + attention(y, y, y, need_weights=True)[0]
            return self.head(x.mean(1))

    model, x = shaken(Own()), images(2, 3, 8, 12)
    explainer = Explainer(model, x, "libra")
    assert explainer.grid == (2, 3) and len(explainer.blocks) == 2
    found = explainer(x, ["rollout", "fullgrad"], 0)
    assert (found["fullgrad"].error < 1e-10).all()
    with torch.no_grad():
        tokens, maps = model.patches(x).flatten(2).mT, []
        for norm, attention in zip(model.norms, model.attentions, strict=True):
            y = norm(tokens)
            added, weights = attention(y, y, y, need_weights=True)
            tokens = tokens + added
            maps.append((weights + torch.eye(6)) / 2)
    expected = (maps[1] @ maps[0]).mean(1).reshape(2, 2, 3)
    torch.testing.assert_close(found["rollout"].values, expected)


def test_a_convolutional_network_without_residuals_has_its_layers_for_blocks() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip
    model, x = shaken(model), images(2, 3, 16, 24)
    explainer = Explainer(model, x)
    assert explainer.blocks == ("3", "6")
    found = explainer(x, ["hirescam", "fullgrad"], 0)
    assert (found["fullgrad"].error < 1e-10).all()  # ReLU networks are complete as they are
    feature = model[:6](x).detach().requires_grad_()
    g = torch.autograd.grad(model[6:](feature)[:, 0].sum(), feature)[0]
    torch.testing.assert_close(found["hirescam"].values, (feature * g).sum(1).detach())


# --------------------------------------------------------------------------- cost


class Counting(TorchDispatchMode):
    """Counts the patch embedding's forwards and backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = self.backward = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.forward += func is torch.ops.aten.convolution.default
        self.backward += func is torch.ops.aten.convolution_backward.default
        return func(*args, **(kwargs or {}))


def test_all_gradient_methods_share_one_forward_and_one_backward() -> None:
    model, x = vit(reg_tokens=1).eval(), images(2, 3, 32, 48, dtype=torch.float32)
    explainer = Explainer(model, x, "libra")
    with Counting() as counted:
        assert len(explainer(x, GRADIENT, 1)) == len(GRADIENT) == 24
    assert (counted.forward, counted.backward) == (1, 1)
    with Counting() as counted:
        explainer(x, "random")
    assert (counted.forward, counted.backward) == (1, 0)


@pytest.mark.slow
def test_the_one_shot_form_and_inference_mode() -> None:
    model, x = shaken(vit(depth=1)), images(2, 3, 32, 48)
    with torch.inference_mode():
        one = explain(model, x * 1, "fullgrad+", policy="libra")
    assert one.target.tolist() == model(x).argmax(1).tolist()
    many = Explainer(model, x, "libra")(x, ["genatt", "fullgrad+"])
    torch.testing.assert_close(one.values, many["fullgrad+"].values)


# --------------------------------------------------------------------------- sampled methods


@pytest.mark.slow
def test_integrated_gradients_by_quadrature_by_hand() -> None:
    model, x = shaken(vit(depth=1)), images(2, 3, 32, 48)
    found = explain(model, x, "integrated-gradients", target=[1, 2])
    points, weights = np.polynomial.legendre.leggauss(50)
    total = torch.zeros_like(x)
    for point, weight in zip((points + 1) / 2, weights / 2, strict=True):
        at = (x * point).requires_grad_()
        total += weight * torch.autograd.grad(model(at)[[0, 1], [1, 2]].sum(), at)[0]
    torch.testing.assert_close(found.values, (total * x).sum(1))
    # the axiom's two sides: what f is at 0 counts, as a bias does
    origin = model(torch.zeros_like(x))[[0, 1], [1, 2]]
    torch.testing.assert_close(found.total, (total * x).flatten(1).sum(1) + origin)
    assert (found.error < 1e-6).all()
    rough = explain(model.bfloat16(), x.bfloat16(), "smoothgrad")  # captum's noise is float32
    assert rough.values.isfinite().all()


@pytest.mark.slow
def test_a_methods_mean_along_the_ray_by_hand() -> None:
    """h_a dL/dh_a at the first block, by a hook on the model, and A dL/dA of every point."""
    model, x = shaken(vit(depth=2)), images(2, 3, 32, 48)
    first = torch.full_like(x, 0.3)
    names = ["embedding-x-gradient", "attention-x-gradient"]
    found = mean_along_ray(Explainer(model, x), x, names, steps=4, baseline=first)
    target = model(x).argmax(1).tolist()  # the image's, at every point
    sums = {name: torch.zeros(2, 2, 3, dtype=x.dtype) for name in names}
    for point, weight in zip(*np.polynomial.legendre.leggauss(4), strict=True):
        a = (1 + point) / 2
        slow = Reference(model, (1 - a) * first + a * x, target, False)
        for name in names:
            sums[name] += weight / 2 * slow.method(name)
    for name in names:
        torch.testing.assert_close(found[name].values, sums[name], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found[name].output, model(x)[[0, 1], target])
        assert found[name].total is None
    with pytest.raises(InputError, match="at least one step"):
        mean_along_ray(Explainer(model, x), x, names, steps=0)


def test_smoothgrad_averages_over_noise() -> None:
    class Square(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x**2).flatten(1).sum(1, keepdim=True)

    x = images(2, 3, 8, 8)
    explainer = Explainer(Square().eval(), x)
    assert set(explainer.applying()) == {
        "input-x-gradient", "fullgrad", "random", "integrated-gradients", "smoothgrad",
    }  # fmt: skip
    first, again, other = (
        explainer(x, "smoothgrad", seed=s)["smoothgrad"].values for s in (0, 0, 9)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    deviation = 2 * 0.15 * (x.amax((1, 2, 3)) - x.amin((1, 2, 3))) * math.sqrt(3 / 25)
    distance = (first - 2 * x.sum(1)) / deviation.view(2, 1, 1)
    assert 0.7 < float(distance.std()) < 1.4 and abs(float(distance.mean())) < 0.4


def test_random_is_seeded() -> None:
    model, x = vit(depth=1).eval(), images(2, 3, 32, 48, dtype=torch.float32)
    explainer = Explainer(model, x)
    one, same, other = (explainer(x, "random", seed=s)["random"].values for s in (3, 3, 4))
    assert one.shape == (2, 2, 3) and torch.equal(one, same) and not torch.equal(one, other)
    assert not torch.equal(one[0], one[1])


@pytest.mark.parametrize("given", [{}, {"function": min, "sampled": max}], ids=["neither", "both"])
def test_a_row_says_how_its_maps_are_made(given: dict) -> None:
    with pytest.raises(ValueError, match=r"'mine' has (neither|both) .* exactly one"):
        Method("mine", "", **given)
    assert all((m.function is None) != (m.sampled is None) for m in METHODS.values())


def test_a_method_is_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is chosen, run and shown by what its row says, whatever its name."""
    model, x = shaken(vit(depth=1)), images(2, 3, 32, 48)
    own = replace(METHODS["random"], name="an own random")
    monkeypatch.setattr(explainers, "METHODS", {**METHODS, own.name: own})
    explainer = Explainer(model, x)
    found = explainer(x, ["random", own.name, "fullgrad"], seed=3)
    assert own.name in explainer.applying() and found[own.name].method == own.name
    assert torch.equal(found[own.name].values, found["random"].values)


# --------------------------------------------------------------------------- maps


def test_a_map_up_to_pixels_and_down_to_tokens() -> None:
    values = images(2, 2, 3)
    found = Map("x", values, values[:, 0, 0], None, None, (32, 48), (16.0, 16.0))
    expected = F.interpolate(values[:, None], size=(32, 48), mode="bicubic")[:, 0]
    torch.testing.assert_close(found.pixels(), expected)
    assert found.pixels((64, 96)).shape == (2, 64, 96) and found.error is None
    torch.testing.assert_close(found.tokens((1, 1))[:, 0, 0], values.sum((1, 2)))
    torch.testing.assert_close(
        found.tokens((4, 6)), values.repeat_interleave(2, 1).repeat_interleave(2, 2) / 4
    )
    fine = found.tokens((3, 3))
    torch.testing.assert_close(fine.sum((1, 2)), values.sum((1, 2)))
    pixels = Map("x", images(1, 32, 48), values[:1, 0, 0], None, None, (32, 48))
    summed = pixels.values.reshape(1, 2, 16, 3, 16).sum((2, 4))
    torch.testing.assert_close(pixels.tokens((2, 3)), summed)


def test_pixels_outside_of_the_tokens_go_to_no_token() -> None:
    """Of 36 x 36 pixels 2 x 2 tokens of 16 cover 32 x 32."""
    model, x = shaken(vit(img_size=36, depth=1)), images(1, 3, 36, 36)
    found = explain(model, x, "integrated-gradients")
    summed = found.values[:, :32, :32].reshape(1, 2, 16, 2, 16).sum((2, 4))
    torch.testing.assert_close(found.tokens((2, 2)), summed)


CONVOLUTIONS = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3), nn.ReLU(),
                nn.Conv2d(8, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]  # fmt: skip
UNTILED = {
    "tiled": (lambda: vit(img_size=32, class_token=False, global_pool="avg", fc_norm=True), 32),
    "36 pixels, patches of 16": (
        lambda: vit(img_size=36, class_token=False, global_pool="avg", fc_norm=True), 36,
    ),
    "with a class token": (lambda: vit(img_size=(36, 56)), (36, 56)),
    "convolutions without padding": (
        lambda: nn.Sequential(*copy.deepcopy(CONVOLUTIONS), nn.Linear(8, 5)), 32,
    ),
    "convolutions without padding, 35 pixels": (
        lambda: nn.Sequential(*copy.deepcopy(CONVOLUTIONS), nn.Linear(8, 5)), 35,
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("what", UNTILED)
def test_places_where_cells_do_not_tile_the_image(what: str) -> None:
    """What is pooled has no place, and what has one is not cut off."""
    make, size = UNTILED[what]
    model = shaken(make())
    height, width = (size, size) if isinstance(size, int) else size
    head = model.head if hasattr(model, "head") else model[-1]
    with torch.no_grad():
        head.bias.fill_(1000.0)
    x = images(2, 3, height, width)
    explainer = Explainer(model, x, "libra")
    found = explainer(x, ["fullgrad", "embedding-x-gradient"], 3)
    assert (found["fullgrad"].error < 1e-10).all()
    assert float(found["fullgrad"].values.sum((1, 2)).abs().max()) < 100
    if not hasattr(model, "head"):  # every value of the embedding has a place
        one = found["embedding-x-gradient"]
        torch.testing.assert_close(one.values.sum((1, 2)), one.total)
    assert all(path != "7" for path in explainer.blocks)  # the classifier is no block


@pytest.mark.slow
def test_a_layer_on_2_by_2_cells_that_reach_over_the_image() -> None:
    """Of 48 pixels strides of 32 make two cells, of which the second is cut."""
    model = shaken(timm.create_model("resnet18", num_classes=5))
    explainer = Explainer(model, images(1, 3, 48, 48))
    last = explainer.anatomy.stream[explainer.anatomy.blocks[-1].output]
    assert last.grid == (2, 2) and bool((last.index >= 0).all())  # the larger first one, too


# --------------------------------------------------------------------------- errors


@pytest.mark.slow
def test_an_index_before_the_logits_is_not_explained() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = vit(depth=1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.vit(x)
            return logits.argmax(1), logits

    model, x = shaken(Both()), images(2, 3, 32, 48)
    for method in ("fullgrad+", "legrad", "random"):
        ours, theirs = explain(model, x, method), explain(model.vit, x, method)
        torch.testing.assert_close(ours.values, theirs.values)
        assert torch.equal(ours.target, theirs.target)


def test_an_attention_method_without_attention_names_those_that_apply() -> None:
    model, x = mixer().eval(), images(1, 3, 32, 32, dtype=torch.float32)
    with pytest.raises(
        InputError, match=r"genatt needs attention.*methods that apply: .*fullgrad\+"
    ):
        explain(model, x, "genatt")


def test_vectors_through_a_norm_are_refused() -> None:
    """Behind attention, before the sum: what a token gives another one is no sum there."""
    model = shaken(vit(depth=1, block_fn=timm.models.vision_transformer.ResPostBlock))
    x = images(1, 3, 32, 48)
    for method in VECTORS:
        with pytest.raises(InputError, match=r"is not linear.*without a norm between"):
            explain(model, x, method)


def test_unknown_methods_targets_and_images() -> None:
    model, x = vit(depth=1).eval(), images(2, 3, 32, 48, dtype=torch.float32)
    explainer = Explainer(model, x)
    with pytest.raises(UnknownNameError, match=r"unknown method 'fulgrad'; did you mean fullgrad"):
        explainer(x, "fulgrad")
    with pytest.raises(InputError, match="name a method"):
        explainer(x, [])
    for target in (5, -6, [0, 5]):
        with pytest.raises(InputError, match="out of range for 5 classes"):
            explainer(x, "genatt", target)
    with pytest.raises(InputError, match="one for each of the 2 samples"):
        explainer(x, "genatt", [1, 2, 3])
    with pytest.raises(InputError, match="whole number"):
        explainer(x, "genatt", torch.tensor(1.5))
    with pytest.raises(InputError, match=r"expected images of shape \(B, 3, 32, 48\)"):
        explainer(x[..., :32], "genatt")
    with pytest.raises(InputError, match="a target is a whole number, or one a sample, not 'cat'"):
        explainer(x, "genatt", "cat")
    for other in (x.double(), (x * 9).to(torch.uint8)):
        with pytest.raises(InputError, match=r"expected images of torch\.float32, as the model"):
            explainer(other, "genatt")
    with pytest.raises(InputError, match="without images"):
        explainer(x[:0], "genatt")
    with pytest.raises(InputError, match="leave the policy out"):
        Explainer(fgt.balance(model, x), policy="libra")
    with pytest.raises(InputError, match="one image tensor"):
        Explainer(nn.Linear(3, 2).eval(), torch.randn(1, 3))
    assert torch.equal(explainer(x, "genatt", -1)["genatt"].target, torch.tensor([4, 4]))
