"""What a vision model consists of, read off its graph: its stream of tokens, blocks, attention.

The stream is what every path from the image to the output runs through. Where two live values are
added on it, a residual branch ends (a join); joins of one module make a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby, pairwise

import networkx as nx
import torch
from torch import Tensor, fx

from ..degrees import Liveness, State
from ..operators import target_name
from ..trace import ComputationGraph, module_path
from . import boxes as bx
from .layout import Layout, batch_of, layout
from .locate import CONTRACTIONS, Boxes, batch_dim, locate

_ADD = {"aten.add.Tensor"}
_SOFTMAX = {"aten.softmax.int", "aten._softmax.default", "aten._safe_softmax.default"}
SDPA = "aten.scaled_dot_product_attention.default"


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
class Attention:
    """A product of attention weights and values at `node`. `fused`: the weights are inside of it.

    `slots`: the order that brings its windows and heads (folded in any way) to (windows, heads).
    `queries`, `keys`: (windows, n) the tokens they are, -1 for padding; of the stream where `step`
    is given, else of a query of the model's own (pooling). They are numbered as in the sequence
    where there is one, prefix tokens among them, else by their cells; `*_tokens`: how many.
    """

    node: str
    fused: bool
    step: int | None
    slots: Tensor
    queries: Tensor
    keys: Tensor
    query_layout: Layout
    key_layout: Layout
    query_tokens: int
    key_tokens: int

    def query_canvas(self, tokens: Tensor) -> Tensor:
        """One number a query token, (batch, n), per cell: (batch, h, w)."""
        return _canvas(tokens, self.query_layout, self.queries)

    def key_canvas(self, tokens: Tensor) -> Tensor:
        """One number a key token, (batch, n), per cell: (batch, h, w)."""
        return _canvas(tokens, self.key_layout, self.keys)


def _canvas(tokens: Tensor, layout: Layout, index: Tensor) -> Tensor:
    if index.shape[0] == 1 and layout.index.numel() == tokens.shape[1]:
        return layout.on_canvas(tokens)  # a sequence in its own order
    return tokens.unflatten(1, layout.canvas)


@dataclass(frozen=True, eq=False)
class Anatomy:
    """Steps, blocks and attention of a traced model, in order; layouts of its values."""

    graph: ComputationGraph
    boxes: Mapping[str, Boxes]
    shapes: Mapping[str, torch.Size | tuple[torch.Size, ...]]
    image: tuple[int, int]
    steps: tuple[Step, ...]
    blocks: tuple[Block, ...]
    attention: tuple[Attention, ...]
    _layouts: dict[tuple[str, int], Layout] = field(default_factory=dict, repr=False)

    def layout(self, name: str, index: int = 0) -> Layout:
        """The layout of a node's value (of output `index` where there are several)."""
        key = name, index
        if key not in self._layouts:
            self._layouts[key] = _layout(
                self.graph, self.boxes, self.shapes, self.image, name, index
            )
        return self._layouts[key]

    @cached_property
    def stream(self) -> dict[str, Layout]:
        """The layouts of all values of the stream."""
        names = dict.fromkeys(n for s in self.steps for n in (s.before, s.after))
        return {n: self.layout(n) for n in names}

    @property
    def tail(self) -> str:
        """The last value of the stream."""
        return self.steps[-1].after


def anatomy(graph: ComputationGraph, live: Liveness, image: Tensor) -> Anatomy:
    """Read a model's anatomy; `image` is one image of shape (1, C, H, W).

    Two copies are run where the batch is open, to see how samples lie in folded dimensions.
    """
    walk = locate(graph, live, torch.cat([image, image]) if graph.dynamic else image)
    size = int(image.shape[-2]), int(image.shape[-1])
    shapes = walk.shapes
    bare = Anatomy(graph, walk.boxes, shapes, size, (), (), ())
    chain = _chain(graph, live)
    placed = [n for n in chain if bare.layout(n.name).placed]
    steps, owners = _steps(placed, live)
    blocks = tuple(
        Block(path, tuple(step for _, step in group))
        for path, group in groupby(zip(owners, steps, strict=True), key=lambda pair: pair[0])
    )
    found = Anatomy(graph, walk.boxes, shapes, size, tuple(steps), blocks, ())
    sites = tuple(_attention(found, live))
    return Anatomy(graph, walk.boxes, shapes, size, tuple(steps), blocks, sites)


def _layout(
    graph: ComputationGraph,
    boxes: Mapping[str, Boxes],
    shapes: Mapping[str, torch.Size | tuple[torch.Size, ...]],
    image: tuple[int, int],
    name: str,
    index: int,
) -> Layout:
    found, shape = boxes.get(name), shapes[name]
    if isinstance(found, list):
        found = found[index] if index < len(found) else None
    shape = shape if isinstance(shape, torch.Size) else shape[index]
    found = bx.empty(len(shape)) if found is None else found
    at = batch_dim(graph, name, index)
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


def _steps(chain: list[fx.Node], live: Liveness) -> tuple[list[Step], list[str]]:
    """Joins with the node each branch started from, and the module each is in."""
    pairs = list(pairwise(chain))

    def operands(node: fx.Node) -> int:
        return sum(_is_live(live, a) for a in node.all_input_nodes)

    joins = [(a, b) for a, b in pairs if target_name(b.target) in _ADD and operands(b) > 1]
    owners = [module_path(b) or b.name for _, b in joins]
    if not joins:  # no residual branches: every layer with weights is a block
        joins = [(a, b) for a, b in pairs if _has_weights(b) and a.op != "placeholder"]
        owners = [module_path(b) or b.name for _, b in joins]
    return [Step(a.name, b.name) for a, b in joins], owners


def _has_weights(node: fx.Node) -> bool:
    return any(word in target_name(node.target) for word in ("conv", "linear"))


# --------------------------------------------------------------------------- attention


def _attention(found: Anatomy, live: Liveness) -> Iterator[Attention]:
    order = {name: i for i, name in enumerate(found.graph.nodes)}
    for node in found.graph.fx.graph.nodes:
        if node.name not in live.calls or not _is_live(live, node):
            continue
        name = target_name(node.target)
        fused = name == SDPA
        if not fused and not (name in CONTRACTIONS and _from_softmax(node.args[0], live)):
            continue
        values = node.args[2 if fused else 1]
        step = next(
            (
                i
                for i, s in enumerate(found.steps)
                if order[s.before] < order[node.name] < order[s.after]
            ),
            None,
        )
        site = _site(found, node, values, fused, step)
        if site is not None:
            yield site


def _from_softmax(node: object, live: Liveness) -> bool:
    """Whether a value is a softmax, seen through operations with one live operand."""
    while isinstance(node, fx.Node) and node.name in live.calls:
        if target_name(node.target) in _SOFTMAX:
            return True
        moving = [a for a in node.all_input_nodes if a.name in live.calls]
        if len(moving) != 1 or target_name(node.target) in CONTRACTIONS:
            return False
        node = moving[0]
    return False


def _site(
    found: Anatomy, node: fx.Node, values: fx.Node, fused: bool, step: int | None
) -> Attention | None:
    """Which tokens queries and keys are; None where the keys are no tokens (channel attention)."""
    out, value = (_rows(found, name) for name in (node.name, values.name))
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
    if count == 1 and (not here or queries.shape[1] == keys.shape[1]):
        # one sequence: tokens in its own order, those of the prefix among them
        queries, keys = (torch.arange(t.shape[1])[None] for t in (queries, keys))
        numbers = queries.shape[1], keys.shape[1]
    else:
        numbers = out.canvas[0] * out.canvas[1], value.canvas[0] * value.canvas[1]
    return Attention(
        node.name, fused, step if here else None, order, queries, keys, out, value, *numbers
    )


def _rows(found: Anatomy, name: str) -> Layout:
    """The layout of a value (..., n, channels) whose channels are one."""
    boxes = found.boxes.get(name)
    boxes = bx.union(boxes, (-1,)) if isinstance(boxes, Tensor) else None
    return _layout(found.graph, {name: boxes}, found.shapes, found.image, name, 0)
