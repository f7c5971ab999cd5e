"""Functions of this library as single calls in an fx graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch.overrides import handle_torch_function, has_torch_function

P = ParamSpec("P")
R = TypeVar("R")


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


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for 16 bits, in which sums and statistics lose too much."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
