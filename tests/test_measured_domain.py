"""Measured operations with complex values, and such as are not the same from call to call."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import fullgrad_theory as fgt
from fullgrad_theory.errors import InputError

torch.manual_seed(0)
X = torch.randn(3, 8)
W = torch.randn(8)


@torch.library.custom_op("fgt_tests::spectrum", mutates_args=())
def spectrum(x: Tensor) -> Tensor:
    return torch.fft.fft(x)


@torch.library.custom_op("fgt_tests::power", mutates_args=())
def power(z: Tensor) -> Tensor:
    return (z * z.conj()).real.clone()


@torch.library.custom_op("fgt_tests::wavering", mutates_args=())
def wavering(x: Tensor) -> Tensor:
    return x * torch.rand(())


def _complex(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=torch.promote_types(x.dtype, torch.complex64))


spectrum.register_fake(_complex)
power.register_fake(lambda z: torch.empty(z.shape, dtype=z.real.dtype))
wavering.register_fake(torch.empty_like)
spectrum.register_autograd(lambda ctx, g: torch.fft.ifft(g, norm="forward").real)
power.register_autograd(
    lambda ctx, g: 2 * g * ctx.z,
    setup_context=lambda ctx, inputs, output: setattr(ctx, "z", inputs[0]),
)
wavering.register_autograd(lambda ctx, g: g)


def check(function, policy=None, x=X):  # type: ignore[no-untyped-def]
    return fgt.check_completeness(function, x, policy=policy, unknown="measure", beside=())


def test_a_complex_result_has_its_degree() -> None:
    report = check(lambda x: spectrum(x).abs() * W)
    assert report.complete is True, str(report)
    (node,) = [n for n in report.nodes if "spectrum" in n.op]
    assert "linear" in node.reason


def test_a_complex_operand_has_its_degree() -> None:
    assert check(lambda x: power(torch.fft.fft(x))).complete is False
    assert check(lambda x: power(torch.fft.fft(x)), "libra").complete is True


COMPLEX = {
    "stft": lambda x: torch.stft(
        x, 4, window=torch.ones(4, dtype=x.dtype), return_complex=True
    ).abs(),
    "hfft": lambda x: torch.fft.hfft(x),
    "ihfft": lambda x: torch.fft.ihfft(x).abs(),
    "eigenvalues": lambda x: torch.linalg.eigvals(x[:, :3]).abs(),
    "of a symmetric matrix": lambda x: torch.linalg.eigvalsh(x.mT @ x).sqrt(),
}


@pytest.mark.parametrize("name", COMPLEX)
def test_of_degree_one(name: str) -> None:
    function, x = COMPLEX[name], X if name != "of a symmetric matrix" else torch.randn(12, 8)
    report = check(function, x=x)
    assert report.complete is True, str(report)


def test_what_is_random_is_refused() -> None:
    with pytest.raises(InputError, match="called again at the same point"):
        check(lambda x: wavering(x) * W)


class Counting(nn.Module):
    """A module that changes from call to call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = itertools.count(1)

    def forward(self, x: Tensor) -> Tensor:
        return x * next(self.calls)


def test_a_leaf_that_counts_its_calls_is_refused() -> None:
    model = nn.Sequential(Counting(), nn.Linear(8, 2)).eval()
    with pytest.raises(InputError, match="called again at the same point"):
        fgt.check_completeness(model, X, unknown="measure", leaves=(Counting,), beside=())
