"""What a model of tokens consists of, read off its graph: its stream, blocks, attention.

The stream is what every path from the input to the output runs through. Where two live values are
added on it, a residual branch ends (a join); joins of one module make a block.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from itertools import pairwise, takewhile
from typing import Any

import networkx as nx
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..graph.computation import ComputationGraph
from ..graph.sources import module_path
from ..operators.algebra import Algebra, Role
from ..operators.registry import has_role, record_of
from ..plan.states import Liveness
from . import boxes as bx
from . import forms
from .layouts import Layout, batch_of, layout, scatter
from .places import Boxes, Source, Walk, batch_dim, locate, open_dim


@dataclass(frozen=True)
class Step:
    """From one value of the stream to the next: `before`, `after` are nodes."""

    before: str
    after: str


@dataclass(frozen=True)
class Block:
    """A module of the stream, with its joins: `steps[0].before` is its input. `output`: the last
    sum, or that behind its norm where the block ends with one (post-norm)."""

    path: str
    steps: tuple[Step, ...]
    output: str

    @property
    def input(self) -> str:
        return self.steps[0].before


@dataclass(frozen=True)
class Attention:
    """A product of attention weights and values at `node`.

    `slots`: the order that brings its windows and heads (folded in any way) to (windows, heads).
    `queries`, `keys`: (windows, n) the tokens they are, -1 for padding; of the stream where `step`
    is given, else of a class token alone or of a query of the model's own (`latent`). They are
    numbered as in the sequence where there is one, prefix tokens among them, else by their cells;
    `*_cells`: the cell of each of these tokens, -1 for a prefix token's.
    """

    node: str
    step: int | None
    latent: bool
    product: forms.Product
    slots: Tensor
    queries: Tensor
    keys: Tensor
    query_layout: Layout
    key_layout: Layout
    query_cells: Tensor
    key_cells: Tensor

    @property
    def query_tokens(self) -> int:
        """How many tokens the queries are numbered among."""
        return self.query_cells.numel()

    @property
    def key_tokens(self) -> int:
        """How many tokens the keys are numbered among."""
        return self.key_cells.numel()

    def query_canvas(self, tokens: Tensor) -> Tensor:
        """One number a query token, (batch, n), per cell: (batch, h, w)."""
        return _canvas(tokens, self.query_layout, self.query_cells)

    def key_canvas(self, tokens: Tensor) -> Tensor:
        """One number a key token, (batch, n), per cell: (batch, h, w)."""
        return _canvas(tokens, self.key_layout, self.key_cells)

    @property
    def fused(self) -> bool:
        """Whether the weights are inside of the kernel."""
        return self.product.weights is None

    def operands(self, given: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """The weights (..., q, k) and values (..., k, c) of a product that is not fused."""
        assert self.product.weights is not None
        pair = [t for t in pytree.tree_leaves(list(given.values())) if isinstance(t, Tensor)]
        weights, values = pair[self.product.weights], pair[1 - self.product.weights]
        first, second, _ = self.product.orders
        return weights.permute(first), values.permute(second)

    def rows(self, result: Tensor) -> Tensor:
        """What the product gave, or its gradient, as (..., q, c)."""
        return result.permute(self.product.orders[2])


def _canvas(tokens: Tensor, layout: Layout, cells: Tensor) -> Tensor:
    return scatter(tokens, cells, math.prod(layout.canvas)).unflatten(1, layout.canvas)


@dataclass(frozen=True, eq=False)
class Anatomy:
    """Steps, blocks and attention of a traced model, in order; layouts of its values. `size`: rows
    and columns of the source's places.

    `unread`: softmaxes over as many entries as there are tokens that are of no attention here.
    """

    graph: ComputationGraph
    source: Source
    boxes: Mapping[str, Boxes]
    shapes: Mapping[str, torch.Size | tuple[torch.Size, ...]]
    size: tuple[int, int]
    steps: tuple[Step, ...]
    blocks: tuple[Block, ...]
    attention: tuple[Attention, ...]
    unread: tuple[str, ...] = ()
    _alone: Callable[[], Walk] | None = field(default=None, repr=False)  # of one sample
    _layouts: dict[tuple[str, int], Layout] = field(default_factory=dict, repr=False)

    def layout(self, name: str, index: int = 0) -> Layout:
        """The layout of a node's value (of output `index` where there are several)."""
        key = name, index
        if key not in self._layouts:
            self._layouts[key] = self._read(name, index, ())
        return self._layouts[key]

    def _read(self, name: str, index: int, united: Sequence[int]) -> Layout:
        """A layout; `united`: dimensions along which elements share a place."""
        at = batch_dim(self.graph, self.source, name, index)
        found = _layout(self.boxes, self.shapes, self.size, name, index, united, at)
        if found.batch is None and self._alone is not None:
            # samples that cannot be told apart are run one by one
            walk = self._alone()
            found = _layout(walk.boxes, walk.shapes, self.size, name, index, united, None)
        return found

    @cached_property
    def stream(self) -> dict[str, Layout]:
        """The layouts of all values of the stream."""
        ends = [n for s in self.steps for n in (s.before, s.after)]
        names = dict.fromkeys([*ends, *(b.output for b in self.blocks)])
        return {n: self.layout(n) for n in names}

    @property
    def tail(self) -> str:
        """The last value of the stream."""
        return self.blocks[-1].output

    @cached_property
    def behind(self) -> frozenset[str]:
        """The nodes that the first block's input leads to: what it holds itself, the patch
        embedding's bias and the positions, is none of theirs."""
        return frozenset(nx.descendants(self.graph.nx, self.blocks[0].input))

    @property
    def forms(self) -> str:
        """The forms of attention that are recognised, and a softmax here that is none of them."""
        return forms.FORMS + (f"; {self.unread[0]} is none of these" if self.unread else "")

    @cached_property
    def pooling(self) -> frozenset[str]:
        """The attention, of queries without a place in the image, that reads the stream's end."""
        order = {name: i for i, name in enumerate(self.graph.nodes)}
        return frozenset(
            s.node
            for s in self.attention
            if not s.query_layout.placed and self.steps and order[s.node] > order[self.tail]
        )

    @property
    def layers(self) -> tuple[Block, ...]:
        """The blocks with attention whose output the head can read as it reads the last one's."""
        own = {self.steps[s.step] for s in self.attention if s.step is not None}
        return tuple(
            b
            for b in self.blocks
            if self.shapes[b.output] == self.shapes[self.tail]
            and (self.pooling or own.intersection(b.steps))
        )

    @property
    def plain(self) -> bool:
        """Whether all attention in steps is over one sequence, the step's tokens in their order,
        and each step has one such attention at most."""
        inner = {s.step: s for s in self.attention if s.step is not None}
        tokens = {n: self.stream[self.steps[n].after].index.numel() for n in inner}
        return len(inner) == sum(s.step is not None for s in self.attention) > 0 and all(
            torch.equal(order, torch.arange(tokens[n])[None])
            for n, s in inner.items()
            for order in (s.queries, s.keys)
        )

    @property
    def steady(self) -> bool:
        """Whether every step keeps the number of tokens and channels."""
        return all(
            self.shapes[s.before].numel() == self.shapes[s.after].numel()  # type: ignore[union-attr]
            and self.stream[s.before].index.numel() == self.stream[s.after].index.numel()
            for s in self.steps
        )


def anatomy(
    graph: ComputationGraph, live: Liveness, source: Source, given: Sequence[Any]
) -> Anatomy:
    """Read a model's anatomy; `given`: the inputs of one sample, flat.

    Two copies are run where the batch is open, to see how samples lie in folded dimensions.
    """
    both = [_twice(n, t) for n, t in zip(graph.placeholders, given, strict=True)]
    walk = locate(graph, live, source, both if graph.dynamic else given)
    shapes = walk.shapes
    size = source.axes.rows(shapes[source.nodes[0]])
    alone = cache(partial(locate, graph, live, source, given)) if graph.dynamic else None
    bare = Anatomy(graph, source, walk.boxes, shapes, size, (), (), (), (), alone)
    chain = _chain(graph, live, source)
    placed = [n for n in chain if bare.layout(n.name).placed]
    steps, owners = _steps(placed, live, source)
    blocks = tuple(_blocks(steps, owners, placed))
    found = replace(bare, steps=tuple(steps), blocks=blocks)
    sites, unread = _attention(found, live)
    return replace(found, attention=sites, unread=unread)


def _layout(
    boxes: Mapping[str, Boxes],
    shapes: Mapping[str, torch.Size | tuple[torch.Size, ...]],
    size: tuple[int, int],
    name: str,
    index: int,
    united: Sequence[int],
    at: tuple[int, int] | None,
) -> Layout:
    found, shape = boxes.get(name), shapes[name]
    if isinstance(found, list):
        found = found[index] if index < len(found) else None
    shape = shape if isinstance(shape, torch.Size) else shape[index]
    found = bx.empty(len(shape)) if found is None else bx.union(found, united)
    batch = None if at is None else batch_of(found, size[0], *at)
    if batch is not None:
        shape = torch.Size(s if d != batch.dim else batch.each for d, s in enumerate(shape))
        if found.shape[batch.dim + 1] > 1:  # of the first sample
            found = torch.stack([batch.split(plane)[0] for plane in found])
    return layout(bx.tidy(found), shape, size, batch)


def _twice(placeholder: fx.Node, given: Any) -> Any:
    """An input of one sample as that of two."""
    at = open_dim(placeholder)
    return given if at is None else torch.cat([given, given], at)


def _chain(graph: ComputationGraph, live: Liveness, source: Source) -> list[fx.Node]:
    """The nodes that every path from the source to the first output runs through, in order."""
    start, end = "the source's parts", graph.outputs[0].name
    moving = {*source.nodes, *(n for n in live.calls if forms.is_live(live, graph.nodes[n]))}
    reached = nx.DiGraph(graph.nx.subgraph(moving).edges)
    reached.add_edges_from((start, name) for name in source.nodes)
    if end not in reached or not nx.has_path(reached, start, end):
        return []
    parents = nx.immediate_dominators(reached, start)
    names = [end]
    while parents[names[-1]] != start:
        names.append(parents[names[-1]])
    return [graph.nodes[n] for n in reversed(names)]


@dataclass(frozen=True)
class _Owner:
    """The module that a join belongs to: its `path`, and the `call` of it with all calls around, by
    export's keys: `b`, `b@1` the second one. `around`: it is not the sum's own, which the branch
    begins outside of."""

    path: str
    call: tuple[object, ...]
    around: bool = False


def _steps(chain: list[fx.Node], live: Liveness, source: Source) -> tuple[list[Step], list[_Owner]]:
    """Joins with the node each branch started from, and the module each is in."""
    pairs = list(pairwise(chain))
    adds = [(a, b) for a, b in pairs if has_role(b, Role.ADDITION)]
    joins = [(a, b) for a, b in adds if forms.live_operands(b, live) > 1]
    steps = [Step(a.name, b.name) for a, b in joins]
    if joins:
        return steps, [_owner(a, b, live) for a, b in joins]
    # no residual branches: every layer with weights is a block
    layers = [(a, b) for a, b in pairs if has_role(b, Role.WEIGHTED) and a.name not in source.nodes]
    return [Step(a.name, b.name) for a, b in layers], [_module(b) for _, b in layers]


def _module(node: fx.Node) -> _Owner:
    path = module_path(node)
    return _Owner(path, _calls(node)) if path else _Owner(node.name, (node.name,))


def _calls(node: fx.Node) -> tuple[object, ...]:
    return tuple(node.meta.get("nn_module_stack") or ())


def _owner(before: fx.Node, join: fx.Node, live: Liveness) -> _Owner:
    """The module of the sum; where the branch begins outside of it, as where BERT's has the sum in
    a module of its own, the smallest one that all of the branch is in."""
    own, shared = _module(join), _calls(join)
    todo, seen = [join], {before, join}
    while todo:
        for a in todo.pop().all_input_nodes:
            if a not in seen and forms.is_live(live, a):
                seen.add(a)
                todo.append(a)
                pairs = zip(shared, _calls(a), strict=False)
                shared = tuple(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    if len(shared) == len(_calls(join)):
        return own
    path = re.sub(r"@\d+$", "", join.meta["nn_module_stack"][shared[-1]][0]) if shared else ""
    return _Owner(path, shared, True) if path else own


def _blocks(steps: list[Step], owners: list[_Owner], chain: list[fx.Node]) -> Iterator[Block]:
    """Joins that follow each other in one call of a module, or in a part of it that is no block by
    itself."""
    groups: list[tuple[_Owner, list[Step]]] = []
    for owner, step in zip(owners, steps, strict=True):
        last = groups[-1][0] if groups else None
        part = last is not None and last.around and owner.call == last.call[: len(owner.call)]
        if last is not None and (part or owner.call == last.call):
            groups[-1] = owner, [*groups[-1][1], step]
        else:
            groups.append((owner, [step]))
    following = dict(pairwise(chain))
    nodes = {n.name: n for n in chain}
    for owner, own in groups:
        end = nodes[own[-1].after]
        while (norm := following.get(end)) is not None and _is_norm(norm, owner):
            end = norm
        yield Block(owner.path, tuple(own), end.name)


def _is_norm(node: fx.Node, owner: _Owner) -> bool:
    """Whether a node is a norm in this call of a module."""
    record = record_of(node)
    inside = _calls(node)[: len(owner.call)] == owner.call
    return inside and record is not None and record.algebra is Algebra.NORMALISER


# --------------------------------------------------------------------------- attention


def _attention(found: Anatomy, live: Liveness) -> tuple[tuple[Attention, ...], tuple[str, ...]]:
    """The attention of a model, and softmaxes over as many entries as the stream has tokens that
    are of none."""
    order = {name: i for i, name in enumerate(found.graph.nodes)}
    sites: list[Attention] = []
    over: dict[str, None] = {}
    counts = {layout.index.numel() for layout in found.stream.values()}
    for node in found.graph.fx.graph.nodes:
        if node.name not in live.calls or not forms.is_live(live, node):
            continue
        place = order[node.name]
        inside = bool(found.steps) and place < order[found.tail]
        if inside and has_role(node, Role.SOFTMAX):
            shape: Any = found.shapes[node.name]
            if shape[node.args[1]] in counts:
                over[node.name] = None
        product = forms.product(found.shapes, node, live)
        if product is None:
            continue
        for read in forms.softmaxes(node, product, live):
            over.pop(read.name, None)
        step = next(
            (i for i, s in enumerate(found.steps) if order[s.before] < place < order[s.after]),
            None,
        )
        scored = forms.scored(node, product, live)
        site = _site(found, node, product, step, scored == 1)
        # rows without a place: a class token's, or channels of values where no product scored them
        if site is not None and (site.step is not None or not inside or scored):
            sites.append(site)
    return tuple(sites), tuple(over)


def _site(
    found: Anatomy, node: fx.Node, product: forms.Product, step: int | None, latent: bool
) -> Attention | None:
    """Which tokens queries and keys are; None where the keys are no tokens (channel attention)."""
    out = _rows(found, node.name, product.orders[2])
    value = _rows(found, forms.values(node, product).name, product.orders[1])
    if not value.placed:
        return None
    lead = out.shape[:-2]
    keys = value.index.expand(*value.shape[:-2], value.shape[-2], 1)
    slots = lead.numel()
    keys = keys.reshape(-1, keys.shape[-2])
    if keys.shape[0] != slots:  # grouped or shared heads: the values are repeated
        keys = keys.repeat_interleave(slots // keys.shape[0], 0)
    queries = out.index.expand(*lead, out.shape[-2], 1).reshape(slots, -1)
    windows, inverse = torch.unique(keys, dim=0, return_inverse=True)
    count = windows.shape[0]
    heads = slots // count
    if count * heads != slots or bool((torch.bincount(inverse) != heads).any()):
        return None
    order = torch.sort(inverse, stable=True).indices
    first = order[::heads]
    queries, keys = queries[first], keys[first]
    here = step is not None and out.placed
    tokens = found.layout(found.steps[step].after).index.numel() if step is not None else 0
    if count == 1 and (not here or queries.shape[1] == tokens):
        # one sequence: tokens in its own order, those of the prefix among them
        cells = queries[0], keys[0]
        queries, keys = (torch.arange(t.shape[1])[None] for t in (queries, keys))
    else:  # a single window may be padded: its entries are not the stream's
        cells = torch.arange(math.prod(out.canvas)), torch.arange(math.prod(value.canvas))
    return Attention(
        node.name, step if here else None, latent, product, order, queries, keys, out, value,
        *cells,
    )  # fmt: skip


def _rows(found: Anatomy, name: str, order: tuple[int, ...]) -> Layout:
    """The layout of a value brought to (..., n, channels), whose channels are one."""
    own = found._read(name, 0, (order[-1],))
    batch = own.batch and replace(own.batch, dim=order.index(own.batch.dim))
    shape = torch.Size(own.shape[d] for d in order)
    return replace(own, index=own.index.permute(order), shape=shape, batch=batch)
