"""Whole modules and autograd.Functions as one node: called, never entered, their backward kept.

While torch.export runs, each call of a leaf is a call of an operation made for it; afterwards that
node's target is a `Leaf`, which calls the module or the Function itself, autograd included.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd import Function
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import InputError, TraceError, unknown_name
from .sources import first_line

LeafSpec = type[nn.Module] | type[Function] | str
"""what is kept whole: a module class, an autograd.Function, or the path of a module"""
_numbers = itertools.count()


class Leaf(nn.Module):
    """One call of a module or Function over a flat list of tensors, the operands of its node.

    A module's parameters and buffers are operands as its inputs are. Returns a tensor, or a tuple
    of them. `__name__` in `__module__`: `leaf.<class>.default`, the name to register it by.
    """

    def __init__(self, owner: nn.Module | type[Function], args: Any, kwargs: Any) -> None:
        super().__init__()
        self.owner, self.training = owner, False
        kind = type(owner) if isinstance(owner, nn.Module) else owner
        self.__module__, self.__name__ = "leaf", f"{kind.__name__}.default"
        self.state = tuple(_state(owner))
        leaves, self.spec = pytree.tree_flatten((args, kwargs))
        self.places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.fixed = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.names = tuple(_sanitised([*_names(owner, args, kwargs), *self.state]))
        self.aliases = False
        """whether a result shares memory with an operand"""

    @property
    def _schema(self) -> Any:
        return torch._C.parse_schema(f"leaf::{self.__name__.split('.')[0]}{self.signature}")

    @property
    def signature(self) -> str:
        """The operands as torch's schema language has them."""
        return f"({', '.join(f'Tensor {name}' for name in self.names)}) -> Tensor[]"

    def forward(self, *operands: Tensor) -> Any:
        results = [t for t in pytree.tree_leaves(self.run(operands)) if isinstance(t, Tensor)]
        return results[0] if len(results) == 1 else tuple(results)

    def run(self, operands: Sequence[Tensor]) -> Any:
        """What the module or Function itself returns."""
        leaves = list(self.fixed)
        for place, tensor in zip(self.places, operands, strict=False):
            leaves[place] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        if isinstance(self.owner, nn.Module):
            state = dict(zip(self.state, operands[len(self.places) :], strict=True))
            return torch.func.functional_call(self.owner, state, args, kwargs)
        return self.owner.apply(*args, **kwargs)


def _state(owner: nn.Module | type[Function]) -> dict[str, Tensor]:
    if not isinstance(owner, nn.Module):
        return {}
    return {**dict(owner.named_parameters()), **dict(owner.named_buffers())}


def _names(owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[str]:
    """A name for each tensor among the arguments: forward's own, numbered inside a container."""
    is_function = not isinstance(owner, nn.Module)
    context = is_function and owner.setup_context is Function.setup_context
    given = (None, *args) if context else args
    try:
        arguments = dict(inspect.signature(owner.forward).bind(*given, **kwargs).arguments)
    except (TypeError, ValueError):
        arguments = {f"arg{i}": a for i, a in enumerate(given)} | kwargs
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            yield name
        else:
            held = [v for v in pytree.tree_leaves(value) if isinstance(v, Tensor)]
            yield from (f"{name}_{i}" for i in range(len(held)))


def _sanitised(names: list[str]) -> Iterator[str]:
    taken: set[str] = set()
    for name in names:
        fitting = re.sub(r"\W", "_", name)
        while fitting in taken:
            fitting += "_"
        taken.add(fitting)
        yield fitting


class Leaves:
    """The leaves of one model: found at the door, installed for an export, written into its graph.

    Raises `InputError` or `UnknownNameError` for a leaf that the model does not have.
    """

    def __init__(self, module: nn.Module, specs: Collection[LeafSpec]) -> None:
        if isinstance(specs, (str, type)):
            raise InputError(f"leaves is a tuple: leaves=({specs!r},)")
        self.specs = tuple(specs)
        self.made: dict[Any, Leaf] = {}
        self.functions = [s for s in self.specs if isinstance(s, type) and issubclass(s, Function)]
        kinds = [s for s in self.specs if isinstance(s, type) and issubclass(s, nn.Module)]
        named = dict(module.named_modules())
        for spec in self.specs:
            if isinstance(spec, str) and spec not in named:
                raise unknown_name("module", spec, filter(None, named))
            if not isinstance(spec, str) and spec not in self.functions and spec not in kinds:
                raise InputError(
                    f"{spec!r} is no leaf: pass module classes, autograd.Functions or module paths"
                )
        self.modules: list[tuple[str, nn.Module, nn.Module]] = []
        """path, module, and a copy of its own that shares its parameters"""
        inside: set[int] = set()
        for path, sub in named.items():
            if id(sub) not in inside and (path in self.specs or isinstance(sub, tuple(kinds))):
                inside |= {id(m) for m in sub.modules()}
                self.modules.append((path, sub, _sharing_copy(path, sub)))
        by_name: dict[str, type] = {}
        for kind in (*(type(sub) for _, sub, _ in self.modules), *self.functions):
            if by_name.setdefault(kind.__name__, kind) is not kind:
                raise InputError(f"two leaves are named {kind.__name__}: rename one of the classes")

    @contextmanager
    def installed(self) -> Iterator[None]:
        """For the time of an export, calls of the leaves are calls of operations made for them."""
        self.made = {}
        if not self.specs:
            yield
            return
        space = f"fullgrad_leaves_{next(_numbers)}"
        with torch.library._scoped_library(space, "FRAGMENT") as library, ExitStack() as undo:
            recorder = _Recorder(library, self.made)
            for _, module, shell in self.modules:
                plain = module._compiled_call_impl or module._call_impl
                _set(undo, module, "_compiled_call_impl", recorder.of_module(module, shell, plain))
            for function in self.functions:
                plain = inspect.getattr_static(function, "apply")
                _set(undo, function, "apply", recorder.of_function(plain))
            yield

    def write(self, module: fx.GraphModule) -> None:
        """Make the leaves themselves the targets of their nodes."""
        called = set()
        for node in list(module.graph.nodes):
            leaf = self.made.get(node.target) if node.op == "call_function" else None
            if leaf is None:
                continue
            called.add(leaf.owner)
            node.target = leaf
            if len(node.meta["val"]) == 1:
                node.meta["val"] = node.meta["val"][0]
                for item in list(node.users):
                    item.replace_all_uses_with(node)
                    module.graph.erase_node(item)
        for spec in self.specs:
            owners = [
                shell
                for path, sub, shell in self.modules
                if path == spec or (isinstance(spec, type) and isinstance(sub, spec))
            ]
            fitting = any(o is spec or any(o is shell for shell in owners) for o in called)
            if not fitting and (owners or spec in self.functions):
                name = spec if isinstance(spec, str) else spec.__name__
                how = f"{name}.apply(...)" if spec in self.functions else "module(...)"
                raise InputError(
                    f"the leaf {name} is never called as {how} where the trace sees it; it may be "
                    "inside another leaf, or its result unused"
                )

    def check_writes(self, writes: bool) -> None:
        """Refuse in-place writes beside a leaf whose result shares memory with what it reads."""
        leaf = next((m for m in self.made.values() if m.aliases), None)
        if writes and leaf is not None:
            raise TraceError(
                f"leaf {leaf.__name__} returns memory of what it reads, and the model writes in "
                "place: nobody can tell to what; return a clone() from it"
            )


class _Recorder:
    """Turns a call into a call of an operation of its own, which export records as one node."""

    def __init__(self, library: Any, made: dict[Any, Leaf]) -> None:
        self.library, self.made = library, made
        self.inside = False
        """in a leaf already: everything is called as ever"""

    def of_module(
        self, module: nn.Module, shell: nn.Module, plain: Callable[..., Any]
    ) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.inside:
                return plain(*args, **kwargs)
            return self.record(Leaf(shell, args, kwargs), args, kwargs, _state(module))

        return call

    def of_function(self, plain: Any) -> Any:
        def apply(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
            if self.inside:
                return plain.__get__(None, cls)(*args, **kwargs)
            return self.record(Leaf(cls, args, kwargs), args, kwargs, {})

        return classmethod(apply)

    def record(self, leaf: Leaf, args: Any, kwargs: Any, state: dict[str, Tensor]) -> Any:
        results: list[Any] = []

        def fake(*operands: Tensor) -> list[Tensor]:
            self.inside = True
            try:
                with _NoWrites(leaf.__name__, operands):
                    results[:] = pytree.tree_flatten(leaf.run(operands))
            finally:
                self.inside = False
            memory = {_memory(t) for t in operands}
            tensors = [v for v in results[0] if isinstance(v, Tensor)]
            leaf.aliases = any(_memory(t) in memory for t in tensors)
            return [t.clone() if _memory(t) in memory else t for t in tensors]

        name = f"{leaf.__name__.split('.')[0]}_{len(self.made)}"
        self.library.define(name + leaf.signature)
        torch.library.register_fake(f"{self.library.ns}::{name}", fake, lib=self.library)
        operation = getattr(getattr(torch.ops, self.library.ns), name).default
        self.made[operation] = leaf
        leaves = pytree.tree_leaves((args, kwargs))
        found = iter(operation(*(leaves[i] for i in leaf.places), *state.values()))
        flat, spec = results
        return pytree.tree_unflatten(
            [next(found) if isinstance(v, Tensor) else v for v in flat], spec
        )


class _NoWrites(TorchDispatchMode):
    """Refuses a leaf that writes to what it reads: its node would hide that."""

    def __init__(self, name: str, operands: Sequence[Tensor]) -> None:
        super().__init__()
        self.name, self.memory = name, {_memory(t) for t in operands}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = zip(func._schema.arguments, args, strict=False)
        for argument, value in named:
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and isinstance(value, Tensor) and _memory(value) in self.memory:
                raise TraceError(
                    f"leaf {self.name} writes in place to what it reads ({func}); clone() it there"
                )
        return func(*args, **(kwargs or {}))


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _sharing_copy(path: str, module: nn.Module) -> nn.Module:
    """A module of its own with the same parameters and buffers: what is swapped in is not seen."""
    tensors: Any = [*module.parameters(), *module.buffers()]
    try:
        return copy.deepcopy(module, {id(t): t for t in tensors})
    except Exception as error:
        raise InputError(f"leaf {path!r} cannot be copied: {first_line(error)}") from error


def _set(undo: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute of an object or class, and undo exactly that."""
    had, old = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)
    undo.callback(lambda: setattr(owner, name, old) if had else delattr(owner, name))
