"""Random architectures over the whole registry, as small programs that print as `nn.Module`s.

A program is drawn through `Draw`, an integer between two bounds where smaller is simpler: by
hypothesis (`architectures`), which shrinks, or by a seeded generator (`random_architecture`). It is
run while it is drawn: a call that torch refuses, or whose value is not sane, is taken back.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..operators.algebra import Algebra
from ..operators.registry import lookup, registered
from .sample_calls import _Draw, cases, overload

Draw = Callable[[int, int], int]
"""draw(low, high): an integer of that closed interval"""

LARGEST = 1e3
"""values beyond it are taken back: a sum of them would drown the others' digits"""
DOUBLE = torch.float64

NOT_DRAWN = {
    "aten.where.Scalar": "it chooses between two numbers: no operand is a value",
    "aten.to.prim_Device": "export writes it as aten.to.device",
    "aten.sym_size.int": "a size is a number in a graph of fixed shapes",
    "aten.sym_numel.default": "a size is a number in a graph of fixed shapes",
    "aten.sym_stride.int": "a stride is a number in a graph of fixed shapes",
    "aten.item.default": "export writes it as aten._local_scalar_dense",
    "aten.equal.default": "its result is a Python bool, which export refuses to branch on",
    "aten.rnn_tanh_cell.default": "its layer is drawn, which is opened into the same steps",
    "aten.rnn_relu_cell.default": "its layer is drawn, which is opened into the same steps",
    **dict.fromkeys(
        "add sub mul truediv floordiv mod pow neg eq ne lt le gt ge and_ or_".split(),
        "numbers in, numbers out: torch's own operators are drawn instead",
    ),
}
"""registered operations that no architecture calls, and why"""
INPUTS = 500_009
"""weights are drawn from smaller seeds than inputs, so that x - w never vanishes by design"""


@dataclass(frozen=True)
class Value:
    """The inputs come first, then what each statement makes."""

    index: int


@dataclass(frozen=True)
class Weight:
    """An entry of the architecture's weights."""

    index: int


@dataclass(frozen=True)
class WeightSpec:
    """A parameter, or a buffer, drawn from a seed of its own; `data` for an index tensor."""

    shape: tuple[int, ...]
    kind: str = "real"
    seed: int = 0
    buffer: bool = False
    data: Any = None


@dataclass(frozen=True)
class Statement:
    """`target(*args, **kwargs)`; leaves are Values, Weights, and what Python writes literally."""

    target: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()

    @property
    def reads(self) -> tuple[int, ...]:
        """The values it reads, one entry an argument position."""
        return tuple(v.index for v in _leaves(self) if isinstance(v, Value))

    @property
    def weights(self) -> tuple[int, ...]:
        return tuple(v.index for v in _leaves(self) if isinstance(v, Weight))

    def mapped(self, change: Callable[[Any], Any]) -> Statement:
        """The same call with every leaf changed."""
        kwargs = tuple((name, pytree.tree_map(change, value)) for name, value in self.kwargs)
        return Statement(self.target, pytree.tree_map(change, self.args), kwargs)


def _leaves(statement: Statement) -> list[Any]:
    return pytree.tree_leaves((statement.args, dict(statement.kwargs)))


def weight(
    shape: Sequence[int], kind: str = "real", seed: int = 0, dtype: torch.dtype = DOUBLE
) -> Tensor:
    """A seeded tensor: `real` (normal), `positive`, `unit` (in (-1, 1)), `complex` or `mask`."""
    generator = torch.Generator().manual_seed(seed)
    size = (*shape, 2) if kind == "complex" else tuple(shape)
    normal = torch.randn(size, generator=generator, dtype=DOUBLE)
    if kind == "mask":
        return normal > -0.3
    if kind == "complex":
        return torch.view_as_complex(normal).to(torch.promote_types(dtype, torch.complex64))
    made = {
        "real": lambda: 0.8 * normal,
        "positive": lambda: normal.abs() + 0.25,
        "unit": lambda: 0.9 * torch.tanh(normal),
    }[kind]()
    return made.to(dtype)


@dataclass(frozen=True)
class Architecture:
    """A program. `inputs`: shape and seed of each; `open_batch`: no spare input of another first
    dimension keeps the batch size fixed (which is the faster way to trace)."""

    inputs: tuple[tuple[tuple[int, ...], int], ...]
    weights: tuple[WeightSpec, ...]
    statements: tuple[Statement, ...]
    outputs: tuple[int, ...]
    seed: int = 0
    open_batch: bool = False

    def source(self) -> str:
        """The module as Python source: `exec` it, and `Architecture().eval()` is `module()`."""
        return _source(self)

    def __str__(self) -> str:
        return self.source()

    @cached_property
    def _class(self) -> Callable[..., nn.Module]:
        names: dict[str, Any] = {}
        exec(compile(self.source(), "<architecture>", "exec"), names)
        made: Callable[..., nn.Module] = names["Architecture"]
        return made

    def module(self, dtype: torch.dtype = DOUBLE) -> nn.Module:
        """The program as an `nn.Module` in eval mode."""
        return self._class(dtype).eval()

    def example(self, dtype: torch.dtype = DOUBLE, seed: int = 0, scale: float = 1.0) -> Any:
        """Inputs for it, a tuple; each seed gives others."""
        given = [
            scale * weight(shape, "real", 7919 * (self.seed + seed) + own + INPUTS, dtype)
            for shape, own in self.inputs
        ]
        return tuple(given) if self.open_batch else (*given, torch.zeros(97, dtype=torch.int64))

    @property
    def calls(self) -> tuple[str, ...]:
        """The operations called, in order."""
        return tuple(statement.target for statement in self.statements)


# --------------------------------------------------------------------------- as source, as data


def _literal(leaf: Any, names: Sequence[str]) -> str:
    if isinstance(leaf, Value):
        return names[leaf.index]
    if isinstance(leaf, Weight):
        return f"self.w{leaf.index}"
    if isinstance(leaf, tuple):
        return "[" + ", ".join(_literal(e, names) for e in leaf) + "]"
    if isinstance(leaf, torch.device):
        return f"torch.device({str(leaf)!r})"
    if isinstance(leaf, float) and not math.isfinite(leaf):
        return f"float('{leaf}')"
    return repr(leaf)


def _source(architecture: Architecture) -> str:
    count = len(architecture.inputs)
    names = [f"x{i}" for i in range(count)]
    names += [f"v{i}" for i in range(len(architecture.statements))]
    lines = [
        "import torch",
        "from torch import nn",
        "",
        "from fullgrad_theory.testing import weight",
        "",
        "aten = torch.ops.aten",
        "",
        "",
        "class Architecture(nn.Module):",
        "    def __init__(self, dtype=torch.float64):",
        "        super().__init__()",
    ]
    for i, spec in enumerate(architecture.weights):
        if spec.data is not None:
            made = f"torch.tensor({_literal(spec.data, ())}, dtype={spec.kind})"
        else:
            made = f"weight({spec.shape}, {spec.kind!r}, {spec.seed}, dtype)"
        if spec.buffer:
            lines.append(f"        self.register_buffer('w{i}', {made})")
        else:
            lines.append(f"        self.w{i} = nn.Parameter({made})")
    spare = [] if architecture.open_batch else ["spare=None"]
    lines += ["", f"    def forward(self, {', '.join(names[:count] + spare)}):"]
    for name, statement in zip(names[count:], architecture.statements, strict=True):
        arguments = [_literal(a, names) for a in statement.args]
        arguments += [f"{k}={_literal(a, names)}" for k, a in statement.kwargs]
        if statement.target == "getitem":
            lines.append(f"        {name} = {arguments[0]}[{arguments[1]}]")
        else:
            lines.append(f"        {name} = {statement.target}({', '.join(arguments)})")
    lines.append(f"        return {', '.join(names[i] for i in architecture.outputs)}")
    return "\n".join(lines) + "\n"


def to_data(architecture: Architecture) -> dict[str, Any]:
    """The program as what JSON can hold; `from_data` reads it back."""
    return {
        "inputs": architecture.inputs,
        "seed": architecture.seed,
        "open_batch": architecture.open_batch,
        "outputs": architecture.outputs,
        "weights": [vars(w) | {"data": _encode(w.data)} for w in architecture.weights],
        "statements": [
            [s.target, _encode(s.args), {k: _encode(v) for k, v in s.kwargs}]
            for s in architecture.statements
        ],
    }


def from_data(data: dict[str, Any]) -> Architecture:
    """The architecture that `to_data` wrote."""
    return Architecture(
        tuple((tuple(shape), own) for shape, own in data["inputs"]),
        tuple(
            WeightSpec(tuple(w["shape"]), w["kind"], w["seed"], w["buffer"], _decode(w["data"]))
            for w in data["weights"]
        ),
        tuple(
            Statement(target, _decode(args), tuple((k, _decode(v)) for k, v in kwargs.items()))
            for target, args, kwargs in data["statements"]
        ),
        tuple(data["outputs"]),
        data["seed"],
        data["open_batch"],
    )


def _encode(leaf: Any) -> Any:
    if isinstance(leaf, tuple):
        return [_encode(e) for e in leaf]
    if isinstance(leaf, (Value, Weight)):
        return {type(leaf).__name__: leaf.index}
    if isinstance(leaf, torch.dtype):
        return {"dtype": str(leaf).removeprefix("torch.")}
    return {"device": str(leaf)} if isinstance(leaf, torch.device) else leaf


def _decode(leaf: Any) -> Any:
    if isinstance(leaf, list):
        return tuple(_decode(e) for e in leaf)
    if not isinstance(leaf, dict):
        return leaf
    ((kind, content),) = leaf.items()
    if kind == "dtype":
        return getattr(torch, content)
    made: dict[str, Callable[[Any], Any]] = {
        "Value": Value,
        "Weight": Weight,
        "device": torch.device,
    }
    return made[kind](content)


# --------------------------------------------------------------------------- drawing


@cache
def drawable() -> tuple[str, ...]:
    """The operations that architectures call, the simpler classes first, then the composites.

    Of torch's own: what else was registered has no samples here."""
    order = list(Algebra)
    entries = sorted(registered(), key=lambda o: (order.index(o.algebra), o.name))
    names = (o.name for o in entries if o.name.startswith("aten.") or o.name == "getitem")
    return tuple(name for name in names if name not in NOT_DRAWN and cases(name))


class _Refused(Exception):
    """A call that torch does not take, or whose value is not sane."""


class _Size(NamedTuple):
    values: int
    statements: int
    weights: int


_HELD = {"running_mean", "running_var"}
"""arguments in which torch has no derivative"""
_EXACT = {
    "aten.masked_scatter.default": "how much it reads depends on how much of a mask is true",
    "aten.as_strided.default": "it reads memory",
    "aten.scaled_dot_product_attention.default": "its backward does not check shapes, and crashes",
    "aten._native_batch_norm_legit_no_training.default": "it reads past operands too short for it",
    "aten.lstm.input": "its float32 kernel does not check shapes",
    "aten.gru.input": "its float32 kernel does not check shapes",
}
"""operations that are called in the shapes of their samples alone, and why"""
_ACTIVATIONS = (
    "relu gelu silu tanh sigmoid softplus leaky_relu abs exp hardswish sin elu mish cos".split()
)
_SHAPES = ((2, 3), (3,), (1, 3), (2, 1, 2), (1, 1), (2, 2, 3), (1, 2, 2, 2), (4, 1), (1,), (2, 4))


class _Builder:
    """A program under way, and the value of every statement so far."""

    def __init__(self, draw: Draw, seed: int, shapes: Sequence[tuple[int, ...]]) -> None:
        self.draw, self.seed = draw, seed
        self.inputs = tuple((shape, i) for i, shape in enumerate(shapes))
        self.weights: list[WeightSpec] = []
        self.tensors: list[Tensor] = []
        self.statements: list[Statement] = []
        given = Architecture(self.inputs, (), (), (), seed, True).example()
        self.values: list[Any] = [x.requires_grad_() for x in given]
        self.current = len(self.values) - 1
        self.unsized: set[int] = set()

    # ------------------------------------------------------------------ statements

    def size(self) -> _Size:
        return _Size(len(self.values), len(self.statements), len(self.weights))

    def forget(self, size: _Size) -> None:
        """Take back everything since."""
        del self.values[size.values :], self.statements[size.statements :]
        del self.weights[size.weights :], self.tensors[size.weights :]

    def emit(self, target: str, *args: Any, **kwargs: Any) -> Value:
        """Add a call and run it; `_Refused` where torch refuses or the value is not sane."""
        statement = Statement(
            target, _frozen(args), tuple((k, _frozen(v)) for k, v in kwargs.items())
        )
        given, named = pytree.tree_map(
            self._runtime, (as_lists(statement.args), dict(statement.kwargs))
        )
        given, named = tuple(given), {k: as_lists(v) for k, v in named.items()}
        try:
            value = overload(target)(*given, **named)
        except (RuntimeError, IndexError, TypeError, ValueError, NotImplementedError) as error:
            raise _Refused(str(error)) from error
        for made in _outputs_of(value):
            if made.grad_fn is not None and "NotImplemented" in made.grad_fn.name():
                raise _Refused("torch has no derivative of it")
        _sane(value, lookup(target))
        self.statements.append(statement)
        self.values.append(value)
        return Value(len(self.values) - 1)

    def _runtime(self, leaf: Any) -> Any:
        if isinstance(leaf, Value):
            return self.values[leaf.index]
        return self.tensors[leaf.index] if isinstance(leaf, Weight) else leaf

    def tensor(self, value: Value) -> Tensor:
        found: Tensor = self.values[value.index]
        return found

    def is_live(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.requires_grad

    # ------------------------------------------------------------------ operands

    def weight(self, shape: Sequence[int], kind: str = "real", held: bool = False) -> Weight:
        """A new parameter or buffer, or one that stands elsewhere already; `held`: a buffer."""
        shape = tuple(shape)
        alike = [
            i
            for i, w in enumerate(self.weights)
            if (w.shape, w.kind, w.data) == (shape, kind, None) and (w.buffer or not held)
        ]
        how = self.draw(0, 7)
        if alike and how >= 6:
            return Weight(alike[self.draw(0, len(alike) - 1)])
        buffer = held or how == 5 or kind == "mask"
        spec = WeightSpec(shape, kind, 101 * self.seed + len(self.weights), buffer)
        return self._keep(spec, weight(shape, kind, spec.seed))

    def data(self, tensor: Tensor) -> Weight:
        """An index tensor of a sample call, as a buffer."""
        spec = WeightSpec(tuple(tensor.shape), str(tensor.dtype), 0, True, _frozen(tensor.tolist()))
        return self._keep(spec, tensor)

    def _keep(self, spec: WeightSpec, tensor: Tensor) -> Weight:
        self.weights.append(spec)
        self.tensors.append(tensor)
        return Weight(len(self.weights) - 1)

    def live(self) -> list[int]:
        """The live real values, the current one first, then the latest."""
        found = [
            i
            for i, v in enumerate(self.values)
            if self.is_live(v)
            and v.is_floating_point()
            and i != self.current
            and i not in self.unsized
        ]
        return [self.current, *reversed(found)]

    def some(self, others: bool = False) -> Value:
        """A live real value, the current one being the simplest; `others` prefers another."""
        values = self.live()
        if others and len(values) > 1:
            return Value(values[self.draw(1, min(len(values) - 1, 6))])
        return Value(values[self.draw(0, min(len(values) - 1, 4))])

    def fit(self, value: Value, shape: Sequence[int], kind: str = "real") -> Value:
        """The value, moved or projected to a shape, and into the domain of `kind`."""
        shape = tuple(shape)
        if kind == "complex":
            return self.emit("aten.view_as_complex.default", self.fit(value, (*shape, 2)))
        count, given = math.prod(shape), self.tensor(value).numel()
        if not count or not given:
            raise _Refused("empty")
        if tuple(self.tensor(value).shape) == shape and not (count < given):
            fitted = value
        elif count == given and self.draw(0, 3) < 3:
            fitted = self.emit("aten.reshape.default", value, shape)
        else:
            row = value
            if self.tensor(value).dim() != 1:
                row = self.emit("aten.reshape.default", value, (-1,))
            if count < given and self.draw(0, 1) == 0:
                row = self.emit("aten.slice.Tensor", row, 0, 0, count)
            else:
                bias = [self.weight((count,))] if self.draw(0, 3) == 3 else []
                row = self.emit("aten.linear.default", row, self.weight((count, given)), *bias)
            fitted = self.emit("aten.reshape.default", row, shape) if shape != (count,) else row
        if kind == "positive":
            return self.emit("aten.abs.default", fitted)
        if kind == "unit":
            return self.emit("aten.tanh.default", fitted)
        return self.emit("aten.gt.Scalar", fitted, 0.125) if kind == "mask" else fitted

    # ------------------------------------------------------------------ patterns

    def call(self, name: str) -> Value:
        """A call of a registered operation, embedded by one of its sample calls."""
        rows = cases(name)
        args, kwargs = rows[self.draw(0, len(rows) - 1)]
        leaves, spec = pytree.tree_flatten((args, kwargs))
        held = _held(name, args, kwargs)
        drawn = [i for i, leaf in enumerate(leaves) if isinstance(leaf, _Draw)]
        fluid = [i for i in drawn if leaves[i].kind != "mask" and i not in held]
        direct = self.draw(0, 1) == 0 and name not in _EXACT
        entry = lookup(name)
        still = entry is not None and entry.algebra is Algebra.FREEZING
        first = fluid[self.draw(0, len(fluid) - 1)] if fluid else None
        filled: list[Any] = []
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Fraction):
                filled.append(float(leaf))
            elif isinstance(leaf, Tensor):
                filled.append(self.data(leaf))
            elif not isinstance(leaf, _Draw):
                filled.append(leaf)
            elif i == first:
                source = self.some()
                if still and self.draw(0, 1) == 0:
                    source = self.emit("aten.detach.default", source)
                as_it_is = direct and leaf.kind == "real"
                filled.append(source if as_it_is else self.fit(source, leaf.shape, leaf.kind))
            elif i in held or self.draw(0, 2) < 2:
                filled.append(self.weight(leaf.shape, leaf.kind, i in held))
            else:
                filled.append(self.fit(self.some(others=True), leaf.shape, leaf.kind))
        try:
            made = self._made(name, filled, spec)
        except _Refused:
            if first is None or not direct:
                raise
            filled[first] = self.fit(filled[first], leaves[first].shape, leaves[first].kind)
            made = self._made(name, filled, spec)
        return self.settle(name, made)

    def _made(self, name: str, leaves: list[Any], spec: Any) -> Value:
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        return self.emit(name, *args, **kwargs)

    def settle(self, name: str, made: Value) -> Value:
        """A live real value with what a call has made in it."""
        value: Any = self.values[made.index]
        if isinstance(value, (tuple, list)):
            items = [self.emit("getitem", made, i) for i in range(len(value))]
            # what is frozen among them (indices) joins as a factor
            pick = items[self.draw(0, len(items) - 1)]
            return self.settle(name, pick)
        if not isinstance(value, Tensor):
            return self.emit("aten.mul.Scalar", Value(self.current), made)
        if torch.Tag.dynamic_output_shape in getattr(overload(name), "tags", ()):
            self.unsized.add(made.index)  # of another shape for other inputs
            made = self.emit("aten.sum.default", made)
            value = self.values[made.index]
        if "empty" in name:  # it holds what memory held, and lends its shape alone
            flat = self.fit(Value(self.current), (value.numel(),))
            made = self.emit("aten.view_as.default", flat, made)
            value = self.values[made.index]
        if value.is_complex():
            how = self.draw(0, 3)
            reals = ("aten.view_as_real", "aten.real", "aten.imag", "aten.abs")
            made = self.emit(f"{reals[how]}.default", made)
            value = self.values[made.index]
        if self.is_live(value):
            return made
        if not value.is_floating_point() or value.dtype != DOUBLE:
            if value.dtype != torch.bool and not bool(value.abs().lt(100).all()):
                made = self.emit("aten.gt.Scalar", made, 0)
            made = self.emit("aten.to.dtype", made, DOUBLE)
        return self.join(Value(self.current), made)

    def join(self, live: Value, still: Value) -> Value:
        """A live value and a frozen or constant one, in one."""
        still = self.fit(still, self.tensor(live).shape)
        how = self.draw(0, 5)
        if how <= 2:
            return self.emit("aten.mul.Tensor", live, still)
        # never the live value itself, detached: x + x.detach() is of degree 1/2, and all would tie
        still = self.emit("aten.add.Scalar", still, 0.75)
        if how == 3:
            return self.emit("aten.add.Tensor", live, still)
        if how == 4:
            return self.emit("aten.mul.Tensor", live, still)
        still = self.emit("aten.mul.Tensor", still, self.weight(self.tensor(live).shape))
        return self.emit("aten.maximum.default", live, still)

    def registry(self) -> Value:
        names = drawable()
        return self.call(names[self.draw(0, len(names) - 1)])

    def residual(self) -> Value:
        other = self.some(others=True)
        shape = self.tensor(other).shape
        return self.emit("aten.add.Tensor", other, self.fit(Value(self.current), shape))

    def affine(self) -> Value:
        value, how = Value(self.current), self.draw(0, 6)
        shape = self.tensor(value).shape
        if how <= 2 and shape:
            wide = self.draw(1, 3)
            bias = [self.weight((wide,))] if how < 2 else []
            kernel = self.weight((wide, shape[-1]))
            return self.emit("aten.linear.default", value, kernel, *bias)
        if how == 3:
            return self.emit("aten.mul.Tensor", value, self.weight(shape))
        if how == 4:
            return self.emit("aten.add.Tensor", value, self.weight(shape))
        scalar = ("aten.add.Tensor", "aten.mul.Tensor")[self.draw(0, 1)]
        return self.emit(scalar, value, (0.5, -0.75, 2, 1)[self.draw(0, 3)])

    def activation(self) -> Value:
        name = _ACTIVATIONS[self.draw(0, len(_ACTIVATIONS) - 1)]
        return self.emit(f"aten.{name}.default", Value(self.current))

    def product(self) -> Value:
        value = Value(self.current)
        other = self.fit(self.some(others=True), self.tensor(value).shape)
        if self.draw(0, 3) < 3:
            return self.emit("aten.mul.Tensor", value, other)
        return self.emit("aten.div.Tensor", value, other)

    def gate(self) -> Value:
        value = Value(self.current)
        gate = self.fit(self.some(), self.tensor(value).shape)
        if self.draw(0, 1):
            gate = self.emit("aten.mul.Tensor", gate, self.weight(self.tensor(value).shape))
        name = ("sigmoid", "silu", "tanh", "hardsigmoid")[self.draw(0, 3)]
        return self.emit("aten.mul.Tensor", value, self.emit(f"aten.{name}.default", gate))

    def norm(self) -> Value:
        value, how = Value(self.current), self.draw(0, 4)
        shape = self.tensor(value).shape
        if not shape or shape[-1] < 2:
            value = self.fit(value, (2, 3))
            shape = self.tensor(value).shape
        last = (shape[-1],)
        if how <= 1:
            affine = [self.weight(last), self.weight(last)] if how == 0 else [None, None]
            return self.emit("aten.layer_norm.default", value, last, *affine, 1e-5)
        if how == 2:
            return self.emit("aten.rms_norm.default", value, last, self.weight(last), 1e-6)
        if how == 3:
            length = self.emit("aten.linalg_vector_norm.default", value, 2, (-1,), True)
            eps = self.draw(0, 1)
            return self.emit(
                "aten.div.Tensor",
                value,
                self.emit("aten.add.Tensor", length, 1e-3) if eps else length,
            )
        power = self.emit("aten.mean.dim", self.emit("aten.square.default", value), (-1,), True)
        power = self.emit("aten.add.Tensor", power, 1e-3)
        return self.emit("aten.mul.Tensor", value, self.emit("aten.rsqrt.default", power))

    def attention(self) -> Value:
        value = self.fit(Value(self.current), (1, 3, 2))
        other = self.fit(self.some(), (1, 3, 2)) if self.draw(0, 2) == 2 else value
        q = self.emit("aten.linear.default", value, self.weight((2, 2)))
        k = self.emit("aten.linear.default", other, self.weight((2, 2)))
        bias = [self.weight((2,))] if self.draw(0, 1) else []
        v = self.emit("aten.linear.default", other, self.weight((2, 2)), *bias)
        if self.draw(0, 1):
            extra = (None, 0.0, True) if self.draw(0, 1) else ()
            return self.emit("aten.scaled_dot_product_attention.default", q, k, v, *extra)
        turned = self.emit("aten.transpose.int", k, 1, 2)
        scores = self.emit("aten.matmul.default", q, turned)
        if self.draw(0, 2) == 2:
            # not -1e9, beside which the other scores' digits are nothing
            hidden = self.weight((3, 3), "mask")
            scores = self.emit("aten.masked_fill.Scalar", scores, hidden, -30.0)
        probabilities = self.emit("aten.softmax.int", scores, -1)
        return self.emit("aten.matmul.default", probabilities, v)

    def recurrence(self) -> Value:
        state = self.fit(Value(self.current), (2, 2))
        inner, outer, bias = self.weight((2, 2)), self.weight((2, 2)), self.weight((2,))
        given = self.fit(self.some(), (2, 2))
        name = ("relu", "tanh", "sigmoid")[self.draw(0, 2)]
        for _ in range(self.draw(1, 2)):
            mixed = self.emit("aten.linear.default", state, inner, bias)
            mixed = self.emit(
                "aten.add.Tensor", mixed, self.emit("aten.linear.default", given, outer)
            )
            state = self.emit(f"aten.{name}.default", mixed)
        return state

    def join_lists(self) -> Value:
        value = Value(self.current)
        shape = self.tensor(value).shape
        if self.draw(0, 2) == 2:
            other: Any = self.weight(shape)
        else:
            other = self.fit(self.some(others=True), shape)
        name = ("cat", "stack")[self.draw(0, 1)] if shape else "stack"
        return self.emit(f"aten.{name}.default", (value, other))

    def switch(self) -> Value:
        value = Value(self.current)
        shape = self.tensor(value).shape
        where = self.fit(self.some(), shape, "mask")
        other: Any = self.fit(self.some(others=True), shape)
        if self.draw(0, 1):
            other = self.weight(shape)
        return self.emit("aten.where.self", where, value, other)

    def frozen(self) -> Value:
        still = self.emit("aten.detach.default", self.some())
        return self.join(Value(self.current), still)

    def branch(self) -> Value:
        return self.some(others=True)

    # ------------------------------------------------------------------ the whole

    def step(self) -> None:
        """One pattern more; nothing where it was refused."""
        patterns = (
            self.registry,
            self.activation,
            self.affine,
            self.residual,
            self.product,
            self.gate,
            self.norm,
            self.attention,
            self.join_lists,
            self.switch,
            self.frozen,
            self.recurrence,
            self.branch,
        )
        kind = self.draw(0, 2 * len(patterns) - 1)
        before = self.size()
        try:
            made = patterns[kind if kind < len(patterns) else 0]()
            if not self.is_live(self.tensor(made)):
                raise _Refused("no live value")
            self.current = made.index
        except _Refused:
            self.forget(before)

    def finish(self, open_batch: bool) -> Architecture | None:
        outputs = [self.current]
        if self.draw(0, 7) == 7:
            outputs.append(self.some(others=True).index)
        outputs = list(dict.fromkeys(outputs))
        program = Architecture(
            self.inputs,
            tuple(self.weights),
            tuple(self.statements),
            tuple(outputs),
            self.seed,
            open_batch,
        )
        return without_the_unread(program)


def _frozen(tree: Any) -> Any:
    return tuple(_frozen(e) for e in tree) if isinstance(tree, (list, tuple)) else tree


def as_lists(tree: Any) -> Any:
    """Tuples as the lists that torch's operations are given."""
    return [as_lists(e) for e in tree] if isinstance(tree, (list, tuple)) else tree


def _outputs_of(value: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]


def _sane(value: Any, found: Any) -> None:
    for tensor in pytree.tree_leaves(value):
        if not isinstance(tensor, Tensor) or not (
            tensor.is_floating_point() or tensor.is_complex()
        ):
            continue
        size = tensor.detach().abs()
        masked = found is not None and ("masked_fill" in found.name or "empty" in found.name)
        if not masked and not bool((size <= LARGEST).all()):
            raise _Refused("a value is not finite, or too large")
        if tensor.requires_grad and not bool((size > 1e-9).any()):
            raise _Refused("a live value is zero: any degree fits it")


@cache
def argument_positions(name: str) -> tuple[str, ...]:
    """The names of an operation's arguments, in order."""
    schema = getattr(overload(name), "_schema", None)
    return tuple(a.name for a in schema.arguments) if schema else ()


def _held(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> set[int]:
    """Leaves (in pytree's order) in which torch has no derivative."""
    held: set[int] = set()
    at = 0
    for key, value in [*zip(argument_positions(name), args, strict=False), *kwargs.items()]:
        count = len(pytree.tree_leaves(value))
        if key in _HELD:
            held |= set(range(at, at + count))
        at += count
    return held


def without_the_unread(program: Architecture) -> Architecture | None:
    """Drop statements, weights and inputs that no output depends on; None where no input is."""
    count = len(program.inputs)
    needed = set(program.outputs)
    for place in reversed(range(len(program.statements))):
        if place + count in needed:
            needed |= set(program.statements[place].reads)
    values = {old: new for new, old in enumerate(sorted(needed))}
    kept = [s for i, s in enumerate(program.statements) if i + count in needed]
    used = sorted({w for s in kept for w in s.weights})
    weights = {old: new for new, old in enumerate(used)}

    def renumber(leaf: Any) -> Any:
        if isinstance(leaf, Value):
            return Value(values[leaf.index])
        return Weight(weights[leaf.index]) if isinstance(leaf, Weight) else leaf

    inputs = tuple(x for i, x in enumerate(program.inputs) if i in needed)
    if not inputs or not kept:
        return None
    return replace(
        program,
        inputs=inputs,
        weights=tuple(program.weights[w] for w in used),
        statements=tuple(s.mapped(renumber) for s in kept),
        outputs=tuple(values[o] for o in program.outputs),
    )


MOST_STEPS = 7


def build(draw: Draw) -> Architecture | None:
    """A program by whoever draws; None where nothing was left of it."""
    steps = draw(1, MOST_STEPS)
    shapes = [_SHAPES[draw(0, len(_SHAPES) - 1)]]
    if draw(0, 4) == 4:
        shapes.append(_SHAPES[draw(0, len(_SHAPES) - 1)])
    seed = draw(0, 999)
    open_batch = draw(0, 31) == 31
    with torch.enable_grad():
        builder = _Builder(draw, seed, shapes)
        for _ in range(steps):
            builder.step()
        return builder.finish(open_batch)


def random_architecture(seed: int) -> Architecture | None:
    """The program of a seed: the same one on every machine."""
    return build(random.Random(seed).randint)


@st.composite
def architectures(draw: st.DrawFn) -> Architecture:
    """A hypothesis strategy; shrinks towards few statements, early operations, first operands."""
    from hypothesis import assume

    made = build(lambda low, high: draw(st.integers(low, high)))
    assume(made is not None)
    assert made is not None
    return made


def calling(name: str, seed: int = 0, attempts: int = 60) -> Architecture | None:
    """A small program with a call of one operation in it."""
    for attempt in range(attempts):
        draw = random.Random(f"{name} {seed} {attempt}").randint
        with torch.enable_grad():
            builder = _Builder(draw, attempt, [_SHAPES[draw(0, len(_SHAPES) - 1)]])
            before = builder.size()
            try:
                made = builder.call(name)
            except _Refused:
                builder.forget(before)
                continue
            if not builder.is_live(builder.tensor(made)):
                continue
            builder.current = made.index
            program = builder.finish(False)
        if program is not None and name in program.calls:
            return program
    return None
