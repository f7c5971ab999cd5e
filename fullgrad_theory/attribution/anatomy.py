"""What a vision model consists of, read off its graph: its stream of tokens, blocks, attention.

The stream is what every path from the image to the output runs through. Where two live values are
added on it, a residual branch ends (a join); joins of one module make a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from itertools import groupby, pairwise
from typing import Any

import networkx as nx
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..degrees import Liveness, State
from ..operators import target_name
from ..trace import ComputationGraph, module_path
from . import boxes as bx
from .layout import Layout, batch_of, layout, scatter
from .locate import CONTRACTIONS, Boxes, Walk, batch_dim, locate

_ADD = {"aten.add.Tensor"}
_SOFTMAX = {"aten.softmax.int", "aten._softmax.default", "aten._safe_softmax.default"}
_REDUCTIONS = {"aten.sum.dim_IntList", "aten.amax.default", "aten.max.dim"}
_EINSUM = "aten.einsum.default"
SDPA = "aten.scaled_dot_product_attention.default"
_FORMS = (
    "F.scaled_dot_product_attention, or matmul, bmm or einsum of values with a softmax or with "
    "x / x.sum()"
)


@dataclass(frozen=True)
class Step:
    """From one value of the stream to the next: `before`, `after` are nodes."""

    before: str
    after: str


@dataclass(frozen=True)
class Block:
    """A module of the stream, with its joins: `steps[0].before` is its input."""

    path: str
    steps: tuple[Step, ...]

    @property
    def input(self) -> str:
        return self.steps[0].before

    @property
    def output(self) -> str:
        return self.steps[-1].after


@dataclass(frozen=True)
class Product:
    """How a product of attention weights and values is written: which operand, 0 or 1, holds the
    weights, and the order of dimensions that brings the weights to (..., q, k), the values to
    (..., k, c) and the product to (..., q, c)."""

    weights: int
    orders: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Attention:
    """A product of attention weights and values at `node`. `fused`: the weights are inside of it.

    `slots`: the order that brings its windows and heads (folded in any way) to (windows, heads).
    `queries`, `keys`: (windows, n) the tokens they are, -1 for padding; of the stream where `step`
    is given, else of a class token alone or of a query of the model's own (`latent`). They are
    numbered as in the sequence where there is one, prefix tokens among them, else by their cells;
    `*_cells`: the cell of each of these tokens, -1 for a prefix token's.
    """

    node: str
    fused: bool
    step: int | None
    latent: bool
    product: Product
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

    def operands(self, given: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """The weights (..., q, k) and values (..., k, c) of a product that is not fused."""
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
    """Steps, blocks and attention of a traced model, in order; layouts of its values.

    `unread`: softmaxes over as many entries as there are tokens that are of no attention here.
    """

    graph: ComputationGraph
    boxes: Mapping[str, Boxes]
    shapes: Mapping[str, torch.Size | tuple[torch.Size, ...]]
    image: tuple[int, int]
    steps: tuple[Step, ...]
    blocks: tuple[Block, ...]
    attention: tuple[Attention, ...]
    unread: tuple[str, ...] = ()
    _alone: Callable[[], Walk] | None = field(default=None, repr=False)  # of one image
    _layouts: dict[tuple[str, int], Layout] = field(default_factory=dict, repr=False)

    def layout(self, name: str, index: int = 0) -> Layout:
        """The layout of a node's value (of output `index` where there are several)."""
        key = name, index
        if key not in self._layouts:
            self._layouts[key] = self._read(name, index, ())
        return self._layouts[key]

    def _read(self, name: str, index: int, united: Sequence[int]) -> Layout:
        """A layout; `united`: dimensions along which elements share a place."""
        at = batch_dim(self.graph, name, index)
        found = _layout(self.boxes, self.shapes, self.image, name, index, united, at)
        if found.batch is None and self._alone is not None:
            # samples that cannot be told apart are run one by one
            walk = self._alone()
            found = _layout(walk.boxes, walk.shapes, self.image, name, index, united, None)
        return found

    @cached_property
    def stream(self) -> dict[str, Layout]:
        """The layouts of all values of the stream."""
        names = dict.fromkeys(n for s in self.steps for n in (s.before, s.after))
        return {n: self.layout(n) for n in names}

    @property
    def tail(self) -> str:
        """The last value of the stream."""
        return self.steps[-1].after

    @property
    def forms(self) -> str:
        """The forms of attention that are recognised, and a softmax here that is none of them."""
        return _FORMS + (f"; {self.unread[0]} is none of these" if self.unread else "")

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
    def steady(self) -> bool:
        """Whether every step keeps the number of tokens and channels."""
        return all(
            self.shapes[s.before].numel() == self.shapes[s.after].numel()  # type: ignore[union-attr]
            and self.stream[s.before].index.numel() == self.stream[s.after].index.numel()
            for s in self.steps
        )


def anatomy(graph: ComputationGraph, live: Liveness, image: Tensor) -> Anatomy:
    """Read a model's anatomy; `image` is one image of shape (1, C, H, W).

    Two copies are run where the batch is open, to see how samples lie in folded dimensions.
    """
    walk = locate(graph, live, torch.cat([image, image]) if graph.dynamic else image)
    size = int(image.shape[-2]), int(image.shape[-1])
    shapes = walk.shapes
    alone = cache(partial(locate, graph, live, image)) if graph.dynamic else None
    bare = Anatomy(graph, walk.boxes, shapes, size, (), (), (), (), alone)
    chain = _chain(graph, live)
    placed = [n for n in chain if bare.layout(n.name).placed]
    steps, owners = _steps(placed, live)
    blocks = tuple(
        Block(path, tuple(step for _, step in group))
        for (path, _), group in groupby(zip(owners, steps, strict=True), key=lambda pair: pair[0])
    )
    found = replace(bare, steps=tuple(steps), blocks=blocks)
    sites, unread = _attention(found, live)
    return replace(found, attention=sites, unread=unread)


def _layout(
    boxes: Mapping[str, Boxes],
    shapes: Mapping[str, torch.Size | tuple[torch.Size, ...]],
    image: tuple[int, int],
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
    batch = None if at is None else batch_of(found, image[0], *at)
    if batch is not None:
        shape = torch.Size(s if d != batch.dim else batch.each for d, s in enumerate(shape))
        if found.shape[batch.dim + 1] > 1:  # of the first sample
            found = torch.stack([batch.split(plane)[0] for plane in found])
    return layout(bx.tidy(found), shape, image, batch)


def _chain(graph: ComputationGraph, live: Liveness) -> list[fx.Node]:
    """The nodes that every path from the image to the first output runs through, in order."""
    start, end = graph.placeholders[0].name, graph.outputs[0].name
    moving = [
        n for n in graph.nx if n == start or (n in live.calls and _is_live(live, graph.nodes[n]))
    ]
    reached = graph.nx.subgraph(moving)
    if end not in reached or start not in reached or not nx.has_path(reached, start, end):
        return []
    parents = nx.immediate_dominators(reached, start)
    names = [end]
    while names[-1] != start:
        names.append(parents[names[-1]])
    return [graph.nodes[n] for n in reversed(names)]


def _is_live(live: Liveness, node: fx.Node) -> bool:
    return live.state(node) is State.LIVE


def _steps(chain: list[fx.Node], live: Liveness) -> tuple[list[Step], list[tuple[str, object]]]:
    """Joins with the node each branch started from, and the module, and call of it, each is in."""
    pairs = list(pairwise(chain))
    joins = [(a, b) for a, b in pairs if target_name(b.target) in _ADD and _moving(b, live) > 1]
    if not joins:  # no residual branches: every layer with weights is a block
        joins = [(a, b) for a, b in pairs if _has_weights(b) and a.op != "placeholder"]
    return [Step(a.name, b.name) for a, b in joins], [_owner(b) for _, b in joins]


def _moving(node: fx.Node, live: Liveness) -> int:
    """How many operands are live."""
    return sum(_is_live(live, a) for a in node.all_input_nodes)


def _owner(node: fx.Node) -> tuple[str, object]:
    """The module a node is in, and which call of it, by export's key: `b`, `b@1` the second one."""
    path = module_path(node)
    calls = list(node.meta.get("nn_module_stack") or [""])
    return (path, calls[-1]) if path else (node.name, None)


def _has_weights(node: fx.Node) -> bool:
    return any(word in target_name(node.target) for word in ("conv", "linear"))


# --------------------------------------------------------------------------- attention


def _attention(found: Anatomy, live: Liveness) -> tuple[tuple[Attention, ...], tuple[str, ...]]:
    """The attention of a model, and softmaxes over as many entries as the stream has tokens that
    are of none."""
    order = {name: i for i, name in enumerate(found.graph.nodes)}
    sites: list[Attention] = []
    over: dict[str, None] = {}
    counts = {layout.index.numel() for layout in found.stream.values()}
    for node in found.graph.fx.graph.nodes:
        if node.name not in live.calls or not _is_live(live, node):
            continue
        name, place = target_name(node.target), order[node.name]
        inside = bool(found.steps) and place < order[found.tail]
        if name in _SOFTMAX and inside and found.shapes[node.name][node.args[1]] in counts:  # type: ignore[index]
            over[node.name] = None
        fused = name == SDPA
        product = None if fused else _product(found, node, live)
        if not fused and product is None:
            continue
        if product is not None:
            for read in _behind(_operands(node)[product.weights], live):
                over.pop(read.name, None)
        step = next(
            (i for i, s in enumerate(found.steps) if order[s.before] < place < order[s.after]),
            None,
        )
        scored = _scored(node, product, live)
        site = _site(found, node, product or _fused(found, node), fused, step, scored == 1)
        # rows without a place: a class token's, or channels of values where no product scored them
        if site is not None and (site.step is not None or not inside or scored):
            sites.append(site)
    return tuple(sites), tuple(over)


def _operands(node: fx.Node) -> list[fx.Node]:
    """The tensors of a product, in order; one may be there twice."""
    flat = pytree.tree_leaves([*node.args])
    return [a for a in flat if isinstance(a, fx.Node)]


def _plain(*ranks: int, swapped: bool = False) -> tuple[tuple[int, ...], ...]:
    """Orders that leave the dimensions as they are, or swap the last two."""
    return tuple(
        (*range(r - 2), r - 1, r - 2) if swapped and r > 1 else tuple(range(r)) for r in ranks
    )


def _fused(found: Anatomy, node: fx.Node) -> Product:
    value, out = (len(found.shapes[n]) for n in (str(node.args[2]), node.name))
    same = _plain(out, value, out)
    return Product(0, (same[0], same[1], same[2]))


def _product(found: Anatomy, node: fx.Node, live: Liveness) -> Product | None:
    """How a node multiplies attention weights with values; None where it does not."""
    name = target_name(node.target)
    pair = _operands(node)
    if (name not in CONTRACTIONS and name != _EINSUM) or len(pair) != 2:
        return None
    weights = next((i for i in (0, 1) if _normaliser(pair[i], live)), None)
    if weights is None:
        return None
    if name == _EINSUM:
        return _from_equation(str(node.args[0]), weights, len(found.shapes[node.name]))
    ranks = [len(found.shapes[n.name]) for n in (pair[weights], pair[1 - weights], node)]
    if min(ranks) < 2:
        return None
    orders = _plain(*ranks, swapped=weights == 1)  # v^T A^T is (A v)^T
    return Product(weights, (orders[0], orders[1], orders[2]))


def _from_equation(equation: str, weights: int, rank: int) -> Product | None:
    """What an einsum says: one letter is summed (k), one is of weights alone (q), one of values
    alone (c), and the rest, heads and windows, is in all three. `rank`: dimensions of the result.
    """
    left, _, out = equation.replace(" ", "").partition("->")
    filled = "".join(chr(0x391 + i) for i in range(rank + 3 - len(out)))  # for the dots
    left, out = left.replace("...", filled), out.replace("...", filled)
    pair = left.split(",")
    a, v = pair[weights], pair[1 - weights]
    keys, queries = (set(a) & set(v)) - set(out), (set(a) & set(out)) - set(v)
    channels = (set(v) & set(out)) - set(a)
    rest = [letter for letter in out if letter in a and letter in v]
    if not len(keys) == len(queries) == len(channels) == 1:
        return None
    if any(len(set(t)) != len(t) or len(t) != len(rest) + 2 for t in (a, v, out)):
        return None
    (k,), (q,), (c,) = keys, queries, channels
    first, second, third = (
        tuple(term.index(letter) for letter in (*rest, *last))
        for term, last in zip((a, v, out), ((q, k), (k, c), (q, c)), strict=True)
    )
    return Product(weights, (first, second, third))


def _normaliser(node: object, live: Liveness) -> fx.Node | None:
    """The softmax, or x / x.sum(), that a value is, seen through operations with one live
    operand; None where it is none."""
    while isinstance(node, fx.Node) and node.name in live.calls:
        if target_name(node.target) in _SOFTMAX or _shares(node, live):
            return node
        if target_name(node.target) in CONTRACTIONS:
            return None
        node = _single(node, live)
    return None


def _behind(weights: fx.Node, live: Liveness) -> Iterator[fx.Node]:
    """The softmaxes that weights are made of, one or several."""
    todo, seen = [weights], set[fx.Node]()
    while todo:
        node = todo.pop()
        if node in seen or node.name not in live.calls or target_name(node.target) in CONTRACTIONS:
            continue
        seen.add(node)
        if target_name(node.target) in _SOFTMAX:
            yield node
        else:
            todo += node.all_input_nodes


def _single(node: fx.Node, live: Liveness) -> fx.Node | None:
    """The one operand that is live, a reduction of it beside it perhaps (x - x.amax()); None where
    there are several."""
    moving = [a for a in node.all_input_nodes if a.name in live.calls]
    for a in moving:
        if all(b is a or _reduces(b, a, live, _REDUCTIONS) for b in moving):
            return a
    return None


def _shares(node: fx.Node, live: Liveness) -> bool:
    """x / x.sum(), a small number added perhaps."""
    divided = target_name(node.target) == "aten.div.Tensor"
    return divided and _reduces(node.args[1], node.args[0], live, {"aten.sum.dim_IntList"})


def _reduces(node: object, of: object, live: Liveness, kinds: Collection[str]) -> bool:
    """Whether a value is a reduction of another one, seen through operations on it alone."""
    while isinstance(node, fx.Node) and node.name in live.calls:
        if target_name(node.target) in kinds:
            return node.args[0] is of
        moving = [a for a in node.all_input_nodes if a.name in live.calls]
        node = moving[0] if len(moving) == 1 else None
    return False


def _scored(node: fx.Node, product: Product | None, live: Liveness) -> int:
    """Of the queries and keys that weights come from, how many are live: one where the queries are
    parameters; 0 where there are none, and a layer made the weights of the values alone."""
    if product is None:  # fused
        return sum(_is_live(live, a) for a in node.args[:2] if isinstance(a, fx.Node))
    last = _normaliser(_operands(node)[product.weights], live)
    at = last.args[0] if last is not None else None
    while isinstance(at, fx.Node) and at.name in live.calls and not _has_weights(at):
        following = _single(at, live)
        if following is None or target_name(at.target) in {*CONTRACTIONS, _EINSUM}:
            return _moving(at, live)
        at = following
    return 0


def _site(
    found: Anatomy, node: fx.Node, product: Product, fused: bool, step: int | None, latent: bool
) -> Attention | None:
    """Which tokens queries and keys are; None where the keys are no tokens (channel attention)."""
    values = node.args[2] if fused else _operands(node)[1 - product.weights]
    assert isinstance(values, fx.Node)
    out = _rows(found, node.name, product.orders[2])
    value = _rows(found, values.name, product.orders[1])
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
        node.name, fused, step if here else None, latent, product, order, queries, keys, out, value,
        *cells,
    )  # fmt: skip


def _rows(found: Anatomy, name: str, order: tuple[int, ...]) -> Layout:
    """The layout of a value brought to (..., n, channels), whose channels are one."""
    own = found._read(name, 0, (order[-1],))
    batch = own.batch and replace(own.batch, dim=order.index(own.batch.dim))
    shape = torch.Size(own.shape[d] for d in order)
    return replace(own, index=own.index.permute(order), shape=shape, batch=batch)
