"""Containers that torch.export does not know, as plain ones: taken apart, and put together again.

Mappings (a processor's batch, a `ModelOutput`), dataclasses, named tuples and plain objects become
dicts; what is no tensor, number or text (a cache) becomes None.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

Part = tuple[str | int, Any]
Path = tuple[str | int, ...]

_NUMBERS = (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool, bool, int, float, str)
_NO_CONTAINERS = (nn.Module, type, FunctionType, MethodType, ModuleType)


def is_value(leaf: Any) -> bool:
    """Whether torch.export carries a leaf: a tensor, a number or a text, or None."""
    return leaf is None or isinstance(leaf, _NUMBERS)


def is_cache(value: Any) -> bool:
    """Whether a value is the keys and values of attention, or a state, kept for the next call."""
    return any("Cache" in kind.__name__ for kind in type(value).__mro__)


def is_named(value: Any) -> bool:
    """Whether the parts of a container have names."""
    if isinstance(value, (tuple, list)):
        return hasattr(value, "_fields")
    return parts(value) is not None


def parts(value: Any) -> list[Part] | None:
    """What a container holds, by name or by place; None for what is no container."""
    if is_value(value) or is_cache(value) or isinstance(value, _NO_CONTAINERS):
        return None
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, (tuple, list)):
        names = getattr(value, "_fields", None) or range(len(value))
        return list(zip(names, value, strict=True))
    if is_dataclass(value):
        return [(f.name, getattr(value, f.name, None)) for f in fields(value)]
    held = [(n, v) for n, v in getattr(value, "__dict__", {}).items() if not n.startswith("_")]
    return held if any(_holds_tensor(v) for _, v in held) else None


def _holds_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (
        isinstance(value, (tuple, list, Mapping)) and any(_holds_tensor(v) for _, v in _in(value))
    )


def _in(value: Any) -> list[Part]:
    return parts(value) or []


def leaves_of(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The leaves of nested containers with their paths, in the order of `plain`'s."""
    held = parts(value)
    if held is None:
        yield path, value
    else:
        for name, part in held:
            yield from leaves_of(part, (*path, name))


def plain(value: Any, any_leaf: bool = False) -> Any:
    """The same in tuples, lists and dicts alone; what is no value becomes None, but `any_leaf`."""
    held = parts(value)
    if held is None:
        return value if any_leaf or is_value(value) else None
    if not isinstance(value, (tuple, list)):
        return {name: plain(part, any_leaf) for name, part in held}
    made = [plain(part, any_leaf) for _, part in held]
    if type(value) in (tuple, list):
        return type(value)(made)
    return type(value)(*made) if hasattr(value, "_fields") else tuple(made)


def ordered_as(example: Any, value: Any) -> Any:
    """A plain container with its dicts in the order of another's keys, which they have too."""
    if isinstance(example, dict) and isinstance(value, dict):
        order = [n for n in example if n in value] + [n for n in value if n not in example]
        return {n: ordered_as(example.get(n), value[n]) for n in order}
    alike = isinstance(example, (tuple, list)) and type(example) is type(value)
    if not alike or hasattr(value, "_fields") or len(example) != len(value):
        return value
    return type(value)(ordered_as(e, v) for e, v in zip(example, value, strict=True))


@dataclass(frozen=True)
class Form:
    """What a plain container is made into again: the kind of it and of its parts, no values.

    `shell`: an empty one of that kind, for what is not made from its parts alone.
    """

    kind: type
    parts: Mapping[Any, Form]
    shell: Any = None

    def restored(self, value: Any) -> Any:
        """The container as it was, of a plain one's parts."""
        if value is None:
            return None
        named = isinstance(value, Mapping)
        held = dict(value) if named else dict(enumerate(value))
        held = {n: self.parts[n].restored(v) if n in self.parts else v for n, v in held.items()}
        if not named:
            sequence = list(held.values())
            if hasattr(self.kind, "_fields"):
                return self.kind(*sequence)
            return self.kind(sequence)
        if self.kind is dict:
            return held
        if issubclass(self.kind, Mapping) and is_dataclass(self.kind):  # a ModelOutput
            return self.kind(**held)
        made = copy.copy(self.shell)
        if issubclass(self.kind, Mapping):
            made.update(held)
        else:
            for name, part in held.items():
                object.__setattr__(made, str(name), part)
        return made


def form_of(value: Any) -> Form | None:
    """How to make a container again; None for a leaf."""
    held = parts(value)
    if held is None:
        return None
    names = [n for n, _ in held]
    if isinstance(value, (tuple, list)):
        names = list(range(len(held)))
    inner = {n: form_of(part) for n, (_, part) in zip(names, held, strict=True)}
    known = {n: form for n, form in inner.items() if form is not None}
    if isinstance(value, Mapping) and (type(value) is dict or is_dataclass(value)):
        return Form(type(value), known)
    if isinstance(value, (tuple, list)):
        return Form(type(value), known)
    return Form(type(value), known, _emptied(value, [n for n, _ in held]))


def same_form(form: Form) -> bool:
    """Whether containers are plain ones already."""
    known = form.kind in (tuple, list, dict) or hasattr(form.kind, "_fields")
    return known and all(map(same_form, form.parts.values()))


def _emptied(value: Any, names: list[Any]) -> Any:
    """A copy of a container without what it holds."""
    try:
        shell = copy.copy(value)
        if isinstance(value, Mapping):
            shell.clear()  # type: ignore[attr-defined]
            return shell
    except (AttributeError, TypeError):  # a mapping that cannot be written to
        return {}
    hidden = [n for n, v in getattr(shell, "__dict__", {}).items() if not is_value(v)]
    tensors = [n for n, v in getattr(shell, "__dict__", {}).items() if isinstance(v, Tensor)]
    for name in dict.fromkeys([*names, *hidden, *tensors]):
        object.__setattr__(shell, name, None)
    return shell
