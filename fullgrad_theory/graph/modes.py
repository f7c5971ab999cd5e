"""Which modules do something else in training mode: those whose code asks for their mode."""

from __future__ import annotations

import dis
from collections.abc import Iterator
from functools import cache
from types import CodeType, FunctionType
from typing import Any

from torch import nn

_ABOUT_THE_FLAG = {"__init__", "__setstate__", "train", "eval", "extra_repr", "__repr__"}
_READS = {"LOAD_ATTR", "LOAD_METHOD", "LOAD_CONST"}


def acts_in_training(module: nn.Module) -> bool:
    """Whether a module's `training=True` may change what it computes.

    It may where the code of its class, or a function that this calls by name, reads an attribute
    `training`: a container, a linear layer, a wrapper of one's own do not. torch's own layers that
    drop nothing (`p`, or `dropout`, is 0) are the same in either mode.
    """
    rate = getattr(module, "p", getattr(module, "dropout", None))
    if type(module).__module__.startswith("torch.nn.") and isinstance(rate, (int, float)):
        return rate > 0
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    own = (v for v in (*vars(module).values(), *hooks) if isinstance(v, FunctionType))
    kind: Any = type(module)  # mypy takes a class for its instances, and those as unhashable
    return _asks(kind) or any(_reads_training(f, set()) for f in own)


@cache
def _asks(kind: type) -> bool:
    seen: set[CodeType] = set()
    for base in kind.__mro__:
        if base in (nn.Module, object):
            continue
        for name, value in vars(base).items():
            functions = _functions(value) if name not in _ABOUT_THE_FLAG else ()
            if any(_reads_training(function, seen) for function in functions):
                return True
    return False


def _functions(value: Any) -> Iterator[FunctionType]:
    """The functions behind a class's attribute."""
    parts = (value, *(getattr(value, n, None) for n in ("__func__", "fget", "__wrapped__", "func")))
    return (part for part in parts if isinstance(part, FunctionType))


def _reads_training(function: FunctionType, seen: set[CodeType]) -> bool:
    """Whether a function, or one beside it that it calls by name, reads `.training`."""
    codes = [function.__code__]
    for code in codes:
        if code in seen:
            continue
        seen.add(code)
        codes += [c for c in code.co_consts if isinstance(c, CodeType)]
        for step in dis.get_instructions(code):
            if step.opname in _READS and step.argval == "training":  # getattr's name is a constant
                return True
            if step.opname == "LOAD_GLOBAL":
                named = function.__globals__.get(step.argval)
                if (
                    isinstance(named, FunctionType)
                    and named.__module__ == function.__module__
                    and _reads_training(named, seen)
                ):
                    return True
    return False
