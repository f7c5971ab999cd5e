"""Symbolic evaluation of operations and of whole small graphs, against torch."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import sympy as sp
import torch
from torch import nn

from fullgrad_theory import trace
from fullgrad_theory.operators import Algebra, lookup, register, registry
from fullgrad_theory.testing.sample_calls import Sample, samples
from proofs.symbolic import (
    Region,
    evaluate,
    from_torch,
    meaning,
    rational,
    residual,
    vanishes,
)


class Block(nn.Module):
    """One attention head, a norm, a gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(2), nn.Linear(2, 6)
        self.up, self.down = nn.Linear(2, 4), nn.Linear(2, 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v)
        gate, value = self.up(x).chunk(2, dim=-1)
        return x + self.down(nn.functional.silu(gate) * value)


@pytest.mark.slow
def test_a_transformer_block() -> None:
    torch.manual_seed(0)
    model = Block().double().eval()
    x = torch.randn(2, 2, 2, dtype=torch.float64)
    graph = trace(model, x)
    digits = np.vectorize(lambda e: sp.Float(e, 30), otypes=[object])  # exact trees would be huge
    values = {graph.placeholders[0].name: digits(from_torch(x))}
    found = evaluate(graph, values)
    (output,) = graph.outputs
    with torch.no_grad():
        expected = model(x).numpy()
    np.testing.assert_allclose(Region().array(found[output.name]), expected, rtol=1e-10)


def test_a_relu_net_is_homogeneous_over_symbols() -> None:
    """A bias-free net at a point: f is linear in the region, so <df/dx, x> = f, symbolically."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 1, bias=False))
    model = model.double().eval()
    graph = trace(model, torch.ones(2, 2, dtype=torch.float64))
    x = np.array(sp.symbols("x1:5", positive=True), dtype=object).reshape(2, 2)
    point = {s: sp.Rational(i + 1, 4) for i, s in enumerate(x.ravel())}
    found = evaluate(graph, {graph.placeholders[0].name: x}, Region(point))
    for value in found[graph.outputs[0].name].ravel():
        assert value.free_symbols
        assert vanishes(sum(s * sp.diff(value, s) for s in x.ravel()) - value)


def test_parameters_may_be_symbols() -> None:
    model = nn.Linear(2, 1).double().eval()
    graph = trace(model, torch.ones(2, 2, dtype=torch.float64))
    names = [str(n.target) for n in graph.fx.graph.nodes if n.op == "get_attr"]
    weight = np.array([sp.symbols("w1:3")], dtype=object)
    given = {graph.placeholders[0].name: np.array([sp.symbols("x1:3")], dtype=object)}
    given |= {n: weight if n.endswith("weight") else np.array([sp.Symbol("b")]) for n in names}
    found = evaluate(graph, given)[graph.outputs[0].name]
    assert str(found[0, 0]) == "b + w1*x1 + w2*x2"


def test_max_is_resolved_in_the_region() -> None:
    a, b = sp.symbols("a b")
    arguments = {"self": np.array([a]), "other": np.array([b])}
    for larger, point in ((a, {a: 2, b: 1}), (b, {a: 1, b: 2})):
        region = Region({s: sp.Integer(n) for s, n in point.items()})
        assert meaning("aten.maximum.default")(region, arguments).tolist() == [larger]


def test_freezing_replaces_the_inverse_deviation() -> None:
    x = np.array([sp.symbols("x1:4", real=True)], dtype=object)
    region = Region(freeze=True)
    arguments = {"input": x, "normalized_shape": [3], "weight": None, "bias": None, "eps": 0.125}
    result = meaning("aten.layer_norm.default")(region, arguments)
    (symbol,) = region.held
    assert sp.expand(sum(s * sp.diff(result[0, 0], s) for s in x[0]) - result[0, 0]) == 0
    assert symbol in result[0, 0].free_symbols


def test_an_unknown_operation_is_refused() -> None:
    with pytest.raises(LookupError, match="no symbolic meaning"):
        meaning("nobody.knows.this")


def test_a_missing_edit_is_refused() -> None:
    name = "aten.relu.default"
    sample = samples(name, torch.Generator().manual_seed(0))[0]
    with pytest.raises(ValueError, match="has no edit"):
        residual(name, sample, "secant")


def test_residual_holds_for_repeated_operands() -> None:
    """mul(x, x) has two edges; each is seen with its own degree."""
    x = torch.tensor([0.5, -1.5], dtype=torch.float64)
    found = residual("aten.mul.Tensor", Sample((x, x), {}, ("self", "other")))
    assert found and all(map(vanishes, found))


@pytest.mark.parametrize("number", [0.1, 1 / 3, -2.5, 1e-12, 3, 0.044715, torch.finfo().eps])
def test_rationals_are_the_same_float(number: float) -> None:
    assert float(rational(number)) == number


def test_what_a_user_registers_is_not_proved() -> None:
    with torch.library._scoped_library("foreign", "FRAGMENT") as library:
        library.define("same(Tensor x) -> Tensor")
        assert not register("foreign.same.default", Algebra.STRUCTURAL).proved
        del registry._REGISTRY["foreign.same.default"]
    assert lookup("aten.relu.default").proved  # type: ignore[union-attr]


@pytest.mark.slow
def test_importing_the_package_leaves_sympy_alone() -> None:
    code = "import sys, fullgrad_theory; assert 'sympy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
