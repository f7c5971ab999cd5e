"""One forward and one backward that gather all that the asked methods read."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..backward.balanced import Balanced
from ..backward.running import Run, finite_products
from ..backward.targets import Chosen, Target, resolve
from ..check.numeric import float_leaves
from ..errors import InputError
from ..graph.walking import Walker
from ..operators.algebra import Algebra
from ..operators.calls import named, operation_args
from ..plan.labelling import Degrees
from .layouts import Cell
from .places import Source
from .structure import Anatomy, Attention


class Need(StrEnum):
    """What a method reads of a pass, and what it asks of the model."""

    INPUT = "the input's gradient"
    BLOCKS = "blocks"
    ATTENTION = "attention"
    ATTENTION_GRADIENT = "the gradient of attention"
    LAYERS = "the output as each layer would have it"
    BIASES = "biases"
    STREAM = "attention whose queries are the tokens of the residual stream"
    VECTORS = "attention over one sequence, added to its tokens without a norm between"
    STEADY = "residual branches that keep the number of tokens and channels"


OF_ATTENTION = frozenset({Need.ATTENTION, Need.ATTENTION_GRADIENT, Need.LAYERS, Need.VECTORS})


@dataclass(frozen=True)
class Weights:
    """An attention: its `map` A and, where asked for, `gradient` dL/dA = g v^T, of shape
    (batch, windows, heads, queries, keys)."""

    site: Attention
    map: Tensor
    gradient: Tensor


@dataclass(frozen=True)
class Vectors:
    """What a token gives another one in a sub-layer of attention, (batch, 1, queries, keys), of the
    vectors T_ij = A_ij v_j W + [i = j] x_i, W what the sub-layer does with values: their `norm`,
    and how `near` each is to the sum of all, max(|y_i|_1 - |y_i - T_ij|_1, 0)."""

    site: Attention
    norm: Tensor
    near: Tensor


@dataclass(frozen=True)
class Record:
    """What one pass gathered. `input`: the source's value, an image or embedded tokens. `values`,
    `gradients`: stream node -> (batch, tokens, channels).

    `layers`: attention with the gradient of the output that the head makes of that very layer.
    `biases`: cell -> what the biases contribute there, (batch, *canvas); `bias_total`: (batch,);
    `later`: the same as `biases`, of the biases behind the first block's input alone.
    """

    anatomy: Anatomy
    input: Tensor
    input_gradient: Tensor
    output: Tensor
    target: Chosen
    values: Mapping[str, Tensor] = field(default_factory=dict)
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    attention: tuple[Weights, ...] = ()
    layers: tuple[Weights, ...] = ()
    biases: Mapping[Cell, Tensor] = field(default_factory=dict)
    bias_total: Tensor | None = None
    later: Mapping[Cell, Tensor] = field(default_factory=dict)
    vectors: tuple[Vectors, ...] = ()

    def on_canvas(self, node: str, tokens: Tensor) -> tuple[Cell, Tensor]:
        """One number a token of a stream node, (batch, tokens), as its cell and (batch, h, w)."""
        layout = self.anatomy.stream[node]
        return layout.cell, layout.on_canvas(tokens)


def gather(
    balanced: Balanced,
    labels: Degrees,
    anatomy: Anatomy,
    given: Sequence[Any],
    target: Target | Chosen,
    needs: Collection[Need],
) -> Record:
    """One forward and one backward of a balanced model, for its inputs, flat.

    Attention's gradient is taken at the product of weights and values, so that it is there where a
    policy prunes the weights and where the kernel is fused; the forward is not touched.
    """
    wants_attention = OF_ATTENTION & set(needs)
    sites = anatomy.attention if wants_attention else ()
    stream = anatomy.stream if {Need.BLOCKS, *wants_attention} & set(needs) else {}
    run = _Gathering(balanced, labels, anatomy, {*stream}, sites, Need.BIASES in needs)
    # the head is run again, or what follows each attention
    run.garbage_collect_values = not {Need.LAYERS, Need.VECTORS} & set(needs)
    with torch.enable_grad():
        output = float_leaves(run.run(*given, enable_io_processing=False))[0]
        chosen = chosen_of(output, target)
        value = chosen.of(output)
        layers = tuple(_layers(run, sites, chosen)) if Need.LAYERS in needs else ()
        read = run.sources | {n: run.kept[n] for n in (*stream, *(s.node for s in sites))}
        asked = {n: t for n, t in read.items() if t.requires_grad}
        with run.listening():
            found = torch.autograd.grad(value.sum(), [*asked.values()], allow_unused=True)
    grads = dict(zip(asked, found, strict=True))
    grads = {
        n: torch.zeros_like(t) if grads.get(n) is None else grads[n].detach()
        for n, t in read.items()
    }
    source = anatomy.source
    return Record(
        anatomy,
        source.axes.joined([run.sources[name].detach() for name in source.nodes]),
        source.axes.joined([grads[name] for name in source.nodes]),
        value.detach(),
        chosen,
        {n: layout.tokens(run.kept[n].detach()) for n, layout in stream.items()},
        {n: layout.tokens(grads[n]) for n, layout in stream.items()},
        tuple(run.weights(s, grads[s.node]) for s in sites),
        layers,
        run.biases,
        run.bias_total,
        run.later,
        tuple(_vectors(run, sites)) if Need.VECTORS in needs else (),
    )


def counted(labels: Degrees) -> Degrees:
    """The labels with the biases of norms that a policy leaves as they are.

    Completeness does not know them as leaves: the norm breaks it before. FullGrad counts every
    bias by its gradient, whether or not the sum is the output.
    """
    norms = {
        name: ("bias",)
        for name, call in labels.live.calls.items()
        if call.operator.algebra is Algebra.NORMALISER
        and call.operator.bias_operands(call) == ("bias",)
    }
    return replace(labels, biases=norms | dict(labels.biases))


def chosen_of(output: Tensor, target: Target | Chosen) -> Chosen:
    """The target of each sample of an output (B, *rest); raises `InputError`."""
    if output.dim() == 0:
        raise InputError("the model returns one number for all samples; there must be one a sample")
    return target if isinstance(target, Chosen) else resolve(target, output)


class _AtSource(Walker):
    """Runs a graph, keeping the values of its source, or having others in their place."""

    def __init__(self, module: fx.GraphModule, source: Source) -> None:
        super().__init__(module)
        self.source = source
        self.found: dict[str, Tensor] = {}
        self.given: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.name in self.given:
            return self.given[n.name]
        value = super().run_node(n)
        if n.name in self.source.nodes:
            self.found[n.name] = value
        return value


def output_and_source(
    balanced: Balanced, source: Source, given: Sequence[Any]
) -> tuple[Tensor, list[Tensor]]:
    """The output, (B, *rest), and the parts of the source; `given`: the inputs, flat."""
    run = _AtSource(balanced.fx, source)
    output = float_leaves(run.run(*given, enable_io_processing=False))[0]
    return output, [run.found[name] for name in source.nodes]


def output_from(
    balanced: Balanced, source: Source, given: Sequence[Any], parts: Sequence[Tensor]
) -> Tensor:
    """The output, (B, *rest), where the source has these parts."""
    run = _AtSource(balanced.fx, source)
    run.given = dict(zip(source.nodes, parts, strict=True))
    return float_leaves(run.run(*given, enable_io_processing=False))[0]


class _Gathering(Run):
    """Keeps values of the stream and operands of attention; sums up what biases contribute."""

    def __init__(
        self,
        balanced: Balanced,
        labels: Degrees,
        anatomy: Anatomy,
        stream: Collection[str],
        sites: Sequence[Attention],
        biases: bool,
    ) -> None:
        graph = anatomy.graph
        super().__init__(balanced.fx, graph, labels)
        self.anatomy, self.with_biases = anatomy, biases
        self.stream, self.sites = stream, {s.node: s for s in sites}
        self.kept: dict[str, Tensor] = {}
        self.operands: dict[str, dict[str, Any]] = {}
        self.biases: dict[Cell, Tensor] = {}
        self.later: dict[Cell, Tensor] = {}
        self.bias_total: Tensor | None = None
        self.behind = anatomy.behind if biases and anatomy.blocks else frozenset[str]()
        self._heard = False

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.stream or n.name in self.sites:
            self.kept[n.name] = value
        if n.name in self.sites:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            self.operands[n.name] = self.bound(n, args, kwargs)
        return value

    def bound(self, n: fx.Node, args: Any, kwargs: Any) -> dict[str, Any]:
        """Arguments by the names that the unedited operation gives them, detached."""
        original: Any = self.original[n.name].target
        given = named(original, operation_args(n.target, args), kwargs)
        return pytree.tree_map_only(Tensor, Tensor.detach, given)

    def _watch(self, n: fx.Node, value: Any) -> None:
        if self.with_biases:
            super()._watch(n, value)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Biases are counted in this backward alone."""
        self._heard = True
        try:
            yield
        finally:
            self._heard = False

    def hear(self, key: str, g: Tensor, added: Tensor) -> None:
        if not self._heard:
            return
        name, _, index = key.partition("[")
        layout = self.anatomy.layout(name, int(index[:-1]) if index else 0)
        products = finite_products(g, added)
        total = layout.split(products).flatten(1).sum(1, dtype=torch.float64)
        self.bias_total = total if self.bias_total is None else self.bias_total + total
        if layout.placed:
            placed = layout.place(products)
            for into in (self.biases, self.later) if name in self.behind else (self.biases,):
                known = into.get(layout.cell)
                into[layout.cell] = placed if known is None else known + placed

    def weights(
        self, site: Attention, g: Tensor, operands: dict[str, Any] | None = None
    ) -> Weights:
        """An attention's map, recomputed where it is fused, and its gradient g v^T."""
        g = site.rows(g)
        attention, values = self.attended(site, g, operands)
        gradient = g.to(attention) @ values.to(attention).mT
        return Weights(site, _by_window(site, attention), _by_window(site, gradient))

    def attended(
        self, site: Attention, rows: Tensor, operands: dict[str, Any] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The weights (..., q, k) and values (..., k, c) of a product (..., q, c) like `rows`."""
        given = self.operands[site.node] if operands is None else operands
        if site.fused:
            attention, values = _softmax(given), given["value"]
        else:
            attention, values = site.operands(given)
        if values.dim() > 2 and values.shape[-3] != rows.shape[-3]:  # grouped or shared heads
            values = values.repeat_interleave(rows.shape[-3] // values.shape[-3], -3)
        return attention, values


def _by_window(site: Attention, weights: Tensor) -> Tensor:
    """(..., q, k), heads and windows folded in any way -> (batch, windows, heads, q, k)."""
    slots, windows = site.slots.numel(), site.keys.shape[0]
    split = site.query_layout.split(weights)
    flat = split.reshape(-1, slots, *weights.shape[-2:])
    return flat[:, site.slots.to(flat.device)].unflatten(1, (windows, slots // windows))


def _softmax(given: Mapping[str, Any]) -> Tensor:
    """softmax(q k^T scale + mask), in float32 or wider, beside the fused kernel."""
    query, key, mask = given["query"], given["key"], given.get("attn_mask")
    wide = torch.promote_types(query.dtype, torch.float32)
    query, key = query.to(wide), key.to(wide)
    if query.dim() > 2 and key.shape[-3] != query.shape[-3]:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scale = given.get("scale")
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if given.get("is_causal"):
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    return cast(Tensor, torch.ops.aten._safe_softmax.default(scores, -1))


def _layers(run: _Gathering, sites: Sequence[Attention], chosen: Chosen) -> Iterator[Weights]:
    """Per layer, the head's output for it, and that output's gradient at the layer's attention.

    Where the head pools by an attention of its own, its map is taken, as LeGrad has it. Each is
    differentiated from the head down to that attention only: together, about one backward.
    """
    anatomy = run.anatomy
    nodes = list(run.graph.nodes)
    places = {n.name: i for i, n in enumerate(nodes)}
    last = nodes[places[anatomy.tail]]
    pooling = [s for s in sites if s.node in anatomy.pooling]
    inner = [s for s in sites if s.step is not None]
    for block in anatomy.layers:
        own = [s for s in inner if anatomy.steps[s.step] in block.steps]  # type: ignore[index]
        state = run.kept[block.output]
        values, output = _head(run, nodes[places[last.name] + 1 :], last, state)
        read = [values[s.node] for s in pooling] or [run.kept[s.node] for s in own]
        score = chosen.of(output).sum()
        grads = torch.autograd.grad(score, read, retain_graph=True, allow_unused=True)
        for site, value, g in zip(pooling or own, read, grads, strict=True):
            g = torch.zeros_like(value) if g is None else g.detach()
            operands = values[f"{site.node}:operands"] if pooling else None
            yield run.weights(site, g, operands)


@torch.no_grad()
def _vectors(run: _Gathering, sites: Sequence[Attention]) -> Iterator[Vectors]:
    """Each attention with what its keys give to its queries: the product is run again for one key
    at a time, through the layers behind it up to the sum with the tokens. Only norms are kept.

    Raises `InputError` where these layers are not linear, as behind a norm.
    """
    nodes = list(run.graph.nodes)
    places = {n.name: i for i, n in enumerate(nodes)}
    for site in sites:
        if site.step is None:
            continue
        step = run.anatomy.steps[site.step]
        before, after = (run.anatomy.stream[n] for n in (step.before, step.after))
        first, last = places[site.node], places[step.after]
        order = torch.tensor(site.product.orders[2]).argsort().tolist()
        rows = site.rows(run.kept[site.node])
        attention, values = run.attended(site, rows)

        def through(product: Tensor) -> Tensor:
            states = {nodes[first]: product.permute(order).to(run.kept[site.node])}  # noqa: B023
            for n in nodes[first + 1 : last + 1]:  # noqa: B023
                _again(run, n, states)
            return after.tokens(states[nodes[last]])  # noqa: B023

        x, y = before.tokens(run.kept[step.before]), after.tokens(run.kept[step.after])
        rest, total, found = through(torch.zeros_like(rows)), torch.zeros_like(y), []
        for key in range(attention.shape[-1]):
            pair = slice(key, key + 1)
            vector = through(attention[..., pair] * values[..., pair, :]) - rest
            total += vector
            vector[:, key] += x[:, key]
            away = (y - vector).abs().sum(-1)
            found.append((vector.norm(dim=-1), (y.abs().sum(-1) - away).relu()))
        scale = float(y.abs().max())
        if float((total + rest - y).abs().max()) > 1e-3 * scale:
            raise InputError(f"what follows {site.node} is not linear: {Need.VECTORS} is needed")
        norm, near = (torch.stack(t, -1)[:, None] for t in zip(*found, strict=True))
        yield Vectors(site, norm, near)


def _again(run: _Gathering, n: fx.Node, states: dict[fx.Node, Any]) -> None:
    """Run a node on other values, where it reads any of them."""
    if n.op == "call_function" and any(a in states for a in n.all_input_nodes):
        args, kwargs = fx.map_arg((n.args, n.kwargs), lambda a: states.get(a, run.env[a]))
        states[n] = n.target(*args, **kwargs)  # type: ignore[operator]


def _head(
    run: _Gathering, nodes: Sequence[fx.Node], last: fx.Node, state: Tensor
) -> tuple[dict[str, Any], Tensor]:
    """Run what reads the stream's last value again, on another one."""
    values: dict[fx.Node, Any] = {last: state}
    kept: dict[str, Any] = {}
    for n in nodes:
        if n.op == "output":
            made = fx.map_arg(n.args, lambda a: values.get(a, run.env.get(a)))
            return kept, float_leaves(made)[0]
        _again(run, n, values)
        if n not in values:
            continue
        kept[n.name] = values[n]
        if n.name in run.sites:
            args, kwargs = fx.map_arg((n.args, n.kwargs), lambda a: values.get(a, run.env[a]))
            kept[f"{n.name}:operands"] = run.bound(n, args, kwargs)
    raise AssertionError("a graph ends with its output")
