"""Whatever is said to apply to a model runs, whatever does not is a clear error: small versions of
many architectures, attention in the ways it is written, and blocks that are called twice."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import timm
import torch
from timm.models import byobnet, maxxvit, mobilevit
from timm.models.pit import PoolingVisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

import fullgrad_theory as fgt
from fullgrad_theory.attribution import METHODS, Explainer
from fullgrad_theory.errors import InputError

pytestmark = pytest.mark.slow

GRADIENT = [name for name, method in METHODS.items() if method.function is not None]
ATTENTION = [
    "attcat", "genatt", "tokentm", "legrad", "gradsam", "raw-attention", "attention-gradient",
    "attention-x-gradient", "rollout",
]  # fmt: skip
VECTORS = ["globenc", "alti"]  # of one sequence, and one attention a step
SEQUENCES = ("pit", "cait", "convit")
ON_STREAM = ["attcat", "genatt", "tokentm", "rollout"]


def shaken(model: nn.Module, by: float = 0.05) -> nn.Module:
    """Parameters away from their initial values, which are often 0."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by * torch.randn_like(parameter))
    return model.double().eval()


def images(*size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(2)).double()


def small(name: str, **options: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return shaken(timm.create_model(name, num_classes=5, **options))

    return build


def flat(*size: int) -> dict[str, object]:
    return {"img_size": size, "depth": 2, "embed_dim": 24, "num_heads": 2}


def made(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def seeded() -> nn.Module:
        torch.manual_seed(0)
        return shaken(build())

    return seeded


def mobile() -> nn.Module:
    convolution = mobilevit._inverted_residual_block(d=1, c=8, s=2, br=1.0)
    attention = mobilevit._mobilevit_block(
        d=1, c=8, s=2, transformer_dim=8, transformer_depth=1, patch_size=2, br=1.0
    )
    plan = byobnet.ByoModelCfg(
        blocks=(convolution, attention), stem_chs=8, stem_type="3x3", stem_pool="", num_features=16
    )
    return byobnet.ByobNet(plan, num_classes=5)


def maxvit() -> nn.Module:
    windows = maxxvit.MaxxVitTransformerCfg(window_size=(2, 2), grid_size=(2, 2), dim_head=4)
    plan = maxxvit.MaxxVitCfg(
        embed_dim=(8,), depths=(1,), block_type=("M",), stem_width=8, transformer_cfg=windows
    )
    return maxxvit.MaxxVit(plan, img_size=16, num_classes=5)


def pooled() -> nn.Module:
    """A hierarchy with a class token."""
    return PoolingVisionTransformer(
        img_size=32, patch_size=4, stride=4, base_dims=(4, 4), depth=(1, 1), heads=(2, 4),
        mlp_ratio=2, num_classes=5,
    )  # fmt: skip


STAGES = {"depths": (1, 1), "embed_dims": (8, 16), "num_heads": (2, 2)}
SHORT = {"img_size": 48, "depth": 2, "embed_dim": 24, "num_heads": 2}
TWINS = STAGES | {"img_size": 32, "mlp_ratios": (2, 2), "sr_ratios": (4, 2), "wss": (4, 2)}
PCPVT = {name: value for name, value in TWINS.items() if name != "wss"}
SWIN = {"img_size": (32, 48), "window_size": 4, "depths": (1,), "embed_dim": 8, "num_heads": (2,)}
GPSA = {"img_size": 48, "depth": 3, "embed_dim": 32, "num_heads": 4, "local_up_to_layer": 2}
XCIT = SHORT | {"embed_dim": 32, "cls_attn_layers": 1}
HIERA = {"img_size": (64, 64), "embed_dim": 8, "num_heads": 1, "stages": (1, 1, 1, 1)}
COAT = {"img_size": 64, "serial_depths": (1, 1, 1, 1), "embed_dims": (16,) * 4, "num_heads": 8}

# the model, the size of its images, and the methods that do not apply
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int], list[str]]] = {
    "swinv2": (small("swinv2_tiny_window8_256", **SWIN), (32, 48), []),
    "pit": (made(pooled), (32, 32), []),
    "cait": (small("cait_xxs24_224", **SHORT), (48, 48), []),
    "xcit": (small("xcit_nano_12_p16_224", **XCIT), (48, 48), [*ON_STREAM, "legrad"]),
    "pvt": (small("pvt_v2_b0", mlp_ratios=(2, 2), sr_ratios=(4, 2), **STAGES), (32, 48), []),
    "convit": (small("convit_tiny", **GPSA), (48, 48), []),
    "twins": (small("twins_svt_small", **TWINS), (32, 32), ["legrad"]),
    "pcpvt": (small("twins_pcpvt_small", **PCPVT), (32, 32), ["legrad"]),
    "davit": (small("davit_tiny", window_size=4, **STAGES), (16, 24), []),
    "mobilevit": (made(mobile), (32, 48), [*ON_STREAM, "legrad"]),
    "coat": (small("coat_lite_tiny", **COAT), (64, 64), ATTENTION),
    "hiera": (small("hiera_tiny_224", **HIERA), (64, 64), ["tokentm"]),
    "maxvit": (made(maxvit), (16, 16), ["tokentm"]),
    "samvit": (
        small("samvit_base_patch16", window_size=8, global_attn_indexes=(1,), **flat(64, 96)),
        (64, 96),
        [],
    ),
    "parallel": (small("vit_small_patch16_18x2_224", **flat(32, 48)), (32, 48), []),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_applies_runs_and_what_does_not_is_an_error(name: str) -> None:
    build, size, lacking = MODELS[name]
    lacking = lacking if name in SEQUENCES else [*lacking, *VECTORS]
    x = images(2, 3, *size)
    explainer = Explainer(build(), x)
    names = [n for n in GRADIENT if n in explainer.applying()]
    assert names == [n for n in GRADIENT if n not in lacking]
    found, alone = explainer(x, names, [4, 0]), explainer(x[1:], names, 0)
    for method in names:
        values = found[method].values
        assert values.isfinite().all() and values.abs().max() > 0, method
        torch.testing.assert_close(
            alone[method].values[0], values[1], rtol=0, atol=float(1e-8 * values.abs().max())
        )
    for method in lacking:
        with pytest.raises(InputError, match=rf"{method} needs .*methods that apply: .*fullgrad\+"):
            explainer(x, method)


# --------------------------------------------------------------------------- class attention


def test_class_attention_behind_the_stream() -> None:
    """CaiT: layers among the patches, then two in which the class token reads them."""
    build, size, _ = MODELS["cait"]
    model, x = build(), images(2, 3, *size)
    found = Explainer(model, x)(x, ["rollout", "raw-attention"], [4, 0])
    kept: list[Tensor] = []
    for block in model.blocks:  # type: ignore[union-attr]
        block.attn.attn_drop.register_forward_hook(lambda m, i, o: kept.append(o))
    for block in model.blocks_token_only:  # type: ignore[union-attr]
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda m, i, o: kept.append(o))
    model(x)
    *inner, first, second = (a.detach().mean(1) for a in kept)
    row = torch.zeros(2, 1, 10).double()
    row[..., 0] = 1
    for a in (second, first):  # I + A, A of the class token's row alone
        row = (row + row[..., :1] @ a) / 2
    row = row[..., 1:]
    for a in reversed(inner):
        row = (row + row @ a) / 2
    torch.testing.assert_close(found["rollout"].values, row.view(2, 3, 3))
    torch.testing.assert_close(found["raw-attention"].values, second[:, 0, 1:].view(2, 3, 3))


# --------------------------------------------------------------------------- ways of writing it


class Layer(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(batch, heads, n, channels) -> (batch, n, heads, channels)."""
        if self.form == "fused":
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        q = q / math.sqrt(q.shape[-1])
        scores = q @ k.mT if "einsum" not in self.form else torch.einsum("bhid,bhjd->bhij", q, k)
        if self.form == "exp/sum":
            weights = (scores - scores.amax(-1, keepdim=True)).exp()
            return ((weights / weights.sum(-1, keepdim=True)) @ v).transpose(1, 2)
        weights = scores.softmax(-1)
        if self.form == "right":
            return (v.mT @ weights.mT).permute(0, 3, 1, 2)
        if self.form == "einsum":
            return torch.einsum("bhij,bhjd->bihd", weights, v)
        if self.form == "einsum, dots":
            return torch.einsum("...jd,...ij->...id", v, weights).transpose(1, 2)
        return (weights @ v).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        x = x + self.out(self.attention(q, k, v).flatten(2))
        return x + self.mlp(x)


class Written(nn.Module):
    """A ViT by hand, with a class token; `calls`: which layer is called, in order."""

    def __init__(self, form: str, layers: int = 2, calls: tuple[int, ...] = (0, 1)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, 16, 16, 16)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.layers = nn.ModuleList(Layer(form) for _ in range(layers))
        self.norm, self.head, self.calls = nn.LayerNorm(16), nn.Linear(16, 5), calls

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        for i in self.calls:
            x = self.layers[i](x)
        return self.head(self.norm(x[:, 0]))


FORMS = ["explicit", "right", "einsum", "einsum, dots", "exp/sum"]


def test_attention_however_it_is_written() -> None:
    x = images(2, 3, 32, 48)
    reference = shaken(Written("fused"))
    expected = Explainer(reference, x, "libra")(x, ATTENTION, [1, 2])
    for form in FORMS:
        model = Written(form).double().eval()
        model.load_state_dict(reference.state_dict())
        found = Explainer(model, x, "libra")(x, ATTENTION, [1, 2])
        for method in ATTENTION:
            torch.testing.assert_close(
                found[method].values, expected[method].values, msg=lambda m, f=form: f"{f}: {m}"
            )


class Unread(Layer):
    """Attention as a sum of products, which is no form that is known."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.mT).softmax(-1)
        return (weights.unsqueeze(-1) * v.unsqueeze(2)).sum(3).transpose(1, 2)


def test_attention_that_is_not_recognised_is_said_to_be_so() -> None:
    model, x = Written("explicit"), images(1, 3, 32, 48)
    model.layers = nn.ModuleList(Unread("") for _ in range(2))
    with pytest.raises(InputError, match=r"recognised \(.*einsum.*softmax.* is none of these\)"):
        Explainer(shaken(model), x)(x, "genatt")


# --------------------------------------------------------------------------- blocks


def test_a_block_that_is_called_twice_is_two() -> None:
    x = images(2, 3, 32, 48)
    shared = shaken(Written("fused", 1, (0, 0)))
    copied = copy.deepcopy(shared)
    copied.layers.append(copy.deepcopy(copied.layers[0]))
    copied.calls = (0, 1)
    once, twice = Explainer(copied, x), Explainer(shared, x)
    assert len(once.blocks) == len(twice.blocks) == 2
    expected, found = once(x, GRADIENT, [1, 2]), twice(x, GRADIENT, [1, 2])
    for method in GRADIENT:
        torch.testing.assert_close(found[method].values, expected[method].values)


def test_tokentm_reads_every_attention_of_a_step() -> None:
    """Of two in parallel, each matters to the map."""
    build, size, _ = MODELS["parallel"]
    x = images(2, 3, *size)
    explainer = Explainer(build(), x)
    both, maps = explainer.anatomy, []
    assert [s.step for s in both.attention] == [0, 0, 2, 2]
    for kept in (both.attention, both.attention[::2], both.attention[1::2]):
        explainer.anatomy = replace(both, attention=kept)
        maps.append(explainer(x, "tokentm", 1)["tokentm"].values)
    assert not any(torch.allclose(maps[0], other) for other in maps[1:])


def test_an_open_batch_stays_open() -> None:
    """Calls are run again on fakes, to tell which results share memory: no condition on it."""
    build, size, _ = MODELS["swinv2"]
    graph = fgt.trace(build(), images(2, 3, *size))
    assert not str(graph.placeholders[0].meta["val"].shape[0]).isdigit()
