"""A file that holds no plan, whatever it holds, is one `PlanError`; so is one of another graph."""

from __future__ import annotations

import copy
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import fullgrad_theory as fgt
from fullgrad_theory.errors import PlanError
from fullgrad_theory.plan.plan import Plan


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        u = self.linear(self.norm(x))
        return torch.tanh(u) * u + (u @ u.mT).softmax(-1) @ u


MODEL, X = Mixed().eval(), torch.randn(2, 3, 4)
GRAPH = fgt.trace(MODEL, X)
PLAN = fgt.derive_rules(GRAPH, alternatives=2)
DATA = json.loads(json.dumps(PLAN.to_data()))

BROKEN: dict[str, Any] = {
    "nothing": "",
    "no JSON": "{",
    "no object": "[]",
    "a number": "3",
    "null": "null",
    "deep": "[" * 100_000,
    "deep and whole": '{"format":' * 5_000 + "1" + "}" * 5_000,
    "other format": json.dumps(DATA | {"format": "other"}),
    "no edits": json.dumps({k: v for k, v in DATA.items() if k != "edits"}),
    "edits no list": json.dumps(DATA | {"edits": {"node": "x"}}),
    "an edit that is text": json.dumps(DATA | {"edits": ["prune"]}),
    "an unknown edit": json.dumps(DATA | {"edits": [{"edit": "erase", "node": "x"}]}),
    "an edit that is a list": json.dumps(DATA | {"edits": [{"edit": ["prune"], "node": "x"}]}),
    "cost NaN": json.dumps(DATA | {"cost": float("nan")}),
    "cost text": json.dumps(DATA | {"cost": "6"}),
    "cost true": json.dumps(DATA | {"cost": True}),
    "cost infinite": json.dumps(DATA | {"cost": float("inf")}),
    "optimal 1": json.dumps(DATA | {"optimal": 1}),
    "where a list": json.dumps(DATA | {"where": [1]}),
    "where of three": json.dumps(DATA | {"where": {"tanh": ["a", "b", "c"]}}),
    "left a text": json.dumps(DATA | {"left": "tanh"}),
    "left numbers": json.dumps(DATA | {"left": [1]}),
    "alternatives text": json.dumps(DATA | {"alternatives": ["plan"]}),
}
SCALE = {"edit": "scale", "node": "x", "argument": None, "reason": ""}
for factor in ("1/0", "0", "-1/2", "nan", "1e999999999", 0.5, None, "inf", "1/2/3"):
    BROKEN[f"factor {factor}"] = json.dumps(DATA | {"edits": [SCALE | {"factor": factor}]})
for node in (1, None, ["x"], {}):
    BROKEN[f"node {node}"] = json.dumps(
        DATA | {"edits": [{"edit": "freeze", "node": node, "reason": ""}]}
    )


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_plan_is_said(name: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(BROKEN[name], encoding="utf-8")
    with pytest.raises(PlanError) as error:
        Plan.load(file)
    assert "plan.json" in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("content", [b"\xff\xfe\x00\x01", b"\x80\x04\x95", b"\x00" * 64])
def test_binary_files(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_bytes(content)
    with pytest.raises(PlanError, match="holds no plan"):
        Plan.load(file)
    for missing in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(PlanError, match="cannot be read"):
            Plan.load(missing)


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if not isinstance(data, (dict, list)):
        return [path]
    items = data.items() if isinstance(data, dict) else enumerate(data)
    return [path, *(p for key, value in items for p in places(value, (*path, key)))]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(st.data())
def test_a_plan_with_anything_in_it_is_a_plan_or_an_error(data: st.DataObject) -> None:
    """One place of a plan's file replaced or left out: what is read can be printed, saved, applied
    or refused."""
    changed = copy.deepcopy(DATA)
    path = data.draw(st.sampled_from(places(DATA)))
    if not path:
        changed = data.draw(VALUES)
    else:
        held = changed
        for key in path[:-1]:
            held = held[key]
        if data.draw(st.booleans()):
            del held[path[-1]]
        else:
            held[path[-1]] = data.draw(VALUES)
    try:
        plan = Plan.of_data(changed, "mutated")
    except PlanError:
        return
    str(plan), plan.diff(PLAN), json.dumps(plan.to_data(), allow_nan=False)
    with suppress(fgt.FullgradError):
        fgt.balance(GRAPH, policy=plan)(X)


def test_a_plan_of_another_graph_is_refused() -> None:
    """Everywhere that a plan is taken, and also where every node that it names is there."""

    class Other(Mixed):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

    other = Other().eval()
    graph = fgt.trace(other, X)
    assert {edit.node for edit in PLAN} <= set(graph.nodes)
    for refused in (
        lambda: fgt.balance(other, X, PLAN),
        lambda: fgt.balance(graph, policy=PLAN),
        lambda: fgt.check_completeness(other, X, policy=PLAN),
        lambda: fgt.check_completeness(graph, policy=PLAN, numeric=False),
        lambda: fgt.assert_complete(other, X, policy=PLAN),
    ):
        with pytest.raises(PlanError, match=r"another graph than that of Other.*derive_rules"):
            refused()
    assert fgt.check_completeness(MODEL, X, policy=PLAN, numeric=False).complete
    balanced = fgt.balance(MODEL, X, PLAN)
    assert fgt.check_completeness(balanced, X, numeric=False).complete
