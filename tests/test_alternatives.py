"""Alternatives to a plan: complete, minimal, different, in order of cost; prices of one's own."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_derive import Block, candidates, is_complete, lin, random_model, sets_below
from torch import Tensor, nn

from fullgrad_theory.backward.balanced import balance
from fullgrad_theory.edits.base import Edit
from fullgrad_theory.edits.costs import Policy, policies, policy
from fullgrad_theory.edits.pruning import Prune
from fullgrad_theory.errors import InputError, NoPlanError, PolicyError, UnknownNameError
from fullgrad_theory.graph.computation import ComputationGraph
from fullgrad_theory.graph.tracing import trace
from fullgrad_theory.operators import Algebra
from fullgrad_theory.plan.derivation import derive_rules
from fullgrad_theory.plan.labelling import degrees
from fullgrad_theory.plan.plan import Plan

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def swiglu(x: Tensor) -> Tensor:
    return lin(F.silu(lin(x)) * lin(x.flip(0)))


def gate(x: Tensor) -> Tensor:
    return x * torch.sigmoid(lin(F.relu(lin(x.mean(0, keepdim=True)))))


def cube(x: Tensor) -> Tensor:
    return x * x.flip(0) * x.flip(1)


PLANS: dict[str, tuple[Callable[[Tensor], Tensor], list[tuple[int, list[str]]]]] = {
    "swiglu": (
        swiglu,
        [
            (14, ["secant silu", "scale mul by 1/2"]),
            (30, ["prune mul.self"]),
            (36, ["secant silu", "prune mul.other"]),
        ],
    ),
    "gate": (
        gate,
        [
            (30, ["prune mul.other"]),
            (68, ["secant sigmoid", "scale mul by 1/2"]),
            (90, ["secant sigmoid", "prune mul.self"]),
        ],
    ),
    "complete as it is": (lambda x: F.relu(lin(x)), [(0, [])]),
    "polynomial": (lambda x: x + x**2, [(8, ["scale pow_1 by 1/2"])]),
    # one scale for the whole product, one a factor, or some factors held fixed
    "product of three": (
        cube,
        [
            (8, ["scale mul_1 by 1/3"]),
            (16, ["scale mul by 1/2", "scale mul_1 by 1/2"]),
            (38, ["prune mul.self", "scale mul_1 by 1/2"]),
            (38, ["prune mul.other", "scale mul_1 by 1/2"]),
            (38, ["scale mul by 1/2", "prune mul_1.other"]),
            (30, ["prune mul_1.self"]),
            (60, ["prune mul.self", "prune mul_1.other"]),
            (60, ["prune mul.other", "prune mul_1.other"]),
        ],
    ),
}


@pytest.mark.parametrize("name", PLANS)
def test_all_plans_of_a_layer(name: str) -> None:
    layer, expected = PLANS[name]
    plan = derive_rules(layer, X, alternatives=20)
    found = [(p.cost, [str(e) for e in p]) for p in (plan, *plan.alternatives)]
    assert sorted(found) == sorted(expected)
    assert [cost for cost, _ in found] == sorted(cost for cost, _ in expected)
    assert not plan.stopped and all(p.optimal and not p.alternatives for p in plan.alternatives)


def judged(graph: ComputationGraph, plan: Plan) -> None:
    """Complete, and each edit is needed: whichever is removed, something breaks."""
    assert not degrees(graph, plan.edits).findings and not plan.left
    assert plan.reasons.keys() == set(plan.edits)
    for edit in plan:
        assert degrees(graph, [e for e in plan if e != edit]).findings, (str(plan), edit)


@pytest.mark.slow
def test_alternatives_of_a_block() -> None:
    graph = trace(nn.Sequential(Block(False), Block(False)).eval(), torch.randn(2, 5, 8))
    best = derive_rules(graph)
    plan = derive_rules(graph, alternatives=5)
    assert replace(plan, alternatives=()) == best
    plans = [plan, *plan.alternatives]
    # the gate or the value held fixed, or both scaled; the softmax held fixed, or integrated
    assert len(plans) == 6 and len({frozenset(p.edits) for p in plans}) == 6
    assert all(a.cost <= b.cost for a, b in pairwise(plans))
    for one in plans:
        judged(graph, one)
        assert len({len(one.edits_of(n)) for n in ("layer_norm", "layer_norm_2")}) == 1  # alike


def test_pieces_are_combined_best_first() -> None:
    """Each residual branch alone has three plans; two that are alike choose alike."""

    def model(x: Tensor) -> Tensor:
        x = x + swiglu(x)
        x = x + gate(x)
        return x + swiglu(x)

    plan = derive_rules(model, X, alternatives=20)
    first, second = ([cost for cost, _ in PLANS[n][1]] for n in ("swiglu", "gate"))
    expected = sorted(2 * a + b for a in first for b in second)
    assert [p.cost for p in (plan, *plan.alternatives)] == expected
    assert [p.cost for p in derive_rules(model, X, alternatives=3).alternatives] == expected[1:4]


def gradient(graph: ComputationGraph, edits: list[Edit] | tuple[Edit, ...]) -> Tensor:
    """The input gradient under some edits, by the balanced module."""
    plan = replace(derive_rules(graph, policy="plain"), edits=tuple(edits))
    x = torch.rand(2, 2, generator=torch.Generator().manual_seed(5)).requires_grad_()
    (grad,) = torch.autograd.grad(balance(graph, policy=plan)(x).sum(), x)
    return grad


@pytest.mark.slow
def test_brute_force_finds_no_other_plan() -> None:
    """All minimal complete sets of edits up to some cost have the gradient of a plan found."""
    rng = random.Random(3)
    compared = several = 0
    for _ in range(40):
        graph = trace(random_model(rng, rng.randint(2, 5)), torch.rand(2, 2))
        try:
            plan = derive_rules(graph, alternatives=30)
        except NoPlanError:
            continue
        plans = [plan, *plan.alternatives]
        for one in plans:
            if one.edits:
                judged(graph, one)
        bound = 61 if len(plan.alternatives) < 30 else plan.alternatives[-1].cost
        sets = list(islice(sets_below(candidates(graph, policy("libra")), bound), 2000))
        if len(sets) == 2000:
            continue
        complete = [edits for _, edits in sets if is_complete(graph, edits)]
        minimal = [s for s in complete if not any(set(t) < set(s) for t in complete)]
        found = [gradient(graph, p.edits) for p in plans]
        for edits in minimal:
            grad = gradient(graph, edits)
            near = [torch.allclose(grad, g, 1e-4, 1e-6, equal_nan=True) for g in found]
            assert any(near), (graph.fx.code, list(map(str, edits)), str(plan))
        compared += 1
        several += len(minimal) > 1
    assert compared >= 15 and several >= 4, (compared, several)


@pytest.mark.slow
def test_the_limit_is_named_and_what_was_found_is_kept() -> None:
    def cell(x: Tensor) -> Tensor:
        h = torch.tanh(lin(x))
        for _ in range(4):
            z = torch.sigmoid(lin(x) + lin(h))
            h = (1 - z) * torch.tanh(lin(x) + lin(h)) + z * h
        return h

    graph = trace(cell, X)
    all_of_them = derive_rules(graph, alternatives=4)
    assert len(all_of_them.alternatives) == 4 and not all_of_them.stopped
    plan = derive_rules(graph, alternatives=4, effort=0.02)
    assert plan.edits == all_of_them.edits and plan.optimal
    assert plan.stopped and len(plan.alternatives) < 4
    assert "met its limit" in str(plan) and "effort" in str(plan)
    found = zip(plan.alternatives, all_of_them.alternatives, strict=False)
    assert all(a.edits == b.edits and not a.optimal for a, b in found)


def test_partial_policies_and_negative_numbers_are_refused() -> None:
    with pytest.raises(InputError, match="'attnlrp' is partial"):
        derive_rules(gate, X, "attnlrp", alternatives=2)
    with pytest.raises(InputError, match="from 0 up"):
        derive_rules(gate, X, alternatives=-1)


# --------------------------------------------------------------------------- in words, in a file


class Excite(nn.Module):
    """A gate with modules that have names."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(4, 2), nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(F.relu(self.down(x))))


def test_what_a_plan_means_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    graph = trace(nn.Sequential(nn.Linear(4, 4), Excite()).eval(), X)
    plan = derive_rules(graph, alternatives=2)
    (prune,) = plan
    assert isinstance(prune, Prune)
    assert plan.cuts[prune] == ("sigmoid", "sigmoid", "linear_2", "relu", "linear_1")
    words = plan.meaning(prune)
    assert "held fixed: sigmoid" in words
    assert "out of the backward: sigmoid, linear, relu in 1, 1.down, 1.up" in words
    text = " ".join(str(plan).split())
    assert words.split("it is held fixed; ")[1] in text
    assert "alternative 1, cost 68: secant sigmoid (1), scale mul by 1/2 (1); without:" in text
    assert max(map(len, str(plan).splitlines())) <= 100
    assert "secant" in plan.alternatives[0].meaning(plan.alternatives[0].edits[0])


def test_alternatives_are_saved(tmp_path: Path) -> None:
    plan = derive_rules(swiglu, X, alternatives=2)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert len(Plan.load(tmp_path / "plan.json").alternatives) == 2


# --------------------------------------------------------------------------- prices of one's own


def edits(plan: Plan) -> list[str]:
    return [str(e) for e in plan]


def test_a_policy_from_nothing() -> None:
    only_scales = Policy("scales", scale=1)
    assert edits(derive_rules(lambda x: x * x.flip(0), X, only_scales)) == ["scale mul by 1/2"]
    with pytest.raises(NoPlanError, match="'scales'"):
        derive_rules(gate, X, only_scales)


def test_the_price_of_what_is_pruned() -> None:
    """By the operation that computes the value held fixed, through what only moves it."""

    def two_gates(x: Tensor) -> Tensor:
        return F.silu(lin(x)) * torch.sigmoid(lin(x.flip(0)))[:, None].expand(-1, 1, -1).squeeze(1)

    libra = policy("libra")
    assert edits(derive_rules(two_gates, X)) == ["secant silu", "prune mul.other"]
    cheap = replace(libra, name="cheap", secant_origin=20, prune_of={"aten.silu.default": 5})
    assert edits(derive_rules(two_gates, X, cheap)) == ["secant sigmoid", "prune mul.self"]
    gates = replace(libra, name="gates", prune_of={"aten.sigmoid.default": 5})
    plan = derive_rules(two_gates, X, gates)
    assert edits(plan) == ["secant silu", "prune mul.other"] and plan.cost == 11
    never = replace(libra, name="never", prune_of={Algebra.ELEMENTWISE: None})
    assert edits(derive_rules(two_gates, X, never)) == [
        "secant silu",
        "secant sigmoid",
        "scale mul by 1/2",
    ]


def test_modules_that_are_kept() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Excite(), Excite()).eval()
    kept = replace(policy("libra"), name="kept", keep=("1",))
    plan = derive_rules(model, X, kept)
    assert edits(plan) == ["secant sigmoid", "scale mul by 1/2", "prune mul_1.other"]
    every = replace(policy("libra"), name="every", keep=("*",))
    assert not any(isinstance(e, Prune) for e in derive_rules(model, X, every))
    with pytest.raises(PolicyError, match=r"no such module; its modules: .*\.down"):
        derive_rules(model, X, replace(kept, keep=("3",)))


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"prune": -1}, PolicyError, "prune=-1 is no cost"),
    ({"scale": 0}, PolicyError, "from 1 to"),
    ({"secant": 1.5}, PolicyError, "secant=1.5"),
    ({"freeze": True}, PolicyError, "freeze=True"),
    ({"prune": "30"}, PolicyError, "or None, which forbids"),
    ({"prune": 10**6}, PolicyError, "from 1 to"),
    ({"leave": {"softmaxx": 1}}, UnknownNameError, "'softmaxx'"),
    ({"leave": {Algebra.SMOOTH: None}}, PolicyError, "leave"),
    ({"prune_of": {"aten.sigmoid": 5}}, UnknownNameError, "did you mean aten.sigmoid.default"),
    ({"prune_of": {"aten.sigmoid.default": -5}}, PolicyError, "prune_of"),
    ({"edge_scales": {Algebra.ATTENTION: {"query": -1}}}, PolicyError, "no positive Fraction"),
    ({"keep": "blocks"}, PolicyError, "a tuple of module paths"),
    ({"prun": 3}, TypeError, "prun"),
]


@pytest.mark.parametrize(("table", "error", "said"), BAD)
def test_bad_tables(table: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        Policy("bad", **table)


def test_the_policies_that_are_there_pass_their_own_door() -> None:
    for entry in policies():
        assert replace(entry, name="copy").idle == entry.idle
