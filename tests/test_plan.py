"""A plan as data: saved, loaded, compared, printed, and refused by another graph."""

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fullgrad_theory.edits.pruning import Prune
from fullgrad_theory.edits.scaling import Scale
from fullgrad_theory.edits.secants import Secant
from fullgrad_theory.errors import PlanError
from fullgrad_theory.graph.computation import ComputationGraph
from fullgrad_theory.graph.tracing import trace
from fullgrad_theory.plan.derivation import derive_rules
from fullgrad_theory.plan.plan import Plan, compress, fingerprint


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(4), nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        x = x + F.scaled_dot_product_attention(h, h, h)
        gate, value = self.mlp(x).chunk(2, -1)
        return x + F.silu(gate) * value


class Model(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Layer() for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


X = torch.randn(2, 3, 4)


@pytest.fixture(scope="module")
def graph() -> ComputationGraph:
    return trace(Model().eval(), X)


@pytest.fixture(scope="module")
def plan(graph: ComputationGraph) -> Plan:
    return derive_rules(graph, policy="attnlrp")


def test_save_and_load(plan: Plan, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    plan.save(file)
    assert Plan.load(file) == plan
    text = file.read_text()
    assert '"factor": "1/4"' in text and '"edit": "freeze"' in text and "blocks.2" in text
    assert plan.left and json.loads(text)["left"] == list(plan.left)


def test_as_data(plan: Plan, tmp_path: Path) -> None:
    """What is saved, for a file of another format to hold; read with and without JSON between."""
    file = tmp_path / "plan.json"
    plan.save(file)
    assert json.loads(file.read_text()) == json.loads(json.dumps(plan.to_data()))
    assert Plan.of_data(json.loads(file.read_text())) == Plan.of_data(plan.to_data()) == plan
    with pytest.raises(PlanError, match="this holds no plan"):
        Plan.of_data(None)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"format": "other"}',
        '{"format": "fullgrad-theory plan 1", "edits": [{"edit": "bend", "reason": ""}]}',
        '{"format": "fullgrad-theory plan 1", "edits": [{"edit": "scale", "reason": ""}]}',
    ],
)
def test_a_file_that_holds_no_plan(text: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(text)
    with pytest.raises(PlanError, match=r"plan\.json"):
        Plan.load(file)


def test_a_plan_is_a_sequence_of_edits(plan: Plan) -> None:
    assert len(plan) == len(list(plan)) == len(plan.edits) == 3 * 6
    attention = plan.left[0]
    assert plan.edits_of(attention) == (
        Scale(attention, Fraction(1, 4), "query"),
        Scale(attention, Fraction(1, 4), "key"),
        Scale(attention, Fraction(1, 2), "value"),
    )
    assert plan.edits_of("nowhere") == ()
    assert plan.pruned == frozenset()


def test_pruned_edges(graph: ComputationGraph) -> None:
    plan = derive_rules(graph)
    assert plan.pruned == {(e.node, e.argument) for e in plan if isinstance(e, Prune)}
    assert len(plan.pruned) == 6


def test_compare(graph: ComputationGraph, plan: Plan) -> None:
    assert plan == derive_rules(graph, policy="attnlrp") != derive_rules(graph)
    fewer = replace(plan, edits=plan.edits[1:])
    assert plan.diff(fewer).removed == plan.edits[:1] and not plan.diff(fewer).added
    assert str(fewer.diff(plan)) == f"+ {plan.edits[0]}"
    assert str(plan.diff(plan)) == "no difference"


def test_a_plan_fits_its_own_graph_only(graph: ComputationGraph, plan: Plan) -> None:
    plan.check_fits(graph)
    plan.check_fits(trace(Model().eval().double(), torch.randn(5, 3, 4, dtype=torch.float64)))
    with pytest.raises(PlanError, match=r"derived for another graph .* no node"):
        plan.check_fits(trace(Model(depth=2).eval(), X))


def test_the_fingerprint_is_the_same_without_weights(graph: ComputationGraph) -> None:
    with torch.device("meta"):
        bare = trace(Model().eval(), torch.zeros(2, 3, 4))
    assert fingerprint(bare) == fingerprint(graph)


def test_print(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    text = str(plan)
    assert "3 x freeze 1/sigma of layer_norm: blocks.{0..2}.norm" in text
    assert "3 x scale mul by 1/2: blocks.{0..2}" in text
    assert "left incomplete: scaled_dot_product_attention" in text
    assert max(map(len, text.splitlines())) <= 60
    assert str(Plan((), "libra", {}, 0, True, "")) == "policy 'libra': 0 edits, cost 0"
    guess = Plan((Secant("gelu"),), "libra", {}, 6, False, "")
    assert "1 edit, cost 6, not proven" in str(guess) and "secant gelu" in str(guess)


def test_paths_are_compressed() -> None:
    names = [f"blocks.{i}.norm{j}" for i in range(12) for j in (1, 2)]
    assert compress([*names, "norm"]) == ["blocks.{0..11}.norm1", "blocks.{0..11}.norm2", "norm"]
    stages = ["s.0.b.0", "s.0.b.1", "s.1.b.0", "s.1.b.1", "s.1.b.2", "s.1.b.5"]
    assert compress(stages) == ["s.1.b.{2,5}", "s.{0..1}.b.{0..1}"]
    assert compress([]) == []
