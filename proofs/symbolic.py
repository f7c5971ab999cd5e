"""One operation, or a small graph, over sympy expressions; and the residual that proves a lemma.

A symbolic tensor is a numpy array of sympy expressions. Operations that compare (max, clamp) are
resolved in the region of a numeric point: `Region`. Kernels of torch are used only to read off the
matrix of a linear map, and for results that carry no gradient.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import sympy as sp
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fullgrad_theory.graph.computation import ComputationGraph
from fullgrad_theory.operators.algebra import Algebra
from fullgrad_theory.operators.calls import Call, bind, target_name
from fullgrad_theory.operators.registry import lookup
from fullgrad_theory.operators.relations import Mode, Relation, parse_signature
from fullgrad_theory.testing.sample_calls import Sample, call, overload

Array = np.ndarray[Any, Any]
Meaning = Callable[..., Any]


@dataclass
class Region:
    """Where comparisons are decided: symbol -> number. With `freeze`, norms hold 1/sigma fixed as a
    fresh symbol, found in `held`."""

    point: Mapping[sp.Symbol, sp.Expr] = field(default_factory=dict)
    freeze: bool = False
    held: dict[sp.Symbol, sp.Expr] = field(default_factory=dict)

    def value(self, expression: Any) -> Any:
        """The expression's number here (complex where it has an imaginary part)."""
        number = sp.sympify(expression).xreplace(self.point)
        if number.is_comparable or number.is_infinite:
            return float(number)
        if number is sp.nan:
            return math.nan
        return complex(number)

    def array(self, array: Any) -> Array:
        """`value` of every element."""
        found = np.array([self.value(e) for e in np.ravel(array)])
        return found.reshape(np.shape(array)) if found.size else np.zeros(np.shape(array))

    def fixed(self, expression: sp.Expr) -> sp.Expr:
        """The expression itself, or a fresh symbol that stands for it where it is frozen."""
        if not self.freeze:
            return expression
        symbol = sp.Symbol(f"s{len(self.held)}", positive=True)
        self.held[symbol] = expression
        return symbol


def rational(number: Any) -> sp.Expr:
    """A number as the simplest rational that is the same float, else as the float's exact value."""
    if isinstance(number, sp.Basic):
        return number
    if isinstance(number, complex):
        return rational(number.real) + sp.I * rational(number.imag)
    if isinstance(number, (int, np.integer)):
        return sp.Integer(int(number))
    number = float(number)
    if not math.isfinite(number):
        return sp.nan if math.isnan(number) else sp.oo * (1 if number > 0 else -1)
    short = Fraction(number).limit_denominator(10**6)
    exact = short if abs(float(short) - number) <= 4e-16 * abs(number) else Fraction(number)
    return sp.Rational(exact.numerator, exact.denominator)


def from_torch(value: Any) -> Any:
    """Tensors as arrays: floating-point ones of rationals, others numeric. Numbers stay."""
    if isinstance(value, Tensor):
        numbers = value.detach().resolve_conj().numpy()
        if not (value.is_floating_point() or value.is_complex()):
            return numbers
        flat = np.array([rational(x.item()) for x in numbers.ravel()] + [None], dtype=object)
        return flat[:-1].reshape(numbers.shape)
    if isinstance(value, (list, tuple)):
        return type(value)(map(from_torch, value))
    return value


def _to_torch(value: Any, at: Region) -> Any:
    """The numeric tensor an array is at the region's point."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.array(at.array(value) if value.dtype == object else value))
    if isinstance(value, sp.Basic):
        return at.value(value)
    if isinstance(value, (list, tuple)):
        return [_to_torch(v, at) for v in value]
    return value


def _run(name: str, arguments: Mapping[str, Any]) -> Any:
    """The real operation on arguments by schema name."""
    function = overload(name)
    schema = getattr(function, "_schema", None)
    if schema is None:
        return function(*arguments.values())
    args = [arguments[a.name] for a in schema.arguments if not a.kwarg_only]
    return function(*args, **{a.name: arguments[a.name] for a in schema.arguments if a.kwarg_only})


# --------------------------------------------------------------------------- generic meanings


def _symbolic_names(name: str) -> list[str]:
    found = lookup(name)
    assert found is not None
    words = [re.split(r"[*^/]", term)[0].strip() for term in parse_signature(found.signature)[0]]
    return [w for w in words if w]


def _linear(name: str) -> Meaning:
    """A map affine in its signature's operands: its matrix is read off torch, on unit tensors."""

    def meaning(at: Region, **arguments: Any) -> Any:
        names = [n for n in _symbolic_names(name) if arguments.get(n) is not None]
        numeric = {n: _to_torch(v, at) for n, v in arguments.items() if n not in names}
        given = {n: arguments[n] for n in names}
        leaves, spec = pytree.tree_flatten(given, is_leaf=lambda v: isinstance(v, np.ndarray))
        flats = [np.ravel(np.array(leaf, dtype=object)) for leaf in leaves]
        units = [_units(flat, at) for flat in flats]
        spots = [(k, i, u) for k, f in enumerate(flats) for i in range(f.size) for u in units[k]]

        def apply(spot: tuple[int, int, complex] | None) -> tuple[list[Array], Any]:
            tensors = []
            for k, leaf in enumerate(leaves):
                unit = np.zeros(flats[k].size, dtype=complex if len(units[k]) > 1 else float)
                if spot is not None and spot[0] == k:
                    unit[spot[1]] = spot[2]
                array = torch.from_numpy(unit).reshape(np.shape(leaf))
                tensors.append(array if isinstance(leaf, np.ndarray) else unit[0].item())
            result = _run(name, numeric | pytree.tree_unflatten(tensors, spec))
            outputs, shape = pytree.tree_flatten(result)
            return [np.asarray(t.resolve_conj().resolve_neg().numpy()) for t in outputs], shape

        origin, shape = apply(None)
        totals = [as_array([rational(e.item()) for e in o.ravel()], o.shape) for o in origin]
        for spot in spots:
            element = flats[spot[0]][spot[1]]
            part = sp.sympify(element)
            if len(units[spot[0]]) > 1:
                part = part.as_real_imag()[0 if spot[2] == 1 else 1]
            for total, column, zero in zip(totals, apply(spot)[0], origin, strict=True):
                column = column - zero
                for index in map(tuple, np.argwhere(column)):
                    total[index] += rational(column[index].item()) * part
        return pytree.tree_unflatten(totals, shape)

    return meaning


def _units(flat: Array, at: Region) -> tuple[complex, ...]:
    """1, and i where the operand is complex: linear over the reals only."""
    return (1, 1j) if np.iscomplexobj(at.array(flat)) else (1,)


def _frozen(name: str) -> Meaning:
    """A result without a gradient is the number it has at the point."""

    def meaning(at: Region, **arguments: Any) -> Any:
        return pytree.tree_map_only(
            Tensor, from_torch, _run(name, {n: _to_torch(v, at) for n, v in arguments.items()})
        )

    return meaning


def _shaped(name: str) -> Meaning:
    """A factory looks at shapes only."""

    def meaning(at: Region, **arguments: Any) -> Any:
        empty = {
            n: torch.zeros(v.shape, dtype=torch.float64) if isinstance(v, np.ndarray) else v
            for n, v in arguments.items()
        }
        return pytree.tree_map_only(Tensor, from_torch, _run(name, empty))

    return meaning


def _selected(name: str) -> Meaning:
    """Every output element is the input element of the same value at the point (pooling)."""

    def meaning(at: Region, self: Array, **arguments: Any) -> Any:
        numbers = at.array(self)
        place = dict(zip(numbers.ravel().tolist(), self.ravel(), strict=True))
        result = _run(name, {"self": torch.from_numpy(numbers)} | arguments)

        def find(tensor: Tensor) -> Array:
            if not tensor.is_floating_point():
                return tensor.numpy()
            return as_array([place[v] for v in tensor.ravel().tolist()], tensor.shape)

        return pytree.tree_map_only(Tensor, find, result)

    return meaning


def as_array(elements: Iterable[Any], shape: Sequence[int]) -> Array:
    flat = np.array([*elements, None], dtype=object)[:-1]
    return flat.reshape(tuple(shape))


def _each(function: Callable[..., Any]) -> Meaning:
    """An elementwise meaning from `f(u)`, or `f(u, at)` where f compares."""
    compares = "at" in getattr(function, "__code__", _each.__code__).co_varnames

    def meaning(at: Region, **arguments: Any) -> Array:
        self = np.asarray(next(iter(arguments.values())), dtype=object)
        apply = (lambda u: function(u, at)) if compares else function
        return as_array([apply(sp.sympify(u)) for u in self.ravel()], self.shape)

    return meaning


def _map(function: Callable[..., Any], *arrays: Any) -> Array:
    """`function` over broadcast arrays, element by element."""
    wide = np.broadcast_arrays(*(np.asarray(a, dtype=object) for a in arrays))
    return as_array(
        (function(*e) for e in zip(*(w.ravel() for w in wide), strict=True)), wide[0].shape
    )


# --------------------------------------------------------------------------- products


def _tuple(value: Any, n: int) -> list[int]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * n if len(values) == 1 else values


def _convolution(
    input: Array, weight: Array, bias: Array | None = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1, transposed: bool = False, output_padding: Any = 0, **_: Any,
) -> Array:  # fmt: skip
    """Convolution and its transpose by definition, any number of dimensions."""
    size, kernel, n = input.shape[2:], weight.shape[2:], weight.ndim - 2
    step, spread, extra = _tuple(stride, n), _tuple(dilation, n), _tuple(output_padding, n)
    reach = [d * (k - 1) for d, k in zip(spread, kernel, strict=True)]
    if padding in ("same", "valid"):
        total = reach if padding == "same" else [0] * n
    else:
        total = [2 * p for p in _tuple(padding, n)]
    left = [t // 2 for t in total]
    if transposed:
        out = [(s - 1) * st - t + r + e + 1
               for s, st, t, r, e in zip(size, step, total, reach, extra, strict=True)]  # fmt: skip
        filters = weight.shape[1] * groups
    else:
        out = [(s + t - r - 1) // st + 1
               for s, st, t, r in zip(size, step, total, reach, strict=True)]  # fmt: skip
        filters = weight.shape[0]
    result = np.full((input.shape[0], filters, *out), sp.Integer(0), dtype=object)
    ins, outs = input.shape[1] // groups, filters // groups
    near, far = (size, out) if transposed else (out, size)
    for base in np.ndindex(*near):
        for tap in np.ndindex(*kernel):
            other = tuple(b * s + t * d - p for b, s, t, d, p
                          in zip(base, step, tap, spread, left, strict=True))  # fmt: skip
            if not all(0 <= o < f for o, f in zip(other, far, strict=True)):
                continue
            read, write = (base, other) if transposed else (other, base)
            for g in range(groups):
                i, o = slice(g * ins, (g + 1) * ins), slice(g * outs, (g + 1) * outs)
                factor = (
                    weight[(i, slice(None), *tap)]
                    if transposed
                    else weight[(o, slice(None), *tap)].T
                )
                result[(slice(None), o, *write)] += input[(slice(None), i, *read)] @ factor
    return result if bias is None else result + bias.reshape(-1, *[1] * n)


def _transposed(input: Array, weight: Array, bias: Any, **arguments: Any) -> Array:
    return _convolution(input, weight, bias, transposed=True, **arguments)


def _batch_norm(
    input: Array,
    weight: Any,
    bias: Any,
    running_mean: Array,
    running_var: Array,
    eps: Any,
    **_: Any,
) -> Array:
    wide = (-1, *[1] * (input.ndim - 2))
    scale = _map(lambda v: 1 / sp.sqrt(v + rational(eps)), running_var)
    scale = scale if weight is None else scale * weight
    result = (input - running_mean.reshape(wide)) * scale.reshape(wide)
    return result if bias is None else result + bias.reshape(wide)


def _cross(self: Array, other: Array, dim: int = -1, **_: Any) -> Array:
    a, b = np.moveaxis(self, dim, 0), np.moveaxis(other, dim, 0)
    turned = [a[(i + 1) % 3] * b[(i + 2) % 3] - a[(i + 2) % 3] * b[(i + 1) % 3] for i in range(3)]
    return np.moveaxis(np.stack(turned), 0, dim)


def _multi_dot(tensors: list[Array], **_: Any) -> Array:
    product = tensors[0]
    for tensor in tensors[1:]:
        product = product @ tensor
    return product


# --------------------------------------------------------------------------- selections


def _order(at: Region, self: Array, dim: int, descending: bool = False) -> Array:
    numbers = at.array(self)
    return np.argsort(-numbers if descending else numbers, axis=dim, kind="stable")


def _ranked(at: Region, self: Array, rank: int, dim: int, keepdim: bool) -> tuple[Array, Array]:
    """The element of a rank (0 the smallest) along a dimension, and its index."""
    index = np.take(_order(at, self, dim), [rank], axis=dim)
    found = np.take_along_axis(self, index, dim)
    return (found, index) if keepdim else (found.squeeze(dim), index.squeeze(dim))


def _extreme(rank: int) -> Meaning:
    def meaning(at: Region, self: Array, dim: Any = None, keepdim: bool = False, **_: Any) -> Any:
        if isinstance(dim, int):
            return _ranked(at, self, rank, dim, keepdim)
        axes = sorted(d % self.ndim for d in (dim or range(self.ndim)))
        kept = [d for d in range(self.ndim) if d not in axes]
        flat = self.transpose(*kept, *axes).reshape(*[self.shape[d] for d in kept], -1)
        found = _ranked(at, flat, rank, -1, False)[0]
        return np.expand_dims(np.asarray(found, dtype=object), tuple(axes)) if keepdim else found

    return meaning


def _sort(at: Region, self: Array, dim: int = -1, descending: bool = False, **_: Any) -> Any:
    index = _order(at, self, dim, descending)
    return np.take_along_axis(self, index, dim), index


def _topk(at: Region, self: Array, k: int, dim: int = -1, largest: bool = True, **_: Any) -> Any:
    index = np.take(_order(at, self, dim, largest), range(k), axis=dim)
    return np.take_along_axis(self, index, dim), index


def _median(at: Region, self: Array, dim: int | None = None, keepdim: bool = False) -> Any:
    if dim is None:
        return _ranked(at, self.ravel(), (self.size - 1) // 2, 0, False)[0]
    return _ranked(at, self, (self.shape[dim] - 1) // 2, dim, keepdim)


def _mode(at: Region, self: Array, dim: int = -1, keepdim: bool = False) -> Any:
    """The most frequent value along a dimension, the smallest of them."""
    lines = np.moveaxis(at.array(self), dim, -1)
    flat = lines.reshape(-1, lines.shape[-1])
    best = []
    for row in flat:
        found, counts = np.unique(row, return_counts=True)
        best.append(int(np.flatnonzero(row == found[counts.argmax()])[-1]))
    index = np.expand_dims(np.array(best).reshape(lines.shape[:-1]), dim)
    value = np.take_along_axis(self, index, dim)
    return (value, index) if keepdim else (value.squeeze(dim), index.squeeze(dim))


def _running(better: Callable[[Any, Any], bool]) -> Meaning:
    def meaning(at: Region, self: Array, dim: int) -> Any:
        lines, numbers = np.moveaxis(self, dim, 0), np.moveaxis(at.array(self), dim, 0)
        index = np.zeros(lines.shape, dtype=int)
        for i in range(1, len(lines)):
            last = np.take_along_axis(numbers, index[i - 1 : i], 0)[0]
            index[i] = np.where(better(numbers[i], last), i, index[i - 1])
        found = np.take_along_axis(lines, index, 0)
        return np.moveaxis(found, 0, dim), np.moveaxis(index, 0, dim)

    return meaning


def _larger(at: Region) -> Callable[[Any, Any], Any]:
    return lambda a, b: a if at.value(a) >= at.value(b) else b


def _smaller(at: Region) -> Callable[[Any, Any], Any]:
    return lambda a, b: a if at.value(a) <= at.value(b) else b


def _clamp(at: Region, self: Array, min: Any = None, max: Any = None, **_: Any) -> Array:
    result = self if min is None else _map(_larger(at), self, min)
    return result if max is None else _map(_smaller(at), result, max)


# --------------------------------------------------------------------------- moments and norms


def _axes(self: Array, dim: Any) -> tuple[int, ...]:
    if dim is None or dim == []:
        return tuple(range(self.ndim))
    return (dim,) if isinstance(dim, int) else tuple(dim)


def _sum(array: Array, axes: Any, keepdim: bool = False) -> Array:
    return np.asarray(array.sum(axis=axes, keepdims=keepdim), dtype=object)


def _moments(self: Array, dim: Any, correction: Any, keepdim: bool) -> tuple[Array, Array]:
    axes = _axes(self, dim)
    count = math.prod(self.shape[a] for a in axes)
    mean = _sum(self, axes, True) / sp.Integer(count)
    spread = _sum((self - mean) ** 2, axes, keepdim) / (count - rational(correction))
    return spread, mean if keepdim else _sum(mean, axes)


def _moment(root: bool, with_mean: bool) -> Meaning:
    """var, std, var_mean, std_mean, in their three overloads."""

    def meaning(
        self: Array, dim: Any = None, unbiased: bool = True, correction: Any = None,
        keepdim: bool = False, **_: Any,
    ) -> Any:  # fmt: skip
        taken = correction if correction is not None else int(unbiased)
        spread, mean = _moments(self, dim, taken, keepdim)
        spread = _map(sp.sqrt, spread) if root else spread
        return (spread, mean) if with_mean else spread

    return meaning


def _norm(
    at: Region, self: Array, ord: Any = None, dim: Any = None, keepdim: bool = False, p: Any = None,
    **_: Any,
) -> Array:  # fmt: skip
    """The p-norm over some dimensions."""
    order = next((rational(o) for o in (ord, p) if o is not None and o != "fro"), sp.Integer(2))
    axes = _axes(self, dim)
    size = _map(lambda u: _modulus(u, at), self)
    if order.is_infinite:
        return _extreme(-1 if order > 0 else 0)(at, size, list(axes), keepdim)
    return _map(lambda s: s ** (1 / order), _sum(size**order, axes, keepdim))


def _modulus(u: Any, at: Region) -> Any:
    value = at.value(u)
    if isinstance(value, complex):
        re, im = sp.sympify(u).as_real_imag()
        return sp.sqrt(re**2 + im**2)
    return u if value >= 0 else -u


def _cdist(at: Region, x1: Array, x2: Array, p: Any, **_: Any) -> Array:
    return _norm(at, x1[..., :, None, :] - x2[..., None, :, :], ord=p, dim=-1)


def _whitened(
    at: Region, input: Array, axes: tuple[int, ...], eps: Any, centre: bool = True
) -> tuple[Array, Array, Array]:
    """(x - mean) / sigma over some axes, the mean, and 1/sigma, which freezing holds fixed."""
    count = sp.Integer(math.prod(input.shape[a] for a in axes))
    mean = _sum(input, axes, True) / count if centre else np.zeros_like(input)
    power = _sum((input - mean) ** 2, axes, True) / count
    inverse = _map(lambda v: at.fixed(1 / sp.sqrt(v + rational(eps))), power)
    return (input - mean) * inverse, mean, inverse


def _affine(whitened: Array, weight: Any, bias: Any = None) -> Array:
    scaled = whitened if weight is None else whitened * weight
    return scaled if bias is None else scaled + bias


def _layer_norm(
    at: Region, input: Array, normalized_shape: Sequence[int], weight: Any, bias: Any, eps: Any,
    **_: Any,
) -> tuple[Array, Array, Array]:  # fmt: skip
    axes = tuple(range(-len(normalized_shape), 0))
    whitened, mean, inverse = _whitened(at, input, axes, eps)
    return _affine(whitened, weight, bias), mean, inverse


def _group_norm(
    at: Region, input: Array, num_groups: int, weight: Any, bias: Any, eps: Any, **_: Any
) -> Array:
    grouped = input.reshape(input.shape[0], num_groups, -1)
    whitened = _whitened(at, grouped, (-1,), eps)[0].reshape(input.shape)
    wide = (-1, *[1] * (input.ndim - 2))
    return _affine(whitened, *(None if w is None else w.reshape(wide) for w in (weight, bias)))


def _rms_norm(
    at: Region, input: Array, normalized_shape: Sequence[int], weight: Any = None, eps: Any = None
) -> Array:
    axes = tuple(range(-len(normalized_shape), 0))
    tiny = torch.finfo(torch.float64).eps if eps is None else eps
    return _affine(_whitened(at, input, axes, tiny, centre=False)[0], weight)


# --------------------------------------------------------------------------- composites


def _softmax(self: Array, dim: int = -1, **_: Any) -> Array:
    weights = _map(sp.exp, self)
    return weights / _sum(weights, dim, True)


def _log_sum_exp(self: Array, dim: Any, keepdim: bool = False) -> Array:
    return _map(sp.log, _sum(_map(sp.exp, self), _axes(self, dim), keepdim))


def _attention(
    query: Array, key: Array, value: Array, attn_mask: Any = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: Any = None, enable_gqa: bool = False, **_: Any,
) -> Array:  # fmt: skip
    if enable_gqa:
        times = query.shape[-3] // key.shape[-3]
        key, value = np.repeat(key, times, -3), np.repeat(value, times, -3)
    factor = 1 / sp.sqrt(query.shape[-1]) if scale is None else rational(scale)
    scores = query @ np.swapaxes(key, -1, -2) * factor
    seen = np.ones(scores.shape, dtype=bool)
    if is_causal:
        seen = np.tril(seen)
    if attn_mask is not None and attn_mask.dtype == bool:
        seen = seen & attn_mask
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = np.where(seen, _map(sp.exp, scores), sp.Integer(0))
    return weights / _sum(weights, -1, True) @ value


def _logistic(u: Any) -> Any:
    return 1 / (1 + sp.exp(-u))


def _lstm_step(x: Array, state: Any, w: Sequence[Any]) -> Any:
    h, c = state
    i, f, g, o = np.split(x @ w[0].T + h @ w[1].T + sum(w[2:]), 4, -1)
    c = _map(_logistic, f) * c + _map(_logistic, i) * _map(sp.tanh, g)
    return _map(_logistic, o) * _map(sp.tanh, c), c


def _gru_step(x: Array, state: Any, w: Sequence[Any]) -> Any:
    (h,) = state
    bias = (w[2], w[3]) if len(w) > 2 else (0, 0)
    ri, zi, ni = np.split(x @ w[0].T + bias[0], 3, -1)
    rh, zh, nh = np.split(h @ w[1].T + bias[1], 3, -1)
    r, z = _map(_logistic, ri + rh), _map(_logistic, zi + zh)
    n = _map(sp.tanh, ni + r * nh)
    return ((1 - z) * n + z * h,)


def _plain_step(function: Callable[[Any, Region], Any]) -> Callable[..., Any]:
    def step(x: Array, state: Any, w: Sequence[Any], at: Region) -> Any:
        total = x @ w[0].T + state[0] @ w[1].T + sum(w[2:])
        return (_map(lambda u: function(u, at), total),)

    return step


def _recurrent(step: Callable[..., Any]) -> Meaning:
    """A one-layer, one-direction recurrent net with the time first."""
    takes_region = "at" in inspect.signature(step).parameters

    def meaning(at: Region, input: Array, hx: Any, params: Sequence[Array], **_: Any) -> Any:
        states = tuple(h[0] for h in (hx if isinstance(hx, (list, tuple)) else [hx]))
        outputs = []
        for x in input:
            states = step(x, states, params, at) if takes_region else step(x, states, params)
            outputs.append(states[0])
        return (np.stack(outputs), *(s[None] for s in states))

    return meaning


def _relu(u: Any, at: Region) -> Any:
    return u if at.value(u) > 0 else sp.Integer(0)


def _softplus(u: Any, at: Region, beta: Any, threshold: Any) -> Any:
    beta = rational(beta)
    return u if at.value(beta * u) > threshold else sp.log(1 + sp.exp(beta * u)) / beta


def _gelu(self: Array, approximate: str = "none", **_: Any) -> Array:
    if approximate == "none":
        return _map(lambda u: u * (1 + sp.erf(u / sp.sqrt(2))) / 2, self)
    cubic = sp.Rational("0.044715")
    return _map(lambda u: u * (1 + sp.tanh(sp.sqrt(2 / sp.pi) * (u + cubic * u**3))) / 2, self)


def _exponential_unit(
    at: Region, self: Array, alpha: Any = 1, scale: Any = 1, input_scale: Any = 1
) -> Array:
    a, s, r = map(rational, (alpha, scale, input_scale))
    return _map(lambda u: s * (u if at.value(u) > 0 else a * (sp.exp(u * r) - 1)), self)


_SELU = {"alpha": 1.6732632423543772848170429916717, "scale": 1.0507009873554804934193349852946}


# --------------------------------------------------------------------------- the table


def _hard_gate(u: Any, at: Region) -> Any:
    return _smaller(at)(_larger(at)(u + 3, sp.Integer(0)), sp.Integer(6)) / 6


# each line is called with the arguments by schema name, and `at`; names it leaves out are dropped
_TABLE: dict[str, Meaning] = {
    "getitem": lambda self, index: self[index],
    "mul.Tensor mul.Scalar multiply.Tensor": lambda self, other: self * _exact(other),
    "div.Tensor div.Scalar divide.Tensor true_divide.Tensor": lambda self, other: (
        self / _exact(other)),
    "reciprocal": lambda self: 1 / self,
    "matmul": lambda self, other: self @ other,
    "mm bmm": lambda self, mat2: self @ mat2,
    "mv": lambda self, vec: self @ vec,
    "dot": lambda self, tensor: self @ tensor,
    "vdot": lambda self, other: self @ other,
    "inner": lambda self, other: self @ np.swapaxes(other, -1, -2),
    "outer": lambda self, vec2: self[:, None] * vec2,
    "tensordot": lambda self, other, dims_self, dims_other: np.tensordot(
        self, other, (dims_self, dims_other)),
    "einsum": lambda equation, tensors: np.einsum(equation, *tensors),
    "linalg_multi_dot": _multi_dot,
    "linalg_vecdot": lambda x, y, dim: _sum(x * y, dim),
    "linalg_cross": _cross,
    "kron": lambda self, other: np.kron(self, other),
    "linear": lambda input, weight, bias: _affine(input @ weight.T, None, bias),
    "bilinear": lambda input1, input2, weight, bias: _affine(
        np.einsum("ni,oij,nj->no", input1, weight, input2), None, bias),
    "addmm": lambda self, mat1, mat2, beta, alpha: beta * self + alpha * (mat1 @ mat2),
    "baddbmm": lambda self, batch1, batch2, beta, alpha: beta * self + alpha * (batch1 @ batch2),
    "addbmm": lambda self, batch1, batch2, beta, alpha: (
        beta * self + alpha * _sum(batch1 @ batch2, 0)),
    "addmv": lambda self, mat, vec, beta, alpha: beta * self + alpha * (mat @ vec),
    "addr": lambda self, vec1, vec2, beta, alpha: beta * self + alpha * vec1[:, None] * vec2,
    "addcmul": lambda self, tensor1, tensor2, value: self + value * tensor1 * tensor2,
    "addcdiv": lambda self, tensor1, tensor2, value: self + value * tensor1 / tensor2,
    "conv1d conv1d.padding conv2d conv2d.padding conv3d conv3d.padding convolution": _convolution,
    "conv_transpose1d conv_transpose2d.input conv_transpose3d.input": _transposed,
    "batch_norm": _batch_norm,
    "_native_batch_norm_legit_no_training": lambda **a: (_batch_norm(**a), _NONE, _NONE),
    "relu": _each(_relu),
    "leaky_relu": lambda at, self, negative_slope: _map(
        lambda u: u if at.value(u) > 0 else rational(negative_slope) * u, self),
    "rrelu": lambda at, self, lower, upper: _map(
        lambda u: u if at.value(u) > 0 else rational((lower + upper) / 2) * u, self),
    "prelu": lambda at, self, weight: _map(
        lambda u, w: u if at.value(u) > 0 else w * u, self, weight),
    "abs absolute": _each(lambda u, at: _modulus(u, at)),
    "sgn": _each(lambda u, at: u / _modulus(u, at) if at.value(u) else sp.Integer(0)),
    "angle": _each(lambda u, at: sp.atan2(*reversed(u.as_real_imag()))),
    "polar": lambda abs, angle: _map(lambda r, a: r * (sp.cos(a) + sp.I * sp.sin(a)), abs, angle),
    "maximum fmax max.other": lambda at, self, other: _map(_larger(at), self, other),
    "minimum fmin min.other": lambda at, self, other: _map(_smaller(at), self, other),
    "max max.dim amax": _extreme(-1),
    "min min.dim amin": _extreme(0),
    "median median.dim": _median,
    "mode": _mode,
    "cummax": _running(lambda a, b: a >= b),
    "cummin": _running(lambda a, b: a <= b),
    "sort sort.stable": _sort,
    "msort": lambda at, self: _sort(at, self, 0)[0],
    "topk": _topk,
    "kthvalue": lambda at, self, k, dim, keepdim: _ranked(at, self, k - 1, dim, keepdim),
    "hardshrink": lambda at, self, lambd: _map(
        lambda u: u if abs(at.value(u)) > lambd else sp.Integer(0), self),
    "softshrink": lambda at, self, lambd: _map(
        lambda u: (u - _exact(lambd) if at.value(u) > 0 else u + _exact(lambd))
        if abs(at.value(u)) > at.value(lambd) else sp.Integer(0), self),
    "threshold": lambda at, self, threshold, value: _map(
        lambda u: u if at.value(u) > threshold else _exact(value), self),
    "clamp clamp.Tensor clip clamp_min clamp_min.Tensor clamp_max clamp_max.Tensor": _clamp,
    "hardtanh": lambda at, self, min_val, max_val: _clamp(at, self, min_val, max_val),
    "nan_to_num": lambda self: self,
    "remainder.Scalar remainder.Tensor": lambda at, self, other: _map(
        lambda u, w: u - w * math.floor(at.value(u / w)), self, _exact(other)),
    "fmod.Scalar fmod.Tensor": lambda at, self, other: _map(
        lambda u, w: u - w * math.trunc(at.value(u / w)), self, _exact(other)),
    "square": lambda self: self**2,
    "sqrt": _each(lambda u: sp.sqrt(u)),
    "rsqrt": _each(lambda u: 1 / sp.sqrt(u)),
    "pow.Tensor_Scalar float_power.Tensor_Scalar": lambda self, exponent: _map(
        lambda u: u ** _exact(exponent), self),
    "var var.dim var.correction": _moment(False, False),
    "std std.dim std.correction": _moment(True, False),
    "var_mean var_mean.dim var_mean.correction": _moment(False, True),
    "std_mean std_mean.dim std_mean.correction": _moment(True, True),
    "norm.Scalar norm.ScalarOpt_dim linalg_vector_norm linalg_norm": _norm,
    "linalg_matrix_norm.str_ord": _norm,
    "dist": lambda at, self, other, p: _norm(at, self - other, p=p),
    "cdist": _cdist,
    "hypot": lambda self, other: _map(lambda a, b: sp.sqrt(a**2 + b**2), self, other),
    "linalg_inv": lambda A: np.array(sp.Matrix(A).inv(), dtype=object),
    "linalg_solve": lambda A, B: np.array(sp.Matrix(A).inv() * sp.Matrix(B), dtype=object),
    "gelu": _gelu,
    "silu": _each(lambda u: u / (1 + sp.exp(-u))),
    "mish": _each(lambda u: u * sp.tanh(sp.log(1 + sp.exp(u)))),
    "tanh": _each(lambda u: sp.tanh(u)),
    "erf": _each(lambda u: sp.erf(u)),
    "erfinv": _each(lambda u: sp.erfinv(u)),
    "hardswish": _each(lambda u, at: u * _hard_gate(u, at)),
    "relu6": _each(lambda u, at: _smaller(at)(_relu(u, at), sp.Integer(6))),
    "elu": _exponential_unit,
    "selu": lambda at, self: _exponential_unit(at, self, **_SELU),
    "celu": lambda at, self, alpha: _exponential_unit(at, self, alpha, 1, 1 / alpha),
    "expm1": _each(lambda u: sp.exp(u) - 1),
    "log1p": _each(lambda u: sp.log(1 + u)),
    "sin": _each(lambda u: sp.sin(u)),
    "tan": _each(lambda u: sp.tan(u)),
    "sinh": _each(lambda u: sp.sinh(u)),
    "asinh": _each(lambda u: sp.asinh(u)),
    "atan arctan": _each(lambda u: sp.atan(u)),
    "asin": _each(lambda u: sp.asin(u)),
    "atanh": _each(lambda u: sp.atanh(u)),
    "sigmoid special_expit": _each(_logistic),
    "hardsigmoid": _each(_hard_gate),
    "log_sigmoid": _each(lambda u: -sp.log(1 + sp.exp(-u))),
    "softplus": lambda at, self, beta, threshold: _map(
        lambda u: _softplus(u, at, beta, threshold), self),
    "exp": _each(lambda u: sp.exp(u)),
    "exp2": _each(lambda u: 2**u),
    "cos": _each(lambda u: sp.cos(u)),
    "cosh": _each(lambda u: sp.cosh(u)),
    "sinc": _each(lambda u, at: sp.sin(sp.pi * u) / (sp.pi * u) if at.value(u) else sp.Integer(1)),
    "erfc": _each(lambda u: 1 - sp.erf(u)),
    "acos": _each(lambda u: sp.acos(u)),
    "layer_norm": lambda **a: _layer_norm(**a)[0],
    "native_layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "instance_norm": lambda at, input, weight, bias, eps: _group_norm(
        at, input, input.shape[1], weight, bias, eps),
    "rms_norm": _rms_norm,
    "softmax.int _softmax _safe_softmax": _softmax,
    "log_softmax.int _log_softmax": lambda self, dim: self - _log_sum_exp(self, dim, True),
    "logsumexp": _log_sum_exp,
    "logaddexp": lambda self, other: _map(lambda a, b: sp.log(sp.exp(a) + sp.exp(b)), self, other),
    "logcumsumexp": lambda self, dim: _map(sp.log, np.cumsum(_map(sp.exp, self), axis=dim)),
    "glu": lambda self, dim: np.split(self, 2, dim)[0] * _map(_logistic, np.split(self, 2, dim)[1]),
    "lstm.input": _recurrent(_lstm_step),
    "gru.input": _recurrent(_gru_step),
    "rnn_tanh.input": _recurrent(_plain_step(lambda u, at: sp.tanh(u))),
    "rnn_relu.input": _recurrent(_plain_step(_relu)),
    "lstm_cell": lambda input, hx, w_ih, w_hh, b_ih, b_hh: _lstm_step(
        input, hx, [w for w in (w_ih, w_hh, b_ih, b_hh) if w is not None]),
    "gru_cell": lambda input, hx, w_ih, w_hh, b_ih, b_hh: _gru_step(
        input, [hx], [w for w in (w_ih, w_hh, b_ih, b_hh) if w is not None])[0],
    "log": _each(lambda u: sp.log(u)),
    "log2": _each(lambda u: sp.log(u) / sp.log(2)),
    "log10": _each(lambda u: sp.log(u) / sp.log(10)),
    "logit": lambda at, self, eps: _map(
        lambda u: sp.log(u / (1 - u)),
        self if eps is None else _clamp(at, self, rational(eps), 1 - rational(eps))),
    "xlogy.Tensor special_xlogy": lambda self, other: _map(lambda a, b: a * sp.log(b), self, other),
    "xlogy.Scalar_Other special_xlogy.other_scalar": lambda self, other: (
        self * sp.log(_exact(other))),
    "special_xlog1py": lambda self, other: _map(lambda a, b: a * sp.log(1 + b), self, other),
    "special_xlog1py.other_scalar": lambda self, other: self * sp.log(1 + _exact(other)),
    "pow.Scalar": lambda self, exponent: _map(lambda u: _exact(self) ** u, exponent),
    "pow.Tensor_Tensor float_power.Tensor_Tensor": lambda self, exponent: _map(
        lambda u, k: u**k, self, exponent),
    "atan2": lambda self, other: _map(sp.atan2, self, other),
    "prod": lambda self: np.asarray(np.prod(self), dtype=object),
    "prod.dim_int": lambda self, dim, keepdim: np.prod(self, axis=dim, keepdims=keepdim),
    "cumprod": lambda self, dim: np.cumprod(self, axis=dim),
    "linalg_det": lambda A: np.asarray(sp.Matrix(A).det(), dtype=object),
    "frac": _each(lambda u, at: u - math.trunc(at.value(u))),
    "scaled_dot_product_attention": _attention,
    "detach detach_copy": lambda self: self,
}  # fmt: skip
_NONE: Any = np.zeros((0,), dtype=object)
_POOLS = """
max_pool1d max_pool2d max_pool3d max_pool2d_with_indices adaptive_max_pool1d adaptive_max_pool2d
"""


def _exact(value: Any) -> Any:
    """A scalar argument as an exact number; arrays stay."""
    return value if isinstance(value, np.ndarray) else _power(value)


def _power(value: Any) -> Any:
    return rational(value) if isinstance(value, (int, float, complex)) else value


def _full(short: str) -> str:
    if short == "getitem":
        return short
    return f"aten.{short}" if "." in short else f"aten.{short}.default"


_MEANINGS = {_full(s): f for key, f in _TABLE.items() for s in key.split()}
_MEANINGS |= {_full(s): _selected(_full(s)) for s in _POOLS.split()}
_GENERIC = {
    Algebra.STRUCTURAL: _linear,
    Algebra.AFFINE: _linear,
    Algebra.FREEZING: _frozen,
    Algebra.FACTORY: _shaped,
}


def meaning(name: str) -> Meaning:
    """The exact result of a registered operation: call it with a `Region` and the arguments by
    schema name, tensors as arrays of expressions. Raises LookupError where nobody wrote it down."""
    found = lookup(name)
    if found is None or (name not in _MEANINGS and found.algebra not in _GENERIC):
        raise LookupError(f"no symbolic meaning for {name}; add a line to the table of symbolic.py")
    function = _MEANINGS.get(name) or _GENERIC[found.algebra](name)
    wanted = inspect.signature(function).parameters
    every = any(p.kind is p.VAR_KEYWORD for p in wanted.values())

    def by_name(at: Region, arguments: Mapping[str, Any]) -> Any:
        given = {"at": at, **arguments}
        result = function(**{n: v for n, v in given.items() if every or n in wanted})
        return pytree.tree_map_only(sp.Basic, lambda e: np.asarray(e, dtype=object), result)

    return by_name


# --------------------------------------------------------------------------- graphs


def evaluate(
    graph: ComputationGraph | fx.GraphModule,
    values: Mapping[str, Any],
    at: Region | None = None,
) -> dict[str, Any]:
    """Every node's value over symbols. `values`: arrays for the placeholders by name, and for those
    parameters (by their dotted path) that shall be symbols; the others enter as exact rationals."""
    module = graph if isinstance(graph, fx.GraphModule) else graph.fx
    at = at or Region()
    found: dict[str, Any] = {}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            found[node.name] = values[node.name]
        elif node.op == "get_attr":
            path = str(node.target)
            found[node.name] = (
                values[path] if path in values else from_torch(_attribute(module, path))
            )
        elif node.op == "call_function":
            arguments = fx.map_arg(bind(node), lambda n: found[n.name])
            found[node.name] = meaning(target_name(node.target))(at, dict(arguments))
    return found


def _attribute(module: Any, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part)
    return module


# --------------------------------------------------------------------------- the residual


@dataclass
class _Symbols:
    """A sample's arguments, symbols for tensors and bias literals; their values and operands."""

    arguments: dict[str, Any] = field(default_factory=dict)
    point: dict[sp.Symbol, sp.Expr] = field(default_factory=dict)
    owner: dict[sp.Symbol, str] = field(default_factory=dict)

    def make(self, operand: str, number: Any, imaginary: bool = False) -> sp.Expr:
        if isinstance(number, complex):
            return self.make(operand, number.real) + sp.I * self.make(operand, number.imag)
        positive = number > 0
        symbol = sp.Symbol(f"u{len(self.point)}", **{"positive" if positive else "negative": True})
        self.point[symbol], self.owner[symbol] = rational(number), operand
        return symbol

    def tensor(self, operand: str, value: Tensor) -> Array:
        if not (value.is_floating_point() or value.is_complex()):
            return value.numpy()
        flat = value.resolve_conj().reshape(-1).tolist()
        return as_array([self.make(operand, number) for number in flat], value.shape)


def _symbols(bound: Mapping[str, Any], seen: Call) -> _Symbols:
    """Symbols for float tensors (of a linear map: those in its signature) and bias literals."""
    made = _Symbols()
    linear = seen.operator.name not in _MEANINGS
    names = _symbolic_names(seen.operator.name) if linear else list(bound)
    literals = (
        {*seen.operator.bias_operands(seen)}
        if seen.operator.algebra in _WITH_BIASES
        else set[str]()
    )
    for name, value in bound.items():
        if isinstance(value, Tensor):
            made.arguments[name] = made.tensor(name, value) if name in names else value.numpy()
        elif isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value):
            made.arguments[name] = [
                made.tensor(f"{name}[{i}]", v) if name in names else v.numpy()
                for i, v in enumerate(value)
            ]
        elif name in literals and value:
            made.arguments[name] = made.make(name, value)
        else:
            made.arguments[name] = value
    return made


_WITH_BIASES = {
    Algebra.STRUCTURAL, Algebra.AFFINE, Algebra.MULTILINEAR, Algebra.HOMOGENEOUS,
    Algebra.NORMALISER,
}  # fmt: skip


def bound_arguments(name: str, sample: Sample) -> dict[str, Any]:
    """The sample's arguments by schema name, defaults included."""
    schema = getattr(overload(name), "_schema", None)
    if schema is None:
        names = ["self", "index"] if len(sample.args) == 2 else [f"arg{i}" for i in range(9)]
        return dict(zip(names, sample.args, strict=False))
    defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    positional = dict(zip([a.name for a in schema.arguments], sample.args, strict=False))
    given = defaults | positional | sample.kwargs
    return {a.name: given[a.name] for a in schema.arguments}


def solutions(relation: Relation, seen: Call) -> list[tuple[dict[str, sp.Expr], sp.Expr]]:
    """All degrees of the live operands that satisfy a relation, with the output's: free ones stay
    symbols. One solution for each degree the domain allows."""
    unknown = {name: sp.Symbol(f"e_{i}") for i, name in enumerate(sorted(seen.moving))}
    degree = sp.Symbol("d")
    totals = [
        sum((unknown[n] * sp.Rational(e.numerator, e.denominator) for n, e in term), sp.S.Zero)
        for term in relation.terms
    ]
    equations = [unknown[n] for n in relation.zero]
    equations += [t - degree for t in totals] or [degree]
    result = []
    for allowed in relation.domain or (None,):
        system = equations if allowed is None else [*equations, degree - allowed]
        for solved in sp.solve(system, [degree, *unknown.values()], dict=True):
            fill = {n: s.xreplace(solved) for n, s in unknown.items()}
            result.append((fill, degree.xreplace(solved)))
    return result


def weightings(relation: Relation, seen: Call) -> list[tuple[dict[str, sp.Expr], sp.Expr]]:
    """Per solution: the factor of each operand's J~ u (its degree; 1 for a bias leaf), and the
    output's degree. A frozen output has none."""
    if relation.frozen:
        return []
    result = []
    for degrees, degree in solutions(relation, seen):
        biases = seen.operator.bias_operands(seen) if degree == 1 and relation.domain else ()
        result.append((dict.fromkeys(biases, sp.S.One) | degrees, degree))
    return result


def residual(name: str, sample: Sample, edit: str | None = None) -> list[sp.Expr]:
    """sum_i d_i J~_i u_i + sum_b J~_b b - d v of one call, element by element, for *all* operand
    degrees that its mode's relation allows. The lemma of the operation's class says: identically 0.

    What a piecewise linear operation leaves is its bias leaf, which has to be constant. For an
    integral along the ray J~ u is f(u) less what f(t u) tends to at t = 0; what is left is that
    less f(0). Raises ValueError where the operation has no such edit.
    """
    seen = call(name, sample)
    mode: Mode | None = next((m for m in seen.operator.modes(seen) if m.edit == edit), None)
    if mode is None:
        raise ValueError(f"{name} has no edit {edit!r}")
    made = _symbols(bound_arguments(name, sample), seen)
    at = Region(made.point, freeze=edit == "freeze")
    result = meaning(name)(at, made.arguments)
    many = len(mode.outputs) > 1
    outputs = list(result) if many else [result]
    if edit == "integrate":
        return _on_the_ray(
            seen, made, [e for o in outputs for leaf in _leaves(o) for e in leaf.flat]
        )
    rest: list[sp.Expr] = []
    for relation, output in zip(mode.outputs, outputs, strict=True):
        elements = [e for leaf in _leaves(output) for e in leaf.ravel()]
        for weights, degree in weightings(relation, seen):
            for value in elements:
                carried = (
                    _secant(seen, made, value, weights, degree)
                    if edit == "secant"
                    else _euler(made, value, weights)
                )
                missing = carried - degree * value
                affine = seen.operator.algebra is Algebra.PIECEWISE and not edit
                rest.append(_euler(made, missing, weights) if affine else missing)
    return rest


def _leaves(output: Any) -> list[Array]:
    parts = output if isinstance(output, (list, tuple)) else [output]
    return [np.asarray(p) for p in parts if np.asarray(p).dtype == object]


def _euler(made: _Symbols, value: Any, weights: Mapping[str, sp.Expr]) -> sp.Expr:
    """sum_s weight_s s dv/ds: the Jacobian applied to the weighted operands."""
    value = sp.sympify(value)
    return sum(
        (
            weights[made.owner[s]] * s * sp.diff(value, s)
            for s in value.free_symbols
            if s in made.owner and weights.get(made.owner[s], 0) != 0
        ),
        sp.S.Zero,
    )


def _secant(
    seen: Call, made: _Symbols, value: Any, weights: Mapping[str, sp.Expr], degree: sp.Expr
) -> sp.Expr:
    """d_u (f(u) - f(0))/u u, and the table's f(0) as the bias leaf."""
    (symbol,) = sp.sympify(value).free_symbols & made.owner.keys() or (sp.Symbol("u"),)
    origin = sp.sympify(_at_zero(seen, made))
    stated = origin if abs(float(origin) - seen.operator.origin) < 1e-15 else seen.operator.origin
    bias = stated if degree == 1 else sp.S.Zero
    slope = (value - origin) / symbol
    return weights[made.owner.get(symbol, "self")] * slope * symbol + bias


def _on_the_ray(seen: Call, made: _Symbols, values: list[Any]) -> list[sp.Expr]:
    """The start of the ray, f(t u) at t = 0, less f(0), element by element."""
    ray = dict.fromkeys((s for s, operand in made.owner.items() if operand in seen.moving), 0)
    pairs = zip(values, _starts(seen, made), strict=True)
    return [sp.sympify(value).subs(ray) - start for value, start in pairs]


def _starts(seen: Call, made: _Symbols) -> list[sp.Expr]:
    """f(0), exactly, with the call's other arguments."""

    def zero(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [zero(f"{name}[{i}]", v) for i, v in enumerate(value)]
        symbolic = isinstance(value, np.ndarray) and value.dtype == object
        moves = symbolic and name in seen.moving
        return np.full(value.shape, sp.S.Zero, dtype=object) if moves else value

    zeros = {n: zero(n, v) for n, v in made.arguments.items()}
    found = meaning(seen.operator.name)(Region(), zeros)
    return [sp.sympify(e) for leaf in _leaves(found) for e in leaf.flat]


def _at_zero(seen: Call, made: _Symbols) -> sp.Expr:
    return _starts(seen, made)[0]


def vanishes(expression: sp.Expr) -> bool:
    """Whether sympy decides that an expression is identically 0."""
    for simplify in (sp.expand, _numerator, sp.cancel, sp.simplify):
        if simplify(expression) == 0:
            return True
    return False


def _numerator(expression: sp.Expr) -> sp.Expr:
    return sp.expand(sp.numer(sp.together(expression)))


def small(expression: sp.Expr, generator: Any, points: int = 5, digits: int = 50) -> bool:
    """Whether an expression is below 1e-30 at random rational points, in high precision.

    `generator`: a `random.Random`. The signs of the symbols are kept, so a region may be left.
    """
    for _ in range(points):
        point = {
            s: (-1 if s.is_negative else 1) * sp.Rational(generator.randint(1, 99), 64)
            for s in expression.free_symbols
        }
        if abs(sp.N(expression.xreplace(point), digits)) > 1e-30:
            return False
    return True
