"""What users declare, a row a class: as a custom operation, as a leaf, and measured; all go alike
through the check, the plan, the balanced module, pickle and the compiler."""

from __future__ import annotations

import inspect
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fullgrad_theory as fgt
from fullgrad_theory import Algebra, Verdict
from fullgrad_theory.errors import PlanError, UnregisteredOperationError
from fullgrad_theory.operators import registry

pytestmark = pytest.mark.slow

X = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def registry_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


# --------------------------------------------------------------------------- what is declared


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def bump(x: Tensor) -> Tensor:
    return torch.exp(-x.square()) + x


def norm(x: Tensor, gain: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * gain


def frozen_norm(x: Tensor, gain: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt().detach() * gain


def shares(x: Tensor) -> Tensor:
    return x.softmax(-1)


def product(x: Tensor, y: Tensor) -> Tensor:
    return x * y


class Leaf(nn.Module):
    """A function as a module, which is kept whole; its gain is a parameter where it has one."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, 6)) if self.has_gain else None

    has_gain = False


class Swish(Leaf):
    def forward(self, x: Tensor) -> Tensor:
        return swish(x)


class Bump(Leaf):
    def forward(self, x: Tensor) -> Tensor:
        return bump(x)


class Norm(Leaf):
    has_gain = True

    def forward(self, x: Tensor) -> Tensor:
        assert self.gain is not None
        return norm(x, self.gain)


class Shares(Leaf):
    def forward(self, x: Tensor) -> Tensor:
        return shares(x)


class Product(Leaf):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return product(x, y)


def operation(function: Callable[..., Tensor]) -> Any:
    """The function as an operation of its own, with its true backward."""
    names = list(inspect.signature(function).parameters)
    heads = ", ".join(f"{name}: torch.Tensor" for name in names)
    space: dict[str, Any] = {"f": function, "torch": torch}
    exec(f"def kernel({heads}) -> torch.Tensor: return f({', '.join(names)}).clone()", space)
    name = f"fgt_declared::{function.__name__}"
    made = torch.library.custom_op(name, space["kernel"], mutates_args=())
    made.register_fake(lambda x, *rest: torch.empty_like(x))

    def backward(ctx: Any, grad: Tensor) -> Any:
        leaves = [t.detach().requires_grad_() for t in ctx.saved_tensors]
        with torch.enable_grad():
            value = function(*leaves)
        found = torch.autograd.grad(value, leaves, grad)
        return found if len(found) > 1 else found[0]

    made.register_autograd(
        backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
    )
    return made


@dataclass(frozen=True)
class Declared:
    """A function with its class, what is registered with it, the edit that mends it."""

    function: Callable[..., Tensor]
    leaf: type[Leaf]
    algebra: Algebra
    edit: str
    entry: tuple[Any, ...] = ()
    named: dict[str, Any] = field(default_factory=dict)
    reads: int = 1
    measured: bool = True


DECLARED = {
    "zero-origin": Declared(swish, Swish, Algebra.ZERO_ORIGIN, "secant"),
    "with a gate": Declared(
        swish, Swish, Algebra.ZERO_ORIGIN, "secant", named={"gate": lambda u: torch.sigmoid(u)},
        measured=False,
    ),
    "elementwise": Declared(bump, Bump, Algebra.ELEMENTWISE, "secant", named={"origin": 1.0}),
    "normaliser": Declared(
        norm, Norm, Algebra.NORMALISER, "freeze", ("x*gain",), {"frozen": frozen_norm},
        measured=False,  # a measurement finds no 1/sigma to be held fixed
    ),
    "frozen by a lambda": Declared(
        norm, Norm, Algebra.NORMALISER, "freeze", ("x*gain",),
        {"frozen": lambda x, gain: frozen_norm(x, gain)}, measured=False,
    ),
    "smooth": Declared(
        shares, Shares, Algebra.SMOOTH, "integrate", measured=False,  # nor that there is a ray
    ),
    "multilinear": Declared(product, Product, Algebra.MULTILINEAR, "scale", ("x*y",), reads=2),
}  # fmt: skip
OPERATIONS = {f: operation(f) for f in (swish, bump, norm, shares, product)}


class Model(nn.Module):
    """Two linear layers around what is declared."""

    def __init__(self, name: str, as_leaf: bool) -> None:
        super().__init__()
        declared = DECLARED[name]
        self.name, self.reads, self.as_leaf = name, declared.reads, as_leaf
        self.fc1, self.fc2 = nn.Linear(5, 6), nn.Linear(6, 3)
        self.own = declared.leaf() if as_leaf or declared.leaf.has_gain else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        read = [h, h.roll(1, -1)][: self.reads]
        if self.as_leaf:
            return self.fc2(self.own(*read))  # type: ignore[misc]
        more = [] if self.own is None else [self.own.gain]
        return self.fc2(OPERATIONS[DECLARED[self.name].function](*read, *more))


def made(name: str, how: str) -> tuple[nn.Module, dict[str, Any]]:
    """The model, and the arguments that everything takes; registers what is to be registered."""
    declared, as_leaf = DECLARED[name], "leaf" in how
    torch.manual_seed(0)
    model = Model(name, as_leaf).eval()
    options: dict[str, Any] = {"leaves": (declared.leaf,)} if as_leaf else {}
    if "measured" in how:
        return model, options | {"unknown": "measure"}
    own = declared.leaf.__name__ if as_leaf else declared.function.__name__
    full = f"leaf.{own}.default" if as_leaf else f"fgt_declared.{own}.default"
    fgt.register(full, declared.algebra, *declared.entry, **declared.named)
    return model, options


HOW = ("operation", "leaf", "measured operation", "measured leaf")
MATRIX = [
    (name, how)
    for name, declared in DECLARED.items()
    for how in HOW
    if declared.measured or "measured" not in how
]


def gradient(model: Callable[[Tensor], Tensor]) -> Tensor:
    x = X.clone().requires_grad_()
    return torch.autograd.grad(model(x).square().sum(), x)[0]


each = pytest.mark.parametrize(("name", "how"), MATRIX)


@each
def test_the_verdict_and_the_plan(name: str, how: str) -> None:
    model, options = made(name, how)
    assert fgt.check_completeness(model, X, **options).complete is False
    report = fgt.check_completeness(model, X, policy="libra", **options)
    assert report.complete is True, str(report)
    assert report.error is not None and report.error < 1e-10
    (node,) = [n for n in report.nodes if n.op.startswith(("leaf.", "fgt_declared."))]
    assert node.verdict is Verdict.NUMERIC
    plan = fgt.derive_rules(model, X, **options)
    assert [edit.kind for edit in plan] == [DECLARED[name].edit]
    assert all(plan.reasons.values())


@each
def test_the_balanced_module(name: str, how: str) -> None:
    model, options = made(name, how)
    balanced = fgt.balance(model, X, **options)
    assert torch.equal(balanced(X), model(X))
    assert not torch.allclose(gradient(balanced), gradient(model))
    parts = fgt.fullgrad(balanced, X, target=1)
    torch.testing.assert_close(parts.total, parts.output, rtol=1e-4, atol=1e-5)


@each
def test_pickled(name: str, how: str) -> None:
    model, options = made(name, how)
    balanced = fgt.balance(model, X, **options)
    file = io.BytesIO()
    torch.save(balanced, file)
    file.seek(0)
    for other in (pickle.loads(pickle.dumps(balanced)), torch.load(file, weights_only=False)):
        assert torch.equal(other(X), balanced(X))
        assert torch.equal(gradient(other), gradient(balanced))


@each
def test_compiled(name: str, how: str) -> None:
    model, options = made(name, how)
    balanced = fgt.balance(model, X, **options)
    torch._dynamo.reset()
    compiled = torch.compile(balanced, backend="aot_eager")
    torch.testing.assert_close(compiled(X), balanced(X))
    torch.testing.assert_close(gradient(compiled), gradient(balanced))


# --------------------------------------------------------------------------- what is refused

REFUSED: dict[str, tuple[str, Algebra, tuple[str, ...], dict[str, Any], str]] = {
    "no such argument": (
        "norm", Algebra.NORMALISER, ("xx*gaet",), {"frozen": frozen_norm},
        "has no argument 'xx'; it takes x, gain",
    ),
    "no degree rule": ("product", Algebra.MULTILINEAR, (), {}, "takes x, y: write its degree rule"),
    "no rule at all": ("product", Algebra.MULTILINEAR, ("x*(y",), {}, "is no degree rule"),
    "no origin": ("bump", Algebra.ELEMENTWISE, (), {}, r"needs origin=f\(0\)"),
    "an origin": ("bump", Algebra.ZERO_ORIGIN, (), {"origin": 1.0}, "is Algebra.ELEMENTWISE"),
    "no frozen form": ("norm", Algebra.NORMALISER, ("x*gain",), {}, "needs frozen=, a function"),
    "no such operation": ("nrom", Algebra.SMOOTH, ("x",), {}, "write its overload as torch prints"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str) -> None:
    name, algebra, entry, named, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        fgt.register(f"fgt_declared.{name}.default", algebra, *entry, **named)
    assert registry.lookup(f"fgt_declared.{name}.default") is None


def test_twice_is_refused() -> None:
    made("zero-origin", "operation")
    for algebra in (Algebra.ZERO_ORIGIN, Algebra.SMOOTH):
        with pytest.raises(ValueError, match="is registered already as zero-origin elementwise"):
            fgt.register("fgt_declared.swish.default", algebra)


@pytest.mark.parametrize("name", ["normaliser", "multilinear"])
def test_a_leaf_is_asked_for_its_arguments_when_it_is_traced(name: str) -> None:
    declared = DECLARED[name]
    leaf = f"leaf.{declared.leaf.__name__}.default"
    fgt.register(leaf, declared.algebra, "x*gaet", **declared.named)
    model = Model(name, as_leaf=True).eval()
    with pytest.raises(UnregisteredOperationError, match="has no argument 'gaet'; it takes x, "):
        fgt.check_completeness(model, X, leaves=(declared.leaf,))


def test_what_is_loaded_is_registered_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has no name of its own is found again in the record."""
    model, _ = made("frozen by a lambda", "operation")
    stored = pickle.dumps(fgt.balance(model, X))
    monkeypatch.delitem(registry._REGISTRY, "fgt_declared.norm.default")
    with pytest.raises(PlanError, match=r"norm\.default has no frozen form here: register it"):
        pickle.loads(stored)
