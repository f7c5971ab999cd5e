"""A call: in a graph, its operands by argument position; at run time, the values they have."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch import Tensor, fx
from torch.autograd import Function
from torch.overrides import handle_torch_function, has_torch_function

if TYPE_CHECKING:
    from .record import Operator

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=type[Function])


@dataclass(frozen=True)
class Operand:
    """One argument position of a call: `weight`, or `tensors[1]` inside a list argument.

    `literal`: the number that stands there; 0 for a tensor that the model's code fills with zeros.
    """

    name: str
    node: fx.Node | None
    literal: float | None = None


@dataclass(frozen=True)
class Call:
    """An operation as it stands in a graph: its operands, and which of them are live or frozen."""

    operator: Operator
    operands: tuple[Operand, ...]
    arguments: Mapping[str, Any]
    moving: frozenset[str]
    """names of the operands that depend on the input, live or frozen"""
    eps: bool = False
    """a literal added here only ever reaches a divisor, so it belongs to the frozen denominator"""
    chosen: bool = False
    """a value that depends on the input selects a constant here, with a jump: it is frozen"""
    gate: str = ""
    """the factor g of a product u*g(u): held fixed, it is the secant of the product"""

    def node(self, operand: str) -> fx.Node | None:
        """What an operand reads, None for a literal."""
        return next(o.node for o in self.operands if o.name == operand)


# --------------------------------------------------------------------------- in a graph


def argument_names(function: Any) -> tuple[str, ...] | None:
    """The schema's argument names, None for a function without a schema."""
    schema = getattr(function, "_schema", None)
    return None if schema is None else tuple(a.name for a in schema.arguments)


def bind(node: fx.Node) -> dict[str, Any]:
    """A call's arguments by their schema names; an operation without a schema gets `arg0`, ...

    Arguments left out are present with their schema default.
    """
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        names = (
            ["self", "index"]
            if node.target is operator.getitem
            else [f"arg{i}" for i in range(len(node.args))]
        )
        return dict(zip(names, node.args, strict=True)) | dict(node.kwargs)
    bound: dict[str, Any] = {}
    for position, argument in enumerate(schema.arguments):
        if position < len(node.args):
            bound[argument.name] = node.args[position]
        elif argument.name in node.kwargs:
            bound[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            bound[argument.name] = argument.default_value
    return bound


def operands(arguments: Mapping[str, Any]) -> Iterator[Operand]:
    """Every node and number among the arguments, one `Operand` an argument position."""
    for name, value in arguments.items():
        if isinstance(value, (list, tuple)):
            for index, element in enumerate(value):
                if isinstance(element, fx.Node):
                    yield Operand(f"{name}[{index}]", element)
        elif isinstance(value, fx.Node):
            yield Operand(name, value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield Operand(name, None, float(value))


def target_name(target: Any) -> str:
    """`'aten.gelu.default'` for an overload; the qualified name for a Python function."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    module = getattr(target, "__module__", "") or ""
    name = getattr(target, "__name__", str(target))
    return name if module in ("_operator", "builtins", "operator", "") else f"{module}.{name}"


def short_name(name: str) -> str:
    """`'gelu'` for `'aten.gelu.default'`: an operation of torch as people call it."""
    return name.split(".")[1] if name.startswith("aten.") else name


def overload(name: str) -> Any:
    """The overload of that name; raises AttributeError where this torch has none."""
    space, packet, kind = name.split(".")
    return getattr(getattr(getattr(torch.ops, space), packet), kind)


# --------------------------------------------------------------------------- at run time


def is_ray(value: Any) -> bool:
    """Whether a value can move along a ray: it is a tensor of real or complex numbers."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def origin(value: Tensor) -> Tensor:
    """The start of the ray to `value`: 0, but where it is infinite, as a mask's entries are."""
    return torch.where(value.isinf(), value, 0.0)


def named(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a call by their schema names; a function without a schema: `arg0`, ..."""
    names = argument_names(function) or [f"arg{i}" for i in range(len(args))]
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def evaluate(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    replaced: Mapping[str, Tensor],
) -> Any:
    """A function's value with some operands replaced, by name."""

    def swap(name: str, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [replaced.get(f"{name}[{i}]", v) for i, v in enumerate(value)]
        return replaced.get(name, value)

    bound = {n: swap(n, v) for n, v in named(function, args, kwargs).items()}
    positional = list(bound)[: len(args)]
    return function(
        *(bound[n] for n in positional), **{n: v for n, v in bound.items() if n not in positional}
    )


@dataclass(frozen=True)
class Running:
    """A call with the arguments that it is run on. `function` is what an unedited graph calls."""

    call: Call
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @cached_property
    def values(self) -> dict[str, Any]:
        """Operand name -> its value."""
        bound = named(self.function, self.args, self.kwargs)
        values: dict[str, Any] = {}
        for operand in self.call.operands:
            stem, _, index = operand.name.partition("[")
            value = bound.get(stem, operand.literal)
            if index and isinstance(value, (list, tuple)):
                value = value[int(index[:-1])]
            values[operand.name] = value
        return values

    @property
    def moving(self) -> dict[str, Tensor]:
        """The values of the operands that depend on the input and can move along a ray."""
        return {n: self.values[n] for n in sorted(self.call.moving) if is_ray(self.values[n])}

    def at(self, replaced: Mapping[str, Tensor]) -> list[Any]:
        """The results with some operands replaced, one an output."""
        result = evaluate(self.function, self.args, self.kwargs, replaced)
        return list(result) if isinstance(result, (tuple, list)) else [result]


# --------------------------------------------------------------------------- functions of ours


def as_one_call(function: Callable[P, R]) -> Callable[P, R]:
    """Let fx's symbolic tracing record a call, not enter it: unpickling a GraphModule retraces."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        operands = (*args, *kwargs.values())
        if has_torch_function(operands):
            return handle_torch_function(call, operands, *args, **kwargs)
        return function(*args, **kwargs)

    return call


def led_by(count: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """`as_one_call` for a function that takes `count` arguments before those of an operation."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        call = as_one_call(function)
        call.lead = count  # type: ignore[attr-defined]
        return call

    return decorate


def operation_args(target: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A rewritten call's arguments as the operation itself takes them."""
    return args[getattr(target, "lead", 0) :]


def bound_once(kind: F) -> F:
    """An autograd.Function whose signature is kept: torch looks it up on every call, at a cost that
    a GPU waits for."""
    forward: Any = kind.forward
    forward.__signature__ = inspect.signature(forward)
    return kind


def is_transformed() -> bool:
    """Whether torch.func is at work, under which no value says whether it asks for a gradient."""
    compiling = torch.compiler.is_compiling()
    return not compiling and torch._C._functorch.peek_interpreter_stack() is not None


def is_batched(value: Tensor) -> bool:
    """Whether a value is many at once, under vmap or with `is_grads_batched`."""
    keys, parse = torch._C._dispatch_keys(value), torch._C._parse_dispatch_key
    return any(keys.has(parse(key)) for key in ("Batched", "FuncTorchBatched"))  # type: ignore[arg-type]


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for 16 bits, in which sums and statistics lose too much."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
