"""Operations of the user's own: measured as black boxes, declared, or whole modules kept as leaves.

The truth about each operation is written here by hand; the residuals come from the real backward.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fullgrad_theory as fgt
from fullgrad_theory import Algebra, Verdict
from fullgrad_theory.errors import InputError, UnknownNameError, UnregisteredOperationError
from fullgrad_theory.operators import registry
from fullgrad_theory.plan.measuring import Measured, measure

SOUND = (Verdict.PROVED, Verdict.NUMERIC)
_generator = torch.Generator().manual_seed(0)
MATRIX = torch.randn(5, 5, generator=_generator, dtype=torch.float64)
SHIFT = torch.randn(5, generator=_generator, dtype=torch.float64)
X = torch.randn(4, 5, generator=_generator)


def custom(name: str, f: Callable[..., Any], count: int = 1, factor: float = 1.0) -> Any:
    """A custom operation of `count` tensors that computes f; its backward is `factor` times f's."""
    names = ["x", "y", "z"][:count]
    outputs = f(*[torch.ones(2, 5)] * count)
    many = isinstance(outputs, tuple)
    kind = "tuple[torch.Tensor, torch.Tensor]" if many else "torch.Tensor"
    space: dict[str, Any] = {"f": f, "torch": torch}
    heads = ", ".join(f"{n}: torch.Tensor" for n in names)
    body = f"f({', '.join(names)})" if many else f"f({', '.join(names)}).clone()"
    exec(f"def kernel({heads}) -> {kind}: return {body}", space)
    op = torch.library.custom_op(f"fgt_userops::{name}", space["kernel"], mutates_args=())
    op.register_fake(f)

    def backward(ctx: Any, *grads: Any) -> Any:
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in ctx.saved_tensors]
            found = f(*leaves)
            pairs = zip(found if many else (found,), grads, strict=True)
            kept = [(v, g) for v, g in pairs if v.requires_grad and g is not None]
            if not kept:
                return tuple(torch.zeros_like(u) for u in leaves) if count > 1 else leaves[0] * 0.0
            out = torch.autograd.grad(
                [v for v, _ in kept], leaves, [g * factor for _, g in kept], allow_unused=True
            )
        return out if count > 1 else out[0]

    op.register_autograd(
        backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
    )
    return op


def matmul(x: Tensor) -> Tensor:
    return x @ MATRIX.to(x)


OPS: dict[str, tuple[Any, int]] = {
    name: (custom(name, f, count), count)
    for name, f, count in [
        ("linear", matmul, 1),
        ("affine", lambda x: matmul(x) + SHIFT.to(x), 1),
        ("product", lambda x, y: x * y, 2),
        ("root", lambda x: x.abs().sqrt(), 1),
        ("cube", lambda x: x.relu() ** 3, 1),
        ("quotient", lambda x, y: x / y, 2),
        ("length", lambda x, y: (x.square() + y.square()).sqrt(), 2),
        ("direction", lambda x, y: x / (x.square() + y.square()).sqrt(), 2),
        ("blend", lambda x, y, z: x * y + z, 3),
        ("gate", lambda x, y: x.softmax(-1) * y, 2),
        ("gelu", F.gelu, 1),
        ("sigmoid", torch.sigmoid, 1),
        ("softmax", lambda x: x.softmax(-1), 1),
        ("round", torch.round, 1),
        ("clip", lambda x: x.clamp(-4.0, 4.0), 1),
        ("shrink", lambda x: F.hardshrink(x, 0.3), 1),
        ("pair", lambda x, y: (x * 2.0, x * y), 2),
        ("order", lambda x: (x * 3.0, x.argsort(-1)), 1),
        ("index", lambda x: x.argmax(-1), 1),
    ]
}


def call(name: str) -> Callable[[Tensor], Any]:
    """A function of x alone: the operation of x, x rolled by one, x rolled by two."""
    op, count = OPS[name]
    return lambda x: op(*(x.roll(i, -1) for i in range(count)))


def entry(name: str) -> Measured:
    graph = measure(fgt.trace(call(name) if name != "index" else _with_index, X))
    (found,) = graph.measured.values()
    assert isinstance(found, Measured)
    return found


def _with_index(x: Tensor) -> Tensor:
    return x * (1.0 + OPS["index"][0](x).unsqueeze(-1))


H = Fraction(1, 2)
CLASSES = {
    "linear": (Algebra.STRUCTURAL, {(("x", 1),)}),
    "affine": (Algebra.AFFINE, {(("x", 1),)}),
    "product": (Algebra.MULTILINEAR, {(("x", 1), ("y", 1))}),
    "root": (Algebra.HOMOGENEOUS, {(("x", H),)}),
    "cube": (Algebra.HOMOGENEOUS, {(("x", 3),)}),
    "quotient": (Algebra.HOMOGENEOUS, {(("x", 1), ("y", -1))}),
    "length": (Algebra.HOMOGENEOUS, {(("x", 1),), (("y", 1),)}),
    "blend": (Algebra.MULTILINEAR, {(("x", 1), ("y", 1)), (("z", 1),)}),
    "gate": (Algebra.HOMOGENEOUS, {(("y", 1),)}),
    "gelu": (Algebra.ZERO_ORIGIN, set()),
    "sigmoid": (Algebra.ELEMENTWISE, set()),
    "softmax": (Algebra.SMOOTH, set()),
}


@pytest.mark.parametrize("name", CLASSES)
def test_the_measured_class_is_the_true_one(name: str) -> None:
    algebra, terms = CLASSES[name]
    found = entry(name)
    assert found.algebra is algebra, found.note
    assert set(found.relations[0].terms) == terms
    assert not found.contradiction
    assert "is the derivative" in found.note
    assert found.relations[0].domain == ((0, 1) if name == "affine" else None)
    zero = {"gate": ("x",)}.get(name, ("x",) if not terms else ())
    assert found.relations[0].zero == zero
    assert found.origin == (0.5 if name == "sigmoid" else 0.0)


def test_operands_whose_degrees_are_tied() -> None:
    """x / |(x, y)| has degree 0 where x and y have the same degree, whatever that is."""
    (relation,) = entry("direction").relations
    for e_x, e_y, holds in ((1, 1, True), (2, 2, True), (0, 0, True), (1, 0, False), (0, 1, False)):
        sums = {sum(p * {"x": e_x, "y": e_y}[n] for n, p in t) for t in relation.terms}
        assert (sums == {0}) is holds


def test_what_carries_no_gradient_is_frozen() -> None:
    assert [r.frozen for r in entry("round").relations] == [True]
    assert [r.frozen for r in entry("index").relations] == [True]
    assert [r.frozen for r in entry("order").relations] == [False, True]
    report = fgt.check_completeness(lambda x: x + OPS["round"][0](x), X, unknown="measure")
    assert report.complete is False
    assert [n.verdict for n in report.nodes if n.op == "aten.add.Tensor"] == [Verdict.OPAQUE]


@pytest.mark.parametrize("name", ["clip", "shrink"])
def test_a_measurement_that_contradicts_itself_is_unknown(name: str) -> None:
    """Linear at the example inputs, or for the backward, and not elsewhere: no law is read off."""
    assert entry(name).contradiction
    report = fgt.check_completeness(call(name), X, unknown="measure")
    assert report.complete is None
    (node,) = [n for n in report.nodes if name in n.op]
    assert node.verdict is Verdict.UNKNOWN
    assert "contradicts itself" in node.reason


# name -> complete as it is, complete under libra, kinds of edit at the operation under libra
VERDICTS: dict[str, tuple[bool, bool, set[type]]] = {
    "linear": (True, True, set()),
    "affine": (True, True, set()),
    "product": (False, True, {fgt.Scale}),
    "root": (False, True, {fgt.Scale}),
    "length": (True, True, set()),
    "blend": (False, True, {fgt.Prune}),
    "gate": (False, True, {fgt.Prune}),
    "gelu": (False, True, {fgt.Secant}),
    "sigmoid": (False, True, {fgt.Secant}),
    "softmax": (False, False, set()),
    "order": (True, True, set()),
}


@pytest.mark.parametrize("name", VERDICTS)
def test_verdicts_are_at_most_numeric_and_agree_with_the_backward(name: str) -> None:
    plain, libra, kinds = VERDICTS[name]
    head = call(name)

    def model(x: Tensor) -> Any:
        found = head(x) if name != "sigmoid" else head(x) * 1.0  # no head that looks like a gate
        return found[0] if isinstance(found, tuple) else found

    with pytest.raises(UnregisteredOperationError, match=r'unknown="measure"'):
        fgt.check_completeness(model, X)
    for policy, complete in ((None, plain), ("libra", libra)):
        report = fgt.check_completeness(model, X, policy=policy, unknown="measure")
        assert report.complete is complete, str(report)
        own = [n for n in report.nodes if n.op == f"fgt_userops.{name}.default"]
        assert own and all(n.verdict is not Verdict.PROVED for n in own)
        assert any("black box" in n for n in report.notes)
        if complete:
            assert report.error is not None and report.error < 1e-10
            assert all(n.error is not None and n.error < 1e-10 for n in report.nodes)
        elif policy is None:
            assert report.error is not None and report.error > 1e-4
    if libra:
        plan = fgt.derive_rules(model, X, unknown="measure")
        assert {type(e) for e in plan if name in e.node} == kinds
        balanced = fgt.balance(model, X, unknown="measure")
        assert torch.equal(balanced(X), model(X))


def test_two_outputs_have_a_relation_each() -> None:
    found = entry("pair")
    assert [r.terms for r in found.relations] == [((("x", 1),),), ((("x", 1), ("y", 1)),)]
    pair = OPS["pair"][0]
    report = fgt.check_completeness(
        lambda x: torch.add(*pair(x, x.roll(1, -1))), X, policy="libra", unknown="measure"
    )
    assert report.complete is True, str(report)
    assert fgt.check_completeness(lambda x: pair(x, x + 1.0)[0], X, unknown="measure").complete


def test_a_gate_without_a_degree_is_pruned() -> None:
    softmax = OPS["softmax"][0]
    plan = fgt.derive_rules(lambda x: x * softmax(x), X, unknown="measure")
    (edit,) = plan.edits
    assert isinstance(edit, fgt.Prune) and edit.node == "mul"
    assert "no degree" in plan.reasons[edit]
    report = fgt.check_completeness(lambda x: x * softmax(x), X, policy="libra", unknown="measure")
    assert report.complete is True


def test_a_wrong_backward_is_said() -> None:
    """Three times x with the gradient of twice x: its own backward has degree 2/3."""
    wrong = custom("wrong", lambda x: x * 3.0, factor=2.0 / 3.0)
    report = fgt.check_completeness(lambda x: wrong(x), X, unknown="measure")
    assert report.complete is False
    assert any("NOT the derivative" in n for n in report.notes)
    (found,) = measure(fgt.trace(lambda x: wrong(x), X)).measured.values()
    assert found.signature == "x^2/3"


@pytest.mark.parametrize("factor", [1.0, 0.5, 1.0 + 1e-6])
@pytest.mark.parametrize("how", ["declared", "measured", "small"])
def test_a_wrong_gradient_of_a_bias_is_said(
    how: str, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a bias adds is read off the values; the gradient that it gets has to say the same."""
    name = f"fgt_userops::gated_{how}_{str(factor).replace('.', '_')}"

    def kernel(x: Tensor, gate: Tensor, bias: Tensor) -> Tensor:
        return x * gate + bias

    kernel.__annotations__ = dict.fromkeys(("x", "gate", "bias", "return"), Tensor)
    op = torch.library.custom_op(name, kernel, mutates_args=())
    op.register_fake(lambda x, gate, bias: torch.empty_like(x))
    op.register_autograd(
        lambda ctx, g: (
            g * ctx.saved_tensors[1],
            (g * ctx.saved_tensors[0]).sum(0),
            g.sum(0) * factor,
        ),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:2]),
    )
    if how != "measured":
        monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
        fgt.register(f"{name.replace('::', '.')}.default", Algebra.MULTILINEAR, "x*gate + bias")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            small = 1e-10 if how == "small" else 1.0
            self.gate, self.bias = nn.Parameter(SHIFT + 2.0), nn.Parameter(SHIFT * small)

        def forward(self, x: Tensor) -> Tensor:
            return op(x, self.gate, self.bias)  # type: ignore[no-any-return]

    unknown = "measure" if how == "measured" else "error"
    report = fgt.check_completeness(Net().double(), X.double(), unknown=unknown)
    assert report.complete is (True if factor == 1.0 else None)
    assert factor == 1.0 or any("its backward" in problem for problem in report.problems)


def test_a_numeric_secant_is_the_closed_form() -> None:
    """Against gelu's and sigmoid's own, zeros and second derivatives included."""
    from planted import GATES

    x = torch.tensor([[-3.0, -1e-9, 0.0, 1e-7, 0.7], [2.0, 1e-5, -1e-4, 0.1, 5.0]]).double()
    for name in ("gelu", "sigmoid"):
        balanced = fgt.balance(call(name), X.double(), unknown="measure")
        u = x.repeat(2, 1).requires_grad_()
        (g,) = torch.autograd.grad(balanced(u).sum(), u, create_graph=True)
        gate = GATES[f"aten.{name}.default"](u)
        torch.testing.assert_close(g, gate, rtol=1e-9, atol=1e-9)


def test_errors_at_the_door() -> None:
    linear = OPS["linear"][0]
    with pytest.raises(InputError, match="meta tensors have no values"):
        fgt.check_completeness(linear, torch.empty(2, 5, device="meta"), unknown="measure")
    with pytest.raises(InputError, match="choose 'error' or 'measure'"):
        fgt.check_completeness(linear, X, unknown="guess")
    silent = torch.library.custom_op("fgt_userops::silent", _twice, mutates_args=())
    silent.register_fake(torch.empty_like)
    with pytest.raises(InputError, match="register_autograd"):
        fgt.check_completeness(lambda x: silent(x), X, unknown="measure")


def _twice(x: Tensor) -> Tensor:
    return x * 2.0


class Foreign(nn.Module):
    pretrained_cfg = {"input_size": (5,)}

    def forward(self, x: Tensor) -> Any:
        return OPS["linear"][0](x)


def test_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from fullgrad_theory.command import checking, cli

    monkeypatch.setattr(checking, "create", lambda *args, **kwargs: Foreign().eval())
    refused = CliRunner().invoke(cli.app, ["check", "foreign"])
    assert refused.exit_code == 2
    assert "--unknown measure" in refused.output
    measured = CliRunner().invoke(cli.app, ["check", "foreign", "--unknown", "measure"])
    assert measured.exit_code == 0, measured.output
    assert "black box" in measured.output
    derived = CliRunner().invoke(cli.app, ["derive", "foreign", "--unknown", "measure"])
    assert derived.exit_code == 0, derived.output


# --------------------------------------------------------------------------- leaves


class LibraGelu(torch.autograd.Function):
    """gelu with the secant from 0 for its derivative, as one writes it by hand."""

    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(u)
        return F.gelu(u)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        (u,) = ctx.saved_tensors
        return g * 0.5 * (1.0 + torch.erf(u / 2.0**0.5))


class Layer(nn.Module):
    """x * scale + shift, and the activation where there is one."""

    def __init__(self, size: int, act: bool = False) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(size))
        self.shift = nn.Parameter(torch.randn(size))
        self.act = act

    def forward(self, x: Tensor, *, double: bool = False) -> Tensor:
        value = x * self.scale + self.shift
        value = LibraGelu.apply(x) * self.scale if self.act else value
        return value * 2.0 if double else value


class Net(nn.Module):
    def __init__(self, act: bool = False) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(5, 6), nn.Linear(6, 3)
        self.layer = Layer(6, act)
        self.cache: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.layer(self.fc1(x), double=True).relu())


class WithFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(LibraGelu.apply(self.fc1(x)))


def made(kind: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


def input_gradient(model: Any, x: Tensor) -> Tensor:
    u = x.clone().requires_grad_()
    return torch.autograd.grad(model(u).square().sum(), u)[0]


def test_a_function_kept_whole_is_judged_as_it_is() -> None:
    model = made(WithFunction)
    inlined = fgt.check_completeness(model, X)
    assert any("modified" in n for n in inlined.notes)
    report = fgt.check_completeness(model, X, leaves=(LibraGelu,), unknown="measure")
    assert report.complete is True, str(report)
    assert not any("modified" in n for n in report.notes)
    (node,) = [n for n in report.nodes if n.op == "leaf.LibraGelu.default"]
    assert node.verdict is Verdict.NUMERIC
    assert "NOT the derivative" in node.reason
    assert "the secant" in node.reason
    graph = fgt.trace(model, X, leaves=(LibraGelu,))
    assert torch.equal(graph.fx(X), model(X))
    assert torch.equal(input_gradient(graph.fx, X), input_gradient(model, X))
    with pytest.raises(UnregisteredOperationError, match=r"leaf.LibraGelu.default"):
        fgt.check_completeness(graph)


@pytest.mark.parametrize("leaf", [Layer, "layer"])
@pytest.mark.parametrize("act", [False, True])
def test_a_module_kept_whole_is_measured(leaf: Any, act: bool) -> None:
    model = made(lambda: Net(act))
    graph = fgt.trace(model, X, leaves=(leaf,))
    (name,) = [n for n, d in graph.nx.nodes(data=True) if d["op"] == "leaf.Layer.default"]
    assert graph.nx.nodes[name]["module_path"] == "layer"
    batch = torch.randn(7, 5)
    assert graph.dynamic and torch.equal(graph.fx(batch), model(batch))
    assert torch.equal(input_gradient(graph.fx, batch), input_gradient(model, batch))
    report = fgt.check_completeness(model, X, leaves=(leaf,), unknown="measure")
    assert report.complete is True, str(report)
    assert not any("modified" in n for n in report.notes)
    (node,) = [n for n in report.nodes if n.op == "leaf.Layer.default"]
    assert node.verdict is Verdict.NUMERIC
    (found,) = measure(graph).measured.values()
    assert found.signature == ("x" if act else "x + shift")


def test_a_module_kept_whole_and_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))

    class Declared(Layer):
        pass

    model = made(Net)
    model.layer = made(lambda: Declared(6))
    fgt.register("leaf.Declared.default", Algebra.MULTILINEAR, "x*scale + shift")
    report = fgt.check_completeness(model, X, leaves=(Declared,))
    assert report.complete is True, str(report)
    (node,) = [n for n in report.nodes if n.op == "leaf.Declared.default"]
    assert node.verdict is Verdict.NUMERIC
    parts = fgt.fullgrad(fgt.balance(model, X, leaves=(Declared,)), X, target=1)
    assert "layer.shift" in parts.biases
    torch.testing.assert_close(parts.total, parts.output, rtol=1e-4, atol=1e-5)


def test_hooks_stay_inside_a_leaf() -> None:
    model = made(Net)
    model.layer.register_full_backward_hook(lambda module, g, out: (g[0] * 2.0,))
    graph = fgt.trace(model, X, leaves=("layer",))
    assert torch.equal(input_gradient(graph.fx, X), input_gradient(model, X))


def state(model: nn.Module) -> list[Any]:
    rows: list[Any] = []
    for name, module in model.named_modules():
        rows.append((name, id(module), module.training, sorted(vars(module)), id(type(module))))
        hooks = (module._forward_hooks, module._backward_hooks, module._forward_pre_hooks)
        rows.append([list(h) for h in hooks])
        rows.append(module.forward)
    rows.append([(n, id(p), p.requires_grad, p._version) for n, p in model.named_parameters()])
    return rows


def test_nothing_is_left_behind() -> None:
    model = made(lambda: Net(True))
    before, values = state(model), copy.deepcopy(model.state_dict())
    function = dict(vars(LibraGelu))
    fgt.check_completeness(model, X, leaves=(Layer,), unknown="measure", policy="libra")
    fgt.check_completeness(made(WithFunction), X, leaves=(LibraGelu,), unknown="measure")
    with pytest.raises(fgt.FullgradError):
        fgt.trace(model, torch.randn(2, 3), leaves=(Layer, LibraGelu))
    assert state(model) == before
    assert dict(vars(LibraGelu)) == function
    assert all(torch.equal(v, values[n]) for n, v in model.state_dict().items())
    left = [n for n in dir(torch.ops) if n.startswith("fullgrad_leaves")]
    assert not any(dir(getattr(torch.ops, n)) and getattr(torch.ops, n)._dir for n in left)


def test_a_balanced_model_with_leaves_pickles_and_copies() -> None:
    model = made(lambda: Net(True))
    balanced = fgt.balance(model, X, leaves=(Layer,), unknown="measure")
    gated = fgt.balance(call("gelu"), X, unknown="measure")
    for one in (balanced, gated):
        for other in (pickle.loads(pickle.dumps(one)), copy.deepcopy(one)):
            assert torch.equal(other(X), one(X))
            assert torch.equal(input_gradient(other, X), input_gradient(one, X))


class TwoResults(nn.Module):
    def forward(self, x: Tensor, *, many: bool = True) -> dict[str, Any]:
        return {"none": None, "a": x * 2.0, "b": (x.abs(), 3)}


def test_a_leaf_with_several_results() -> None:
    leaf = TwoResults().eval()

    def model(x: Tensor) -> Tensor:
        found = leaf(x)
        return found["a"] * found["b"][1] + x

    graph = fgt.trace(model, X, leaves=(TwoResults,))
    assert torch.equal(graph.fx(X), model(X))
    report = fgt.check_completeness(graph, unknown="measure")
    assert report.complete is True, str(report)


class Writes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2.0)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.idle = nn.Linear(5, 5), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def test_leaves_that_cannot_be() -> None:
    model = made(Net)
    with pytest.raises(UnknownNameError, match="did you mean layer"):
        fgt.trace(model, X, leaves=("layr",))
    with pytest.raises(InputError, match="no leaf"):
        fgt.trace(model, X, leaves=(3,))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="is a tuple"):
        fgt.trace(model, X, leaves=Layer)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="never called"):
        fgt.trace(made(Unused), X, leaves=(nn.ReLU,))
    with pytest.raises(InputError, match=r"never called as LibraGelu\.apply"):
        fgt.trace(model, X, leaves=(LibraGelu,))
    writer = Writes().eval()
    with pytest.raises(fgt.FullgradError, match="writes in place to what it reads"):
        fgt.trace(lambda x: writer(x * 1.0), X, leaves=(Writes,))
    graph = fgt.trace(model, X)
    with pytest.raises(InputError, match="has its leaves already"):
        fgt.check_completeness(graph, leaves=(Layer,))
