"""The Triton kernels, in Triton's interpreter, against the definitions written out in float64.

Run by tests/test_fused.py in a process of its own: Triton settles when it is imported whether it
interprets. What only a GPU shows is in experiments/gpu.py.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fullgrad_theory.operators import attention_form, fused
from fullgrad_theory.operators.attention_form import attention


def transposed(
    q: Tensor, k: Tensor, mask: Tensor | None, g: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """P^T g and the log-sum-exp of the scores, query by query."""
    q, k, g = q.double(), k.double(), g.double()
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    out = torch.zeros(*g.shape[:2], k.shape[2], g.shape[3], dtype=torch.float64)
    lse = torch.full(q.shape[:3], math.inf, dtype=torch.float64)
    full = None if mask is None else mask.expand(*g.shape[:2], q.shape[2], k.shape[2])
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for m in range(q.shape[2]):
                scores = k[b, h] @ q[b, h, m] * scale
                if full is not None and full.dtype == torch.bool:
                    scores[~full[b, h, m]] = -math.inf
                elif full is not None:
                    scores += full[b, h, m]
                if causal:
                    scores[m + 1 :] = -math.inf
                if scores.max() == -math.inf:
                    continue
                lse[b, h, m] = scores.logsumexp(0)
                out[b, h] += scores.softmax(0)[:, None] * g[b, h, m]
    return out, lse


CASES = {
    "plain": ((2, 2, 2), (40, 70), (20, 12), None, False),
    "causal": ((1, 4, 2), (70, 70), (64, 64), None, True),
    "causal, more queries": ((1, 2, 2), (90, 20), (16, 16), None, True),
    "causal, more keys": ((1, 1, 1), (20, 90), (16, 16), None, True),
    "bool mask, one kv head": ((1, 4, 1), (30, 130), (40, 70), "bool", False),
    "float mask": ((2, 2, 2), (33, 65), (16, 16), "float", False),
    "wide heads": ((1, 1, 1), (17, 9), (140, 129), None, False),
    "one token": ((1, 1, 1), (1, 1), (3, 5), None, False),
}


def drawn(case: str, dtype: torch.dtype) -> tuple[Any, ...]:
    (batch, heads, shared), (length, source), (width, depth), kind, causal = CASES[case]
    q = torch.randn(batch, length, heads, width).to(dtype).transpose(1, 2)
    k = torch.randn(batch, shared, source, width).to(dtype)
    g = torch.randn(batch, heads, length, depth).to(dtype)
    mask = None
    if kind == "bool":
        mask = torch.rand(batch, 1, length, source) > 0.4
        mask[:, :, 3] = False  # a query that sees nothing
    if kind == "float":
        mask = torch.randn(length, source).to(dtype)
    return q, k, mask, g, causal, 0.3


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 2e-6), (torch.float16, 1e-3)])
@pytest.mark.parametrize("case", CASES)
def test_the_product_is_that_of_the_definition(
    case: str, dtype: torch.dtype, bar: float, kept: bool
) -> None:
    """bfloat16 is left to the GPU: the interpreter does not multiply it."""
    given = drawn(case, dtype)
    expected, lse = transposed(*given)
    ours = fused.transposed_attention(*given, lse.float() if kept else None)
    assert ours.dtype == dtype
    assert float((ours.double() - expected).norm() / expected.norm()) < bar


def test_a_wrong_log_sum_exp_is_seen() -> None:
    given = drawn("plain", torch.float32)
    expected, lse = transposed(*given)
    ours = fused.transposed_attention(*given, lse.float() * math.log2(math.e))
    assert float((ours.double() - expected).norm() / expected.norm()) > 0.1


@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 4e-7), (torch.float16, 1e-3)])
def test_the_secant_of_gelu(tanh: bool, dtype: torch.dtype, bar: float) -> None:
    u = torch.cat([torch.linspace(-9, 9, 2999), torch.zeros(1)]).to(dtype)
    g = torch.randn(3000).to(dtype)
    wide = u.double()
    values = torch.nn.functional.gelu(wide, approximate="tanh" if tanh else "none")
    gate = torch.where(wide == 0, 0.5, values / torch.where(wide == 0, 1.0, wide))
    ours = fused.gelu_product(g, u, tanh).double()
    assert float((ours - g.double() * gate).abs().max()) < bar * float(g.abs().max())


def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the kernels be taken as on a GPU; what is taken is listed."""
    taken: list[str] = []
    right = fused.transposed_attention

    def listed(*given: Any) -> Tensor:
        taken.append("attention")
        return right(*given)

    monkeypatch.setattr(
        fused, "takes", lambda *given: all(t is None or t.dim() == 4 for t in given)
    )
    monkeypatch.setattr(fused, "transposed_attention", listed)
    return taken


@pytest.mark.parametrize("causal", [False, True])
def test_attention_takes_the_kernel(monkeypatch: pytest.MonkeyPatch, causal: bool) -> None:
    taken = on_a_gpu(monkeypatch)
    q, k, v = torch.randn(2, 4, 30, 8), torch.randn(2, 2, 30, 8), torch.randn(2, 2, 30, 6)
    v.requires_grad_()
    out = attention(q, k, v, is_causal=causal, enable_gqa=True)
    g = torch.randn_like(out)
    (ours,) = torch.autograd.grad(out, v, g)
    expected, _ = transposed(q, k, None, g, causal, 8**-0.5)
    torch.testing.assert_close(
        ours.double(), expected.unflatten(1, (2, 2)).sum(2), atol=1e-5, rtol=0
    )
    assert taken


@pytest.mark.parametrize("base", [math.e, 2.0])
def test_what_a_kernel_keeps_is_believed_only_where_it_is_that(
    monkeypatch: pytest.MonkeyPatch, base: float
) -> None:
    """A forward kernel that kept its log-sum-exp in another base would not be believed."""
    monkeypatch.setattr(attention_form, "_MEANS_IT", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    q, k = torch.randn(2, 3, 20, 8), torch.randn(2, 3, 25, 8)
    lse = (q @ k.mT * 0.3).logsumexp(-1) / math.log(base)
    node = SimpleNamespace(_saved_logsumexp=lse[..., None], name=lambda: "SomeKernel")
    keys = torch._C._dispatch_keys(q)
    monkeypatch.setattr(torch._C, "_dispatch_keys", lambda value: keys)
    computed: Any = SimpleNamespace(is_cuda=True, shape=q.shape, grad_fn=node)
    kept = attention_form._log_sum_exp(computed, q, k, 0.3)
    assert (kept is None) == (base == 2.0)
    if kept is not None:
        assert torch.equal(kept, lse)


def test_only_what_fits_is_taken() -> None:
    q = torch.randn(1, 2, 4, 8)
    assert not fused.takes(q, q, None, q)  # on the CPU
    assert not fused.takes_gelu(q, q)
