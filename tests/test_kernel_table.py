"""kernel.toml, line by line: what it says of an operation is what torch's operation does.

Nothing of the registry is asked but its sample calls: the kernel reads each call from a graph of
its own, and Euler's relation is taken by autograd alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fullgrad_theory import kernel
from fullgrad_theory.operators import registered
from fullgrad_theory.operators.calls import overload
from fullgrad_theory.testing.sample_calls import Sample, samples

ROWS = {name: rows for name, rows in kernel.meanings().items() if name != "pointwise"}
OURS = {name for name in ROWS if not name.startswith("aten.")}
"""Python's operators on numbers, getitem, and the function that keeps a kernel's bits"""
RULED = sorted(
    n for n, rows in ROWS.items() if any(r["rule"] not in ("", "-") for r in rows) and n not in OURS
)
STOPS = sorted(
    n for n, rows in ROWS.items() if all(r["rule"] == "-" for r in rows) and n not in OURS
)
SECANT = sorted(n for n, rows in ROWS.items() if any("secant" in r for r in rows))
SIZED = {
    "aten.threshold.default": "its rule depends on its two numbers",
    "aten.as_strided.default": "it reads memory, not values",
}
"""proved in the registry and not said here: the kernel supposes them"""


NOT_SHOWN = {
    "aten.pow.Tensor_Tensor": "its exponent is a tensor, which the kernel does not read",
    "aten.float_power.Tensor_Tensor": "its exponent is a tensor, which the kernel does not read",
    "aten.remainder.Scalar": "it jumps: degree 0 alone fits",
    "aten.fmod.Scalar": "it jumps: degree 0 alone fits",
    "aten.frac.default": "it jumps: degree 0 alone fits",
    "aten.where.Scalar": "both of its values are numbers",
}
JOINT = frozenset({"aten.hypot.default", "aten.dist.default", "aten.cdist.default"})
"""whose constants are bias leaves with a Jacobian that depends on the input"""


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def graph_of(name: str, sample: Sample) -> tuple[fx.GraphModule, dict[str, Tensor], fx.Node]:
    """The call as a graph: what is live is an input, every other tensor a buffer."""
    graph, root, given = fx.Graph(), nn.Module(), dict[str, Tensor]()
    call = overload(name)
    names = [a.name for a in call._schema.arguments]
    bound = dict(zip(names, sample.args, strict=False)) | sample.kwargs

    def leaf(path: str, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [leaf(f"{path}[{i}]", v) for i, v in enumerate(value)]
        if not isinstance(value, Tensor):
            return value
        label = path.replace("[", "_").replace("]", "")
        if path in sample.live:
            node = graph.placeholder(f"in_{label}")
            given[path] = value
        else:
            root.register_buffer(f"held_{label}", value)
            node = graph.get_attr(f"held_{label}")
        node.meta["val"] = value
        return node

    made = graph.call_function(call, (), {n: leaf(n, v) for n, v in bound.items()})
    made.meta["val"] = call(*sample.args, **sample.kwargs)
    graph.output(made)
    return fx.GraphModule(root, graph), given, made


def steps_of(graph: fx.Graph, given: dict[str, Tensor], node: fx.Node) -> dict[str, Any]:
    """What the kernel makes of the call, whatever the degrees of its operands."""
    sources = [n.name for n in graph.nodes if n.op == "placeholder"]
    claim = {"edits": [], "sources": sources, "held": [], "declared": {}, "broken": {}}
    return {
        k: v for k, v in kernel.Proof(graph, claim).steps.items() if k.split("#")[0] == node.name
    }


def degrees_that_fit(step: Any) -> tuple[dict[str, int], Fraction] | None:
    """Degrees of the operands, not all 0, at which all monomials have one total; and that."""
    terms = [{a: Fraction(p) for a, p in m} for m in step["monomials"]]
    named = list(dict.fromkeys(a for m in terms for a in m))
    for some in product((1, 2, 0, 3), repeat=min(len(named), 4)):
        e = dict(zip(named, (*some, *[some[-1]] * len(named)), strict=False)) if some else {}
        totals = {sum((p * e[a] for a, p in m.items()), Fraction(0)) for m in terms}
        if len(totals) == 1 and any(e.values()):
            return e, totals.pop()
    return None


def rest(
    module: fx.GraphModule,
    given: dict[str, Tensor],
    e: dict[str, int],
    n: float,
    item: int,
    t: float,
) -> tuple[float, float]:
    """n <c, f> - sum e_a <J_a^T c, u_a> at u_a t^e_a, for one c; and the size of its terms."""
    leaves = {a: (u * t ** e.get(a, 0)).detach().requires_grad_() for a, u in given.items()}
    value = pytree.tree_leaves(module(*leaves.values()))[item]
    c = torch.randn(value.shape, generator=generator(), dtype=torch.float64).to(value.dtype)
    grads = torch.autograd.grad(value, list(leaves.values()), c, allow_unused=True)
    pairs = [(e.get(a, 0), g, u) for (a, u), g in zip(leaves.items(), grads, strict=True)]
    through = [k * inner(g, u) for k, g, u in pairs if g is not None and k]
    whole = n * inner(c, value)
    return whole - sum(through), abs(whole) + sum(map(abs, through)) + 1e-3


def of_constants(module: fx.GraphModule, given: dict[str, Tensor], item: int) -> float:
    """<c, J_b b> by the derivative in the constants themselves."""
    held = [b.detach().requires_grad_() for b in module.buffers()]
    names = [name for name, _ in module.named_buffers()]
    value = torch.func.functional_call(
        module, dict(zip(names, held, strict=True)), (*given.values(),)
    )
    c = torch.randn(value.shape, generator=generator(), dtype=torch.float64)
    return sum(inner(g, b) for g, b in zip(torch.autograd.grad(value, held, c), held, strict=True))


def inner(a: Tensor, b: Tensor) -> float:
    return float(torch.real(a.detach().conj() * b.detach()).sum())


def evidence(name: str) -> Iterator[tuple[Any, float, float]]:
    """For each result that a line rules: the step, what Euler's relation leaves, and what it leaves
    with a total that is 1 too large."""
    for sample in samples(name, generator()):
        module, given, node = graph_of(name, sample)
        if not given or "running_mean" in given:  # torch has no derivative in a statistic
            continue
        for value, step in steps_of(module.graph, given, node).items():
            found = degrees_that_fit(step)
            if found is None:
                continue
            e, n = found
            item = int(value.partition("#")[2] or 0)
            left, size = rest(module, given, e, float(n), item, 1.0)
            if name in JOINT and step["bias"]:
                left -= of_constants(module, given, item)
            elif step["bias"]:  # what is left is the constants' part, which does not move
                left -= rest(module, given, e, float(n), item, 1.0 + 2.0**-16)[0]
                size *= 2.0**-16
            wrong, _ = rest(module, given, e, float(n) + 1, item, 1.0)
            yield step, left / size, wrong / size


@pytest.mark.parametrize("name", RULED)
def test_a_rule_is_eulers_relation(name: str) -> None:
    shown = list(evidence(name))
    assert bool(shown) != (name in NOT_SHOWN), f"no sample call of {name} shows its rule"
    for step, left, wrong in shown:
        assert abs(left) < (1e-4 if step["bias"] and name not in JOINT else 1e-9), (step, left)
        assert step["bias"] or abs(wrong) > 1e-6, (step, wrong)


@pytest.mark.parametrize("name", STOPS)
def test_what_stops_carries_no_gradient(name: str) -> None:
    for sample in samples(name, generator()):
        module, given, _ = graph_of(name, sample)
        leaves = [u.detach().requires_grad_(u.is_floating_point()) for u in given.values()]
        for value in pytree.tree_leaves(module(*leaves)):
            if isinstance(value, Tensor) and value.requires_grad:
                try:
                    grads = torch.autograd.grad(value.sum(), leaves, allow_unused=True)
                except RuntimeError as error:
                    assert "derivative for" in str(error)  # it has none
                    continue
                assert all(g is None or not g.any() for g in grads)


@pytest.mark.parametrize("name", SECANT)
def test_a_secant_has_the_constant_that_is_said(name: str) -> None:
    """f(0) is 0 where the rule adds no constant."""
    (row,) = [r for r in ROWS[name] if "secant" in r]
    for sample in samples(name, generator()):
        module, given, _ = graph_of(name, sample)
        origin = module(*[torch.zeros_like(u) for u in given.values()])
        assert bool((origin == 0).all()) != ("+ 1" in row["secant"])


def test_a_wrong_line_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {**kernel.meanings(), "aten.relu.default": [{"class": "homogeneous", "rule": "self^2"}]}
    monkeypatch.setattr(kernel, "meanings", lambda: rows)
    assert any(abs(left) > 1e-3 for _, left, _ in evidence("aten.relu.default"))


def test_the_registry_says_nothing_more() -> None:
    """What it calls proved stands in kernel.toml, or the kernel supposes it."""
    said = {operator.name for operator in registered() if operator.proved}
    assert said - ROWS.keys() == SIZED.keys() & said
    assert {name for name in ROWS if name not in said} <= OURS
