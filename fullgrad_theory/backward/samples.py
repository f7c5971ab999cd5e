"""Which dimension of every value is the batch, and whether samples meet.

Found by running the graph: what one sample is made of is set to NaN, and then to other numbers, and
whatever of a value changes belongs to that sample. Where it is one place of one dimension, and the
same place, that dimension holds samples which never meet. NaN goes through a maximum or a sort that
other numbers may not change; other numbers go through a `nan_to_num`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice, product
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..errors import InputError
from ..graph.computation import ComputationGraph

MOST_TRIES = 16
"""assignments of dimensions to inputs that are tried"""

Place = tuple[str, int]
"""a node, and which of its outputs"""


@dataclass(frozen=True)
class Samples:
    """`sources`: source node -> its batch dimension, None where samples share it. `output`: that of
    the output, None where all is one sample. `nodes`: (node, output index) -> its batch dimension;
    one that is missing has the batch folded into another, or holds nothing of the samples."""

    sources: Mapping[str, int | None]
    output: int | None
    nodes: Mapping[Place, int]

    def front(self, output: Tensor) -> Tensor:
        """An output with its samples in front, (n, *rest); of one sample (1, *shape)."""
        return output.unsqueeze(0) if self.output is None else output.movedim(self.output, 0)

    def back(self, front: Tensor) -> Tensor:
        """The inverse of `front`."""
        return front.squeeze(0) if self.output is None else front.movedim(0, self.output)


def samples_of(
    module: fx.GraphModule,
    graph: ComputationGraph,
    sources: Sequence[str],
    watched: Sequence[str],
    batch: int | str | None = "auto",
) -> Samples:
    """The samples of a (rewritten) graph at its example inputs; `watched` nodes are told apart too.

    `batch`: "auto" looks for them, a number is the dimension that holds them in every input, None
    takes all as one sample. Raises `InputError` where they meet along the `batch` that was named.
    """
    whole = Samples(dict.fromkeys(sources), None, {})
    if batch is None:
        return whole
    flat = _flat(graph)
    with torch.no_grad():
        try:
            look = _Look(module, [_two_samples(v, graph.dynamic) for v in flat], sources, watched)
        except (RuntimeError, IndexError, ValueError):  # it runs for this size alone
            look = _Look(module, flat, sources, watched)
        shapes = {name: tuple(t.shape) for name, t in look.sources.items()}
        if isinstance(batch, int):
            return _named(look, shapes, batch)
        for dims in _assignments(shapes):
            found = look.samples(dims)
            if found is not None:
                return found
        at = look.by_ids()
    # the sources have the batch in none of their own dimensions
    return whole if at is None else replace(whole, output=at)


def _flat(graph: ComputationGraph) -> list[Any]:
    return pytree.tree_leaves((graph.args, graph.kwargs))


def _two_samples(value: Any, open_batch: bool) -> Any:
    few = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] < 2
    return torch.cat([value, value]) if few and open_batch else value


def _named(look: _Look, shapes: Mapping[str, tuple[int, ...]], batch: int) -> Samples:
    lacking = [name for name, shape in shapes.items() if not -len(shape) <= batch < len(shape)]
    if lacking:
        shape = shapes[lacking[0]]
        raise InputError(
            f"batch={batch}: the input {lacking[0]} of shape {shape} has no such dimension"
        )
    dims = {name: batch % len(shape) for name, shape in shapes.items()}
    sizes = {shape[dims[name]] for name, shape in shapes.items()}
    if len(sizes) > 1:
        raise InputError(f"batch={batch}: the inputs' sizes there differ, {sorted(sizes)}")
    if sizes == {1}:  # nothing to tell apart
        rank = look.output.dim()
        return Samples(dims, batch % rank if -rank <= batch < rank else None, {})
    found = look.samples(dims)
    if found is None:
        raise InputError(
            f"batch={batch}: samples meet along this dimension, an output of one depends on "
            "another; leave batch out, or pass batch=None to take the whole as one sample"
        )
    return found


def _assignments(shapes: Mapping[str, tuple[int, ...]]) -> list[dict[str, int | None]]:
    """Which dimension of each source may be the batch: the first of all, the second of all ...,
    then any of one size; sources without a dimension of that size are shared.

    The last of several dimensions holds features: `x.cumsum(0)` is one sample, not one a column.
    """
    free = {name: shape if len(shape) == 1 else shape[:-1] for name, shape in shapes.items()}
    sizes = list(dict.fromkeys(n for shape in free.values() for n in shape if n > 1))
    deepest = max(map(len, free.values()), default=0)
    alike: list[dict[str, int | None]] = [
        {name: dim if dim < len(s) and s[dim] == n else None for name, s in free.items()}
        for dim in range(deepest)
        for n in sizes
    ]
    alike.sort(key=lambda dims: sum(d is None for d in dims.values()))
    any_of_size: list[dict[str, int | None]] = []
    for n in sizes:
        places: list[list[int | None]] = [
            [d for d, m in enumerate(s) if m == n] or [None] for s in free.values()
        ]
        chosen = islice(product(*places), MOST_TRIES)
        any_of_size += [dict(zip(free, dims, strict=True)) for dims in chosen]
    tried: list[dict[str, int | None]] = []
    for dims in (*alike, *any_of_size):
        if dims not in tried and any(d is not None for d in dims.values()):
            tried.append(dims)
    return tried[:MOST_TRIES]


class _Watching(fx.Interpreter):
    """Runs the graph with its sources replaced, and shows each node's value to `seen`."""

    def __init__(
        self,
        module: fx.GraphModule,
        replaced: Mapping[str, Tensor],
        seen: Callable[[fx.Node, Any], None],
    ) -> None:
        super().__init__(module)
        self.replaced, self.seen = replaced, seen

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)  # of a placeholder too, which takes the next argument
        value = self.replaced.get(n.name, value)
        self.seen(n, value)
        return value


class _Look:
    """Runs of one graph whose sources are changed in one sample."""

    def __init__(
        self,
        module: fx.GraphModule,
        given: Sequence[Any],
        sources: Collection[str],
        watched: Collection[str],
    ) -> None:
        self.module, self.given, self.watched = module, given, frozenset(watched)
        self.sources: dict[str, Tensor] = {}

        def seen(n: fx.Node, value: Any) -> None:
            if n.name in sources:
                self.sources[n.name] = value

        self.output = self._run({}, seen)

    def _run(
        self,
        replaced: Mapping[str, Tensor],
        seen: Callable[[fx.Node, Any], None],
        given: Sequence[Any] | None = None,
    ) -> Tensor:
        flat = self.given if given is None else given
        made = _Watching(self.module, replaced, seen).run(*flat, enable_io_processing=False)
        return next(t for t in pytree.tree_leaves(made) if isinstance(t, Tensor))

    def by_ids(self) -> int | None:
        """The output's batch dimension where integers are looked up in another order than theirs:
        what it is that changes with a sample's. None where samples meet, or nothing changes."""
        sizes = {v.shape[0] for v in self.given if isinstance(v, Tensor) and v.dim()}
        if len(sizes) != 1 or min(sizes) < 2:
            return None
        (count,) = sizes
        found = set(range(self.output.dim()))
        for k in dict.fromkeys((0, count - 1)):
            given = [_with_ids_of(v, k) for v in self.given]
            made = self._run({}, lambda n, v: None, given)
            differs = made.shape == self.output.shape and _differs(made, self.output)
            found &= _places(differs, k, count) if isinstance(differs, Tensor) else set()
        return min(found, default=None)

    def samples(self, dims: Mapping[str, int | None]) -> Samples | None:
        """The samples along these dimensions of the sources; None where they meet."""
        count = next(self.sources[n].shape[d] for n, d in dims.items() if d is not None)
        output = set(range(self.output.dim()))
        nodes: dict[Place, set[int]] = {}
        ran = False
        for k, fill in product(dict.fromkeys((0, count - 1)), (_nothing, _other)):
            held: dict[Place, set[int]] = {}

            def seen(n: fx.Node, value: Any, k: int = k, held: Any = held) -> None:
                if n.name in self.watched:
                    held |= {(n.name, i): _places(v.isnan(), k, count) for i, v in _tensors(value)}

            with suppress(RuntimeError, ValueError, IndexError):  # an operation refuses NaN
                changed = _changed(self.sources, dims, k, fill)
                made = self._run(changed, seen)
                if made.shape != self.output.shape:
                    return None  # what is selected depends on values
                differs, ran = _differs(made, self.output), True
                if bool(differs.any()):
                    output &= _places(differs, k, count)
                elif fill is _nothing:
                    return None
                if not output:
                    return None
                if fill is _nothing:
                    nodes = {p: nodes.get(p, found) & found for p, found in held.items()}
        if not ran:
            return None
        return Samples(dict(dims), min(output), {p: min(f) for p, f in nodes.items() if f})


def first_not_finite(module: fx.GraphModule, flat: Sequence[Any]) -> str | None:
    """The first node whose value is NaN, or infinite where nothing before it was."""
    found: dict[bool, str] = {}

    def seen(n: fx.Node, value: Any) -> None:
        for _, v in _tensors(value):
            if (v.is_floating_point() or v.is_complex()) and n.op == "call_function":
                if bool(v.isnan().any()):
                    found.setdefault(True, n.name)
                elif not bool(torch.isfinite(v).all()):
                    found.setdefault(False, n.name)

    with torch.no_grad():
        _Watching(module, {}, seen).run(*flat, enable_io_processing=False)
    return found.get(True, found.get(False))


def _with_ids_of(value: Any, k: int) -> Any:
    """Whole numbers whose sample k has those of the one beside it."""
    if not isinstance(value, Tensor) or value.is_floating_point() or value.dim() == 0:
        return value
    changed = value.clone()
    changed[k] = value[k - 1]
    return changed


def _tensors(value: Any) -> Iterator[tuple[int, Tensor]]:
    values = value if isinstance(value, (tuple, list)) else [value]
    return ((i, v) for i, v in enumerate(values) if isinstance(v, Tensor))


def _changed(
    sources: Mapping[str, Tensor],
    dims: Mapping[str, int | None],
    k: int,
    fill: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """The sources with other numbers in sample k."""
    changed = {n: sources[n].detach().clone() for n, d in dims.items() if d is not None}
    for name, value in changed.items():
        part = value.select(dims[name] or 0, k)
        part.copy_(fill(part))
    return changed


def _nothing(part: Tensor) -> Tensor:
    return torch.full_like(part, torch.nan)


def _other(part: Tensor) -> Tensor:
    """Other numbers of the same size and sign: 0 stays, a domain is kept."""
    order = torch.arange(part.numel(), device=part.device, dtype=torch.float64).view(part.shape)
    return part * (1.25 + 0.5 * torch.cos(1.7 * order)).to(part.dtype)


def _differs(now: Tensor, before: Tensor) -> Tensor:
    """Where a value is another one, beyond the last bits that a kernel may give."""
    if not (now.is_floating_point() or now.is_complex()):
        return now != before
    size = before.abs().nan_to_num(0.0, 0.0, 0.0)
    last_bits = 8 * torch.finfo(now.dtype).eps * (size.amax() if size.numel() else 0.0)
    both = (now == before) | (now.isnan() & before.isnan())
    return ~(both | ((now - before).abs() <= last_bits))


def _places(mask: Tensor, k: int, count: int) -> set[int]:
    """The dimensions along which a mask marks place k alone."""
    found = set()
    for d, size in enumerate(mask.shape):
        if size == count:
            marked = mask.movedim(d, 0).flatten(1).any(1) if mask.dim() > 1 else mask
            if bool(marked[k]) and int(marked.sum()) == 1:
                found.add(d)
    return found
