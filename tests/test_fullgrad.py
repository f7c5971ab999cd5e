"""FullGrad: an output split into contributions of the input and of every bias leaf."""

from __future__ import annotations

import gc

import pytest
import timm
import torch
from small_models import small
from torch import nn
from torch.nn import functional as F

import fullgrad_theory as fgt
from fullgrad_theory.errors import InputError


def vit() -> tuple[nn.Module, torch.Tensor]:
    model, x = small("vit")
    return model.double(), torch.cat([x, x[:1].flip(-1)]).double()


@pytest.mark.slow
def test_the_parts_add_up_to_the_logit() -> None:
    model, x = vit()
    parts = fgt.fullgrad(fgt.balance(model, x), x, target=3)
    assert parts.input.shape == x.shape
    torch.testing.assert_close(parts.output, model(x)[:, 3])
    torch.testing.assert_close(parts.total, parts.output, rtol=1e-11, atol=0)
    assert (parts.error < 1e-11).all()
    plain = fgt.fullgrad(model, x, target=3)
    torch.testing.assert_close(plain.output, parts.output)
    assert (plain.error > 1e-3).all()


def test_bias_maps_agree_with_autograd_over_the_parameters() -> None:
    model, x = vit()
    balanced = fgt.balance(model, x)
    parts = fgt.fullgrad(balanced, x, target=3)
    names = ["head.bias", "blocks.0.norm1.bias", "blocks.1.mlp.fc1.bias", "patch_embed.proj.bias"]
    parameters = [model.get_parameter(n) for n in names]
    grads = torch.autograd.grad(balanced(x)[:, 3].sum(), parameters)
    for name, parameter, g in zip(names, parameters, grads, strict=True):
        torch.testing.assert_close(parts.biases[name].sum(), (g * parameter).sum())
        assert parts.biases[name].shape[0] == 3


def test_leaves_autograd_cannot_see() -> None:
    """Scalars, clamp bounds, padding, running_mean and f(0), against contributions by hand."""
    norm = nn.BatchNorm1d(4).double().eval()
    with torch.no_grad():
        for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
            tensor.copy_(torch.rand(4) + 0.5)

    def model(x: torch.Tensor) -> torch.Tensor:
        return (
            norm(x).sum(1)
            + x.clamp(-0.5, 0.5).sum(1)
            + F.pad(x, (1, 1), value=3.0).sum(1)
            + (x + 2.0).sum(1)
        )

    x = torch.tensor([[0.1, 2.0, -1.0, 0.3], [0.2, 0.2, 5.0, 0.1]], dtype=torch.float64)
    parts = fgt.fullgrad(model, x)
    torch.testing.assert_close(parts.total, parts.output, rtol=1e-12, atol=0)
    by_hand = (
        (norm.bias - norm.running_mean * norm.weight / (norm.running_var + norm.eps).sqrt()).sum()
        + torch.tensor([0.0, 0.5], dtype=torch.float64)  # bounds: 0.5 - 0.5; 0.5
        + 6.0
        + 8.0
    )
    biases = sum(b.flatten(1).sum(1) if b.dim() > 1 else b for b in parts.biases.values())
    torch.testing.assert_close(biases, by_hand, rtol=1e-12, atol=0)


def test_a_secant_with_an_origin_has_a_bias_leaf() -> None:
    x = torch.randn(2, 3, dtype=torch.float64)
    parts = fgt.fullgrad(fgt.balance(lambda x: torch.sigmoid(x), x), x, target=1)
    assert [float(v.sum()) for v in parts.biases.values()] == pytest.approx([1.0])
    torch.testing.assert_close(parts.total, torch.sigmoid(x)[:, 1])


def test_one_parameter_as_coefficient_and_bias() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([0.8], dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.w * x + self.w

    x = torch.tensor([[1.0]], dtype=torch.float64)
    parts = fgt.fullgrad(Both().eval(), x, target=0)
    assert float(parts.input.sum()) == pytest.approx(0.8)
    assert float(parts.biases["w"].sum()) == pytest.approx(0.8)
    assert float(parts.total) == pytest.approx(1.6)


@pytest.mark.slow
def test_samples_stay_apart_where_the_batch_is_folded_into_windows() -> None:
    torch.manual_seed(0)
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, depths=(1, 1), embed_dim=24, num_heads=(2, 2)
    )
    model = model.double().eval()
    x = torch.randn(2, 3, 56, 56, dtype=torch.float64)
    parts = fgt.fullgrad(fgt.balance(model, x), x, target=5)
    alone = fgt.fullgrad(fgt.balance(model, x), x[:1], target=5)
    torch.testing.assert_close(parts.total, parts.output, rtol=1e-9, atol=0)
    torch.testing.assert_close(parts.input[:1], alone.input)


def test_several_inputs() -> None:
    a, b = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    parts = fgt.fullgrad(lambda a, b: a.relu() - 2 * b, (a, b), target=0)
    assert isinstance(parts.input, tuple)
    torch.testing.assert_close(parts.input[1][:, 0], -2 * b[:, 0])


@pytest.mark.parametrize("target", [7, -8, (0, 0), ()])
def test_a_target_out_of_range_is_refused(target: object) -> None:
    model, x = vit()
    with pytest.raises(InputError, match="out of range"):
        fgt.fullgrad(fgt.balance(model, x), x, target=target)  # type: ignore[arg-type]


def test_nothing_grows_from_call_to_call() -> None:
    """Hooks of a run's outputs hold the run: were it to hold them, nothing could free either."""
    model, x = small("vit")
    balanced = fgt.balance(model, x)
    explainer = fgt.Explainer(balanced)

    def tensors() -> int:
        gc.collect()
        return sum(type(o) in (torch.Tensor, torch.nn.Parameter) for o in gc.get_objects())

    counts = []
    for _ in range(3):
        fgt.check_completeness(model, x, policy="libra")
        fgt.fullgrad(balanced, x)
        explainer(x, ("fullgrad", "fullgrad+"))
        counts.append(tensors())
    assert counts[2] <= counts[1]  # others' garbage may go meanwhile
