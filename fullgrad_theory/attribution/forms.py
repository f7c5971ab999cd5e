"""How attention is written: products of weights and values, and the queries and keys behind them.

Operators alone decide. A product is fused, or a contraction of which one operand is, seen through
operations on it alone, a softmax or x / x.sum().
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ..operators.algebra import Algebra, Role
from ..operators.registry import has_role, record_of
from ..plan.states import Liveness, State

Shapes = Mapping[str, torch.Size | tuple[torch.Size, ...]]
Orders = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
FORMS = (
    "F.scaled_dot_product_attention, or matmul, bmm or einsum of values with a softmax or with "
    "x / x.sum()"
)


@dataclass(frozen=True)
class Product:
    """How a product of attention weights and values is written: which operand, 0 or 1, holds the
    weights, None where the kernel makes them itself; and the order of dimensions that brings the
    weights to (..., q, k), the values to (..., k, c) and the product to (..., q, c)."""

    weights: int | None
    orders: Orders


def is_live(live: Liveness, node: fx.Node) -> bool:
    return live.state(node) is State.LIVE


def live_operands(node: fx.Node, live: Liveness) -> int:
    """How many operands are live."""
    return sum(is_live(live, a) for a in node.all_input_nodes)


def operands(node: fx.Node) -> list[fx.Node]:
    """The tensors of a product, in order; one may be there twice."""
    flat = pytree.tree_leaves([*node.args])
    return [a for a in flat if isinstance(a, fx.Node)]


def _plain(weights: int, values: int, result: int, swapped: bool = False) -> Orders:
    """Orders, for these ranks, that leave dimensions as they are, or swap the last two."""
    first, second, third = (
        (*range(r - 2), r - 1, r - 2) if swapped else tuple(range(r))
        for r in (weights, values, result)
    )
    return first, second, third


def values(node: fx.Node, product: Product) -> fx.Node:
    """The operand of a product that is attended to."""
    found = node.args[2] if product.weights is None else operands(node)[1 - product.weights]
    assert isinstance(found, fx.Node)
    return found


def _multiplies(node: fx.Node) -> bool:
    return has_role(node, Role.CONTRACTION) or has_role(node, Role.EQUATION)


def product(shapes: Shapes, node: fx.Node, live: Liveness) -> Product | None:
    """How a node multiplies attention weights with values; None where it does not."""
    record = record_of(node)
    if record is not None and record.algebra is Algebra.ATTENTION:
        value, out = (len(shapes[n]) for n in (str(node.args[2]), node.name))
        return Product(None, _plain(out, value, out))
    pair = operands(node)
    if not _multiplies(node) or len(pair) != 2:
        return None
    weights = next((i for i in (0, 1) if normaliser(pair[i], live)), None)
    if weights is None:
        return None
    if has_role(node, Role.EQUATION):
        return _from_equation(str(node.args[0]), weights, len(shapes[node.name]))
    first, second, out = (len(shapes[n.name]) for n in (pair[weights], pair[1 - weights], node))
    if min(first, second, out) < 2:
        return None
    return Product(weights, _plain(first, second, out, weights == 1))  # v^T A^T is (A v)^T


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


def normaliser(node: object, live: Liveness) -> fx.Node | None:
    """The softmax, or x / x.sum(), that a value is, seen through operations with one live
    operand; None where it is none."""
    while isinstance(node, fx.Node) and node.name in live.calls:
        if has_role(node, Role.SOFTMAX) or _shares(node, live):
            return node
        if has_role(node, Role.CONTRACTION):
            return None
        node = _single(node, live)
    return None


def softmaxes(node: fx.Node, product: Product, live: Liveness) -> Iterator[fx.Node]:
    """The softmaxes that a product's weights are made of, one or several."""
    if product.weights is None:
        return
    todo, seen = [operands(node)[product.weights]], set[fx.Node]()
    while todo:
        node = todo.pop()
        if node in seen or node.name not in live.calls or has_role(node, Role.CONTRACTION):
            continue
        seen.add(node)
        if has_role(node, Role.SOFTMAX):
            yield node
        else:
            todo += node.all_input_nodes


def _single(node: fx.Node, live: Liveness) -> fx.Node | None:
    """The one operand that is live, a reduction of it beside it perhaps (x - x.amax()); None where
    there are several."""
    moving = [a for a in node.all_input_nodes if a.name in live.calls]
    for a in moving:
        if all(b is a or _reduces(b, a, live, Role.REDUCTION) for b in moving):
            return a
    return None


def _shares(node: fx.Node, live: Liveness) -> bool:
    """x / x.sum(), a small number added perhaps."""
    divided = has_role(node, Role.QUOTIENT)
    return divided and _reduces(node.args[1], node.args[0], live, Role.SUM)


def _reduces(node: object, of: object, live: Liveness, role: Role) -> bool:
    """Whether a value is a reduction of another one, seen through operations on it alone."""
    while isinstance(node, fx.Node) and node.name in live.calls:
        if has_role(node, role):
            return node.args[0] is of
        moving = [a for a in node.all_input_nodes if a.name in live.calls]
        node = moving[0] if len(moving) == 1 else None
    return False


def scored(node: fx.Node, product: Product, live: Liveness) -> int:
    """Of the queries and keys that weights come from, how many are live: one where the queries are
    parameters; 0 where there are none, and a layer made the weights of the values alone."""
    if product.weights is None:
        return sum(is_live(live, a) for a in node.args[:2] if isinstance(a, fx.Node))
    last = normaliser(operands(node)[product.weights], live)
    at = last.args[0] if last is not None else None
    while isinstance(at, fx.Node) and at.name in live.calls and not has_role(at, Role.WEIGHTED):
        following = _single(at, live)
        if following is None or _multiplies(at):
            return live_operands(at, live)
        at = following
    return 0
