"""The composition theorem, machine-checked over symbols on random graphs.

**Statement.** Take a directed acyclic graph in topological order. A node n has outputs v_{n,o}; an
edge is (n, o, p): argument position p of node n, read by output o, with a Jacobian J~_{n,o,p} (any
matrix: true, edited or 0) and the value u_p of some earlier node or leaf. Leaves (inputs) have
degree 1; every output has a degree d_{n,o}; b_{n,o} are bias leaves with Jacobian B_{n,o}. Let

    r_{n,o} = sum_p d_p J~_{n,o,p} u_p + B_{n,o} b_{n,o} - d_{n,o} v_{n,o}       (the residual)

and let the reverse sweep be: g of the output is c, and g_u = sum over the edges that read u of
J~^T g_{n,o}. Then, for every cut after position k of the order,

    sum_{edges across} d_u <J~^T g_{n,o}, u> + sum_{n > k} <B^T g_{n,o}, b_{n,o}> - d_out <c, v_out>
        = sum_{n > k} <g_{n,o}, r_{n,o}>.

**Proof.** Induction on k from the output backwards: moving node n to the far side of the cut takes
away d_{n,o} <g_{n,o}, v_{n,o}> (all edges that read v_{n,o} are then across) and adds its own edges
and biases; the difference is <g_{n,o}, r_{n,o}> by the definition of r. At k = 0 the edges across
start at the leaves: the left side is the completeness error. Hence: every r = 0 implies
completeness, at every cut the sum is d_out <c, v_out>, and the first cut where it moves names the
culprit.

The identity is checked with J~, B, u, b, c *and the degrees* all free symbols, values included: no
consistency is assumed, so nodes of degree 0 and inconsistent ones are covered.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import count

import pytest
import sympy as sp


@dataclass
class Value:
    """A leaf (node 0) or one output of a node."""

    node: int
    vector: sp.Matrix
    degree: sp.Expr


@dataclass
class Output:
    value: Value
    edges: list[tuple[Value, sp.Matrix]]
    bias: sp.Matrix
    bias_jacobian: sp.Matrix

    def residual(self) -> sp.Matrix:
        carried = self.bias_jacobian * self.bias - self.value.degree * self.value.vector
        for operand, jacobian in self.edges:
            carried += operand.degree * jacobian * operand.vector
        return carried


_fresh = count()


def symbols(rows: int, columns: int = 1) -> sp.Matrix:
    return sp.Matrix(rows, columns, [sp.Symbol(f"z{next(_fresh)}") for _ in range(rows * columns)])


def random_graph(seed: int, nodes: int) -> tuple[list[Value], list[Output]]:
    """Two leaves, then nodes of one or two outputs; operands repeat and fan out at random."""
    rng = random.Random(seed)
    leaves = [Value(0, symbols(rng.choice((1, 2))), sp.S.One) for _ in range(2)]
    values, outputs = list(leaves), []
    for n in range(1, nodes + 1):
        operands = [rng.choice(values) for _ in range(rng.choice((1, 2, 2)))]
        operands += operands[:1] if rng.random() < 0.4 else []  # the same value twice: mul(x, x)
        made = []
        for _ in range(1 if n == nodes else rng.choice((1, 1, 2))):
            size = rng.choice((1, 2))
            value = Value(n, symbols(size), sp.Symbol(f"d{next(_fresh)}"))
            edges = [(u, symbols(size, u.vector.rows)) for u in operands]
            outputs.append(Output(value, edges, symbols(1), symbols(size, 1)))
            made.append(value)
        values += made
    return leaves, outputs


def reverse_sweep(outputs: list[Output], cotangent: sp.Matrix) -> dict[int, sp.Matrix]:
    """id(value) -> cotangent, from the last output back."""
    found = {id(outputs[-1].value): cotangent}
    for output in reversed(outputs):
        g = found.setdefault(id(output.value), sp.zeros(output.value.vector.rows, 1))
        for operand, jacobian in output.edges:
            before = found.get(id(operand), sp.zeros(operand.vector.rows, 1))
            found[id(operand)] = before + jacobian.T * g
    return found


@pytest.mark.parametrize("seed", range(12))
def test_every_cut_of_a_random_graph(seed: int) -> None:
    _, outputs = random_graph(seed, nodes=3 + seed % 3)
    last = outputs[-1].value
    cotangent = symbols(last.vector.rows)
    g = reverse_sweep(outputs, cotangent)
    target = last.degree * (cotangent.T * last.vector)[0]
    for cut in range(last.node):
        beyond = [o for o in outputs if o.value.node > cut]
        across = sum(
            (
                operand.degree * ((jacobian.T * g[id(o.value)]).T * operand.vector)[0]
                for o in beyond
                for operand, jacobian in o.edges
                if operand.node <= cut
            ),
            sp.S.Zero,
        )
        biases = sum(((o.bias_jacobian.T * g[id(o.value)]).T * o.bias)[0] for o in beyond)
        culprits = sum((g[id(o.value)].T * o.residual())[0] for o in beyond)
        assert sp.expand(across + biases - target - culprits) == 0


@pytest.mark.parametrize("seed", range(12))
def test_forward_mode_is_the_transpose(seed: int) -> None:
    """Tangents carried forward from tangent = value on all leaves pair with the reverse sweep:
    <c, tangent of the output> = sum over leaves and biases of <cotangent, value>."""
    leaves, outputs = random_graph(seed, nodes=3)
    tangent = {id(x): x.vector for x in leaves}
    for o in outputs:
        carried = o.bias_jacobian * o.bias
        for operand, jacobian in o.edges:
            carried += jacobian * tangent[id(operand)]
        tangent[id(o.value)] = carried
    cotangent = symbols(outputs[-1].value.vector.rows)
    g = reverse_sweep(outputs, cotangent)
    pulled = sum((g[id(x)].T * x.vector)[0] for x in leaves if id(x) in g)
    pulled += sum(((o.bias_jacobian.T * g[id(o.value)]).T * o.bias)[0] for o in outputs)
    pushed = (cotangent.T * tangent[id(outputs[-1].value)])[0]
    assert sp.expand(pulled - pushed) == 0


@pytest.mark.parametrize("seed", range(6))
def test_consistent_graphs_carry_degree_times_value(seed: int) -> None:
    """With every residual 0 the forward tangent is d v at every node, whatever the degrees are."""
    leaves, outputs = random_graph(seed, nodes=3)
    tangent = {id(x): x.vector for x in leaves}
    for o in outputs:
        carried = o.bias_jacobian * o.bias
        for operand, jacobian in o.edges:
            carried += operand.degree * jacobian * operand.vector
        o.value.vector = (carried / o.value.degree).expand()  # what consistency says v is
        pushed = o.bias_jacobian * o.bias
        for operand, jacobian in o.edges:
            pushed += jacobian * tangent[id(operand)]
        tangent[id(o.value)] = pushed
        difference = (pushed - o.value.degree * o.value.vector).applyfunc(sp.simplify)
        assert difference == sp.zeros(*difference.shape)


def test_the_checker_can_fail() -> None:
    """With one argument position forgotten in the reverse sweep the identity breaks."""
    x = Value(0, symbols(1), sp.S.One)
    square = Output(
        Value(1, symbols(1), sp.Symbol("d")), [(x, symbols(1, 1))] * 2, symbols(1), symbols(1, 1)
    )
    g = reverse_sweep([square], symbols(1))[id(square.value)]
    once = sum((j.T * g).T[0] * u.vector[0] for u, j in square.edges[:1])
    bias = ((square.bias_jacobian.T * g).T * square.bias)[0]
    target = square.value.degree * (g.T * square.value.vector)[0]
    assert sp.expand(once + bias - target - (g.T * square.residual())[0]) != 0
