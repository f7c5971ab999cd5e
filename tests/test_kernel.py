"""The kernel against what is true: small graphs with a known answer, and faults planted in it.

A fault is caught where the faulty kernel proves what the independent judge finds incomplete, proves
a claim that is a lie, or refuses what is complete.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, silu

import fullgrad_theory as fgt
from fullgrad_theory import kernel
from fullgrad_theory.testing.independent import evaluate

SOURCE = Path(kernel.__file__).read_text()
G = torch.Generator().manual_seed(3)
W = torch.randn(5, 5, generator=G, dtype=torch.float64)
B = torch.randn(5, generator=G, dtype=torch.float64)
X = torch.randn(2, 5, generator=G, dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """A function under a policy's edits, and one more lie in what the kernel is told."""

    function: Callable[..., Any]
    policy: str | None = None
    lie: Callable[[dict[str, Any]], object] | None = None


def spelled_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.04 * x**3)))


def statistics(x: Tensor) -> Tensor:
    var, mean = torch.var_mean(x, -1, keepdim=True)
    return var.sqrt() + mean


def edit(kind: str, node: str, **more: Any) -> Callable[[dict[str, Any]], object]:
    def told(claim: dict[str, Any]) -> None:
        claim["edits"] = [*claim["edits"], {"edit": kind, "node": node, **more}]

    return told


CASES: dict[str, Case] = {
    "linear": Case(lambda x: x @ W + B),
    "relu": Case(lambda x: (x @ W + B).relu()),
    "gelu": Case(gelu),
    "gelu mended": Case(gelu, "libra"),
    "gelu spelled out, mended": Case(spelled_gelu, "libra"),
    "a product": Case(lambda x: x * x.flip(-1)),
    "a product mended": Case(lambda x: x * x.flip(-1), "libra"),
    "a product of the wrong scale": Case(
        lambda x: x * x.flip(-1), lie=edit("scale", "mul", factor="1/3", argument=None)
    ),
    "a product turned round": Case(
        lambda x: (x.abs() / x.flip(-1) ** 2).abs(),
        lie=edit("scale", "abs_2", factor="-1", argument=None),
    ),
    "an edge scaled": Case(
        lambda x: x + 2.0 * x, lie=edit("scale", "add", factor="1/2", argument="other")
    ),
    "a gate mended": Case(lambda x: x * (x @ W).sigmoid(), "libra"),
    "softmax": Case(lambda x: x.softmax(-1)),
    "residual product": Case(lambda x: x + x * x.flip(-1)),
    "a bias at degree 2": Case(lambda x: x * x.flip(-1) + B),
    "a bias at degree 2, under a quotient": Case(
        lambda x: (x * x.flip(-1) + B) / x.abs().sum(-1, keepdim=True)
    ),
    "softmax for a weight": Case(lambda x: x * x.softmax(-1)),
    "an activation for a gate": Case(lambda x: x * gelu(x)),
    "a square": Case(lambda x: x**2 / x.abs().sum(-1, keepdim=True)),
    "what is rounded is added": Case(lambda x: x + x.to(torch.int64).double()),
    "1/sigma of a norm": Case(lambda x: x * torch.native_layer_norm(x, (5,), None, None, 0.1)[2]),
    "layer norm": Case(lambda x: layer_norm(x, (5,), B, B)),
    "layer norm mended": Case(lambda x: layer_norm(x, (5,), B, B), "libra"),
    "a quotient of degree 1": Case(lambda x: x * x.flip(-1) / x.abs().sum(-1, keepdim=True)),
    "a root of a cube": Case(lambda x: (x.abs() ** 3) ** (1 / 3)),
    "a literal 0": Case(
        lambda x: torch.where(x > 0, x * x.flip(-1), 0.0) / x.abs().sum(-1, keepdim=True)
    ),
    "a frozen value added": Case(lambda x: x + (x > 0).double()),
    "a frozen factor": Case(lambda x: x * (x > 0).double()),
    "a number read off a value": Case(  # which the judge takes for a literal
        lambda x: x + 5 * x.abs().max().item(), lie=lambda claim: None
    ),
    "what is detached is added": Case(lambda x: x + (x * x).detach()),
    "a list": Case(lambda x: torch.cat([x, 2 * x], -1)),
    "a list of two degrees": Case(lambda x: torch.cat([x, x * x], -1)),
    "a product of a list": Case(lambda x: torch.einsum("ij,ij->i", x, x)),
    "the largest": Case(lambda x: x.max(-1).values),
    "the largest, and where": Case(lambda x: x.max(-1).values + x.max(-1).indices.double()),
    "two statistics": Case(statistics),
    "a shape is lent": Case(lambda x: B.expand_as(x) + x),
    "ones are made": Case(lambda x: x * torch.ones_like(x)),
    "zeros are added": Case(lambda x: x * x / x.abs() + torch.zeros_like(x)),
    "a clamp": Case(lambda x: x.clamp(-1, 1)),
    "a norm of order 0": Case(lambda x: x + torch.linalg.vector_norm(x, 0)),
    "silu mended": Case(lambda x: silu(x @ W), "libra"),
    "an edit that nobody knows": Case(lambda x: x @ W, lie=edit("double", "matmul")),
    "a source in the middle": Case(
        lambda x: x * x.flip(-1), lie=lambda claim: claim["sources"].append("mul")
    ),
    "a region that is not pointwise": Case(
        lambda x: x.softmax(-1) * x,
        lie=edit("secant", "mul", region=["softmax"], origin=0.0),
    ),
    "a freeze of no norm": Case(lambda x: x.softmax(-1), lie=edit("freeze", "softmax")),
    "a region held linear": Case(
        lambda x: x.exp().sin(), lie=edit("freeze", "sin", region=["exp"])
    ),
    "a secant of two values": Case(
        lambda x: x * x.flip(-1), lie=edit("secant", "mul", region=[], origin=0.0)
    ),
    "a value in the middle is held": Case(
        lambda x: x + x.softmax(-1), lie=lambda claim: claim["held"].append("softmax")
    ),
    "two edits at one place": Case(
        lambda x: x * x.flip(-1),
        lie=lambda claim: [
            edit("scale", "mul", factor=factor, argument=None)(claim) for factor in ("1/3", "1/2")
        ],
    ),
    "a division that is not rounded": Case(lambda x: x * torch.div(x, 2.0, rounding_mode=None)),
    "a list with zeros": Case(
        lambda x: torch.cat([x * x, torch.zeros(2, 5).double()], -1).sum(-1) / x.abs().sum(-1)
    ),
    "a lookup among constants": Case(  # which the judge takes for bias leaves
        lambda x: torch.stack([x, x + 5]).gather(0, (x > 0).long()[None])[0],
        lie=lambda claim: None,
    ),
}


@cache
def known(name: str) -> tuple[Any, dict[str, Any], bool]:
    """The graph, what the kernel is told, and whether that is true, by the independent judge."""
    case = CASES[name]
    graph = fgt.trace(case.function, X)
    plan = fgt.derive_rules(graph, policy=case.policy) if case.policy else None
    edits = [e.data() for e in plan.edits] if plan else []
    claim: dict[str, Any] = {
        "edits": [{k: list(v) if isinstance(v, tuple) else v for k, v in e.items()} for e in edits],
        "sources": ["x"] if "x" in graph.nodes else [graph.placeholders[0].name],
        "held": [],
        "declared": {},
        "broken": {},
    }
    if case.lie is not None:
        case.lie(claim)
        return graph, claim, False
    module = fgt.balance(graph, policy=plan).fx if plan else graph.fx
    starts = frozenset(e.node for e in plan.edits) if plan else frozenset[str]()
    points = [(X,), (1.5 * X.flip(0),), (-0.7 * X,)]
    found, _ = evaluate(module, points, from_zero=starts)
    return graph, claim, found.complete


def proves(module: Any, name: str) -> bool:
    """Whether a kernel proves a case, supposing nothing but what the sources are."""
    graph, claim, _ = known(name)
    try:
        proof = module.Proof(graph.fx.graph, claim)
        theorem = module.complete([proof.facts[node.name] for node in graph.outputs])
    except (module.Refused, KeyError, TypeError, AttributeError, ValueError, StopIteration):
        return False
    return all(one.endswith("is a source") for one in theorem.supposing)


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_proves_what_is_true(name: str) -> None:
    assert proves(kernel, name) == known(name)[2]


FAULTS: dict[str, tuple[str, str]] = {
    "what stands in no monomial": ("if loose := ", "if False and (loose := "),
    "several degrees": ("if len(totals) > 1:", "if len(totals) > 9:"),
    "a constant at any degree": ('if step["bias"] and n not in (0, 1):', "if False:"),
    "a scale turned round": ("if scale <= 0 or", "if"),
    "no scale": ("n * scale, ", "n, "),
    "any output": ("if fact.degree != 1]", "if fact.degree == 77]"),
    "prunes overlooked": ("if pruned or", "if"),
    "edges unscaled": ('(node.name, argument, "scale")', '"none"'),
    "a quotient for a product": ('(-1 if sign == "/" else 1)', "1"),
    "no exponents": ("_exponent(power or", "_exponent("),
    "0 is a constant": ("or (value == 0 and exponent > 0)", ""),
    "a list is a product": (
        'is_sum = bool(product) and "[" in product[0][0] and not term.startswith("*")',
        "is_sum = False",
    ),
    "a product is a list": (' and not term.startswith("*")', ""),
    "results mixed up": ('f"{read.name}#{k}" if k and len(rules) > 1 else', ""),
    "a shape moves": ('{*found} - {row.get("shape")}', "found"),
    "conditions overlooked": ("fits &= not any(", "fits |= any("),
    "results without a gradient": (' or rules[min(k, len(rules) - 1)].strip() == "-"', ""),
    "any edit": ('if edit["edit"] not in EDITS', "if False"),
    "a region held linear": (' and edit != "freeze"', ""),
    "the last of two edits": (" or place in self._edits", ""),
    "anything is held": ('node.op == "placeholder" and name in claim', "name in claim"),
    "zeros in a list are constants": (" if v != 0]", "]"),
    "whatever picks is continuous": ("picks and not", "False and not"),
    "any source": ("self._is_source(node)", "True"),
    "any region": ('if own["edit"] == "secant" and not', "if False and not"),
    "an edit means the plain rule": ("row[own.get(\"edit\", \"rule\")]", 'row["rule"]'),
    "what is refused carries nothing": (
        "not (known or read.name in self.refused)", "not known"
    ),
    "constants are overlooked": ("bias |= not held", "pass"),
}  # fmt: skip


def planted(old: str, new: str) -> Any:
    """The kernel with a fault in it, as a module of its own."""
    assert SOURCE.count(old) >= 1, old
    text = SOURCE.replace(old, new)
    if new.startswith("if False and (loose"):
        text = text.replace("for m in terms)]:", "for m in terms)]):", 1)
    module = types.ModuleType("fullgrad_theory.faulty")
    module.__package__ = "fullgrad_theory"
    sys.modules[module.__name__] = module
    try:
        exec(compile(text, "faulty kernel", "exec"), module.__dict__)
    finally:
        del sys.modules[module.__name__]
    return module


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault: str) -> None:
    module = planted(*FAULTS[fault])
    caught = [name for name in CASES if proves(module, name) != known(name)[2]]
    assert caught, f"nobody notices {fault}"


def test_enough_faults() -> None:
    assert len(FAULTS) >= 20


def test_what_it_cannot_read_it_does_not_follow() -> None:
    graph = fgt.trace(lambda x: x.abs() ** float("inf") + x, X)
    claim = {"edits": [], "sources": ["x"], "held": [], "declared": {}, "broken": {}}
    proof = kernel.Proof(graph.fx.graph, claim)
    assert graph.outputs[0].name in proof.refused


def test_a_model_of_integers_ends_at_its_embedding() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3)).eval()
    graph = fgt.trace(model, torch.tensor([[1, 2, 3], [4, 5, 6]]))
    claim = {"edits": [], "sources": ["embedding"], "held": [], "declared": {}, "broken": {}}
    proof = kernel.Proof(graph.fx.graph, claim)
    theorem = kernel.complete([proof.facts[node.name] for node in graph.outputs])
    assert theorem.supposing == {"embedding is a source"}
    lie = kernel.Proof(graph.fx.graph, claim | {"sources": ["linear"]})
    assert "linear" not in lie.facts


def test_a_value_of_unknown_kind_moves() -> None:
    graph = fgt.trace(lambda x: x + x.softmax(-1), X).fx.graph
    claim = {"edits": [], "sources": ["x"], "held": [], "declared": {}, "broken": {}}
    for node in graph.nodes:
        node.meta.pop("val", None)
    assert kernel.Proof(graph, claim).refused.keys() == {"softmax", "add"}
