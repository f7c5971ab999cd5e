"""Derivation: the plan of each layer written down, all policies, optimality by brute force."""

import itertools
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fullgrad_theory.edits.base import Edit
from fullgrad_theory.edits.costs import Policy, policies, policy
from fullgrad_theory.edits.kinds import OWN
from fullgrad_theory.edits.pruning import Prune
from fullgrad_theory.edits.scaling import Scale
from fullgrad_theory.errors import NoPlanError, UnknownNameError
from fullgrad_theory.graph.computation import ComputationGraph
from fullgrad_theory.graph.tracing import trace
from fullgrad_theory.plan.derivation import derive_rules
from fullgrad_theory.plan.labelling import State, degrees, liveness

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
W = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
B = torch.randn(4, generator=torch.Generator().manual_seed(2))


def lin(x: Tensor) -> Tensor:
    return F.linear(x, W, B)


def fused_attention(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(lin(x), lin(x), lin(x))


def masked_attention(x: Tensor) -> Tensor:
    mask = (lin(x) @ W[:, :3])[None]
    return F.scaled_dot_product_attention(lin(x)[None], lin(x)[None], lin(x)[None], attn_mask=mask)


def unfused_attention(x: Tensor) -> Tensor:
    return torch.softmax(lin(x) @ lin(x).mT / 2, -1) @ lin(x)


def cosine_attention(x: Tensor) -> Tensor:
    q, k = F.normalize(F.linear(x, W), dim=-1), F.normalize(F.linear(x, W.mT), dim=-1)
    return torch.softmax(q @ k.mT * 5, -1) @ lin(x)


def glu(x: Tensor) -> Tensor:
    value, gate = lin(x).chunk(2, -1)
    return value * torch.sigmoid(gate)


def gate_read_twice(x: Tensor) -> Tensor:
    gate = torch.sigmoid(lin(x))
    return x * (gate * gate.flip(0))


def gru(x: Tensor) -> Tensor:
    h = torch.tanh(lin(x))
    for _ in range(2):
        z = torch.sigmoid(lin(x) + F.linear(h, W))
        h = (1 - z) * torch.tanh(lin(x) + F.linear(h, W)) + z * h
    return h


def relu_net(x: Tensor) -> Tensor:
    return F.linear(F.relu(lin(x)), W, B).amax(-1)


def clip_features(x: Tensor) -> Tensor:
    features = F.linear(x, W)
    return features / features.norm(dim=-1, keepdim=True)


LAYERS: dict[str, tuple[Callable[[Tensor], Tensor], list[str]]] = {
    "layer norm": (nn.LayerNorm(4).eval(), ["freeze 1/sigma of layer_norm"]),
    "layer norm without eps": (
        lambda x: F.layer_norm(x, (4,), eps=0.0),
        ["freeze 1/sigma of layer_norm"],
    ),
    "decomposed layer norm": (
        lambda x: (x - x.mean(-1, True)) / (x.var(-1, keepdim=True) + 1e-5).sqrt() * B + B,
        ["prune div.other"],
    ),
    "decomposed rms norm": (
        lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * B,
        ["prune mul.other"],
    ),
    "norm with eps outside the root": (
        lambda x: x / (x.pow(2).mean(-1, keepdim=True).sqrt() + 1e-6),
        ["prune div.other"],
    ),
    "gelu": (lambda x: F.gelu(lin(x)), ["secant gelu"]),
    "fused attention": (
        fused_attention,
        ["prune scaled_dot_product_attention.query", "prune scaled_dot_product_attention.key"],
    ),
    "attention with a mask that depends on the input": (
        masked_attention,
        [
            "prune scaled_dot_product_attention.query",
            "prune scaled_dot_product_attention.key",
            "prune scaled_dot_product_attention.attn_mask",
        ],
    ),
    "unfused attention": (unfused_attention, ["prune matmul_1.self"]),
    "cosine attention": (cosine_attention, []),
    "swiglu": (
        lambda x: lin(F.silu(lin(x)) * lin(x)),
        ["secant silu", "scale mul by 1/2"],
    ),
    "squeeze-excite gate": (
        lambda x: x * torch.sigmoid(lin(F.relu(lin(x.mean(0, keepdim=True))))),
        ["prune mul.other"],
    ),
    "gate read twice on the way": (gate_read_twice, ["prune mul_1.other"]),
    "glu of a chunk": (glu, ["prune mul.other"]),
    "mish written out": (lambda x: x * torch.tanh(F.softplus(x)), ["prune mul.other"]),
    "polynomial": (
        lambda x: x + x**2 / 2 - x**3 / 5,
        ["scale pow_1 by 1/2", "scale pow_2 by 1/3"],
    ),
    "one scale for a whole sum": (
        lambda x: x * x.flip(0) + x.relu() * x.flip(1),
        ["scale add by 1/2"],
    ),
    "softsign": (lambda x: x / (1 + x.abs()), ["prune div.other"]),
    "hypotenuse": (lambda x: (x * x + x.flip(0) * x.flip(0)).sqrt(), []),
    "generalised mean pool": (lambda x: x.clamp(min=1e-6).pow(3).mean(-1).pow(1 / 3), []),
    "degree one half": (lambda x: x.relu().sqrt(), ["scale sqrt by 2"]),
    "clip features": (clip_features, ["prune div.other"]),
    "values and indices": (lambda x: x * x.max(dim=0)[0], ["scale mul by 1/2"]),
    "frozen values and indices": (lambda x: x * x.detach().max(dim=0)[0], []),
    "gate multiplied, not added": (lambda x: x * (1 + 5 * (x > 0)), []),
    "sigmoid output": (lambda x: torch.sigmoid(lin(x)), ["secant sigmoid"]),
    "gru": (
        gru,
        [
            "secant tanh",
            "prune sigmoid.self",
            "secant tanh_1",
            "prune sigmoid_1.self",
            "secant tanh_2",
        ],
    ),
    "relu network": (relu_net, []),
    "identity": (lambda x: x, []),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_plan_of_a_layer(name: str) -> None:
    layer, expected = LAYERS[name]
    graph = trace(layer, X)
    plan = derive_rules(graph)
    assert [str(edit) for edit in plan] == expected
    assert plan.optimal and not plan.left
    assert not degrees(graph, plan.edits).findings
    assert all(plan.reasons[edit] for edit in plan)


def test_reasons_say_what_is_repaired() -> None:
    def reason(name: str) -> str:
        plan = derive_rules(LAYERS[name][0], X)
        return plan.reasons[plan.edits[-1]]

    assert "weights depend" in reason("fused attention")
    assert "softmax" in reason("unfused attention")
    assert "sigmoid" in reason("squeeze-excite gate")
    assert "norm with eps" in reason("decomposed rms norm")
    assert "a gate of the value it multiplies" in reason("softsign")
    assert "degree 2" in reason("swiglu")
    assert "1/sigma" in reason("layer norm")
    assert "f(0) = 0.5" in reason("sigmoid output")


def test_two_inputs_and_two_outputs() -> None:
    def model(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        h = F.gelu(a + b)
        return h, h * b

    plan = derive_rules(model, (X, X + 1))
    assert [str(e) for e in plan] == ["secant gelu", "scale mul by 1/2"]


# --------------------------------------------------------------------------- obstacles


OBSTACLES: dict[str, tuple[Callable[[Tensor], Tensor], str, str]] = {
    "softmax head": (
        lambda x: torch.softmax(lin(x), -1).flatten(),
        "aten.softmax.int",
        "the output is a probability: judge the logits",
    ),
    "step": (lambda x: x + 5 * (x > 0), "aten.add.Tensor", "adds a frozen value"),
    "softmax added": (lambda x: x + torch.softmax(x, -1), "aten.softmax.int", "has no degree"),
    "inverse": (lambda x: 1 / x, "aten.reciprocal.default", "degree -1"),
    "log": (lambda x: x.abs().log(), "aten.log.default", "has no degree"),
    "detached": (lambda x: lin(x).detach(), "<lambda>", "carries gradient"),
}


NO_INTEGRAL = replace(policy("libra"), name="no integral", integrate=None)
LAST_RESORT = {"softmax head": ["integrate softmax"], "softmax added": ["integrate softmax"]}


@pytest.mark.parametrize("name", OBSTACLES)
def test_an_integral_is_the_last_resort(name: str) -> None:
    """Only where there is no other plan, and never where the ray from 0 is broken."""
    if name in LAST_RESORT:
        assert [str(edit) for edit in derive_rules(OBSTACLES[name][0], X)] == LAST_RESORT[name]
    else:
        with pytest.raises(NoPlanError):
            derive_rules(OBSTACLES[name][0], X)


@pytest.mark.parametrize("name", LAYERS)
def test_where_there_is_another_plan_it_is_the_same(name: str) -> None:
    graph = trace(LAYERS[name][0], X)
    assert derive_rules(graph).edits == derive_rules(graph, policy=NO_INTEGRAL).edits


@pytest.mark.parametrize("name", OBSTACLES)
def test_no_honest_plan_names_the_obstacle(name: str) -> None:
    model, operation, why = OBSTACLES[name]
    with pytest.raises(NoPlanError) as caught:
        derive_rules(model, X, NO_INTEGRAL)
    assert operation in str(caught.value)
    assert why in str(caught.value)


class Head(nn.Module):
    def __init__(self, times: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Softmax(-1) for _ in range(times)])

    def forward(self, x: Tensor) -> Tensor:
        for head in self.heads:
            x = x + head(x)
        return x


def test_all_obstacles_are_named_at_once_with_module_and_line() -> None:
    with pytest.raises(NoPlanError, match=r"softmax .*heads\.0, .*\(and 2 more like it\)"):
        derive_rules(Head(3).eval(), X, NO_INTEGRAL)


def test_a_policy_without_the_edit_says_so() -> None:
    thrifty = replace(policy("libra"), name="thrifty", freeze=None)
    with pytest.raises(NoPlanError, match="under policy 'thrifty'"):
        derive_rules(nn.LayerNorm(4).eval(), X, thrifty)


def test_misspelt_policy() -> None:
    with pytest.raises(UnknownNameError, match="did you mean libra"):
        derive_rules(lin, X, policy="lybra")


# --------------------------------------------------------------------------- policies


class Block(nn.Module):
    """A ViT block with a gated MLP; `fused` chooses the attention kernel or two matmuls."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.q, self.k, self.v, self.proj = (nn.Linear(8, 8) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = self.q(h), self.k(h), self.v(h)
        if self.fused:
            a = F.scaled_dot_product_attention(q, k, v)
        else:
            a = torch.softmax(q @ k.mT / 3, -1) @ v
        x = x + self.proj(a)
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


FREEZE = ["freeze 1/sigma of layer_norm", "freeze 1/sigma of layer_norm_1"]
GATE = ["secant silu", "scale mul by 1/2"]
HALVES = [
    "scale scaled_dot_product_attention.query by 1/4",
    "scale scaled_dot_product_attention.key by 1/4",
    "scale scaled_dot_product_attention.value by 1/2",
]
WEIGHTS = [
    "prune scaled_dot_product_attention.query",
    "prune scaled_dot_product_attention.key",
]
PRODUCTS = ["scale matmul by 1/2", "scale matmul_1 by 1/2"]
SOFTMAX = ["prune matmul_1.self"]
# policy -> the edits with fused attention, with two matmuls
BLOCK: dict[str, tuple[list[str], list[str]]] = {
    "libra": (FREEZE + WEIGHTS + GATE, FREEZE + SOFTMAX + GATE),
    "integrated": (
        [*FREEZE, "integrate scaled_dot_product_attention", *GATE],
        [*FREEZE, "integrate matmul_1 with the 4 nodes it ends", *GATE],
    ),
    "plain": ([], []),
    "attnlrp": (FREEZE + HALVES + GATE, FREEZE + PRODUCTS + GATE),
    "alilrp": (FREEZE + WEIGHTS, FREEZE + SOFTMAX),
    "decompx": (FREEZE + WEIGHTS + GATE[:1], FREEZE + SOFTMAX + GATE[:1]),
    "scale-only": (HALVES + GATE[1:], PRODUCTS + GATE[1:]),
    "gate+scale": (HALVES + GATE, PRODUCTS + GATE),
    "only-attention": (WEIGHTS, SOFTMAX),
    "only-norm": (FREEZE, FREEZE),
    "only-activation": (GATE[:1], GATE[:1]),
    "only-gate": (GATE[1:], GATE[1:]),
    "without-attention": (FREEZE + GATE, FREEZE + GATE),
    "without-norm": (WEIGHTS + GATE, SOFTMAX + GATE),
    "without-activation": (FREEZE + WEIGHTS + GATE[1:], FREEZE + SOFTMAX + GATE[1:]),
    "without-gate": (FREEZE + WEIGHTS + GATE[:1], FREEZE + SOFTMAX + GATE[:1]),
}


def test_every_policy_has_its_expectation() -> None:
    assert {p.name for p in policies()} == set(BLOCK)
    assert all(p.description and p.source for p in policies())


@pytest.mark.slow
@pytest.mark.parametrize("fused", [True, False])
def test_policies_on_a_block(fused: bool) -> None:
    graph = trace(Block(fused).eval(), torch.randn(2, 5, 8))
    for name, expected in BLOCK.items():
        plan = derive_rules(graph, policy=name)
        assert sorted(map(str, plan)) == sorted(expected[not fused]), name
        assert plan.left == tuple(n for n in graph.nodes if n in degrees(graph, plan).findings)
        assert bool(plan.left) != (name in ("libra", "integrated"))
        assert plan.optimal and plan.policy == name


def test_the_edits_come_in_graph_order() -> None:
    graph = trace(Block(True).eval(), torch.randn(2, 5, 8))
    order = [list(graph.nodes).index(e.node) for e in derive_rules(graph, policy="attnlrp")]
    assert order == sorted(order)


@pytest.mark.slow
def test_a_partial_policy_always_has_a_plan() -> None:
    for model, _, _ in list(OBSTACLES.values())[:-1]:
        for entry in policies():
            if not entry.complete:
                assert derive_rules(model, X, entry).left, entry.name


def test_a_policy_of_ones_own() -> None:
    """Where a scale is dear, the gate is pruned instead."""
    dear = replace(policy("libra"), name="dear", scale=100)
    plan = derive_rules(LAYERS["swiglu"][0], X, dear)
    assert [str(e) for e in plan] == ["prune mul.self"] and plan.cost == 30


# --------------------------------------------------------------------------- whole models


def on_meta(name: str) -> ComputationGraph:
    kwargs = {"depth": 2} if name.startswith(("vit", "eva")) else {}
    with torch.device("meta"):
        model = timm.create_model(name, **kwargs).eval()
    return trace(model)


@pytest.mark.slow
def test_a_vit_is_integrated_without_a_prune() -> None:
    with torch.device("meta"):
        graph = trace(timm.create_model("vit_tiny_patch16_224").eval())
    plan = derive_rules(graph, policy="integrated")
    counts = Counter(type(e).__name__ for e in plan)
    assert counts == {"Integrate": 12, "FreezeScale": 25, "Secant": 12}


MODELS: dict[str, dict[str, int]] = {
    "vit_tiny_patch16_224": {"FreezeScale": 5, "Prune": 4, "Secant": 2},
    "eva02_small_patch14_336": {"FreezeScale": 5, "Prune": 4, "Secant": 2, "Scale": 2},
    "resnet18": {},
    "vgg11": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_models_without_weights(name: str) -> None:
    graph = on_meta(name)
    plan = derive_rules(graph)
    assert Counter(type(e).__name__ for e in plan) == MODELS[name]
    assert plan.optimal and not degrees(graph, plan.edits).findings
    assert derive_rules(graph) == plan


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "complete"),
    [
        ("vit_tiny_patch16_224", {"libra", "integrated", "decompx", "without-gate"}),
        ("eva02_small_patch14_336", {"libra", "integrated"}),
    ],
)
def test_which_policies_leave_nothing(name: str, complete: set[str]) -> None:
    graph = on_meta(name)
    assert {p.name for p in policies() if not derive_rules(graph, policy=p).left} == complete


_ELSEWHERE = """
import torch
import torch.nn.functional as F
from fullgrad_theory import derive_rules
W = torch.eye(4)
def model(x):
    x = x + torch.softmax(F.linear(x, W) @ F.linear(x, W).mT, -1) @ F.linear(F.gelu(x), W)
    return x * torch.sigmoid(x.mean(0, keepdim=True))
plan = derive_rules(model, torch.ones(3, 4))
print(plan.fingerprint, *plan, sep="\\n")
"""


@pytest.mark.slow
def test_another_process_derives_the_same_plan(capsys: pytest.CaptureFixture[str]) -> None:
    exec(_ELSEWHERE, {})
    here = capsys.readouterr().out
    env = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    run = [sys.executable, "-c", _ELSEWHERE]
    there = subprocess.run(run, env=env, capture_output=True, text=True, check=True).stdout
    assert here == there
    assert here.splitlines()[1:] == ["secant gelu", "prune matmul_1.self", "prune mul.other"]


_STARTED = """
import sys
import torch
from fullgrad_theory import derive_rules
assert not derive_rules(lambda x: torch.relu(x), torch.ones(3)).edits
print(*({"ortools", "pandas"} & sys.modules.keys()))
"""


def test_the_solver_is_started_where_there_is_something_to_solve() -> None:
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    run = [sys.executable, "-c", _STARTED]
    found = subprocess.run(run, env=env, capture_output=True, text=True, check=True).stdout
    assert not found.strip()


# --------------------------------------------------------------------------- brute force


def random_model(rng: random.Random, size: int) -> Callable[[Tensor], Tensor]:
    """A random straight-line programme whose last value depends on most of the others."""
    unary: list[Callable[[Tensor], Tensor]] = [
        torch.relu,
        torch.abs,
        torch.tanh,
        torch.sigmoid,
        lambda v: v + 1.0,
        lambda v: v**2,
        lambda v: torch.softmax(v, -1),
        lambda v: F.layer_norm(v, (2,)),
        lambda v: v.detach(),
        lambda v: v.abs().sqrt(),
    ]
    binary: list[Callable[[Tensor, Tensor], Tensor]] = [
        torch.add,
        torch.add,
        torch.mul,
        torch.mul,
        torch.div,
        torch.matmul,
    ]
    steps: list[tuple[Callable[..., Tensor], tuple[int, ...]]] = []
    for i in range(size):
        recent = [i, rng.randint(max(0, i - 2), i)]
        if rng.random() < 0.5:
            steps.append((rng.choice(unary), (recent[0],)))
        else:
            rng.shuffle(recent)
            steps.append((rng.choice(binary), tuple(recent)))

    def model(x: Tensor) -> Tensor:
        values = [x]
        for step, reads in steps:
            values.append(step(*(values[r] for r in reads)))
        return values[-1]

    return model


def candidates(graph: ComputationGraph, costs: Policy) -> list[tuple[int, Edit]]:
    """Every single edit of the graph with its cost; scales by each factor that may be of use."""
    live = liveness(graph)
    found: list[tuple[int, Edit]] = []
    for name, call in live.calls.items():
        if live.state(graph.nodes[name]) is not State.LIVE:
            continue
        for operand in call.operands:
            if operand.node is not None and live.state(operand.node) is State.LIVE:
                found.append((costs.prune or 0, Prune(name, operand.name)))
        for mode in call.operator.modes(call):
            if mode.edit is not None:
                found.append((OWN[mode.edit].price(costs, mode) or 0, OWN[mode.edit](name)))
        for factor in (Fraction(1, 2), Fraction(1, 3), Fraction(2)):
            found.append((costs.scale or 0, Scale(name, factor)))
    return found


def sets_below(found: list[tuple[int, Edit]], bound: int) -> Iterator[tuple[int, list[Edit]]]:
    """All sets of edits that cost less than `bound`, by brute force."""
    if not found:
        if bound > 0:
            yield 0, []
        return
    (cost, edit), rest = found[0], found[1:]
    yield from sets_below(rest, bound)
    for more, edits in sets_below(rest, bound - cost) if cost < bound else ():
        yield cost + more, [edit, *edits]


def is_complete(graph: ComputationGraph, edits: list[Edit]) -> bool:
    scaled = [e.node for e in edits if isinstance(e, Scale)]
    if len(set(scaled)) < len(scaled):
        return False
    found = degrees(graph, edits)
    output = found.facts[graph.outputs[0].name][0]
    return (
        not found.findings
        and output.state is State.LIVE
        and output.degree == 1
        and all(found.facts[node][0].degree == 1 for node in scaled)
    )


@pytest.mark.slow
def test_no_cheaper_set_of_edits_exists() -> None:
    """An independent slow search: every cheaper set of edits leaves a finding."""
    rng = random.Random(3)
    costs = policy("libra")
    compared: Counter[str] = Counter()
    for _ in range(120):
        graph = trace(random_model(rng, rng.randint(2, 5)), torch.rand(2, 2))
        try:
            plan = derive_rules(graph, policy=costs)
            bound = plan.cost
            assert bound == 0 or is_complete(graph, list(plan.edits))
        except NoPlanError:
            plan, bound = None, 45
        searched = list(itertools.islice(sets_below(candidates(graph, costs), bound), 1500))
        if len(searched) == 1500:
            continue  # too many sets to try them all
        compared["none" if plan is None else "free" if bound == 0 else "edited"] += 1
        cheaper = [edits for _, edits in searched if is_complete(graph, edits)]
        assert not cheaper, (graph.fx.code, str(plan), cheaper[0])
    assert compared["edited"] >= 25 and compared["none"] >= 10, compared
