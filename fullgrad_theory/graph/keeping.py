"""Nothing that running a user's code writes stays: attributes, caches, globals are put back.

What the code can reach is found before it runs, by the names that it reads, and compared behind.
"""

from __future__ import annotations

import functools
import gc
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FunctionType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .door import Model, modules_of

_ALONE = threading.RLock()
_GONE = object()
_FOREIGN = frozenset(sys.stdlib_module_names) | {
    "torch", "numpy", "sympy", "networkx", "scipy", "fullgrad_theory", "pytest", "_pytest",
}  # fmt: skip
"""packages whose code keeps no tensors of a model's, or whose own state is not to be touched"""
_OPAQUE = ("torch", "numpy", "sympy", "builtins", "logging")
"""packages whose objects are not looked into"""
_PLAIN = (str, bytes, int, float, complex, type(None), type(...), CodeType, BuiltinFunctionType)
_MOST = 200_000
"""objects looked at, at most"""
_LRU = type(functools.lru_cache(lambda: None))


@contextmanager
def alone() -> Iterator[None]:
    """One thread at a time: an export, and a run of the user's code, patch what is process-wide."""
    with _ALONE:
        yield


# --------------------------------------------------------------------------- what is process-wide


class _Mute:
    """A stream that drops what one thread writes; others (a progress bar) go on."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.thread = stream, threading.get_ident()

    def write(self, text: str) -> int:
        quiet = threading.get_ident() == self.thread
        return len(text) if quiet else int(self.stream.write(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def muted() -> Iterator[None]:
    """torch.export writes pages to stderr when it fails; the error raised says what matters."""
    with alone(), redirect_stderr(_Mute(sys.stderr)):
        yield


@contextmanager
def without_fast_path() -> Iterator[None]:
    """torch's own layers leave their kernels for inference alone, which round differently."""
    with alone():
        before = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def eagerly() -> Iterator[None]:
    """What torch.compile compiled runs as it is written."""
    with alone(), torch.compiler.set_stance("force_eager"):
        yield


def untouched(model: Model, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the model returns; whatever its code writes to itself or to its inputs is undone."""
    module = nn.ModuleList(modules_of(model))
    held = [(t, t.detach().clone()) for t in (*module.parameters(), *module.buffers())]
    given, named = pytree.tree_map_only(Tensor, Tensor.clone, (args, kwargs))
    with alone():
        try:
            with kept(module, model), eagerly():
                return model(*given, **named)
        finally:
            for tensor, value in held:
                if not tensor.is_meta and not torch.equal(tensor, value):
                    tensor.data.copy_(value)


# --------------------------------------------------------------------------- what is put back


@contextmanager
def kept(*models: Any) -> Iterator[None]:
    """Undo what running the code of models sets on them, and what it leaves in caches elsewhere.

    Attributes of modules, and containers in them, are as they were before. Of what is shared (a
    global, a class, a default argument, an lru_cache) only what now holds another tensor, or a
    size that was traced, is put back: the rest may be another thread's.
    """
    found = _Reach()
    for model in models:
        found.own(model)
    found.follow()
    try:
        yield
    finally:
        for place in found.places:
            place.restore()


class _Reach:
    """What the code of a model can write to: its places, each with what was there."""

    def __init__(self) -> None:
        self.seen: dict[int, Any] = {}  # the objects stay alive, or their ids would mean others
        self.places: list[_Place] = []
        self.queue: deque[tuple[Any, bool]] = deque()
        self.names: set[tuple[int, str]] = set()

    def own(self, model: Any) -> None:
        """A model, of which all is put back."""
        self.queue.append((model, True))

    def follow(self) -> None:
        while self.queue and len(self.seen) < _MOST:
            value, owned = self.queue.popleft()
            if id(value) not in self.seen:
                self.seen[id(value)] = value
                self._visit(value, type(value), owned)

    def _later(self, values: Iterable[Any], owned: bool = False) -> None:
        kinds = (*_PLAIN, Tensor)
        self.queue.extend((v, owned) for v in values if not issubclass(type(v), kinds))

    def _visit(self, value: Any, kind: type, owned: bool) -> None:
        if issubclass(kind, nn.Module):
            self._entries(vars(value), True)
            self._later([kind])
        elif issubclass(kind, dict):
            self._entries(value, owned)
        elif issubclass(kind, (list, deque, set)):
            self.places.append(_Sequence(value, owned))
            self._later(value.copy(), owned)
        elif issubclass(kind, (tuple, frozenset)):
            self._later(value, owned)
        elif issubclass(kind, _LRU):
            self.places.append(_Cache(value))
            self._later([value.__wrapped__])
        elif issubclass(kind, FunctionType):
            self._function(value)
        elif issubclass(kind, MethodType):
            self._later([value.__self__], owned)
            self._later([value.__func__])
        elif issubclass(kind, functools.partial):
            self._later([value.func, value.args, value.keywords], owned)
        elif issubclass(kind, CellType):
            self.places.append(_Cell(value))
            self._later([self.places[-1].before])
        elif issubclass(kind, type):
            self._class(value)
        elif issubclass(kind, (staticmethod, classmethod)):
            self._later([value.__func__])
        elif issubclass(kind, property):
            self._later([value.fget, value.fset])
        elif issubclass(kind, functools.cached_property):
            self._later([value.func])
        elif not issubclass(kind, ModuleType):  # of a module only what is read of it by name
            self._instance(value, kind, owned)

    def _entries(self, entries: dict[Any, Any], owned: bool) -> None:
        self.places.append(_Entries(entries, owned))
        self._later(dict.values(entries), owned)

    def _instance(self, value: Any, kind: type, owned: bool) -> None:
        """Of a class of the user's it is the model's, as its attributes are."""
        foreign = _is_foreign(kind.__module__)
        if foreign and kind.__module__.partition(".")[0] in _OPAQUE:
            return
        attributes = getattr(value, "__dict__", None)
        if type(attributes) is dict:
            self._entries(attributes, owned and not foreign)
        if not foreign:
            names = [n for base in kind.__mro__ for n in _slot_names(base)]
            if names:
                self.places.append(_Slots(value, names, owned))
                self._later(self.places[-1].before.values(), owned)
            self._later([kind])

    def _class(self, kind: type) -> None:
        for base in kind.__mro__:
            if not _is_foreign(base.__module__) and (base is kind or id(base) not in self.seen):
                self.seen[id(base)] = base
                self.places.append(_OfClass(base))
                self._later(list(vars(base).values()))

    def _function(self, function: FunctionType) -> None:
        self._later([*(function.__closure__ or ()), function.__defaults__, function.__kwdefaults__])
        if _is_foreign(function.__module__):
            self._later([vars(function)] if vars(function) else [])
            return
        self._later([vars(function)])
        names, space = _names_in(function.__code__), function.__globals__
        for name in names:
            self._global(space, name)
            value = space.get(name)
            if isinstance(value, ModuleType) and not _is_foreign(value.__name__):
                for inner in names:
                    self._global(vars(value), inner)

    def _global(self, space: dict[str, Any], name: str) -> None:
        if (id(space), name) not in self.names:
            self.names.add((id(space), name))
            self.places.append(_Global(space, name))
            self._later([self.places[-1].before])


def _is_foreign(module: str | None) -> bool:
    return (module or "").partition(".")[0] in _FOREIGN


def _slot_names(kind: type) -> list[str]:
    return [n for n, d in vars(kind).items() if isinstance(d, MemberDescriptorType)]


@functools.lru_cache(10_000)
def _names_in(code: CodeType) -> tuple[str, ...]:
    """The names that code reads and writes: globals, attributes, those of functions in it."""
    inner = (c for c in code.co_consts if isinstance(c, CodeType))
    return tuple(dict.fromkeys([*code.co_names, *(n for c in inner for n in _names_in(c))]))


# --------------------------------------------------------------------------- places


class _Place(Protocol):
    """Something that code can write to. `before`: what was there."""

    before: Any

    def restore(self) -> None: ...


class _Entries:
    """A dict, or the attributes of an object."""

    def __init__(self, entries: dict[Any, Any], owned: bool) -> None:
        self.entries, self.owned, self.before = entries, owned, _raw(entries)
        self.base: Any = OrderedDict if isinstance(entries, OrderedDict) else dict

    def restore(self) -> None:
        now = _raw(self.entries)
        if not self.owned and not any(
            v is not self.before.get(k, _GONE) and _holds_tensor(v) for k, v in now.items()
        ):
            return
        for key, value in now.items():
            if key not in self.before and (self.owned or _holds_tensor(value)):
                self.base.__delitem__(self.entries, key)
        for key, value in self.before.items():
            other = now.get(key, _GONE)
            if other is not value and (self.owned or other is _GONE or _holds_tensor(other)):
                self.base.__setitem__(self.entries, key, value)


def _raw(entries: dict[Any, Any]) -> dict[Any, Any]:
    """What a dict holds, whatever a subclass makes of it when it is asked."""
    return dict(dict.items(entries))


class _Sequence:
    """A list, a deque or a set."""

    def __init__(self, values: Any, owned: bool) -> None:
        self.values, self.owned, self.before = values, owned, values.copy()

    def restore(self) -> None:
        old, now = {id(v) for v in self.before}, self.values.copy()
        if [*map(id, now)] == [*map(id, self.before)]:
            return
        if self.owned or any(id(v) not in old and _holds_tensor(v) for v in now):
            self.values.clear()
            add = self.values.update if isinstance(self.values, set) else self.values.extend
            add(self.before)


class _Written:
    """A place of one value: it is written back where it holds another tensor now."""

    def read(self) -> Any:
        raise NotImplementedError

    def write(self, value: Any) -> None:
        raise NotImplementedError

    before: Any

    def restore(self) -> None:
        now = self.read()
        if now is not self.before and _holds_tensor(now):
            self.write(self.before)


class _Cell(_Written):
    """A variable of an enclosing function."""

    def __init__(self, cell: CellType) -> None:
        self.cell = cell
        self.before = self.read()

    def read(self) -> Any:
        try:
            return self.cell.cell_contents
        except ValueError:  # empty
            return _GONE

    def write(self, value: Any) -> None:
        if value is _GONE:
            del self.cell.cell_contents
        else:
            self.cell.cell_contents = value


class _Global(_Written):
    """A name in a module."""

    def __init__(self, space: dict[str, Any], name: str) -> None:
        self.space, self.name = space, name
        self.before = self.read()

    def read(self) -> Any:
        return self.space.get(self.name, _GONE)

    def write(self, value: Any) -> None:
        if value is _GONE:
            del self.space[self.name]
        else:
            self.space[self.name] = value


class _Slots:
    """The slots of an object."""

    def __init__(self, owner: Any, names: Sequence[str], owned: bool) -> None:
        self.owner, self.names, self.owned = owner, names, owned
        self.before = self._read()

    def _read(self) -> dict[str, Any]:
        return {n: getattr(self.owner, n) for n in self.names if hasattr(self.owner, n)}

    def restore(self) -> None:
        for name, now in self._read().items():
            old = self.before.get(name, _GONE)
            if now is old or not (self.owned or _holds_tensor(now)):
                continue
            if old is _GONE:
                object.__delattr__(self.owner, name)
            else:
                object.__setattr__(self.owner, name, old)


class _OfClass:
    """The attributes of a class."""

    def __init__(self, owner: type) -> None:
        self.owner, self.before = owner, dict(vars(owner))

    def restore(self) -> None:
        for name, now in dict(vars(self.owner)).items():
            old = self.before.get(name, _GONE)
            if now is old or not _holds_tensor(now):
                continue
            if old is _GONE:
                delattr(self.owner, name)
            else:
                setattr(self.owner, name, old)


class _Cache:
    """What functools.lru_cache keeps: it cannot be put back, so that it is cleared."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache
        self.before = self._held()

    def _held(self) -> list[Any]:
        if not self.cache.cache_info().currsize:
            return []
        return [t for v in gc.get_referents(self.cache) for t in _tensors_in(v)]

    def restore(self) -> None:
        known = {id(t) for t in self.before}
        if any(id(t) not in known for t in self._held()):
            self.cache.cache_clear()


_TRACED = (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)


def _holds_tensor(value: Any) -> bool:
    return any(True for _ in _tensors_in(value))


def _tensors_in(value: Any) -> Iterator[Any]:
    """The tensors, and the sizes that an export traced, in nested containers and objects."""
    queue: deque[Any] = deque([value])
    seen: dict[int, Any] = {}
    while queue and len(seen) < 10_000:
        one = queue.popleft()
        kind = type(one)
        if id(one) in seen or issubclass(kind, _PLAIN):
            continue
        seen[id(one)] = one
        if issubclass(kind, _TRACED):
            yield one
        elif issubclass(kind, FunctionType):
            queue.extend(one.__closure__ or ())
        elif not issubclass(kind, (type, ModuleType)):
            queue.extend(gc.get_referents(one))
