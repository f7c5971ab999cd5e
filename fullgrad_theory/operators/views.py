"""Views: how what is written through one comes back to what it is a view of.

A view without an entry here can be read after a write, and not written through.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .calls import bind

aten = torch.ops.aten
Emitted = tuple[Any, tuple[Any, ...]]
Back = Callable[[fx.Node, fx.Node, Any], Emitted]
"""(the view's node, what it is a view of now, what was written) -> target and arguments of the call
that gives what the base holds afterwards"""


@dataclass(frozen=True)
class View:
    """A result in its operand's memory. `back`: see `Back`, None where nothing comes back.

    `relaid`: the operation of the same values for an operand whose strides have changed.
    `of_memory`: what it shows depends on those strides, so there is no such operation.
    """

    back: Back | None
    relaid: Any = None
    of_memory: bool = False


def _reshaped(view: fx.Node, base: fx.Node, value: Any) -> Emitted:
    return aten.reshape_as.default, (value, base)


def _swapped(view: fx.Node, base: fx.Node, value: Any) -> Emitted:
    return aten.transpose.int, (value, *list(bind(view).values())[1:3])


def _swapping(first: int, second: int) -> Back:
    return lambda view, base, value: (aten.transpose.int, (value, first, second))


def _permuted(view: fx.Node, base: fx.Node, value: Any) -> Emitted:
    dims = bind(view)["dims"]
    order = [int(d) % len(dims) for d in dims]
    return aten.permute.default, (value, sorted(range(len(dims)), key=order.__getitem__))


def _reversed(view: fx.Node, base: fx.Node, value: Any) -> Emitted:
    return aten.permute.default, (value, list(reversed(range(len(base.meta["val"].shape)))))


def _moved(view: fx.Node, base: fx.Node, value: Any) -> Emitted:
    bound = bind(view)
    return view.target, (value, bound["destination"], bound["source"])


def _narrowed(view: fx.Node, base: fx.Node, value: Any) -> Emitted | None:
    bound = bind(view)
    start, length = bound["start"], bound["length"]
    if not isinstance(start, int):
        return None
    end = start + length if start >= 0 or start + length < 0 else None
    return aten.slice_scatter.default, (base, value, bound["dim"], start, end)


def scattered(into: Any) -> View:
    """A part of the operand: `into(base, value, *the view's other arguments)` puts it back."""
    return View(lambda view, base, value: (into, (base, value, *list(bind(view).values())[1:])))


def joined(by: Any) -> View:
    """Pieces along `dim`, which `by` (cat, stack) puts side by side again."""
    return View(lambda view, base, value: (by, (value, bind(view)["dim"])))


RESHAPED = View(_reshaped)
VIEWED = View(_reshaped, relaid=aten.reshape.default)
VIEWED_AS = View(_reshaped, relaid=aten.reshape_as.default)
SWAPPED = View(_swapped)
TRANSPOSED = View(_swapping(0, 1))
LAST_TRANSPOSED = View(_swapping(-2, -1))
PERMUTED = View(_permuted)
REVERSED = View(_reversed)
MOVED = View(_moved)
NARROWED = View(_narrowed)  # type: ignore[arg-type]
SLICED = scattered(aten.slice_scatter.default)
SELECTED = scattered(aten.select_scatter.default)
DIAGONAL = scattered(aten.diagonal_scatter.default)
SPLIT = joined(aten.cat.default)
UNBOUND = joined(aten.stack.default)
OF_MEMORY = View(None, of_memory=True)
