"""Edited backwards against slow references; forwards bit for bit against ATen."""

from __future__ import annotations

import contextlib
import itertools
import math
import pickle

import pytest
import torch
from planted import GATES
from torch import fx
from torch.nn import functional as F

from fullgrad_theory.edits.scaling import scale
from fullgrad_theory.edits.secants import secant
from fullgrad_theory.operators import Algebra, attention_form, registered
from fullgrad_theory.operators.attention_form import attention

aten = torch.ops.aten
FREEZES = {
    o.name: o.frozen.form for o in registered() if o.algebra is Algebra.NORMALISER and o.frozen
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SETTINGS = list(itertools.product(DTYPES, [True, False], [True, False]))
DOUBLE = {"dtype": torch.float64}


def norms(dtype=torch.float64):
    """(name, input, arguments after it), the affine ones among them."""
    x = torch.randn(2, 6, 5, 4).to(dtype) + 3
    w, b = torch.randn(6).to(dtype), torch.randn(6).to(dtype)
    lw, lb = torch.randn(5, 4).to(dtype), torch.randn(5, 4).to(dtype)
    return {
        "layer_norm": (x, (5, 4), lw, lb, 1e-3),
        "layer_norm bare": (x, (4,), None, None, 1e-5),
        "native_layer_norm": (x, (5, 4), lw, lb, 1e-3),
        "group_norm": (x, 3, w, b, 1e-3),
        "group_norm last": (x.to(memory_format=torch.channels_last), 2, w, None),
        "rms_norm": (x, (5, 4), lw),
        "rms_norm bare": (x, (4,), None, 1e-2),
        "instance_norm": (x, w, b, None, None, True, 0.1, 1e-3, False),
    }


def entry(name):
    return f"aten.{name.split()[0]}.default"


def original(name):
    return getattr(aten, name.split()[0]).default


@contextlib.contextmanager
def setting(grad, autocast):
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        yield


def same(ours, theirs):
    for a, b in zip(*(t if isinstance(t, tuple) else (t,) for t in (ours, theirs)), strict=True):
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()
        assert torch.equal(a, b)


@pytest.mark.parametrize(("dtype", "grad", "autocast"), SETTINGS)
def test_forward_of_secants_is_bitwise(dtype, grad, autocast):
    u = torch.rand(7, 33).to(dtype).requires_grad_()
    for op in GATES:
        f = getattr(aten, op.split(".")[1]).default
        if op == "aten.erfinv.default" and dtype == torch.float16:
            continue
        with setting(grad, autocast):
            same(secant(op, u), f(u))


@pytest.mark.parametrize("name", norms())
@pytest.mark.parametrize(("dtype", "grad", "autocast"), SETTINGS)
def test_forward_of_norms_is_bitwise(name, dtype, grad, autocast):
    x, *rest = norms(dtype)[name]
    with setting(grad, autocast):
        same(FREEZES[entry(name)](x.requires_grad_(), *rest), original(name)(x, *rest))


def test_every_normaliser_has_a_replacement():
    assert {o.name for o in registered() if o.algebra is Algebra.NORMALISER} == set(FREEZES)


def frozen_value(name, x, at, args):
    """The frozen surrogate from its definition: 1/sigma taken at `at`, everything else at x."""
    kind, rest = name.split()[0], list(args)
    if kind in ("layer_norm", "native_layer_norm", "rms_norm"):
        dims, (w, b) = tuple(range(-len(rest[0]), 0)), (rest[1], None)
        if kind != "rms_norm":
            b = rest[2]
        eps = rest[3] if kind != "rms_norm" else (rest[2] if len(rest) > 2 else None)
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        shape = x.shape
    else:
        groups, (w, b) = (rest[0], rest[1:3]) if kind == "group_norm" else (6, rest[:2])
        eps = rest[7 - 1] if kind == "instance_norm" else (rest[3] if len(rest) > 3 else 1e-5)
        shape, dims = (x.shape[0], groups, -1), (-1,)
        w, b = (t if t is None else t.view(-1, 1, 1) for t in (w, b))
    x_, at_ = x.reshape(shape), at.reshape(shape)
    centre = 0.0 if kind == "rms_norm" else 1.0
    x_ = x_ - centre * x_.mean(dims, keepdim=True)
    at_ = at_ - centre * at_.mean(dims, keepdim=True)
    y = (x_ / (at_.square().mean(dims, keepdim=True) + eps).sqrt()).reshape(x.shape)
    y = y if w is None else y * w
    return y if b is None else y + b


def positions(name, args):
    start = 0 if name.startswith("instance") else 1
    return [i for i in (start, start + 1) if i < len(args) and isinstance(args[i], torch.Tensor)]


@pytest.mark.parametrize("name", norms())
def test_norm_gradients_are_those_of_the_frozen_surrogate(name):
    """By central differences of the surrogate; the weight's and bias's by autograd of it."""
    torch.manual_seed(0)
    x, *args = norms()[name]
    x.requires_grad_()
    for i in positions(name, args):
        args[i].requires_grad_()
    leaves = [x, *(args[i] for i in positions(name, args))]
    out = FREEZES[entry(name)](x, *args)
    out = out[0] if isinstance(out, tuple) else out
    cotangent = torch.randn_like(out)
    grads = torch.autograd.grad(out, leaves, cotangent)
    with torch.no_grad():
        torch.testing.assert_close(frozen_value(name, x, x, args), out)
        for _ in range(3):
            d = torch.randn_like(x)
            low, high = (frozen_value(name, x + s * d, x, args) for s in (-1e-3, 1e-3))
            numeric = ((high - low) * cotangent).sum() / 2e-3
            torch.testing.assert_close((grads[0] * d).sum(), numeric, rtol=1e-8, atol=1e-8)
    real = frozen_value(name, x.detach(), x.detach(), args)
    if len(leaves) > 1:
        torch.testing.assert_close(
            grads[1:], torch.autograd.grad(real, leaves[1:], cotangent), rtol=1e-9, atol=1e-9
        )
    if len(leaves) == 3:  # completeness: x and the bias account for the value
        total = (grads[0] * x).sum() + (grads[2] * leaves[2]).sum()
        torch.testing.assert_close(total, (out * cotangent).sum())


@pytest.mark.parametrize("name", norms())
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_norm_gradients_in_low_precision(name, dtype):
    torch.manual_seed(0)
    x, *args = norms(dtype)[name]
    wide = [a.double() if isinstance(a, torch.Tensor) else a for a in args]
    if name == "rms_norm":
        args, wide = [*args, 1e-3], [*wide, 1e-3]
    f, cotangent, grads = FREEZES[entry(name)], torch.randn(x.shape).to(dtype), []
    for y, rest in ((x, args), (x.double(), wide)):
        leaf = y.detach().requires_grad_()
        out = f(leaf, *rest)
        out = out[0] if isinstance(out, tuple) else out
        grads.append(torch.autograd.grad(out, leaf, cotangent.to(out.dtype))[0])
    assert grads[0].dtype == dtype
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(grads[0].double(), grads[1], rtol=tolerance, atol=4 * tolerance)


def saved(f):
    sizes = []
    hooks = torch.autograd.graph.saved_tensors_hooks
    with hooks(lambda t: sizes.append(tuple(t.shape)) or t, lambda t: t):
        f()
    return sizes


def test_what_is_saved():
    x, w = torch.randn(4, 7, 8, requires_grad=True), torch.randn(8)
    assert saved(lambda: scale(x, 0.5)) == []
    assert saved(lambda: secant("aten.gelu.default", x)) == [(4, 7, 8)]
    assert saved(lambda: secant("aten.gelu.default", x.detach())) == []
    norm = FREEZES["aten.layer_norm.default"]
    assert sorted(saved(lambda: norm(x, [8], w, w))) == [(4, 7), (8,)]
    assert sorted(saved(lambda: norm(x, [8], w.clone().requires_grad_(), w))) == [
        (4, 7),
        (4, 7, 8),
        (8,),
    ]
    assert saved(lambda: norm(x.detach(), [8], w, w.clone().requires_grad_())) == [(4, 7)]


def heads(*lead, length=5, source=6, width=4, value=3, dtype=torch.float64, kv=None):
    kv = lead if kv is None else kv
    return (
        torch.randn(*lead, length, width).to(dtype),
        torch.randn(*kv, source, width).to(dtype),
        torch.randn(*kv, source, value).to(dtype).requires_grad_(),
    )


def boolean_mask(*shape):
    mask = torch.rand(*shape) > 0.4
    mask[..., 0, :] = False  # a row without any key
    return mask


def float_mask(*shape):
    return torch.randn(*shape, **DOUBLE).masked_fill(~boolean_mask(*shape), -math.inf)


def attention_cases():
    yield "plain", heads(2, 3), {}
    yield "three dimensions", heads(3), {}
    yield "two dimensions", heads(), {}
    yield "five dimensions", heads(2, 2, 3), {"scale": 0.3}
    yield "causal", heads(2, 3), {"is_causal": True}
    yield "boolean", heads(2, 3), {"attn_mask": boolean_mask(2, 1, 5, 6)}
    yield "float", heads(2, 3), {"attn_mask": float_mask(3, 5, 6)}
    yield "mask of keys", heads(2, 3), {"attn_mask": torch.rand(2, 1, 1, 6) > 0.3}
    yield "mask 2d", heads(2, 3), {"attn_mask": float_mask(5, 6).requires_grad_()}
    yield "grouped", heads(2, 4, kv=(2, 2)), {"enable_gqa": True, "is_causal": True}
    yield (
        "grouped mask",
        heads(2, 4, kv=(2, 2)),
        {"enable_gqa": True, "attn_mask": boolean_mask(5, 6)},
    )
    yield "multi-query", heads(2, 4, kv=(2, 1)), {"enable_gqa": True}


CASES = {name: (qkv, kw) for name, qkv, kw in attention_cases()}


def reference_weights(q, k, attn_mask=None, is_causal=False, scale=None, enable_gqa=False):
    """Row by row from the definition; a row without keys weighs nothing."""
    if enable_gqa:
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.where(attn_mask, 0.0, -math.inf).to(q.dtype)
    scores = scores if attn_mask is None else scores + attn_mask.detach()
    weights = (scores - scores.amax(-1, keepdim=True).clamp(min=-1e300)).exp()
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)


@pytest.mark.parametrize("block", [1, 17, 2**20])
@pytest.mark.parametrize("case", CASES)
def test_attention(case, block, monkeypatch):
    monkeypatch.setattr(attention_form, "BLOCK", block)
    (q, k, v), kw = CASES[case]
    out = attention(q, k, v, **kw)
    same(out, aten.scaled_dot_product_attention.default(q, k, v, **kw))
    cotangent = torch.randn_like(out)
    (ours,) = torch.autograd.grad(out, v, cotangent)
    weights, heads_of_v = reference_weights(q, k, **kw), v
    if kw.get("enable_gqa"):
        heads_of_v = v.repeat_interleave(q.shape[-3] // v.shape[-3], -3)
    torch.testing.assert_close(weights @ heads_of_v, out)
    (slow,) = torch.autograd.grad(weights @ heads_of_v, v, cotangent)
    torch.testing.assert_close(ours, slow)
    torch.testing.assert_close((ours * v).sum(), (out * cotangent).sum())


@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 3, 0, 4), (2, 3, 5, 4), (2, 3, 5, 6)),  # no query
        ((0, 3, 2, 4), (0, 3, 5, 4), (0, 3, 5, 6)),  # an empty batch
        ((2, 3, 2, 4), (2, 3, 5, 4), (2, 3, 5, 0)),
        ((2, 3, 2, 4), (2, 3, 5, 4), (5, 6)),  # values without heads
    ],
)
def test_attention_over_little(shapes):
    q, k, v = (torch.randn(s, dtype=torch.float64) for s in shapes)
    v.requires_grad_()
    out = attention(q, k, v)
    cotangent = torch.randn_like(out)
    (g,) = torch.autograd.grad(out, v, cotangent)
    weights = (q @ k.mT * 0.5).softmax(-1)
    assert g.shape == v.shape
    torch.testing.assert_close((g * v).sum(), ((weights @ v) * cotangent).sum())


def test_a_mask_keeps_its_gradient_under_vmap():
    q, k, v = heads(2, 3)
    mask = torch.randn(q.shape[-2], k.shape[-2], dtype=q.dtype).requires_grad_()
    many = torch.vmap(attention, in_dims=(0, 0, 0, None))(q, k, v, mask)
    (g,) = torch.autograd.grad(many.pow(2).sum(), mask)
    one = torch.stack([attention(a, b, c, mask) for a, b, c in zip(q, k, v, strict=True)])
    (slow,) = torch.autograd.grad(one.pow(2).sum(), mask)
    torch.testing.assert_close(g, slow)


@pytest.mark.parametrize(("dtype", "grad", "autocast"), SETTINGS)
@pytest.mark.parametrize("mask", [None, "bool", "float", "learnt"])
def test_forward_of_attention_is_bitwise_and_the_same_kernel(dtype, grad, autocast, mask):
    q, k, v = heads(2, 3, length=40, source=40, width=16, value=16, dtype=dtype)
    q = q.requires_grad_()
    masks = {None: None, "bool": boolean_mask(40, 40), "float": torch.randn(40, 40).to(dtype)}
    chosen = masks["float"].requires_grad_() if mask == "learnt" else masks[mask]
    if autocast and dtype != torch.float64 and mask in ("float", "learnt"):
        chosen = chosen.to(torch.bfloat16)
    with setting(grad, autocast):
        same(attention(q, k, v, chosen), aten.scaled_dot_product_attention.default(q, k, v, chosen))


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_attention_gradient_in_low_precision(dtype):
    q, k, v = heads(2, 3, length=64, source=64, dtype=dtype)
    g = torch.randn(2, 3, 64, 3).to(dtype)
    (ours,) = torch.autograd.grad(attention(q, k, v), v, g)
    exact = reference_weights(q.double(), k.double()).mT @ g.double()
    assert ours.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(ours.double(), exact, rtol=4 * eps, atol=4 * eps)


def test_attention_prunes_query_and_key_and_refuses_dropout():
    q, k, v = (t.detach().requires_grad_() for t in heads(2, 3))
    mask = torch.randn(5, 6, **DOUBLE).requires_grad_()
    grads = torch.autograd.grad(
        attention(q, k, v, mask).square().sum(), (q, k, v, mask), allow_unused=True
    )
    assert [g is None for g in grads] == [True, True, False, False]
    real = F.scaled_dot_product_attention(q, k, v, mask).square().sum()
    for ours, theirs in zip(grads[2:], torch.autograd.grad(real, (v, mask)), strict=True):
        torch.testing.assert_close(ours, theirs)
    out = attention(q, k, v, mask.detach())
    grads = torch.autograd.grad(out.sum(), (q, k, v), allow_unused=True, retain_graph=True)
    assert [g is None for g in grads] == [True, True, False]
    assert not attention(q, k, v.detach()).requires_grad
    cotangent = torch.randn_like(out).requires_grad_()
    (g,) = torch.autograd.grad(out, v, cotangent, create_graph=True)
    seconds = torch.autograd.grad(g.sum(), (q, k, mask, cotangent), allow_unused=True)
    assert [s is None for s in seconds] == [True, True, True, False]
    sizes = saved(lambda: attention(q.detach(), k.detach(), v))
    assert all(size in [(2, 3, 5, 4), (2, 3, 6, 4)] or len(size) < 4 for size in sizes[-2:])
    with pytest.raises(ValueError, match="dropout"):
        attention(q, k, v, None, 0.1)


def test_scale_and_secant():
    x = torch.tensor([0.0, -1.5, 0.7, 30.0], **DOUBLE).requires_grad_()
    assert torch.autograd.grad(scale(x, 0.25).sum(), x)[0].tolist() == [0.25] * 4
    out = secant("aten.softplus.default", x, 2.0, threshold=100)
    (g,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(g * x, out - math.log(2) / 2)
    with pytest.raises(KeyError, match=r"no secant gate for aten\.round"):
        secant("aten.round.default", x)


def chain(x, w):
    x = FREEZES["aten.layer_norm.default"](x, (4,), w, 2 * w)
    x = secant("aten.gelu.default", x, approximate="tanh")
    return scale(attention(x, x, x, is_causal=True), 0.5)


def test_double_backward_of_a_chain_is_finite():
    x, w = torch.zeros(2, 3, 4, **DOUBLE).requires_grad_(), torch.ones(4, **DOUBLE).requires_grad_()
    (g,) = torch.autograd.grad(chain(x, w).square().sum(), x, create_graph=True)
    for second in torch.autograd.grad(g.square().sum(), (x, w), allow_unused=True):
        assert second is None or second.isfinite().all()
    u = torch.randn(9, **DOUBLE).requires_grad_()
    edited = lambda t: torch.autograd.grad(  # noqa: E731
        secant("aten.gelu.default", t).sum(), t, create_graph=True
    )[0]
    assert torch.autograd.gradcheck(edited, u)


def test_vmap_and_batched_cotangents():
    x, w = torch.randn(5, 2, 3, 4, **DOUBLE), torch.randn(4, **DOUBLE)
    gradient = torch.func.grad(lambda t: chain(t, w).square().sum())
    torch.testing.assert_close(torch.vmap(gradient)(x), torch.stack([gradient(t) for t in x]))
    y = x[0].requires_grad_()
    out = chain(y, w)
    eye = torch.eye(out.numel(), **DOUBLE).reshape(-1, *out.shape)
    (batched,) = torch.autograd.grad(out, y, eye, is_grads_batched=True, retain_graph=True)
    (one,) = torch.autograd.grad(out, y, eye[7])
    torch.testing.assert_close(batched[7], one)


@pytest.mark.slow
def test_compile_fullgraph():
    x, w = (
        torch.randn(2, 3, 4, **DOUBLE).requires_grad_(),
        torch.randn(4, **DOUBLE).requires_grad_(),
    )
    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(f(x, w).square().sum(), (x, w)) for f in (compiled, chain)]
    torch.testing.assert_close(*grads)


def test_a_graph_that_calls_the_wrappers_pickles():
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(secant, ("aten.gelu.default", x), {"approximate": "tanh"})
    y = graph.call_function(FREEZES["aten.layer_norm.default"], (y, (4,)))
    graph.output(graph.call_function(scale, (graph.call_function(attention, (y, y, y)), 0.5)))
    module = fx.GraphModule(torch.nn.Module(), graph)
    again = pickle.loads(pickle.dumps(module))
    z = torch.randn(2, 3, 4).requires_grad_()
    a, b = (torch.autograd.grad(m(z).square().sum(), z)[0] for m in (module, again))
    assert torch.equal(a, b)
    assert a.abs().sum() > 0
