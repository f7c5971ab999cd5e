"""Graph modules that pass: torch.fx keeps the source of every one it ever made, for tracebacks.

A process that goes on judging models would grow by it. What is made for a while leaves nothing.
"""

from __future__ import annotations

import linecache
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.fx import GraphModule, graph_module


def unbound(module: GraphModule) -> GraphModule:
    """A module whose graph does not hold it, so that its tensors go as soon as nobody holds it.

    Its source goes with it.
    """
    module.graph.owning_module = None
    weakref.finalize(module, _forget_source_of, type(module)).atexit = False
    return module


def recompile(module: GraphModule) -> None:
    """Compile a module's graph again; the source it had is forgotten."""
    forget_inner(module)
    _forget_source_of(type(module))
    module.recompile()


def forget_inner(module: nn.Module) -> None:
    """Forget the sources of the graph modules in one: torch compiles them anew with it."""
    for part in module.modules():
        if part is not module and isinstance(part, GraphModule):
            _forget_source_of(type(part))


@contextmanager
def leaving_none() -> Iterator[None]:
    """The sources of graph modules made meanwhile are forgotten."""
    before = set(_sources())
    try:
        yield
    finally:
        for file in _sources().keys() - before:
            _forget(file)


def _forget_source_of(kind: type) -> None:
    _forget(getattr(getattr(kind.__dict__.get("forward"), "__code__", None), "co_filename", ""))


def _forget(file: str) -> None:
    if _sources().pop(file, None) is not None:
        linecache.cache.pop(file, None)


def _sources() -> dict[str, str]:
    """torch's own table, by the name that a traceback has for the file."""
    return getattr(getattr(graph_module, "_loader", None), "eval_cache", {})
