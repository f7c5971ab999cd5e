"""Metrics against published implementations and against their definitions, written out slowly."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import numpy as np
import pytest
import quantus
import timm
import torch
from sklearn.metrics import f1_score, jaccard_score
from small_models import small
from torch import Tensor, nn
from torchmetrics.classification import BinaryAveragePrecision

from fullgrad_theory import metrics
from fullgrad_theory.errors import InputError, UnknownNameError
from fullgrad_theory.metrics import FRACTIONS, METRICS, Deletion
from fullgrad_theory.metrics.removing import _refusal

VIT = {"img_size": 64, "patch_size": 8, "num_classes": 5, "embed_dim": 48, "depth": 2}
TOKEN_MODELS = {
    "vit": ("vit_tiny_patch16_224", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "siglip": ("vit_base_patch16_siglip_gap_224", {}),
    "registers": ("vit_base_patch16_siglip_gap_224", {"reg_tokens": 3}),
    "oblong": ("vit_tiny_patch16_224", {"img_size": (32, 48)}),
    "eva": ("eva02_tiny_patch14_224", {}),
    "eva, as many tokens as head channels": (
        "eva02_tiny_patch14_224",
        {"embed_dim": 128, "num_heads": 2},
    ),
    "beit": ("beit_base_patch16_224", {}),
    "beit, a shared bias": (
        "beit_base_patch16_224",
        {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True},
    ),
    "beit, oblong": ("beitv2_base_patch16_224", {"img_size": (32, 48)}),
}


def build(name: str) -> nn.Module:
    timm_name, options = TOKEN_MODELS[name]
    torch.manual_seed(0)
    model = timm.create_model(timm_name, **(VIT | {"num_heads": 3} | options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def images(model: nn.Module, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn((count, 3, *model.patch_embed.img_size), generator=generator)


def subsets(count: int, cells: int, kept: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    order = torch.rand((count, cells), generator=generator).argsort(1)
    return order[:, :kept].sort(1).values


# ----------------------------------------------------------- tokens that are dropped, by hand


def never_saw(model: nn.Module, x: Tensor, kept: Tensor) -> Tensor:
    """The logits for one image of which only the patches `kept` ever reach a block."""
    tokens = model.patch_embed(x[None])
    ropes = None
    if isinstance(model, timm.models.Beit):
        tokens = torch.cat([model.cls_token, tokens], 1)
    else:
        embedded = model._pos_embed(tokens)
        tokens, ropes = embedded if isinstance(embedded, tuple) else (embedded, None)
    prefix = model.num_prefix_tokens
    rows = torch.cat([torch.arange(prefix), kept + prefix])
    tokens = (model.norm_pre if hasattr(model, "norm_pre") else nn.Identity())(tokens[:, rows])
    for block in model.blocks:
        if isinstance(model, timm.models.Beit):
            shared = None if model.rel_pos_bias is None else model.rel_pos_bias()
            tokens = beit_block(block, tokens, rows, shared)
        else:
            tokens = block(tokens) if ropes is None else block(tokens, rope=ropes[kept])
    return model.forward_head(model.norm(tokens))[0]


def beit_block(block: nn.Module, x: Tensor, rows: Tensor, shared: Tensor | None) -> Tensor:
    """A BEiT block written out; its bias for a pair of tokens is that of their places."""
    attn, u = block.attn, block.norm1(x)
    bias = attn._get_rel_pos_bias()[0] if shared is None else shared
    parts = torch.nn.functional.linear(u, attn.qkv.weight)
    parts = parts + torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
    q, k, v = (t.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for t in parts.chunk(3, -1))
    weights = q @ k.mT / math.sqrt(q.shape[-1]) + bias[:, rows][:, :, rows]
    y = attn.proj((weights.softmax(-1) @ v).transpose(1, 2).flatten(2))
    one = 1 if block.gamma_1 is None else block.gamma_1
    two = 1 if block.gamma_2 is None else block.gamma_2
    x = x + one * y
    return x + two * block.mlp(block.norm2(x))


@pytest.mark.parametrize("name", TOKEN_MODELS)
def test_dropping_tokens_is_a_model_that_never_saw_them(name: str) -> None:
    model = build(name).double()
    x = images(model, 3).double()
    deletion = Deletion(model, x)
    cells = deletion.grid[0] * deletion.grid[1]
    assert deletion.way == "tokens" and "dropped before blocks.0" in deletion.describe
    assert deletion.grid == model.patch_embed.grid_size
    for count in (2, cells // 2, cells - 1, cells):
        kept = subsets(3, cells, count)
        got = deletion._remove(x, kept)
        with torch.no_grad():
            want = torch.stack([never_saw(model, *pair) for pair in zip(x, kept, strict=True)])
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(deletion._remove(x, subsets(3, cells, 4)), model(x))
    torch.testing.assert_close(got, model(x), rtol=1e-9, atol=1e-9)  # all are kept


@pytest.mark.parametrize("name", ["vit", "eva", "beit"])
def test_fewer_tokens_reach_the_blocks(name: str) -> None:
    model = build(name)
    x = images(model, 2)
    deletion = Deletion(model, x)
    lengths = []
    probe = copy.deepcopy(model)
    for block in probe.blocks:
        block.register_forward_pre_hook(lambda m, args: lengths.append(args[0].shape[1]))
    Deletion(probe, x)
    lengths.clear()
    watched = Deletion(probe, x)
    lengths.clear()
    watched._remove(x, subsets(2, 64, 9))
    assert lengths == [9 + model.num_prefix_tokens] * len(model.blocks)
    assert deletion.describe == watched.describe


def test_timm_drops_the_rotations_of_eva_the_same_way() -> None:
    """timm's own dropping of patches, given the indices, in a copy of the model."""
    model = build("eva").double()
    x = images(model, 2).double()
    kept = subsets(2, 64, 11)

    class Given(nn.Module):
        def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
            rows = torch.cat([torch.zeros(2, 1, dtype=torch.long), kept + 1], 1)
            return tokens.take_along_dim(rows[..., None], 1), kept

    other = copy.deepcopy(model)
    other.patch_drop = Given()
    torch.testing.assert_close(Deletion(model, x)._remove(x, kept), other(x), rtol=1e-9, atol=1e-9)


def test_a_transformer_of_ones_own_needs_no_timm() -> None:
    torch.manual_seed(0)

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Conv2d(3, 16, 8, 8)
            self.places = nn.Parameter(torch.randn(1, 12, 16))
            layers = [nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(2)]
            self.layers = nn.ModuleList(layers)
            self.head = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.embed(x).flatten(2).mT + self.places
            for layer in self.layers:
                tokens = layer(tokens)
            return self.head(tokens.mean(1))

    model = Own().eval()
    x = torch.randn(2, 3, 24, 32)
    deletion = Deletion(model, x)
    assert (deletion.way, deletion.grid) == ("tokens", (3, 4))
    kept = subsets(2, 12, 5)
    for image, rows, got in zip(x, kept, deletion._remove(x, kept), strict=True):
        tokens = (model.embed(image[None]).flatten(2).mT + model.places)[:, rows]
        for layer in model.layers:
            tokens = layer(tokens)
        torch.testing.assert_close(got, model.head(tokens.mean(1))[0])


# ----------------------------------------------------------- where tokens cannot be dropped


def mixer() -> tuple[nn.Module, Tensor]:
    return small("gmixer")


def swin() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=64,
        window_size=4,
        embed_dim=16,
        depths=(1, 2),
        num_heads=(2, 2),
        num_classes=5,
    )
    return model.eval(), torch.randn(2, 3, 64, 64)


def conv() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=5).eval(), torch.randn(2, 3, 48, 64)


def test_a_mixer_has_its_tokens_zeroed_and_says_why() -> None:
    model, x = mixer()
    deletion = Deletion(model, x)
    assert deletion.way == "zeros" and deletion.grid == (4, 4)
    assert deletion.describe.startswith("tokens of removed patches are zeroed before blocks.0")
    assert "not tokens: RuntimeError" in deletion.describe
    kept = subsets(2, 16, 5)
    tokens = model.stem(x).detach()
    for row, kept_row in zip(tokens, kept, strict=True):
        for cell in range(16):
            if cell not in kept_row.tolist():
                row[cell] = 0.0
    want = model.forward_head(model.norm(model.blocks(tokens)))
    torch.testing.assert_close(deletion._remove(x, kept), want)


@pytest.mark.parametrize(("make", "grid"), [(swin, (8, 8)), (conv, (12, 16))])
def test_others_have_their_pixels_greyed(make, grid) -> None:
    model, x = make()
    deletion = Deletion(model, x, grid=grid)
    assert deletion.way == "pixels" and "mean colour" in deletion.describe
    assert "no run of blocks" in deletion.describe
    cells = grid[0] * grid[1]
    kept = subsets(2, cells, 20)
    grey = x.clone()
    high, wide = x.shape[2] // grid[0], x.shape[3] // grid[1]
    for image, rows, old in zip(grey, kept, x, strict=True):
        for cell in set(range(cells)) - set(rows.tolist()):
            r, c = divmod(cell, grid[1])
            patch = image[:, r * high : (r + 1) * high, c * wide : (c + 1) * wide]
            patch[:] = old.mean((1, 2))[:, None, None]
    torch.testing.assert_close(deletion._remove(x, kept), model(grey))


def test_pixels_can_be_asked_for_and_use_the_grid_of_the_tokens() -> None:
    model = build("vit")
    deletion = Deletion(model, images(model, 1), drop="pixels")
    assert (deletion.way, deletion.grid) == ("pixels", (8, 8))
    assert "not tokens" not in deletion.describe


def test_a_way_that_is_not_possible_is_an_error_that_says_why() -> None:
    model, x = mixer()
    with pytest.raises(InputError, match="does not allow removal by tokens: RuntimeError"):
        Deletion(model, x, drop="tokens")
    with pytest.raises(InputError, match="no run of blocks"):
        Deletion(*swin(), drop="zeros")
    with pytest.raises(InputError, match="tokens, zeros, pixels, not by 'blur'"):
        Deletion(model, x, drop="blur")


def test_a_removal_that_leaks_is_refused() -> None:
    """Overlapping patches: a removed token leaves its pixels in its neighbours."""
    torch.manual_seed(0)
    blocks = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    model = nn.Sequential(nn.Conv2d(3, 8, 9, 4, 4), nn.Flatten(2))

    class Overlapping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.blocks = model, blocks

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks(self.embed(x).mT).mean(1)

    deletion = Deletion(Overlapping().eval(), torch.randn(1, 3, 32, 32))
    assert deletion.way == "pixels"
    assert "not tokens: removed patches still change the output" in deletion.describe


def test_a_way_whose_output_is_not_finite_is_refused() -> None:
    model = build("vit")
    x = images(model, 2)
    assert _refusal(Deletion(model, x)._remove, x, (8, 8)) is None
    deletion = Deletion(model, x / 0)
    assert deletion.way == "pixels"
    assert "not tokens: the output for the patches that stay is not finite" in deletion.describe


def test_the_trial_notices_a_wrong_order_of_patches() -> None:
    model = build("vit")
    x = images(model, 2)
    deletion = Deletion(model, x)

    def transposed(images: Tensor, kept: Tensor) -> Tensor:
        return deletion._remove(images, (kept % 8) * 8 + kept // 8)

    assert _refusal(deletion._remove, x, (8, 8)) is None
    assert "still change" in (_refusal(transposed, x, (8, 8)) or "")


def test_the_model_is_untouched() -> None:
    from torch.nn.modules import module as torch_module

    model = build("beit")
    x = images(model, 2)
    before = {n: dict(m.__dict__) for n, m in model.named_modules()}
    values = copy.deepcopy(model.state_dict())
    hooks = dict(torch_module._global_forward_pre_hooks)
    output = model(x)
    Deletion(model, x).curves(x, {"a": torch.randn(2, 8, 8)})
    after = {n: dict(m.__dict__) for n, m in model.named_modules()}
    assert before.keys() == after.keys()
    for name, old in before.items():
        assert old.keys() == after[name].keys()
        assert all(after[name][key] is value for key, value in old.items()), name
    assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items())
    assert torch_module._global_forward_pre_hooks == hooks
    assert torch.equal(model(x), output)


# ----------------------------------------------------------- curves and what is read off them


def setting(methods: int = 2) -> tuple[Deletion, Tensor, dict[str, Tensor], Tensor]:
    model = build("vit")
    x = images(model, 3)
    generator = torch.Generator().manual_seed(3)
    maps = {f"m{i}": torch.randn((3, 8, 8), generator=generator) for i in range(methods)}
    return Deletion(model, x), x, maps, torch.tensor([0, 3, 1])


def test_curves_against_their_definition() -> None:
    """One image, one map and one fraction at a time; every number from its formula."""
    deletion, x, maps, target = setting()
    curves = deletion.curves(x, maps, target)
    whole = deletion.predict(x).softmax(1)
    for name, values in maps.items():
        for i, label in enumerate(target.tolist()):
            p = {"mif": [], "lif": []}
            right = {"mif": [], "lif": []}
            ranked = sorted(range(64), key=lambda cell: -float(values[i].flatten()[cell]))
            for fraction in FRACTIONS:
                gone = round(64 * fraction)
                for order, kept in (("mif", ranked[gone:]), ("lif", ranked[: 64 - gone])):
                    rows = torch.tensor(sorted(kept))
                    logits = never_saw(deletion.model, x[i], rows).detach()
                    p[order].append(float(logits.softmax(0)[label]))
                    right[order].append(int(logits.argmax()) == label)
            p0 = float(whole[i, label])
            expected = {
                "mif-accuracy": sum(right["mif"]) / 9,
                "mif-accuracy-drop": (int(whole[i].argmax()) == label) - sum(right["mif"]) / 9,
                "lif-accuracy": sum(right["lif"]) / 9,
                "aopc": sum(p0 - q for q in p["mif"]) / 9,
                "lif-aopc": sum(p0 - q for q in p["lif"]) / 9,
                "mif-auc": area_from_whole(p0, p["mif"]),
                "lif-auc": area_from_whole(p0, p["lif"]),
                "log-odds": sum(math.log(q / p0) for q in p["mif"]) / 9,
                "lif-log-odds": sum(math.log(q / p0) for q in p["lif"]) / 9,
                "srg": area(p["lif"]) - area(p["mif"]),
                "srg-accuracy": area(right["lif"]) - area(right["mif"]),
            }
            assert set(expected) == {n for n, m in METRICS.items() if m.needs == "curves"}
            for metric, want in expected.items():
                got = float(METRICS[metric].compute(curves[name])[i])
                assert got == pytest.approx(want, abs=2e-5), (name, i, metric)


def area(heights: list[float]) -> float:
    """Trapezoids of width 0.1, over the 0.8 that they cover."""
    return sum((a + b) / 2 * 0.1 for a, b in pairwise(heights)) / 0.8


def area_from_whole(whole: float, heights: list[float]) -> float:
    """Trapezoids of width 0.1 from the whole image on, over the 0.9 that they cover."""
    return sum((a + b) / 2 * 0.1 for a, b in pairwise([whole, *heights])) / 0.9


def test_curves_against_quantus_pixel_flipping() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    x = torch.randn(4, 1, 8, 8)
    x -= x.mean((2, 3), keepdim=True)  # its mean colour is 0
    values, target = torch.randn(4, 8, 8), torch.tensor([0, 1, 2, 1])
    fractions = [k / 64 for k in (4, 16, 32, 60)]
    curves = Deletion(model, x, grid=(8, 8)).curves(x, {"a": values}, target, fractions)["a"]
    for sign, ours in ((1, curves.mif), (-1, curves.lif)):
        flipping = quantus.PixelFlipping(
            features_in_step=4,
            perturb_baseline=0.0,
            normalise=False,
            abs=False,
            disable_warnings=True,
        )
        theirs = flipping(
            model=model,
            x_batch=x.numpy(),
            y_batch=target.numpy(),
            a_batch=sign * values[:, None].numpy(),
            softmax=True,
            device="cpu",
        )
        steps = np.array(theirs)[:, [round(64 * f) // 4 - 1 for f in fractions]]
        np.testing.assert_allclose(ours.exp().numpy(), steps, rtol=1e-4, atol=1e-6)


def test_area_against_scikit_learn() -> None:
    from sklearn.metrics import auc

    deletion, x, maps, target = setting(1)
    curves = deletion.curves(x, maps, target, [0.1, 0.25, 0.7])["m0"]
    for i in range(3):
        both = [auc(curves.fractions, c[i].exp().numpy()) for c in (curves.lif, curves.mif)]
        assert float(metrics.srg(curves)[i]) == pytest.approx((both[0] - both[1]) / 0.6)


def test_an_oracle_beats_its_opposite() -> None:
    """A model whose logit counts bright patches: deleting by brightness must be seen by all."""

    class Bright(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            score = x.mean((1, 2, 3))
            return torch.stack([score, torch.full_like(score, 0.2)], 1)

    x = torch.rand(5, 3, 16, 16)
    brightness = nn.functional.avg_pool2d(x.mean(1, keepdim=True), 4)[:, 0]
    # the mean colour hides brightness: removal must be by black, so the images are centred
    x = x - x.mean((2, 3), keepdim=True)
    maps = {"right": brightness, "wrong": -brightness}
    curves = Deletion(Bright().eval(), x, grid=(4, 4)).curves(x, maps, 0)
    for name in ("aopc", "lif-aopc", "log-odds", "lif-log-odds", "srg"):
        metric = METRICS[name]
        right, wrong = (metric.compute(curves[m]) for m in ("right", "wrong"))
        assert bool((right > wrong).all() if metric.higher_is_better else (right < wrong).all())


class Counting(nn.Module):
    """Counts the images that go through it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.images, self.calls = model, 0, 0
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.images += len(x)
        self.calls += 1
        return self.model(x)


def test_no_more_images_are_run_than_the_metrics_need() -> None:
    model = Counting(build("vit"))
    x = images(model.model, 3)
    deletion = Deletion(model, x)
    maps = {f"m{i}": torch.randn(3, 8, 8) for i in range(4)}
    model.images = model.calls = 0
    curves = deletion.curves(x, maps, [0, 1, 2])
    for name, metric in METRICS.items():
        if metric.needs == "curves":
            assert metric.compute(curves["m0"]).shape == (3,), name
    assert model.images == 3 * 4 * 2 * 9 + 3  # and the whole images
    assert model.calls == 9 + 1  # one batch a fraction
    model.images = model.calls = 0
    twins = deletion.curves(
        x, {"a": maps["m0"], "b": 2 * maps["m0"]}, [0, 1, 2], output=deletion.predict(x)
    )
    assert model.images == 3 * 1 * 2 * 9 + 3  # one order, run once; predict() is the 3
    assert torch.equal(twins["a"].mif, twins["b"].mif)


def test_batches_change_nothing_but_rounding() -> None:
    deletion, x, maps, target = setting()
    whole = deletion.curves(x, maps, target)
    parts = deletion.curves(x, maps, target, batch_size=5)
    for name in maps:
        torch.testing.assert_close(whole[name].mif, parts[name].mif, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(whole[name].lif, parts[name].lif, rtol=1e-5, atol=1e-6)


def test_the_target_is_the_prediction_by_default() -> None:
    deletion, x, maps, _ = setting(1)
    predicted = deletion.model(x).argmax(1)
    by_default = deletion.curves(x, maps)["m0"]
    assert torch.equal(by_default.mif, deletion.curves(x, maps, predicted)["m0"].mif)
    assert by_default.start_correct.all()
    one = deletion.curves(x, maps, 2)["m0"]
    assert torch.equal(one.lif, deletion.curves(x, maps, [2, 2, 2])["m0"].lif)


def test_bad_input_is_met_before_work_is_done() -> None:
    deletion, x, maps, target = setting(1)
    with pytest.raises(InputError, match=r"'bad' has shape \(3, 4, 4\).*\(3, 8, 8\)"):
        deletion.curves(x, {"bad": torch.zeros(3, 4, 4)}, target)
    with pytest.raises(InputError, match="NaN"):
        deletion.curves(x, {"bad": torch.full((3, 8, 8), float("nan"))}, target)
    with pytest.raises(InputError, match="no maps"):
        deletion.curves(x, {}, target)
    with pytest.raises(InputError, match="one class below 5"):
        deletion.curves(x, maps, [0, 1, 5])
    with pytest.raises(InputError, match="fractions"):
        deletion.curves(x, maps, target, [0.5, 1.0])
    with pytest.raises(InputError, match="too coarse"):
        deletion.curves(x, maps, target, [0.5, 0.99])
    with pytest.raises(InputError, match="logits"):
        Deletion(nn.Conv2d(3, 4, 3).eval(), x)
    with pytest.raises(InputError, match="images"):
        Deletion(nn.Linear(3, 4).eval(), torch.randn(2, 3))


# ----------------------------------------------------------- objects


def blobs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    values = torch.randn((6, 16, 16), generator=generator)
    masks = torch.rand((6, 16, 16), generator=generator) < 0.3
    values[0] = values[0].round()  # ties
    return values, masks


def slow_ap(scores: Tensor, mask: Tensor) -> float:
    """Precision at every threshold, weighted with what recall gains there."""
    total, recall, gained = int(mask.sum()), 0.0, 0.0
    for threshold in sorted(set(scores.flatten().tolist()), reverse=True):
        chosen = scores >= threshold
        hits = int((chosen & mask).sum())
        gained += (hits / total - recall) * hits / int(chosen.sum())
        recall = hits / total
    return gained


def test_segmentation_ap_against_torchmetrics_and_the_definition() -> None:
    values, masks = blobs()
    got = metrics.segmentation_ap(values, masks)
    for value, mask, ours in zip(values, masks, got.tolist(), strict=True):
        theirs = BinaryAveragePrecision()(value.flatten().sigmoid(), mask.flatten().int())
        assert ours == pytest.approx(float(theirs), abs=1e-6)
        assert ours == pytest.approx(slow_ap(value, mask), abs=1e-9)


def test_segmentation_at_the_mean_pixel_by_pixel() -> None:
    """Counted by hand, and against torchmetrics and scikit-learn."""
    values, masks = blobs()
    got = {
        name: METRICS[f"segmentation-{name}"].compute(values, masks).tolist()
        for name in ("iou", "accuracy", "f1")
    }
    for i, (value, mask) in enumerate(zip(values, masks, strict=True)):
        mean = sum(value.flatten().tolist()) / value.numel()
        counts = {(said, true): 0 for said in (False, True) for true in (False, True)}
        for v, true in zip(value.flatten().tolist(), mask.flatten().tolist(), strict=True):
            counts[v > mean, true] += 1
        hit, miss, false, right = (
            counts[key] for key in ((True, True), (False, True), (True, False), (False, False))
        )
        ious = hit / (hit + miss + false), right / (right + miss + false)
        assert got["iou"][i] == pytest.approx(sum(ious) / 2)
        assert got["accuracy"][i] == pytest.approx((hit + right) / value.numel())
        assert got["f1"][i] == pytest.approx(2 * hit / (2 * hit + miss + false))
        said, true = (value > mean).flatten().int(), mask.flatten().int()
        assert got["f1"][i] == pytest.approx(f1_score(true, said))
        assert got["iou"][i] == pytest.approx(jaccard_score(true, said, average="macro"))
    for metric in (metrics.segmentation_iou, metrics.segmentation_accuracy):
        assert metric(masks.float(), masks).tolist() == [1.0] * 6
        assert metric(-masks.float(), masks).tolist() == [0.0] * 6
    whole = torch.ones_like(masks)  # an even map is nowhere above its mean
    assert metrics.segmentation_iou(torch.zeros(6, 16, 16), whole).tolist() == [0.0] * 6


def test_maps_are_upsampled_bicubically() -> None:
    values, _ = blobs()
    pixels = metrics.to_pixels(values, (32, 24))
    want = nn.functional.interpolate(values[:, None], (32, 24), mode="bicubic")[:, 0]
    assert torch.equal(pixels, want)
    mask = torch.zeros(6, 32, 24, dtype=torch.bool)
    mask[:, :5, :7] = True
    ap = metrics.segmentation_ap(values, mask)
    assert torch.equal(ap, metrics.segmentation_ap(pixels, mask))


def test_the_mask_itself_is_a_perfect_map() -> None:
    _, masks = blobs()
    assert metrics.segmentation_ap(masks.float(), masks).tolist() == [1.0] * 6
    assert metrics.pointing_game(masks.float(), masks).tolist() == [1.0] * 6
    share = masks.double().mean((1, 2))
    torch.testing.assert_close(metrics.segmentation_ap(torch.zeros(6, 16, 16), masks), share)


def test_pointing_game_against_quantus() -> None:
    values, masks = blobs()
    values[0] += torch.randn(16, 16) * 1e-3  # quantus counts any of several equal maxima
    theirs = quantus.PointingGame(normalise=False, abs=False, disable_warnings=True)(
        model=None,
        x_batch=np.zeros((6, 1, 16, 16)),
        y_batch=np.zeros(6, dtype=int),
        a_batch=values[:, None].numpy(),
        s_batch=masks[:, None].numpy(),
    )
    got = metrics.pointing_game(values, masks).tolist()
    assert got == [float(hit) for hit in theirs] and 0 < sum(got) < 6


def test_pointing_game_has_a_tolerance() -> None:
    values, mask = torch.zeros(1, 16, 16), torch.zeros(1, 16, 16, dtype=torch.bool)
    values[0, 3, 4], mask[0, 6:, 8:] = 1.0, True  # 3 rows and 4 columns away: 5 pixels
    assert metrics.pointing_game(values, mask, 4).tolist() == [0.0]
    assert metrics.pointing_game(values, mask, 5).tolist() == [1.0]


def test_an_empty_mask_has_no_answer() -> None:
    values, masks = blobs()
    masks[2] = False
    for metric in (m.compute for m in METRICS.values() if m.needs == "masks"):
        assert metric(values, masks).isnan().tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_maps_of_any_dtype_are_ranked_as_they_are(dtype: torch.dtype) -> None:
    values, masks = blobs()
    pixels = metrics.to_pixels(values, tuple(masks.shape[1:])).to(dtype)
    for metric in (metrics.segmentation_ap, metrics.pointing_game):
        torch.testing.assert_close(metric(pixels, masks), metric(pixels.double(), masks))
    fine = torch.zeros_like(masks, dtype=torch.float64).add_(1).add_(masks * 1e-12)
    assert metrics.segmentation_ap(fine, masks).nanmean() == 1  # float32 would see ties


def test_masks_that_do_not_fit_are_errors() -> None:
    values, masks = blobs()
    with pytest.raises(InputError, match="same B images"):
        metrics.segmentation_ap(values[:2], masks)
    with pytest.raises(InputError, match="NaN"):
        metrics.pointing_game(values / 0, masks)


# ----------------------------------------------------------- completeness


def test_completeness_error_against_quantus() -> None:
    """A linear model: input x gradient is complete, and a map with a bit more is not."""
    weight = torch.tensor([[1.0, -2.0, 3.0, 4.0], [2.0, 0.0, 1.0, -1.0]])
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False)).eval()
    model[1].weight.data = weight
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0], [2.0, -1.0, 0.0, 5.0]]).reshape(2, 1, 2, 2)
    target = torch.tensor([0, 1])
    parts = x * weight[target].reshape(2, 1, 2, 2)
    parts[1, 0, 0, 0] += 0.5
    output = model(x).detach().gather(1, target[:, None])[:, 0]
    error = metrics.completeness_error(output, parts.flatten(1).sum(1))
    assert error.tolist() == [0.0, 0.5]
    theirs = quantus.Completeness(
        normalise=False, abs=False, perturb_baseline=0.0, disable_warnings=True
    )(
        model=model,
        x_batch=x.numpy(),
        y_batch=target.numpy(),
        a_batch=parts.numpy(),
        device="cpu",
        softmax=False,
    )
    assert [bool(t) for t in theirs] == [e == 0 for e in error.tolist()]
    relative = metrics.relative_completeness_error(output, parts.flatten(1).sum(1))
    assert relative.tolist() == [0.0, 0.5 / abs(float(output[1]))]


def test_completeness_error_does_not_round_to_the_output_dtype() -> None:
    total = torch.tensor([1.0 + 1e-12], dtype=torch.float64)
    error = metrics.completeness_error(torch.tensor([1.0]), total)
    assert error.dtype == torch.float64 and 0 < float(error) < 2e-12


def test_an_unknown_metric_names_those_near_it() -> None:
    assert metrics.metric("aopc").higher_is_better
    with pytest.raises(UnknownNameError, match=r"did you mean .*segmentation-ap"):
        metrics.metric("segmentation-map")
