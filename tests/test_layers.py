"""Layers that nobody registered: the plan of each by hand, and its completeness by two witnesses.

One is `check_completeness`. The other is autograd on the balanced module over leaves written into
the layer: parameters called `b...` are its biases, `one` is a Python number lifted to a parameter,
and f(0) of a secant is a leaf that this file adds behind it. It shares no code with the first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fullgrad_theory.backward.balanced import balance
from fullgrad_theory.backward.contributions import fullgrad
from fullgrad_theory.check.completeness import check_completeness
from fullgrad_theory.check.report import Verdict
from fullgrad_theory.edits.base import Edit
from fullgrad_theory.edits.pruning import Prune
from fullgrad_theory.edits.secants import Secant, secant
from fullgrad_theory.errors import NoPlanError
from fullgrad_theory.graph.computation import ComputationGraph
from fullgrad_theory.graph.tracing import trace
from fullgrad_theory.plan.derivation import derive_rules
from fullgrad_theory.plan.labelling import degrees
from fullgrad_theory.plan.plan import Plan
from fullgrad_theory.testing.sample_calls import overload

TOLERANCE = 1e-10


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


X = drawn(3, 4)
SEQ = drawn(2, 3, 4, seed=1)
IMAGE = drawn(2, 4, 5, 5, seed=2)

SHAPES: dict[str, tuple[int, ...]] = {
    "w1": (4, 4), "w2": (4, 4), "w3": (4, 4), "w4": (4, 4), "wide": (8, 4), "narrow": (4, 8),
    "w12": (12, 4), "w16": (16, 4), "scale": (4,), "taps": (4, 1, 3), "state": (3, 4),
    "out": (4, 3), "time": (3, 3), "route": (5, 4), "experts": (5, 4, 4),
    "spline": (4, 4, 5), "radial": (4, 5),
    "head": (3, 16),
    "b1": (4,), "b2": (4,), "b3": (4,), "b8": (8,), "b12": (12,), "b_time": (3,), "b_out": (5, 4),
    "b_knots": (5,), "b_centres": (5, 4),
}  # fmt: skip


class Net(nn.Module):
    """A layer over parameters: those called `b...` are only ever added, the rest only multiplied.

    `one` is the number 1, or with `lifted` a parameter that is 1.
    """

    def __init__(self, function: Callable[..., Tensor], lifted: bool = False) -> None:
        super().__init__()
        self.function = function
        for seed, (name, shape) in enumerate(SHAPES.items(), 10):
            self.register_parameter(name, nn.Parameter(drawn(*shape, seed=seed)))
        self.one: Any = nn.Parameter(torch.ones((), dtype=torch.float64)) if lifted else 1
        self.eval()

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)

    @property
    def biases(self) -> list[nn.Parameter]:
        return [p for name, p in self.named_parameters() if name[0] == "b" or name == "one"]


def lin(p: Any, x: Tensor, which: int = 1) -> Tensor:
    weights, biases = (p.w1, p.w2, p.w3, p.w4), (p.b1, p.b2, p.b3, None)
    return F.linear(x, weights[which - 1], biases[which - 1])


# --------------------------------------------------------------------------- recurrent layers


def gru(p: Any, x: Tensor, first: Tensor | None = None) -> Tensor:
    h = torch.zeros_like(x[:, 0]) if first is None else first
    for t in range(3):
        z = torch.sigmoid(lin(p, x[:, t]) + F.linear(h, p.w2))
        r = torch.sigmoid(lin(p, x[:, t], 2) + F.linear(h, p.w3))
        n = torch.tanh(lin(p, x[:, t], 3) + F.linear(r * h, p.w4))
        one = p.one if t == 0 else 1  # where the gate is held fixed it is no bias
        h = (one - z) * n + z * h
    return h


def lstm(p: Any, x: Tensor, first: Tensor | None = None) -> Tensor:
    h = c = torch.zeros_like(x[:, 0]) if first is None else first
    for t in range(3):
        i, f, g = (lin(p, x[:, t], k) + F.linear(h, p.w4) for k in (1, 2, 3))
        o = lin(p, x[:, t], 3) + F.linear(h, p.w1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
    return h


def minimal_gated_unit(p: Any, x: Tensor, first: Tensor | None = None) -> Tensor:
    h = torch.zeros_like(x[:, 0]) if first is None else first
    for t in range(3):
        f = torch.sigmoid(lin(p, x[:, t]) + F.linear(h, p.w2))
        h = (1 - f) * h + f * torch.tanh(lin(p, x[:, t], 3) + F.linear(f * h, p.w4))
    return h


def selective_scan(p: Any, x: Tensor) -> Tensor:
    """Mamba without its gate: step sizes, input and output matrices depend on the input."""
    u = F.silu(F.conv1d(F.pad(x.mT, (2, 0)), p.taps, p.b1, groups=4)).mT
    dt, into, out = F.softplus(lin(p, u, 2)), F.linear(u, p.state), F.linear(u, p.out.mT)
    s = torch.zeros(u.shape[0], 4, 3, dtype=u.dtype)
    ys = []
    for t in range(3):
        keep = torch.exp(dt[:, t, :, None] * -p.out.abs())
        s = keep * s + dt[:, t, :, None] * into[:, t, None] * u[:, t, :, None]
        ys.append((s * out[:, t, None]).sum(-1))
    return torch.stack(ys, 1) + u * p.scale


def mamba(p: Any, x: Tensor) -> Tensor:
    return lin(p, selective_scan(p, lin(p, x, 4)) * F.silu(lin(p, x)), 4)


# --------------------------------------------------------------------------- attention, experts


def linear_attention(p: Any, x: Tensor) -> Tensor:
    q, k = F.elu(lin(p, x)) + p.one, F.elu(lin(p, x, 2)) + p.one
    return q @ (k.mT @ lin(p, x, 3)) / (q @ k.sum(0, keepdim=True).mT)


def linear_attention_eps(p: Any, x: Tensor) -> Tensor:
    q, k = F.elu(lin(p, x)) + p.one, F.elu(lin(p, x, 2)) + p.one
    z = 1 / (q @ k.sum(0, keepdim=True).mT + 1e-6)
    return q @ (k.mT @ lin(p, x, 3)) * z


def cosine_attention(p: Any, x: Tensor) -> Tensor:
    q, k = F.linear(x, p.w1), F.linear(x, p.w2)
    q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
    return torch.softmax(10 * q @ k.mT, -1) @ lin(p, x, 3)


def gated_attention(p: Any, x: Tensor) -> Tensor:
    a = F.scaled_dot_product_attention(lin(p, x), lin(p, x, 2), lin(p, x, 3))
    return a * torch.sigmoid(lin(p, x, 2))


def softcapped_attention(p: Any, x: Tensor) -> Tensor:
    logits = torch.tanh(lin(p, x) @ lin(p, x, 2).mT / 30) * 30
    return torch.softmax(logits, -1) @ lin(p, x, 3)


def cross_attention(p: Any, x: Tensor, context: Tensor) -> Tensor:
    q = lin(p, F.layer_norm(x, (4,)))
    return x + F.scaled_dot_product_attention(q, lin(p, context, 2), lin(p, context, 3))


def experts(p: Any, x: Tensor) -> Tensor:
    return torch.einsum("bd,edf->bef", x, p.experts) + p.b_out


def soft_experts(p: Any, x: Tensor) -> Tensor:
    gate = torch.softmax(F.linear(x, p.route), -1)
    return torch.einsum("be,bef->bf", gate, experts(p, x))


def top_experts(p: Any, x: Tensor) -> Tensor:
    value, index = F.linear(x, p.route).topk(2, -1)
    chosen = experts(p, x).gather(1, index[..., None].expand(-1, -1, 4))
    return (chosen * torch.softmax(value, -1)[..., None]).sum(1)


def scattered_experts(p: Any, x: Tensor) -> Tensor:
    value, index = F.linear(x, p.route).topk(2, -1)
    gate = torch.zeros(3, 5, dtype=x.dtype).scatter(-1, index, torch.softmax(value, -1))
    return torch.einsum("be,bef->bf", gate, F.relu(experts(p, x)))


def indexed_experts(p: Any, x: Tensor) -> Tensor:
    value, index = torch.softmax(F.linear(x, p.route), -1).topk(2, -1)
    value = value / value.sum(-1, keepdim=True)
    out = torch.zeros_like(x)
    for e in range(2):
        weight = (value * (index == e)).sum(-1, keepdim=True)
        out = out.index_add(0, torch.arange(3), F.gelu(x @ p.experts[e] + p.b_out[e]) * weight)
    return out


def sigmoid_experts(p: Any, x: Tensor) -> Tensor:
    value, index = torch.sigmoid(F.linear(x, p.route)).topk(2, -1)
    value = value / (value.sum(-1, keepdim=True) + 1e-20)
    chosen = F.silu(experts(p, x)).gather(1, index[..., None].expand(-1, -1, 4))
    return (chosen * value[..., None]).sum(1)


# --------------------------------------------------------------------------- kernels from the input


def dynamic_convolution(p: Any, x: Tensor) -> Tensor:
    kernel = torch.softmax(F.linear(x.mean(1), p.state), -1)
    return (F.pad(x.mT, (1, 1)).unfold(-1, 3, 1) * kernel[:, None, None]).sum(-1)


def linear_dynamic_convolution(p: Any, x: Tensor) -> Tensor:
    kernel = F.linear(x.mean(1), p.state, p.b_time)
    return (F.pad(x.mT, (1, 1)).unfold(-1, 3, 1) * kernel[:, None, None]).sum(-1)


def hyper_network(p: Any, x: Tensor) -> Tensor:
    weight = F.linear(F.gelu(lin(p, x)), p.w16).reshape(-1, 4, 4)
    return F.gelu(torch.bmm(weight, x[..., None]).squeeze(-1))


# --------------------------------------------------------------------------- splines, bilinear


def radial_basis(p: Any, x: Tensor) -> Tensor:
    distance = ((x[:, None] - p.b_centres) ** 2).sum(-1)
    return F.linear(torch.exp(-distance), p.radial)


def radial_basis_cdist(p: Any, x: Tensor) -> Tensor:
    return F.linear(torch.exp(-(torch.cdist(x, p.b_centres) ** 2) / 2), p.radial)


def spline(p: Any, x: Tensor) -> Tensor:
    """A Kolmogorov-Arnold layer: cubic splines as powers of relu, and a base activation."""
    cubes = F.relu(x[..., None] - p.b_knots) ** 3
    return F.linear(F.silu(x), p.w1) + torch.einsum("bik,iok->bo", cubes, p.spline)


def b_spline(p: Any, x: Tensor) -> Tensor:
    """The same by de Boor's recursion, from comparisons; the knots are biases."""
    knots, x = p.b_knots.cumsum(0), x[..., None]
    basis = ((x >= -1) & (x < 1)).to(x.dtype).expand(-1, -1, 4)
    for k in range(1, 3):
        left = (x - knots[: -k - 1]) / k * basis[..., :-1]
        basis = left + (knots[k + 1 :] - x) / k * basis[..., 1:]
    return torch.einsum("bik,iok->bo", basis, p.spline[..., :2])


def bilinear_pooling(p: Any, x: Tensor) -> Tensor:
    f = lin(p, x)
    outer = (f[:, :, None] * f[:, None]).flatten(1)
    root = torch.sign(outer) * torch.sqrt(outer.abs())
    return F.linear(root / root.norm(dim=-1, keepdim=True), p.head)


# --------------------------------------------------------------------------- gates and modulation


def squeeze_excite(p: Any, x: Tensor) -> Tensor:
    g = F.conv2d(x.mean((2, 3), keepdim=True), p.w1[..., None, None], p.b1)
    return x * torch.sigmoid(F.conv2d(F.relu(g), p.w2[..., None, None], p.b2))


def convolutional_gate(p: Any, x: Tensor) -> Tensor:
    g = F.group_norm(F.conv2d(x, p.w1[..., None, None], p.b1), 2, p.scale, p.b2)
    return F.conv2d(x, p.w2[..., None, None], p.b3) * torch.sigmoid(g)


def spatial_gating(p: Any, x: Tensor) -> Tensor:
    u, v = F.gelu(F.linear(x, p.wide, p.b8)).chunk(2, -1)
    v = F.linear(F.layer_norm(v, (4,), p.scale, p.b1).mT, p.time, p.b_time).mT
    return lin(p, u * v, 2)


def geglu(p: Any, x: Tensor) -> Tensor:
    gate, value = F.linear(x, p.wide, p.b8).chunk(2, -1)
    return lin(p, F.gelu(gate) * value, 2)


def conformer(p: Any, x: Tensor) -> Tensor:
    value, gate = F.linear(F.layer_norm(x, (4,), p.scale, p.b1), p.wide, p.b8).chunk(2, -1)
    h = F.conv1d((value * torch.sigmoid(gate)).mT, p.taps, p.b2, padding=1, groups=4)
    return x + lin(p, F.silu(h).mT, 3)


def highway(p: Any, x: Tensor) -> Tensor:
    t = torch.sigmoid(lin(p, x))
    return t * F.relu(lin(p, x, 2)) + (1 - t) * x


def modulation(p: Any, x: Tensor, condition: Tensor) -> Tensor:
    """adaLN: scale, shift and gate of a block come from a second input."""
    scale, shift, gate = F.linear(F.silu(condition), p.w12, p.b12)[:, None].chunk(3, -1)
    h = F.layer_norm(x, (4,)) * (p.one + scale) + shift
    return x + gate * lin(p, F.gelu(lin(p, h)), 2)


def squash(p: Any, x: Tensor) -> Tensor:
    capsules = torch.einsum("bd,edf->bef", x, p.experts)
    square = (capsules**2).sum(-1, keepdim=True)
    return square / (1 + square) * capsules / torch.sqrt(square + 1e-8)


def token_merging(p: Any, x: Tensor) -> Tensor:
    order = torch.einsum("btd,bsd->bts", x, x).amax(-1).argsort(-1, descending=True)
    x = x.gather(1, order[..., None].expand(-1, -1, 4))
    return torch.cat([x[:, :1], (x[:, 1:2] + x[:, 2:]) / 2], 1)


def fourier_mixing(p: Any, x: Tensor) -> Tensor:
    return F.layer_norm(x + torch.fft.fft2(x).real, (4,), p.scale, p.b1)


def over_norm(p: Any, x: Tensor) -> Tensor:
    return lin(p, x) / (lin(p, x, 2).abs().sum(-1, keepdim=True) + 1e-6)


def pairwise_kernel(p: Any, x: Tensor) -> Tensor:
    return torch.softmax(-torch.cdist(lin(p, x), lin(p, x, 2)), -1) @ lin(p, x, 3)


# --------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Layer:
    """A layer `run(parameters, *inputs)`, its plan as it would be written by hand, its inputs."""

    run: Callable[..., Tensor]
    plan: list[str]
    inputs: tuple[Tensor, ...] = (X,)


QUERY_KEY = [
    "prune scaled_dot_product_attention.query",
    "prune scaled_dot_product_attention.key",
]
LAYERS: dict[str, Layer] = {
    "scales before a sum": Layer(
        lambda p, x: x + x**2 + x**3, ["scale pow_1 by 1/2", "scale pow_2 by 1/3"]
    ),
    "a literal added": Layer(lambda p, x: p.one + torch.sin(x), ["secant sin"]),
    "elu + 1": Layer(lambda p, x: F.elu(lin(p, x)) + p.one, ["secant elu"]),
    "cosine features": Layer(lambda p, x: lin(p, torch.cos(lin(p, x)), 2), ["secant cos"]),
    "softplus": Layer(lambda p, x: F.softplus(lin(p, x), beta=2.0), ["secant softplus"]),
    "over a norm": Layer(
        lambda p, x: lin(p, x) / lin(p, x, 2).norm(dim=-1, keepdim=True), ["prune div.other"]
    ),
    "over a norm with eps": Layer(over_norm, ["prune div.other"]),
    "coefficient and bias": Layer(lambda p, x: p.scale * x + p.b1, []),
    "squeeze and excite": Layer(squeeze_excite, ["prune mul.other"], (IMAGE,)),
    "convolutional gate": Layer(convolutional_gate, ["prune mul_3.other"], (IMAGE,)),
    "cosine attention": Layer(cosine_attention, []),
    "gated recurrent unit": Layer(
        gru,
        [
            "secant tanh",
            "prune mul_1.self",
            "prune sigmoid_2.self",
            "prune mul_3.self",
            "secant tanh_1",
            "prune sigmoid_4.self",
            "prune mul_6.self",
            "secant tanh_2",
        ],
        (SEQ,),
    ),
    # a state of zeros is none; later what an output gate lets through is fixed, the gate explained
    "long short-term memory": Layer(
        lstm,
        [
            "secant tanh",
            "prune mul_1.self",
            "secant tanh_1",
            "prune mul_2.self",
            "secant sigmoid_5",
            "prune mul_5.other",
            "secant sigmoid_8",
            "prune mul_8.other",
        ],
        (SEQ,),
    ),
    "minimal gated unit": Layer(
        minimal_gated_unit,
        [
            "secant tanh",
            "prune mul_2.self",
            "prune sigmoid_1.self",
            "secant tanh_1",
            "prune sigmoid_2.self",
            "secant tanh_2",
        ],
        (SEQ,),
    ),
    "selective scan": Layer(
        selective_scan,
        ["secant silu", "prune softplus.self", "scale stack by 1/3"],
        (SEQ,),
    ),
    "Mamba": Layer(
        mamba,
        ["secant silu_1", "prune mul_16.self"],
        (SEQ,),
    ),
    "cosine similarity": Layer(
        lambda p, x: F.cosine_similarity(lin(p, x), x, dim=-1), ["prune div.other"]
    ),
    "dynamic convolution": Layer(dynamic_convolution, ["prune mul.other"], (SEQ,)),
    "linear dynamic convolution": Layer(linear_dynamic_convolution, ["scale mul by 1/2"], (SEQ,)),
    "hyper-network": Layer(hyper_network, ["secant gelu", "scale bmm by 1/2", "secant gelu_1"]),
    "soft experts": Layer(soft_experts, ["prune einsum_1.tensors[0]"]),
    "top experts": Layer(top_experts, ["prune mul.other"]),
    "scattered experts": Layer(scattered_experts, ["prune einsum_1.tensors[0]"]),
    "indexed experts": Layer(
        indexed_experts, ["prune getitem.self", "secant gelu", "secant gelu_1"]
    ),
    "sigmoid experts": Layer(sigmoid_experts, ["secant silu", "prune mul.other"]),
    "linear attention": Layer(linear_attention, ["secant elu", "secant elu_1"]),
    "linear attention with eps": Layer(
        linear_attention_eps,
        ["secant elu", "secant elu_1", "scale matmul_2 by 1/3", "prune mul_1.other"],
    ),
    "gated attention": Layer(gated_attention, [*QUERY_KEY, "prune mul.other"]),
    "softcapped attention": Layer(softcapped_attention, ["prune matmul_1.self"]),
    "cross attention": Layer(cross_attention, QUERY_KEY, (SEQ, drawn(2, 5, 4, seed=3))),
    "radial basis": Layer(radial_basis, ["scale pow_1 by 1/2", "secant exp"]),
    "radial basis by cdist": Layer(radial_basis_cdist, ["scale pow_1 by 1/2", "secant exp"]),
    "relu splines": Layer(spline, ["scale pow_1 by 1/3", "secant silu"]),
    "b-splines": Layer(b_spline, ["scale add_1 by 1/2"]),
    "bilinear pooling": Layer(bilinear_pooling, ["prune div.other"]),
    "spatial gating": Layer(
        spatial_gating,
        ["secant gelu", "freeze 1/sigma of layer_norm", "scale mul by 1/2"],
        (SEQ,),
    ),
    "squared relu": Layer(
        lambda p, x: F.linear(F.relu(F.linear(x, p.wide, p.b8)).square(), p.narrow, p.b1),
        ["scale square by 1/2"],
    ),
    "GeGLU": Layer(geglu, ["secant gelu", "scale mul by 1/2"]),
    "conformer": Layer(
        conformer, ["freeze 1/sigma of layer_norm", "prune mul.other", "secant silu"], (SEQ,)
    ),
    "Fourier mixing": Layer(fourier_mixing, ["freeze 1/sigma of layer_norm"], (SEQ,)),
    "pairwise distances": Layer(lambda p, x: torch.cdist(x, lin(p, x)), []),
    # a distance to a constant has that constant for a bias leaf, on whichever side it stands
    "distances from centres": Layer(
        lambda p, x: (
            torch.cdist(p.b_centres, x, p=3.0).mT + torch.hypot(x.amax(), p.b_out[:3, 0:1])
        ),
        [],
    ),
    "distance to a centre": Layer(lambda p, x: torch.dist(x, p.b_centres[:3])[None] + x, []),
    "pairwise kernel": Layer(pairwise_kernel, ["prune matmul.self"]),
    "capsule squash": Layer(squash, ["prune sum_1.self"]),
    "max-out": Layer(lambda p, x: experts(p, x).amax(1), []),
    "highway": Layer(highway, ["prune sigmoid.self"]),
    "modulation": Layer(
        modulation,
        [
            "secant silu",
            "freeze 1/sigma of layer_norm",
            "scale mul by 1/2",
            "secant gelu",
            "scale mul_1 by 1/2",
        ],
        (SEQ, drawn(2, 4, seed=4)),
    ),
    "token merging": Layer(token_merging, [], (SEQ,)),
}


def is_complete(graph: ComputationGraph, edits: Any) -> bool:
    return not degrees(graph, edits).findings


class Lifted(fx.Interpreter):
    """Runs a balanced module with a leaf f(0) behind every secant, by plain autograd."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.leaves: list[Tensor] = []

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.target is not secant:
            return value
        name, _, *more = self.fetch_args_kwargs_from_env(n)[0]
        origin = overload(name)(torch.zeros((), dtype=value.dtype), *more, **n.kwargs)
        self.leaves.append(torch.full_like(value, float(origin)).requires_grad_())
        return value - origin + self.leaves[-1]


def missing(net: Net, inputs: tuple[Tensor, ...], plan: Plan, graph: ComputationGraph) -> float:
    """|<c, f> - sum of leaf times gradient|, relative to sum |c f|; autograd and nothing else."""
    balanced = balance(graph, policy=plan)
    given = [x.clone().requires_grad_() for x in inputs]
    run = Lifted(balanced.fx)
    output = run.run(*given)
    assert torch.allclose(output, net(*inputs), rtol=1e-13, atol=1e-13)
    cotangent = drawn(*output.shape, seed=9)
    leaves = [*given, *net.biases, *run.leaves]
    grads = torch.autograd.grad(output, leaves, cotangent, allow_unused=True)
    found = sum(
        float((g * u).detach().sum()) for g, u in zip(grads, leaves, strict=True) if g is not None
    )
    total = (cotangent * output).detach()
    return abs(float(total.sum()) - found) / float(total.abs().sum())


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer(name: str) -> None:
    layer = LAYERS[name]
    graph = trace(Net(layer.run), layer.inputs)
    plan = derive_rules(graph)
    assert [str(edit) for edit in plan] == layer.plan
    assert plan.optimal and is_complete(graph, plan.edits)

    report = check_completeness(graph, policy="libra")
    assert report.complete and report.error is not None and report.error < TOLERANCE
    assert {n.verdict for n in report.nodes} <= {Verdict.PROVED, Verdict.NUMERIC}

    lifted = Net(layer.run, lifted=True)
    assert missing(lifted, layer.inputs, plan, trace(lifted, layer.inputs)) < TOLERANCE


def test_the_second_witness_can_say_no() -> None:
    """Unedited, or with one edit taken away, the same autograd misses the output."""
    for name in ("GeGLU", "spatial gating", "modulation", "softplus"):
        layer = LAYERS[name]
        net = Net(layer.run, lifted=True)
        graph = trace(net, layer.inputs)
        plan = derive_rules(graph)
        for edit in plan:
            fewer = replace(plan, edits=tuple(e for e in plan if e != edit))
            assert missing(net, layer.inputs, fewer, graph) > 1e-6, (name, edit)


def gates_fixed(graph: ComputationGraph) -> list[Edit]:
    """Every gate held fixed and a secant in every tanh."""
    tanhs: list[Edit] = [Secant(n) for n in graph.nodes if n.startswith("tanh")]
    return tanhs + [Prune(n, "self") for n in graph.nodes if n.startswith("sigmoid")]


def selection_fixed(graph: ComputationGraph) -> list[Edit]:
    """Mamba's decay, input and output matrices held fixed at each step: a linear filter of silu.

    The first decay, of a zero state, has nothing to hold fixed, and is made linear.
    """
    linear = ("silu", "silu_1", "softplus", "exp")
    edits: list[Edit] = [Secant(n) for n in linear if n in graph.nodes]
    for node in graph.nodes.values():
        if node.target is torch.ops.aten.mul.Tensor:
            first, second = (str(a).split("_")[0] for a in node.args)
            if (first, second) in (("exp", "add"), ("mul", "unsqueeze")):  # decay, B dt
                edits.append(Prune(node.name, "self"))
            elif (first, second) in (("add", "unsqueeze"), ("add", "silu")):  # C, Mamba's gate
                edits.append(Prune(node.name, "other"))
    return edits


def with_a_first_state(cell: Callable[..., Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """A gate on a zero state has nothing to hold fixed: the first state is one of the input."""
    return lambda p, x: cell(p, x, F.linear(x[:, 0], p.w4))


Textbook = Callable[[ComputationGraph], list[Edit]]
TEXTBOOK: dict[str, tuple[Callable[..., Tensor], Textbook]] = {
    "gated recurrent unit": (with_a_first_state(gru), gates_fixed),
    "long short-term memory": (with_a_first_state(lstm), gates_fixed),
    "minimal gated unit": (with_a_first_state(minimal_gated_unit), gates_fixed),
    "selective scan": (selective_scan, selection_fixed),
    "Mamba": (mamba, selection_fixed),
}


@pytest.mark.parametrize("name", TEXTBOOK)
def test_no_longer_than_the_plan_of_a_textbook(name: str) -> None:
    layer, by_hand = TEXTBOOK[name]
    graph = trace(Net(layer), SEQ)
    textbook = by_hand(graph)
    assert is_complete(graph, textbook)
    assert len(derive_rules(graph)) <= len(textbook)


class Cells(nn.Module):
    """A recurrent cell over some steps."""

    def __init__(self, cell: nn.Module, steps: int = 3) -> None:
        super().__init__()
        self.cell, self.steps = cell, steps

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros_like(x[:, 0])
        state: Any = (h, h) if isinstance(self.cell, nn.LSTMCell) else h
        for t in range(self.steps):
            state = self.cell(x[:, t], state)
        return state[0] if isinstance(state, tuple) else state


class First(nn.Module):
    """The first result of a module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


THREE = ["secant tanh", "secant tanh_1", "secant tanh_2"]
LSTM = [
    "secant tanh", "prune mul_1.self", "secant tanh_1", "prune mul_2.self",
    "secant sigmoid_5", "prune mul_5.other", "secant sigmoid_8", "prune mul_8.other",
]  # fmt: skip
GRU = [
    "secant sigmoid", "secant tanh", "prune mul_1.other", "prune mul_2.other", "secant tanh_1",
    "prune mul_3.other", "prune mul_4.other", "secant tanh_2", "prune mul_5.other",
]  # fmt: skip
HELD_IN_CELLS = {"prune mul_2.other": "prune mul_2.self", "prune mul_4.other": "prune mul_4.self"}
MODULES: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "RNNCell": (lambda: Cells(nn.RNNCell(4, 4)), THREE),
    "RNNCell with relu": (lambda: Cells(nn.RNNCell(4, 4, nonlinearity="relu")), []),
    "RNN": (lambda: First(nn.RNN(4, 4, batch_first=True)), THREE),
    "RNN, two layers": (
        lambda: First(nn.RNN(4, 4, 2, batch_first=True)),
        [*THREE, *(f"secant tanh_{i}" for i in (3, 4, 5))],
    ),
    "RNN with relu": (lambda: First(nn.RNN(4, 4, batch_first=True, nonlinearity="relu")), []),
    # kernels, with their steps beside them: the gates are held
    "GRUCell": (lambda: Cells(nn.GRUCell(4, 4)), [HELD_IN_CELLS.get(e, e) for e in GRU]),
    "LSTMCell": (lambda: Cells(nn.LSTMCell(4, 4)), LSTM),
    "GRU": (lambda: First(nn.GRU(4, 4, batch_first=True)), GRU),
    "LSTM": (lambda: First(nn.LSTM(4, 4, batch_first=True)), LSTM),
    "GLU": (lambda: nn.Sequential(nn.Linear(4, 8), nn.GLU()), ["prune mul.other"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_a_recurrent_module(name: str) -> None:
    torch.manual_seed(0)
    make, expected = MODULES[name]
    module = make().double().eval()
    graph = trace(module, SEQ)
    plan = derive_rules(graph)
    assert [str(edit) for edit in plan] == expected
    report = check_completeness(module, SEQ, policy="libra")
    assert report.complete and report.error is not None and report.error < TOLERANCE

    x = SEQ.clone().requires_grad_()
    biases = [p for n, p in module.named_parameters() if "bias" in n]
    output = balance(module, SEQ)(x)
    grads = torch.autograd.grad(output.sum(), [x, *biases])
    found = sum((g * u).sum() for g, u in zip(grads, [x, *biases], strict=True))
    if any("secant sigmoid" in e for e in expected):  # sigmoid(0) = 1/2 is a bias leaf as well
        parts = fullgrad(balance(lambda u: module(u).sum(), SEQ), SEQ)
        assert parts.error < TOLERANCE and any("f(0)" in leaf for leaf in parts.biases)
    else:
        assert torch.allclose(found, output.sum(), rtol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_bit_for_bit_those_of_the_layer(dtype: torch.dtype) -> None:
    for make in (
        lambda: First(nn.RNN(17, 17, 2, batch_first=True)),
        lambda: Cells(nn.RNNCell(17, 17)),
    ):
        module = make().to(dtype).eval()
        x = torch.randn(5, 3, 17).to(dtype)
        assert torch.equal(balance(module, x)(x), module(x))


# --------------------------------------------------------------------------- no honest plan


OBSTACLES: dict[str, tuple[Callable[[Any, Tensor], Tensor], str, str]] = {
    "an inverse of what might be -1": (
        lambda p, x: 1 / (1 + x.norm(dim=-1)), "aten.add.Tensor",
        "a literal inside a divisor is no bias",
    ),
    "hard codebook": (
        lambda p, x: p.route[torch.cdist(x, p.route).argmin(-1)], "Net", "carries gradient",
    ),
    "straight through": (
        lambda p, x: x + (x.round() - x).detach(), "aten.add.Tensor", "adds a frozen value",
    ),
    "half detached": (
        lambda p, x: lin(p, x) + x.detach(), "aten.add.Tensor", "adds a frozen value",
    ),
    "log1p of a norm": (
        lambda p, x: torch.log(1 + x.norm(dim=-1)), "aten.log.default", "it has no degree",
    ),
    "angle": (
        lambda p, x: torch.atan2(lin(p, x), lin(p, x, 2)), "aten.atan2.default", "degree 0",
    ),
    "power of itself": (
        lambda p, x: x.abs() ** x, "aten.pow.Tensor_Tensor", "it has no degree",
    ),
    "inverse distance": (
        lambda p, x: 1 / torch.cdist(x, p.b_centres), "aten.reciprocal.default", "degree -1",
    ),
    "counting": (lambda p, x: (x > 0).to(x.dtype).sum(-1), "Net", "carries gradient"),
    "gate added": (
        lambda p, x: x + torch.frac(lin(p, x)), "aten.frac.default", "jumps",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OBSTACLES)
def test_no_honest_plan(name: str) -> None:
    layer, what, why = OBSTACLES[name]
    with pytest.raises(NoPlanError) as caught:
        derive_rules(Net(layer), X)
    assert what in str(caught.value) and why in str(caught.value)


def test_an_undefined_gradient_is_no_completeness() -> None:
    """Where relu is 0 the square root's gradient is infinite, and 0 times infinity is nan."""
    net = Net(lambda p, x: F.relu(lin(p, x)).sqrt())
    report = check_completeness(net, X, policy="libra")
    assert report.complete is False
    assert any("not finite" in problem for problem in report.problems)


def test_one_parameter_as_coefficient_and_as_bias() -> None:
    """In w*x + w the gradient of w is x + 1: the bias is one use of it, x*w + 1*w the output."""
    net = Net(lambda p, x: p.scale * x + p.scale)
    assert not derive_rules(net, X).edits
    report = check_completeness(net, X)
    assert report.complete and report.error is not None and report.error < TOLERANCE
    x = X.clone().requires_grad_()
    output = net(x).sum()
    grad, own = torch.autograd.grad(output, [x, net.scale])
    through_input, scale = (grad * X).sum(), net.scale.detach()
    assert torch.allclose(through_input + 3 * scale.sum(), output.detach())
    assert abs(through_input + (own * scale).sum() - output.detach()) > 0.1
