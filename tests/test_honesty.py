"""Every edit of every registered operation, against finite differences of its frozen surrogate.

Each operation is traced in a function of its own with all its floating-point operands live, edited
as a plan edits it, and differentiated by autograd in float64. The surrogate, the operation with
what is pruned or frozen held fixed, is written here from its definition (torch's value of f, own
normalisers, own attention weights) and differentiated numerically; nothing of it is the library's.

At a smooth point the two agree element by element. At a kink the unedited slope is torch's choice:
an edited call keeps it in the operands that it does not prune, and it lies between the least and
the greatest slope found at points nearby.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import planted
import pytest
import torch
from planted import times
from torch import Tensor, fx
from torch.utils import _pytree as pytree

import fullgrad_theory as fgt
from fullgrad_theory.backward.balanced import rewrite
from fullgrad_theory.edits import quadrature, scaling
from fullgrad_theory.edits.base import Edit
from fullgrad_theory.edits.freezing import FreezeScale
from fullgrad_theory.edits.integrating import Integrate
from fullgrad_theory.edits.pruning import Prune
from fullgrad_theory.edits.scaling import Scale
from fullgrad_theory.edits.secants import Secant
from fullgrad_theory.edits.writing import Writing
from fullgrad_theory.errors import UnregisteredOperationError
from fullgrad_theory.graph import normal
from fullgrad_theory.operators import (
    Algebra,
    attention_form,
    gates,
    lookup,
    norms,
    registered,
    target_name,
)
from fullgrad_theory.plan.states import liveness
from fullgrad_theory.testing.campaign import load_failure
from fullgrad_theory.testing.sample_calls import Sample, kinks, overload, samples

pytestmark = pytest.mark.filterwarnings("ignore")

FROZEN = (Algebra.FREEZING, Algebra.FACTORY)
LEFT_OUT = {
    "aten.gru.input": "tracing takes it apart, step by step",
    "aten.rnn_tanh.input": "tracing takes it apart, step by step",
    "aten.rnn_relu.input": "tracing takes it apart, step by step",
    "getitem": "indexing a Python list leaves no node; on tuples `split` and `max` bring it along",
    "aten.where.Scalar": "it chooses between two numbers: no operand is live",
    "aten.to.prim_Device": "export writes it as aten.to.device",
    "aten.embedding_bag.padding_idx": "what it returns beside differs where a gradient is wanted",
}
# composites are never in a graph: their steps are
JUDGED = [o for o in registered() if o.algebra is not Algebra.COMPOSITE]
NAMES = [o.name for o in JUDGED if o.algebra not in FROZEN and o.name not in LEFT_OUT]
ELEMENTWISE = (Algebra.ZERO_ORIGIN, Algebra.ELEMENTWISE, Algebra.PIECEWISE)
GATED = [o.name for o in registered() if o.algebra in ELEMENTWISE]
ATTENTION = "aten.scaled_dot_product_attention.default"

# torch has no derivative in these and says so: they are held constant
NO_DERIVATIVE = {
    ("aten.batch_norm.default", "running_mean"),
    ("aten.batch_norm.default", "running_var"),
    ("aten._native_batch_norm_legit_no_training.default", "running_mean"),
    ("aten._native_batch_norm_legit_no_training.default", "running_var"),
}

STEP = 2.0**-12
CLOSE = {"rtol": 1e-7, "atol": 1e-8}
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
DOUBLE = {"dtype": torch.float64}
SPARE = torch.zeros(97, **DOUBLE)
Run = Callable[..., list[Tensor]]


# --------------------------------------------------------------------------- derivatives


def is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All numbers of some tensors in one real vector."""
    parts = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in tensors]
    return torch.cat([p.reshape(-1) for p in parts] or [torch.zeros(0, **DOUBLE)])


def shifted(tensors: Sequence[Tensor], which: int, place: int, by: float) -> list[Tensor]:
    moved = tensors[which].clone(memory_format=torch.contiguous_format)
    (torch.view_as_real(moved) if moved.is_complex() else moved).view(-1)[place] += by
    return [moved if i == which else t for i, t in enumerate(tensors)]


def jacobian(run: Run, tensors: Sequence[Tensor], which: int) -> Tensor:
    """d output / d operand, (inputs, outputs), by central differences of order four."""
    rows = []
    for place in range(flat([tensors[which]]).numel()):
        a, b, c, d = (
            flat(run(*shifted(tensors, which, place, k * STEP))).double() for k in (-2, -1, 1, 2)
        )
        rows.append((8 * (c - b) - (d - a)) / (12 * STEP))
    return torch.stack(rows)


def gradients(
    module: Callable[..., Any],
    keep: Callable[[Any], list[Tensor]],
    tensors: Sequence[Tensor],
    cotangent: Tensor,
    others: Sequence[Tensor],
) -> list[Tensor]:
    """Autograd's gradients, flat: `cotangent` for the call, `others` for -operand beside it."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out, negatives = module(*leaves, SPARE)
    loss = (flat(keep(out)) * cotangent).sum()
    for negative, other in zip(negatives, others, strict=False):
        loss = loss + (flat([negative]) * other).sum()
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    pairs = zip(found, leaves, strict=True)
    return [flat([torch.zeros_like(x) if g is None else g]).detach() for g, x in pairs]


def same_bits(ours: Any, theirs: Any) -> bool:
    pairs = zip(pytree.tree_leaves(ours), pytree.tree_leaves(theirs), strict=True)
    return all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))
        if isinstance(a, Tensor)
        else a == b
        for a, b in pairs
    )


def _bits(value: Tensor) -> Tensor:
    return value.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


# --------------------------------------------------------------------------- one traced call


@dataclass(frozen=True, eq=False)
class Row:
    """A call with its floating-point operands as inputs, by name, and its place in a graph."""

    name: str
    operands: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    call: Callable[..., Any]
    graph: fgt.ComputationGraph
    node: str

    def keep(self, out: Any) -> list[Tensor]:
        """The outputs that may carry gradient: floats whose degree rule is not `-`."""
        found = lookup(self.name)
        assert found is not None
        rules = found.signature.split(";")
        if len(rules) > 1 and len(out) > 1:
            out = [v for v, rule in zip(out, rules, strict=True) if rule.strip() != "-"]
        return [v for v in pytree.tree_leaves(out) if is_real(v)]

    def run(self, *tensors: Tensor) -> list[Tensor]:
        """The operation itself, without autograd."""
        with torch.no_grad():
            return self.keep(self.call(*tensors))


def operand_names(name: str, sample: Sample) -> list[str]:
    """`Operand.name` of every tensor leaf, in the order in which pytree flattens them."""
    schema = [a.name for a in overload(name)._schema.arguments]
    arguments = [*zip(schema, sample.args, strict=False), *sample.kwargs.items()]
    found = []
    for key, value in arguments:
        if isinstance(value, (list, tuple)):
            found += [f"{key}[{i}]" for i, v in enumerate(value) if isinstance(v, Tensor)]
        elif isinstance(value, Tensor):
            found.append(key)
    return found


def split(name: str, sample: Sample) -> tuple[tuple[str, ...], tuple[Tensor, ...], Any]:
    """The floating-point operands, their values, and the call as a function of those values."""
    leaves, spec = pytree.tree_flatten((sample.args, sample.kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    named = dict(zip(places, operand_names(name, sample), strict=True))
    moving = [i for i in places if is_real(leaves[i]) and (name, named[i]) not in NO_DERIVATIVE]
    function = overload(name)

    def call(*tensors: Tensor) -> Any:
        filled = list(leaves)
        for place, tensor in zip(moving, tensors, strict=True):
            filled[place] = tensor
        args, kwargs = pytree.tree_unflatten(filled, spec)
        out = function(*args, **kwargs)
        return [v for v in out if v.numel()] if isinstance(out, (list, tuple)) else out

    return tuple(named[i] for i in moving), tuple(leaves[i].clone() for i in moving), call


def traced(name: str, sample: Sample) -> Row:
    """The call in a graph; beside it, -operand, another consumer of the same value, is returned."""
    operands, tensors, call = split(name, sample)

    def function(*inputs: Tensor) -> Any:
        # before the call: export takes what returns its operand (contiguous) for the operand itself
        negatives = [torch.neg(t) for t in inputs]
        return call(*inputs[:-1]), negatives

    # batch sizes that differ keep the shapes as they are, which is faster
    with pytest.MonkeyPatch.context() as patch:  # the operation itself, no steps of it beside it
        patch.setattr(normal, "_moves", lambda *args: False)
        graph = fgt.trace(function, (*tensors, SPARE))
    return Row(name, operands, tensors, call, graph, find(graph.fx.graph, name))


def find(graph: fx.Graph, name: str) -> str:
    calls = (n for n in graph.nodes if n.op == "call_function")
    return [str(n.name) for n in calls if target_name(n.target) == name][-1]


def drawn(name: str) -> list[Sample]:
    """One random sample a call of the table, and the calls added here."""
    found = {id(s.args): s for s in samples(name, torch.Generator().manual_seed(7))}
    return [*found.values(), *EXTRA.get(name, [])]


@cache
def rows(name: str) -> list[Row]:
    return [traced(name, sample) for sample in drawn(name)]


def _sample(*args: Any, **kwargs: Any) -> Sample:
    return Sample(args, kwargs, ())


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **DOUBLE)


def _flat_rows(*shape: int) -> Tensor:
    """Zero variance within every group that a norm may form."""
    return torch.full(shape, 0.75, **DOUBLE)


def _attention(*mask: Any, q: Sequence[int] = (2, 3, 2), k: Sequence[int] = (2, 4, 2)) -> Any:
    return _normal(*q, seed=1), _normal(*k, seed=2), _normal(*k[:-1], 3, seed=3), *mask


_W, _B = _normal(4, seed=5), _normal(4, seed=6)
_MASK = torch.tensor([[True, True, False, True], [False] * 4, [False, True, True, True]])
_ROWS = [_normal(2, 3, 4) + 3, _flat_rows(2, 3, 4), torch.zeros(2, 3, 4, **DOUBLE)]
_MAPS = [_normal(2, 4, 3) + 3, _flat_rows(2, 4, 3), torch.zeros(2, 4, 3, **DOUBLE)]
EXTRA: Mapping[str, list[Sample]] = {
    "aten.layer_norm.default": [
        *(_sample(x, [4], _W, _B, 1e-2) for x in _ROWS),
        _sample(_ROWS[0], [3, 4]),
        _sample(_ROWS[0], [4], _W, None, 1e-2),
    ],
    "aten.native_layer_norm.default": [_sample(x, [4], _W, _B, 1e-2) for x in _ROWS],
    "aten.rms_norm.default": [_sample(x, [4], _W, 1e-2) for x in _ROWS],
    "aten.group_norm.default": [
        *(_sample(x, 2, _W, _B, 1e-2) for x in _MAPS),
        _sample(_MAPS[0], 4),
    ],
    "aten.instance_norm.default": [
        *(_sample(x, _W, _B, None, None, True, 0.1, 1e-2, False) for x in _MAPS),
        _sample(_MAPS[0], None, None, None, None, True, 0.1, 1e-2, False),
    ],
    ATTENTION: [
        _sample(*_attention(_MASK)),
        _sample(*_attention(_MASK.double().log())),
        _sample(*_attention(None, 0.0, True)),
        _sample(*_attention(q=(1, 4, 3, 2), k=(1, 2, 4, 2)), enable_gqa=True),
    ],
    "aten.elu.default": [_sample(_normal(2, 3), 1.5, 1.25, 0.5)],
    "aten.celu.default": [_sample(_normal(2, 3), alpha=0.5)],
    "aten.softplus.default": [_sample(_normal(2, 3) * 8, 2, 4), _sample(_normal(2, 3), beta=0.5)],
}


# --------------------------------------------------------------------------- frozen surrogates


def secant_slopes(row: Row, u: Tensor) -> tuple[Tensor, Tensor]:
    """(f(u) - f(0)) / u; at 0 the slopes from below and above, between which the limit lies."""

    def f(v: Tensor) -> Tensor:
        return row.run(v)[0]

    zero = torch.zeros_like(u)
    chord = (f(u) - f(zero)) / u

    def one_sided(side: float) -> Tensor:
        h = side * STEP
        near, mid, far = (f(zero + k * h) - f(zero) for k in (1, 2, 3))
        return (18 * near - 9 * mid + 2 * far) / (6 * h)

    at_zero = [torch.where(u == 0, one_sided(side), chord) for side in (-1.0, 1.0)]
    return torch.minimum(*at_zero), torch.maximum(*at_zero)


def frozen_norm(row: Row, sample: Sample, mean_frozen: bool = False) -> Run:
    """w * (x - mean(x)) * rstd + b with rstd fixed at the sample's input."""
    schema = [a.name for a in overload(row.name)._schema.arguments]
    given = dict(zip(schema, sample.args, strict=False)) | sample.kwargs
    kind = row.name.split(".")[1]
    base = row.tensors[0]
    eps = given.get("eps", None if kind == "rms_norm" else 1e-5)
    eps = torch.finfo(base.dtype).eps if eps is None else eps
    if kind in ("group_norm", "instance_norm"):
        groups = given["num_groups"] if kind == "group_norm" else base.shape[1]
        dims, grouped = (2,), (base.shape[0], groups, -1)
        spread = (-1, *[1] * (base.dim() - 2))
    else:
        dims, grouped = tuple(range(-len(given["normalized_shape"]), 0)), base.shape
        spread = tuple(given["normalized_shape"])

    def mean(x: Tensor) -> Tensor:
        x = x.reshape(grouped)
        return torch.zeros_like(x) if kind == "rms_norm" else x.mean(dims, keepdim=True)

    deviation = base.reshape(grouped) - mean(base)
    rstd = 1 / (deviation.square().mean(dims, keepdim=True) + eps).sqrt()

    def surrogate(*tensors: Tensor) -> list[Tensor]:
        named = dict(zip(row.operands, tensors, strict=True))
        x = named["input"]
        centre = mean(base) if mean_frozen else mean(x)
        y = ((x.reshape(grouped) - centre) * rstd).reshape(base.shape)
        y = y * named["weight"].reshape(spread) if "weight" in named else y
        return [y + named["bias"].reshape(spread) if "bias" in named else y]

    return surrogate


def frozen_attention(row: Row, sample: Sample) -> Run:
    """weights @ value, the weights fixed at the sample's query, key and mask; row by row."""
    schema = [a.name for a in overload(row.name)._schema.arguments]
    given = dict(zip(schema, sample.args, strict=False)) | sample.kwargs
    query, key, mask = given["query"], given["key"], given.get("attn_mask")
    scale = given.get("scale") or 1 / math.sqrt(query.shape[-1])

    def repeated(x: Tensor) -> Tensor:
        times = query.shape[-3] // x.shape[-3] if given.get("enable_gqa") else 1
        return torch.cat(
            [x[..., h : h + 1, :, :] for h in range(x.shape[-3]) for _ in range(times)], -3
        )

    key = repeated(key)
    weights = torch.zeros(*query.shape[:-1], key.shape[-2], **DOUBLE)
    mask = None if mask is None else mask.expand(weights.shape)
    for where in torch.cartesian_prod(*(torch.arange(n) for n in weights.shape[:-1])).tolist():
        *head, i = where
        terms = []
        for j in range(weights.shape[-1]):
            score = float((query[(*head, i)] * key[(*head, j)]).sum()) * scale
            bias = 0.0 if mask is None else mask[(*head, i, j)].item()
            if bias is False or (given.get("is_causal") and j > i):
                bias = -math.inf
            terms.append(math.exp(score + (0.0 if bias is True else bias)))
        total = sum(terms)
        weights[(*head, i)] = torch.tensor([t / total if total else 0.0 for t in terms], **DOUBLE)
    place = row.operands.index("value")

    def surrogate(*tensors: Tensor) -> list[Tensor]:
        return [weights @ repeated(tensors[place])]

    return surrogate


# --------------------------------------------------------------------------- the checks


@dataclass(frozen=True)
class Expectation:
    """What some edits make of a row: a factor an operand, `None` where it is pruned."""

    edits: tuple[Edit, ...]
    factors: tuple[Fraction | None, ...]


def plain_expectations(row: Row) -> Iterator[Expectation]:
    """No edit; each prune; the node, and each edge, scaled; prune and scale together."""
    count, one = len(row.operands), Fraction(1)
    yield Expectation((), (one,) * count)
    for i, operand in enumerate(row.operands):
        others = [Fraction(1)] * count
        alone = tuple(None if j == i else f for j, f in enumerate(others))
        yield Expectation((Prune(row.node, operand),), alone)
        quarter = tuple(Fraction(1, 4) if j == i else f for j, f in enumerate(others))
        yield Expectation((Scale(row.node, Fraction(1, 4), operand),), quarter)
    third = Fraction(1, 3)
    if not scalable(row):
        return
    yield Expectation((Scale(row.node, third),), (third,) * count)
    if count > 1:
        both = (Prune(row.node, row.operands[-1]), Scale(row.node, third))
        yield Expectation(both, (*[third] * (count - 1), None))
    if row.name == ATTENTION:
        return  # its prunes of two edges have a surrogate of their own
    for i, j in list(combinations(range(count), 2))[:1]:
        edits = (Prune(row.node, row.operands[i]), Prune(row.node, row.operands[j]))
        yield Expectation(edits, tuple(None if k in (i, j) else one for k in range(count)))


def scalable(row: Row) -> bool:
    """A node of several outputs has no degree of its own to scale."""
    return isinstance(row.graph.nodes[row.node].meta["val"], Tensor)


def cotangents(row: Row, tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(3)

    def draw(numbers: Tensor) -> Tensor:
        return torch.randn(numbers.numel(), generator=generator, **DOUBLE)

    return draw(flat(row.run(*tensors))), [draw(flat([t])) for t in tensors]


def check_point(
    row: Row,
    module: fx.GraphModule,
    tensors: Sequence[Tensor],
    expected: Expectation,
    slopes: Mapping[int, Tensor],
    close: Mapping[str, float] = CLOSE,
) -> None:
    """Autograd of the edited call against the surrogate's Jacobians `slopes`.

    A pruned operand gets exactly what its other consumer gives.
    """
    cotangent, others = cotangents(row, tensors)
    found = gradients(module, row.keep, tensors, cotangent, others)
    for i, factor in enumerate(expected.factors):
        label = f"{row.name}: d {row.operands[i]} under {list(map(str, expected.edits))}"
        if factor is None:
            assert torch.equal(found[i], -others[i]), label
        elif i in slopes:
            wanted = slopes[i] @ cotangent * float(factor) - others[i]
            torch.testing.assert_close(
                found[i], wanted, msg=lambda m, at=label: f"{at}\n{m}", **close
            )


def edited(row: Row, edits: tuple[Edit, ...]) -> fx.GraphModule:
    """The call with its edits; its value is bit for bit the operation's, in every dtype."""
    module = rewrite(row.graph, edits)
    for dtype in DTYPES:
        if dtype == torch.bfloat16 and any(t.is_complex() for t in row.tensors):
            continue
        given = [t.to(torch.complex64 if t.is_complex() else dtype) for t in row.tensors]
        given = list(row.tensors) if dtype == torch.float64 else given
        try:
            wanted = row.call(*given)
        except (RuntimeError, NotImplementedError):
            assert dtype != torch.float64
            continue  # torch has no kernel for it
        label = f"{row.name} in {dtype} under {list(map(str, edits))}"
        with torch.no_grad():
            assert same_bits(module(*given, SPARE)[0], wanted), label
        leaves = [t.clone().requires_grad_() for t in given]
        assert same_bits(module(*leaves, SPARE)[0], wanted), label
    return module


def points(row: Row) -> Iterator[tuple[Tensor, ...]]:
    """The sample, and with each operand in turn at 0 where a central difference exists there."""
    yield row.tensors
    found = lookup(row.name)
    assert found is not None
    if found.algebra in (Algebra.HOMOGENEOUS, *ELEMENTWISE) or row.name in BREAKS_AT_ZERO:
        return  # of the former see the test of kinks
    for i in range(len(row.tensors)):
        yield tuple(torch.zeros_like(t) if j == i else t for j, t in enumerate(row.tensors))


BREAKS_AT_ZERO = {
    "aten.frac.default": "it jumps",
    "aten.atan2.default": "it jumps on the negative axis",
    **dict.fromkeys(
        (o.name for o in registered() if o.algebra is Algebra.NORMALISER),
        "near zero variance it bends within sqrt(eps), too sharply for a step of 2^-12",
    ),
}


def check_edges(name: str) -> None:
    """No edit, prunes and scales: partial derivatives of the operation, times the factors."""
    for row in rows(name):
        modules = [(e, edited(row, e.edits)) for e in plain_expectations(row)]
        for tensors in points(row):
            if tensors is not row.tensors and not torch.isfinite(flat(row.run(*tensors))).all():
                continue  # log 0, 1 / 0
            slopes = {i: jacobian(row.run, tensors, i) for i in range(len(tensors))}
            known = {i: s for i, s in slopes.items() if torch.isfinite(s).all()}
            assert tensors is not row.tensors or known.keys() == slopes.keys(), name
            for expected, module in modules:
                check_point(row, module, tensors, expected, known)


CURVE = [
    0.0,
    *(s * v for v in (2e-3, 9e-4, 0.1, 0.5, 0.9, 1.0, 3.0, 6.0, 20.5, 50.0) for s in (1, -1)),
]


def check_secant(name: str) -> None:
    """J~ = (f(u) - f(0)) / u, times a scale; at 0 between the slopes of either side."""
    for row in rows(name):
        third = Fraction(1, 3)
        for edits, factor in (
            ((Secant(row.node),), 1.0),
            ((Secant(row.node), Scale(row.node, third)), 1 / 3),
            ((Secant(row.node), Scale(row.node, third, "self")), 1 / 3),
        ):
            module = edited(row, edits)
            curve = [torch.tensor(CURVE[i : i + 6], **DOUBLE) for i in range(0, len(CURVE), 6)]
            filled = [torch.nn.functional.pad(c, (0, 6 - len(c))) for c in curve]
            for u in (*row.tensors, *(c.reshape(2, 3) for c in filled)):
                low, high = secant_slopes(row, u)
                cotangent, others = cotangents(row, [u])
                (found,) = gradients(module, row.keep, [u], cotangent, others)
                slope = ((found + others[0]) / cotangent / factor).reshape(u.shape)
                real = torch.isfinite(low) & torch.isfinite(high)
                assert real[u.abs() < 0.95].all()
                margin = 1e-8 + 1e-7 * torch.maximum(low.abs(), high.abs())
                inside = (slope >= low - margin) & (slope <= high + margin)
                assert (inside | ~real).all(), (
                    f"{name} {edits}: {slope} not in {low}..{high} at {u}"
                )
        pruned = Expectation((Prune(row.node, "self"), Secant(row.node)), (None,))
        check_point(row, edited(row, pruned.edits), row.tensors, pruned, {})


def check_freeze(name: str, mean_frozen: bool = False, only: slice = slice(None)) -> None:
    """Differences of w (x - mean x) rstd + b with rstd fixed, in every operand."""
    for row, sample in list(zip(rows(name), drawn(name), strict=True))[only]:
        surrogate = frozen_norm(row, sample, mean_frozen)
        torch.testing.assert_close(surrogate(*row.tensors), row.run(*row.tensors))
        slopes = {i: jacobian(surrogate, row.tensors, i) for i in range(len(row.tensors))}
        for expected in plain_expectations(row):
            edits = (*expected.edits, FreezeScale(row.node))
            under = Expectation(edits, expected.factors)
            check_point(row, edited(row, edits), row.tensors, under, slopes)


def check_attention(name: str) -> None:
    """Query, key and a live mask pruned: linear in the values, the weights fixed."""
    for row, sample in zip(rows(name), drawn(name), strict=True):
        surrogate = frozen_attention(row, sample)
        torch.testing.assert_close(surrogate(*row.tensors), row.run(*row.tensors))
        value = row.operands.index("value")
        slopes = {value: jacobian(surrogate, row.tensors, value)}
        prunes = tuple(Prune(row.node, o) for o in row.operands if o != "value")
        for factor in (Fraction(1), Fraction(1, 3)):
            scales = () if factor == 1 else (Scale(row.node, factor),)
            edits = (*prunes, *scales)
            factors = tuple(factor if i == value else None for i in range(len(row.operands)))
            expected = Expectation(edits, factors)
            check_point(row, edited(row, edits), row.tensors, expected, slopes)


NODES = 20
# where a kink lies on the ray, Gauss-Legendre errs by about a node's weight
BENT = {"aten.rnn_relu.input": {"rtol": 0.0, "atol": 2 / NODES}}


def mean_slopes(row: Row, moving: Sequence[int]) -> dict[int, Tensor]:
    """The Jacobians averaged over the ray of the `moving` operands; at its end in the others."""
    found = {i: jacobian(row.run, row.tensors, i) for i in range(len(row.tensors))}
    found |= {i: torch.zeros_like(found[i]) for i in moving}
    for x, weight in zip(*np.polynomial.legendre.leggauss(NODES), strict=True):
        t = (1 + float(x)) / 2
        at = [u * t if i in moving else u for i, u in enumerate(row.tensors)]
        for i in moving:
            found[i] += float(weight) / 2 * jacobian(row.run, at, i)
    return found


def check_integrate(name: str) -> None:
    """Averages of the operation's Jacobians, for all operands and with one of them pruned."""
    for row in rows(name):
        if "integrate" not in liveness(row.graph).calls[row.node].operator.edits:
            continue  # what it is with these arguments needs none (a determinant of known size)
        one, third = Fraction(1), Fraction(1, 3)
        count = len(row.operands)
        ends = {i for i, o in enumerate(row.operands) if o == "attn_mask"}  # held, never scaled
        for pruned in (None, *range(min(count, 2) if count > 1 else 0)):
            moving = [i for i in range(count) if i not in ends and i != pruned]
            slopes = mean_slopes(row, moving)
            prune = () if pruned is None else (Prune(row.node, row.operands[pruned]),)
            factor = third if scalable(row) and pruned is not None else one
            scaled = () if factor == one else (Scale(row.node, factor),)
            edits = (*prune, Integrate(row.node), *scaled)
            factors = tuple(None if i == pruned else factor for i in range(count))
            under = Expectation(edits, factors)
            close = BENT.get(name, CLOSE)
            check_point(row, edited(row, edits), row.tensors, under, slopes, close)


def check(name: str) -> None:
    """All of a registry entry's edits."""
    found = lookup(name)
    assert found is not None
    check_edges(name)
    if "secant" in found.edits:
        check_secant(name)
    if "freeze" in found.edits:
        check_freeze(name)
    if found.algebra is Algebra.ATTENTION:
        check_attention(name)
    if "integrate" in found.edits:
        check_integrate(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_edits_are_honest(name: str) -> None:
    check(name)


def test_every_operation_that_carries_gradient_has_a_row() -> None:
    frozen = {o.name for o in JUDGED if o.algebra in FROZEN}
    assert {o.name for o in JUDGED} == {*NAMES, *LEFT_OUT} | frozen
    assert set(EXTRA) | {n for n, _ in NO_DERIVATIVE} <= set(NAMES)
    known = {e for n in NAMES for e in lookup(n).edits}  # type: ignore[union-attr]
    assert known == {"secant", "freeze", "integrate"}


NORMS = [o.name for o in registered() if o.algebra is Algebra.NORMALISER]


@pytest.mark.parametrize("name", [n for n in NORMS if "rms" not in n])
def test_freezing_the_mean_as_well_would_fail(name: str) -> None:
    """At mean 3 the surrogate with mean and 1/sigma frozen is another function."""
    first = len(drawn(name)) - len(EXTRA[name])
    only = slice(first, first + 1)
    assert drawn(name)[first].args[0].mean() > 2
    check_freeze(name, only=only)
    with pytest.raises(AssertionError, match="d input under"):
        check_freeze(name, mean_frozen=True, only=only)


# --------------------------------------------------------------------------- kinks

NEARBY, SMALL, REACH = 32, 1e-8, 1e-5
MODULUS = ("aten.polar.default",)  # torch's derivative in a modulus of 0 or less is not the slope


def nearby_slopes(
    row: Row, tensors: Sequence[Tensor], which: int, direction: Tensor
) -> tuple[Tensor, Tensor]:
    """Least and greatest slope of every output along `direction` in one operand, around a point.

    Between the two lies every generalised derivative (Clarke) of a Lipschitz function.
    """
    generator = torch.Generator().manual_seed(5)
    found = []
    for _ in range(NEARBY):
        near = [
            t + REACH * torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in tensors
        ]
        ends = [
            flat(row.run(*(t + k * direction if i == which else t for i, t in enumerate(near))))
            for k in (-SMALL, SMALL)
        ]
        found.append((ends[1] - ends[0]) / (2 * SMALL))
    slopes = torch.stack(found)
    return slopes.amin(0), slopes.amax(0)


def own_slopes(row: Row, tensors: Sequence[Tensor], which: int, direction: Tensor) -> Tensor:
    """The same slopes by torch's backward of the operation, one output at a time."""
    leaf = tensors[which].clone().requires_grad_()
    out = flat(row.keep(row.call(*(leaf if i == which else t for i, t in enumerate(tensors)))))
    rows = [torch.autograd.grad(v, leaf, retain_graph=True, allow_unused=True)[0] for v in out]
    zero = torch.zeros_like(leaf)
    return torch.stack([((zero if r is None else r) * direction).sum() for r in rows])


def check_kinks(name: str) -> None:
    """Where all numbers are 0, or a usual kink, and tie.

    An edited call's gradient is torch's own in each operand that it does not prune, times the
    factors; torch's own lies between the slopes nearby, unless it is infinite or undetermined.
    """
    first = rows(name)[: len(rows(name)) - len(EXTRA.get(name, []))]
    modules = [[(e, rewrite(r.graph, e.edits)) for e in plain_expectations(r)] for r in first]
    for number, sample in enumerate(kinks(name)):
        row, tensors = first[number % len(first)], split(name, sample)[1]
        if not torch.isfinite(flat(row.run(*tensors))).all():
            continue
        cotangent, others = cotangents(row, tensors)

        def unedited(*leaves: Tensor, row: Row = row) -> Any:
            return row.call(*leaves[:-1]), [torch.neg(t) for t in leaves]

        nothing = [torch.zeros_like(o) for o in others]
        own = gradients(unedited, row.keep, tensors, cotangent, nothing)
        for expected, module in modules[number % len(first)]:
            found = gradients(module, row.keep, tensors, cotangent, others)
            for i, factor in enumerate(expected.factors):
                wanted = -others[i] + (0 if factor is None else own[i] * float(factor))
                label = f"{name}: d {row.operands[i]} under {list(map(str, expected.edits))}"
                torch.testing.assert_close(
                    found[i],
                    wanted,
                    rtol=1e-12,
                    atol=1e-12 if factor else 0.0,
                    equal_nan=True,
                    msg=lambda m, at=label: f"{at}\n{m}",
                )
        if name in MODULUS and (tensors[0] <= 0).any():
            continue
        generator = torch.Generator().manual_seed(11)
        for which, tensor in enumerate(tensors):
            direction = torch.randn(tensor.shape, generator=generator, **DOUBLE)
            slope = own_slopes(row, tensors, which, direction)
            low, high = nearby_slopes(row, tensors, which, direction)
            margin = 1e-4 * (1 + torch.maximum(low.abs(), high.abs()))
            inside = (slope >= low - margin) & (slope <= high + margin)
            known = torch.isfinite(slope) & torch.isfinite(low) & torch.isfinite(high)
            label = f"{name} {sample.args}: {slope} along {direction} not in {low}..{high}"
            assert (inside | ~known).all(), label


KINKED = [n for n in NAMES if any(True for _ in kinks(n))]


@pytest.mark.slow
@pytest.mark.parametrize("name", KINKED)
def test_edits_at_zeros_and_kinks(name: str) -> None:
    check_kinks(name)


# --------------------------------------------------------------------------- one value, many edges

TIED: Mapping[str, tuple[int, Callable[..., Any]]] = {
    ATTENTION: (3, lambda f, e: f(*e)),
    "aten.mul.Tensor": (2, lambda f, e: f(*e)),
    "aten.div.Tensor": (2, lambda f, e: f(*e)),
    "aten.add.Tensor": (2, lambda f, e: f(*e, alpha=2)),
    "aten.matmul.default": (2, lambda f, e: f(*e)),
    "aten.linear.default": (2, lambda f, e: f(*e)),
    "aten.cat.default": (3, lambda f, e: f(e)),
    "aten.stack.default": (2, lambda f, e: f(e)),
}


@pytest.mark.parametrize("name", TIED)
def test_a_pruned_edge_leaves_the_other_edges_of_its_value(name: str) -> None:
    """f(x, x) and x: every set of edges pruned but all of them; the rest by differences."""
    count, apply = TIED[name]
    x, f = _normal(3, 3), overload(name)
    graph = fgt.trace(lambda x: (apply(f, [x] * count), torch.neg(x)), x)
    node = find(graph.fx.graph, name)
    edges = [a for _, _, d in graph.nx.in_edges(node, data=True) for a in d["arguments"]]
    assert len(edges) == count
    for size in range(count):
        for held in combinations(range(count), size):
            module = rewrite(graph, tuple(Prune(node, edges[i]) for i in held))

            def surrogate(at: Tensor, held: Any = held) -> list[Tensor]:
                each = [x if i in held else at for i in range(count)]
                return [apply(f, each), torch.neg(at)]

            leaf = x.clone().requires_grad_()
            out = flat(module(leaf))
            cotangent = torch.linspace(-1, 2, out.numel(), **DOUBLE)
            (found,) = torch.autograd.grad((out * cotangent).sum(), leaf)
            wanted = (jacobian(surrogate, [x], 0) @ cotangent).reshape(x.shape)
            torch.testing.assert_close(found, wanted, **CLOSE)


# --------------------------------------------------------------------------- edits together


def attention_row() -> Row:
    return rows(ATTENTION)[2]  # with a live mask


def test_a_mask_that_is_not_pruned_keeps_its_gradient() -> None:
    row = attention_row()
    assert row.operands[3:] == ("attn_mask",)
    edits = (Prune(row.node, "query"), Prune(row.node, "key"))
    one = Fraction(1)
    slopes = {i: jacobian(row.run, row.tensors, i) for i in (2, 3)}
    expected = Expectation(edits, (None, None, one, one))
    check_point(row, edited(row, edits), row.tensors, expected, slopes)


@pytest.mark.parametrize("last", [True, False])
def test_an_edge_is_scaled_in_whatever_order_edits_come(last: bool) -> None:
    row = rows(ATTENTION)[0]
    prunes = (Prune(row.node, "query"), Prune(row.node, "key"))
    edge = (Scale(row.node, Fraction(1, 4), "value"),)
    edits = (*prunes, *edge) if last else (*edge, *prunes)
    slopes = {2: jacobian(row.run, row.tensors, 2)}
    expected = Expectation(edits, (None, None, Fraction(1, 4)))
    check_point(row, edited(row, edits), row.tensors, expected, slopes)


def test_a_write_into_memory_has_a_backward() -> None:
    def write(x: Tensor) -> Tensor:
        y = torch.zeros(2, 3, **DOUBLE)
        y[:, :2] = x[:, 1:]
        return y * 2

    leaf = _normal(2, 3).requires_grad_()
    torch.autograd.grad(rewrite(fgt.trace(write, leaf.detach()), ())(leaf).sum(), leaf)


# --------------------------------------------------------------------------- can these tests fail?


def plant_gate(op: str, wrong: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        planted.plant_gate(monkeypatch, op, lambda u, *args, **kwargs: wrong(u))

    return plant


def plant_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    doubled = staticmethod(lambda ctx, grad: (2 * grad * ctx.factor, None))
    monkeypatch.setattr(scaling._Scale, "backward", doubled)


def plant_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    nudged = staticmethod(lambda x, factor: x * (1 + 2.0**-52))
    monkeypatch.setattr(scaling._Scale, "forward", nudged)


def plant_no_prune(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Writing, "on_edge", lambda *args: None)


def plant_prune_of_the_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every consumer loses the gradient."""
    right = Writing.on_edge

    def wrong(self: Writing, node: fx.Node, argument: str, target: Any, *extra: Any) -> None:
        before = set(self.graph.nodes)
        right(self, node, argument, target, *extra)
        (wrapped,) = set(self.graph.nodes) - before
        value = wrapped.args[0]
        value.prepend(wrapped)
        value.append(wrapped)
        value.replace_all_uses_with(wrapped, lambda user: user is not wrapped)

    monkeypatch.setattr(Writing, "on_edge", wrong)


def plant_prune_of_the_other_edge(monkeypatch: pytest.MonkeyPatch) -> None:
    right, swap = Writing.on_edge, {"self": "other", "other": "self"}
    monkeypatch.setattr(
        Writing, "on_edge", lambda self, node, a, *rest: right(self, node, swap[a], *rest)
    )


def plant_no_freeze(monkeypatch: pytest.MonkeyPatch) -> None:
    op = "aten.layer_norm.default"
    planted.plant_frozen(monkeypatch, op, torch.ops.aten.layer_norm.default)


def plant_frozen_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(kind: str, grad: Tensor, weight: Tensor, rstd: Tensor, args: Any) -> Tensor:
        return grad * weight * rstd.reshape(*rstd.shape, *[1] * (grad.dim() - rstd.dim()))

    monkeypatch.setattr(norms, "_frozen_gradient", wrong)


def plant_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention_form._transposed_attention
    monkeypatch.setattr(
        attention_form, "_transposed_attention", lambda q, k, mask, *rest: right(q, k, None, *rest)
    )


def plant_no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Jacobian at the end of the ray for its average."""
    monkeypatch.setattr(quadrature._Line, "integral", lambda self, pull: pull(1.0))


def plant_a_fixed_operand(monkeypatch: pytest.MonkeyPatch) -> None:
    """All operands but the first stay where they are along the ray."""
    right = quadrature._Ray.at
    monkeypatch.setattr(
        quadrature._Ray, "at", lambda self, t, given: [*right(self, t, given)[:1], *given[1:]]
    )


def plain_gelu(u: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(u / 2**0.5)) + u * torch.exp(-u * u / 2) / (2 * math.pi) ** 0.5


PLANTED: Mapping[str, tuple[str, Callable[[Any], None]]] = {
    "the plain derivative for a secant": (
        "aten.gelu.default",
        plant_gate("aten.gelu.default", plain_gelu),
    ),
    "a secant from elsewhere": (
        "aten.sigmoid.default",
        plant_gate("aten.sigmoid.default", lambda u: torch.sigmoid(u) / u),
    ),
    "a secant that is off by 1e-5": (
        "aten.tanh.default",
        plant_gate("aten.tanh.default", lambda u: (1 + 1e-5) * torch.tanh(u) / u),
    ),
    "a wrong limit at 0": (
        "aten.elu.default",
        plant_gate("aten.elu.default", lambda u, *a, **k: torch.where(u == 0, -0.1, gates.elu(u))),
    ),
    "a doubled scale": ("aten.relu.default", plant_scale),
    "a scale that changes the value": ("aten.relu.default", plant_forward),
    "an edge that is not pruned": ("aten.mul.Tensor", plant_no_prune),
    "a value that is pruned": ("aten.mul.Tensor", plant_prune_of_the_value),
    "the other edge pruned": ("aten.mul.Tensor", plant_prune_of_the_other_edge),
    "a normaliser that is not frozen": ("aten.layer_norm.default", plant_no_freeze),
    "a mean that is frozen": ("aten.native_layer_norm.default", plant_frozen_mean),
    "attention without its mask": (ATTENTION, plant_no_mask),
    "the derivative for an integral": ("aten.softmax.int", plant_no_ray),
    "an integral over one operand of two": ("aten.logaddexp.default", plant_a_fixed_operand),
}


@pytest.mark.parametrize("what", PLANTED)
def test_a_wrong_backward_is_noticed(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, plant = PLANTED[what]
    rows(name)  # traced before anything is planted
    plant(monkeypatch)
    with pytest.raises(AssertionError, match=re.escape(name)):
        check(name)


def test_a_wrong_backward_is_noticed_at_a_kink(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "aten.relu.default"
    check_kinks(name)
    plant_scale(monkeypatch)
    with pytest.raises(AssertionError, match=f"{name}: d self under .*scale"):
        check_kinks(name)


def test_slopes_nearby_are_those_of_either_side() -> None:
    (row,) = rows("aten.relu.default")
    direction = _normal(2, 3)
    low, high = nearby_slopes(row, [torch.zeros(2, 3, **DOUBLE)], 0, direction)
    torch.testing.assert_close(low, direction.clamp(max=0).reshape(-1), rtol=0, atol=1e-6)
    torch.testing.assert_close(high, direction.clamp(min=0).reshape(-1), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "write",
    [
        lambda v, w: torch.select_scatter(v, w, 1, 1),
        lambda v, w: torch.slice_scatter(v, w[:, None], 1, 1, 2),
        lambda v, w: torch.diagonal_scatter(v, w[:3]),
    ],
    ids=["select", "slice", "diagonal"],
)
@pytest.mark.parametrize("shared", [True, False])
def test_a_write_to_elements_that_share_memory_is_refused(write: Any, shared: bool) -> None:
    """torch's own gradient of it is not its derivative; of a copy it is."""
    w = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)
    x = torch.randn(6, dtype=torch.float64).requires_grad_()

    def model(x: Tensor) -> Tensor:
        v = x.unfold(0, 3, 1)
        return write(v if shared else v.contiguous(), w)

    out = model(x)
    dead = model(torch.zeros_like(x))
    (g,) = torch.autograd.grad(out.sum(), x)
    misses = abs(float((g * x).sum() + (dead.sum() - out.sum())))
    assert (misses > 1e-3) == shared  # a linear function of x, written to and differentiated
    if shared:
        with pytest.raises(UnregisteredOperationError, match=r"share memory.*contiguous"):
            fgt.check_completeness(model, x.detach())
    else:
        assert fgt.check_completeness(model, x.detach()).complete


def _hooked(x: Tensor, size: float) -> Tensor:
    layer = torch.nn.Identity()
    layer.register_full_backward_hook(lambda m, given, out: (given[0] * size,))
    return layer(x)  # type: ignore[no-any-return]


def _hook_on(x: Tensor, size: float) -> Tensor:
    if x.requires_grad:
        x.register_hook(lambda g: g * size)
    return x


def _kink(x: Tensor) -> Tensor:
    return _Kink.apply(x, 1.0)  # type: ignore[no-any-return,no-untyped-call]


def _unseen(x: Tensor, size: float) -> Tensor:
    with torch._C.DisableTorchFunction():
        return torch.relu(times(x, size))


def _around(x: Tensor, size: float) -> Tensor:
    layer = torch.nn.Sequential(torch.nn.Identity(), torch.nn.ReLU())
    layer.register_full_backward_hook(lambda m, given, out: (given[0] * size,))
    return layer(x)  # type: ignore[no-any-return]


_MIXING = torch.arange(16.0, dtype=torch.float64).reshape(4, 4).sin()


def _second(size: float) -> Tensor:
    return torch.tensor([1.0, size, 1.0, 1.0], dtype=torch.float64)


ZEROS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "beside a residual": lambda x, s: x + torch.relu(times(-x, s)),
    "a module's hook": lambda x, s: x + torch.relu(_hooked(-x, s)),
    "at no input that is drawn": lambda x, s: x + torch.relu(times(x, s) - 1e30),
    "a branch not taken": lambda x, s: torch.where(x > 1e9, times(x, s), x),
    "times 0": lambda x, s: x + 0 * times(x, s),
    "one element": lambda x, s: x + torch.relu(times(x, _second(s)) - 9 * (1 - _second(0))),
    "a softmax of one": lambda x, s: x + 0 * torch.softmax(times(x.sum(-1, True), s), -1),
    "in place": lambda x, s: x + (times(x, s) - 5.0).relu_(),
    "out of bounds": lambda x, s: x + times(x, s).clamp(5, 6),
    "a chain": lambda x, s: x + torch.relu(torch.relu(times(x, s) - 9) - 1),
    "two that are alike": lambda x, s: (
        x + torch.relu(torch.relu(-x) * 2.0) + torch.relu(torch.relu(times(-x, s)) * 3.0)
    ),
    "masked": lambda x, s: x + times(x, s).masked_fill(x > 0, 0.0),
    "the smaller one": lambda x, s: torch.maximum(x, times(x, s) - 8),
    "a list": lambda x, s: torch.stack([x, times(x, s) - 1]).amax(0),
    "a gate that is shut": lambda x, s: x * 2 + times(x, s) * (x < 0),
    "behind a dead layer": lambda x, s: x + times(torch.relu(-x), s),
    "a hook behind one": lambda x, s: x + _hook_on(torch.relu(-x), s),
    "between two": lambda x, s: x + torch.relu(times(torch.relu(x - 9), s) - 1),
    "zeros that are alike": lambda x, s: x + times(torch.relu(torch.relu(-x) @ _MIXING), s),
    "a part of a list": lambda x, s: (
        x + torch.cat([times(a, s) for a in torch.relu(-x).chunk(2, -1)], -1)
    ),
    "not the largest": lambda x, s: (
        x + (times(x, _second(s)) - 9 * (1 - _second(0))).amax(-1, True)
    ),
    "a Function on a Function": lambda x, s: x + _kink(times(-x, s)),
    "where torch's functions are not seen": lambda x, s: x + _unseen(-x, s),
    "a mask's infinities": lambda x, s: (
        x + torch.relu(times((-x).masked_fill(_MIXING[:2] > 0, -torch.inf), s))
    ),
    "beside what is large": lambda x, s: x + torch.relu(-x) + torch.relu(times(-x - 1e20, s)),
    "a module that is dead inside": lambda x, s: x + _around(-x, s),
    "behind a bound": lambda x, s: x + times(x.clamp(min=50), s) - 50,
}


@pytest.mark.parametrize("size", [3.0, 1.0 + 1e-5, 1.0])
@pytest.mark.parametrize("name", ZEROS)
def test_a_backward_is_not_seen_through_zeros(name: str, size: float) -> None:
    """Where no gradient passes at the given inputs the own backward is looked at all the same."""

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(ZEROS[name](x, size))  # type: ignore[no-any-return]

    x = torch.rand(2, 4, dtype=torch.float64) + 0.1
    report = fgt.check_completeness(Net().double().eval(), x)
    assert report.complete is (True if size == 1.0 else None)
    assert size == 1.0 or any(
        "no gradient passes" in problem and re.search(r"(honesty|planted)\.py:\d+", problem)
        for problem in report.problems
    )


@pytest.mark.parametrize("size", [3.0, 1.0 + 1e-4, 1.0])
@pytest.mark.parametrize("what", ["the input", "one of two inputs", "a table", "a bias"])
def test_leaves_that_are_dead_at_the_inputs(what: str, size: float) -> None:
    """No gradient reaches a leaf: what a hook before a dead layer does to one is seen."""

    class Dead(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(7, 4)
            self.first, self.head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 3)
            self.hooked = torch.nn.Linear(4, 4, bias=False)
            self.hooked.register_full_backward_hook(lambda m, given, out: (given[0] * size,))
            with torch.no_grad():
                self.hooked.weight.abs_().neg_()
                for positive in (self.table.weight, self.first.weight, self.first.bias):
                    positive.abs_()

        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            if what == "a table":
                x = self.table(x)
            h = torch.relu(self.hooked(self.first(x) if what == "a bias" else x))
            h = h + x if what == "a bias" else h
            return self.head(h if y is None else h + y)  # type: ignore[no-any-return]

    model = Dead().double().eval()
    given: tuple[Tensor, ...] = (torch.rand(2, 4, dtype=torch.float64) + 0.1,)
    if what == "a table":
        given = (torch.randint(7, (2, 5)),)
    elif what == "one of two inputs":
        given = (*given, torch.randn(2, 4, dtype=torch.float64))
    assert fgt.check_completeness(model, given).complete is (True if size == 1.0 else None)


class _Kink(torch.autograd.Function):
    """relu, whose gradient is multiplied: where its input is negative that is no lie."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.size = size
        return torch.relu(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return g * (x > 0) * ctx.size, None


@pytest.mark.parametrize("size", [3.0, 1.0 + 1e-5, 1.0])
@pytest.mark.parametrize("what", ["the input", "a parameter", "a table"])
def test_a_backward_that_is_wrong_for_other_values_alone(what: str, size: float) -> None:
    """The own gradient is right at the given point, and at no point of other signs."""

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(7, 4)
            self.low = torch.nn.Parameter(-torch.rand(4) - 0.1)
            self.head = torch.nn.Linear(4, 3)
            with torch.no_grad():
                self.table.weight.abs_()

        def forward(self, x: Tensor) -> Tensor:
            x = self.table(x) if what == "a table" else x
            dead = _Kink.apply(self.low if what == "a parameter" else -x, size)  # type: ignore[no-untyped-call]
            return self.head(x + dead)  # type: ignore[no-any-return]

    x = torch.randint(7, (2, 5)) if what == "a table" else torch.rand(2, 4).double() + 0.1
    report = fgt.check_completeness(Net().double().eval(), x)
    assert report.complete is (True if size == 1.0 else None)
    assert size == 1.0 or any("other inputs" in problem for problem in report.problems)


@pytest.mark.parametrize("bound", [1e3, None])
def test_a_backward_that_clips_large_cotangents(bound: float | None) -> None:
    """It is none of a Jacobian, whatever it does to small ones."""

    class Net(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2.0
            if y.requires_grad and bound is not None:
                y.register_hook(lambda g: g.clamp(-bound, bound))
            return y.relu()

    report = fgt.check_completeness(Net(), torch.randn(2, 4))
    assert report.complete is (True if bound is None else None)


HONEST: dict[str, Callable[[Tensor], Tensor]] = {
    "masks": lambda x: torch.maximum(x, (x - 9).masked_fill(_MIXING[:2] > 0, -torch.inf)),
    "one transposed matrix twice": lambda x: x + torch.relu(x @ _MIXING.T - 99) + x @ _MIXING.T,
    "a part that nothing reads": lambda x: x + torch.relu(_pair(-x, x)[0]),
    "copies": lambda x: x + torch.relu(-x) + torch.relu(-x).abs() + torch.relu(-x.clone()),
    "a view beside its base": lambda x: x + torch.relu(-x) + torch.relu(-x).view(4, 2).view(2, 4),
    "infinities that are copied": lambda x: (
        torch.nn.functional.pad(x, (2, 2), value=-torch.inf)
        .reshape(2, 2, 4)
        .transpose(1, 2)
        .reshape(2, 4, 2)
        .amax(-1)
    ),
    "nothing but rounding": lambda x: x + torch.relu((x * 3 - x * 2 - x) * 1.0),
    "written to": lambda x: (x - 9).relu_().mul(2).add_(x),
    "not there": lambda x: x + torch.relu(-x).sum() * torch.ones_like(x),
}


class _Pair(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a.clone(), b.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return g, h


def _pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return _Pair.apply(a, b)  # type: ignore[no-any-return,no-untyped-call]


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_backward_with_zeros_is_believed(name: str) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(HONEST[name](x))  # type: ignore[no-any-return]

    x = torch.rand(2, 4, dtype=torch.float64) + 0.1
    assert fgt.check_completeness(Net().double().eval(), x).complete is True


@pytest.mark.parametrize("size", [3.0, 1.0])
@pytest.mark.parametrize("where", ["a large entry", "a large neighbour"])
def test_what_sleeps_is_seen_at_any_size(where: str, size: float) -> None:
    """Cotangents are of one size, and as small as values are large: each alone would be blind."""

    class Net(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if where == "a large entry":
                return torch.where(x > 1e18, times(x, size), x)
            return x * 2 + torch.relu(times(x, size) - 9) + torch.relu(x * -1e20)

    x = torch.rand(2, 4, dtype=torch.float64) + 0.1
    x[0, 0] = 1e15 if where == "a large entry" else 1.0
    assert fgt.check_completeness(Net(), x).complete is (True if size == 1.0 else None)


def test_a_modified_backward_is_not_judged_where_no_gradient_passes() -> None:
    """One that adds up where it is seen says nothing of where it is not."""

    class Even(torch.autograd.Function):
        """Of a + 2a: too much for one, too little for the other, and all in all what is right."""

        @staticmethod
        def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
            return a + b

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return g * 1.5, g * 0.75

    class Net(torch.nn.Module):
        def __init__(self, dead: bool) -> None:
            super().__init__()
            self.dead = dead

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = Even.apply(x, x * 2)  # type: ignore[no-untyped-call]
            return y + torch.relu(times(x, 3.0) - 9) if self.dead else y

    x = torch.rand(2, 4, dtype=torch.float64)
    assert fgt.check_completeness(Net(False), x).complete
    assert fgt.check_completeness(Net(True), x).complete is not True


def test_an_integral_that_misses_at_the_own_parameters_says_so() -> None:
    """Node by node it is measured at perturbed ones, at which it may converge."""
    failures = Path(__file__).parent.parent / "experiments" / "fuzz" / "failures"
    architecture, _ = load_failure(failures / "integral-at-own-parameters.json")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = fgt.check_completeness(
            architecture.module(), architecture.example(), policy="libra", beside=()
        )
    assert report.complete is not True
    assert any("did not converge" in problem for problem in report.problems)
    assert not any("error of this library" in problem for problem in report.problems)
