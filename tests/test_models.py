"""Real timm models at their real sizes; the larger ones are in experiments/models.py."""

from __future__ import annotations

import pytest
import timm
import torch

import fullgrad_theory as fgt

pytestmark = pytest.mark.slow

COMPLETE = ["resnet18", "convmixer_768_32"]
INCOMPLETE = ["vit_tiny_patch16_224", "vit_small_patch16_224", "gmixer_24_224"]


@pytest.mark.parametrize("name", [*COMPLETE, *INCOMPLETE])
def test_verdict(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    plain = fgt.check_completeness(model, numeric=name in COMPLETE)
    assert plain.complete is (name in COMPLETE), str(plain)
    if name in COMPLETE:
        assert len(fgt.derive_rules(model)) == 0
        return
    libra = fgt.check_completeness(model, policy="libra")
    assert libra.complete is True, str(libra)
    assert libra.error is not None
    assert libra.error < 1e-10


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "mixer_b16_224", "resnet18"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_forward_is_bitwise_equal(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name).eval().to(dtype)
    x = torch.randn(3, *model.pretrained_cfg["input_size"], dtype=dtype)
    balanced = fgt.balance(model, x[:1])
    with torch.no_grad():
        assert torch.equal(balanced(x), model(x))
