"""Operations that nobody registered, measured: what their own backward is consistent with.

A call's degrees (e_i, d) are the solutions of sum e_i <J_i^T c, u_i> = d <c, v>: linear equations,
one a random cotangent c and point u, whose rational solutions are read off (Euler). Scaling, v(t u)
= t^d v(u), and finite differences are witnesses that use no such product. A measurement proves
nothing: the verdict is numeric at most.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..errors import InputError
from ..graph.computation import ComputationGraph
from ..graph.door import Inputs, Model
from ..graph.leaves import LeafSpec
from ..graph.tracing import trace
from ..operators.algebra import Algebra
from ..operators.calls import Call
from ..operators.record import Operator
from ..operators.relations import Mode, Relation
from .liveness import unregistered

ZERO_TOLERANCE = 1e-8
"""singular values below this, relative to the largest, are none"""
RATIONAL_TOLERANCE = 1e-6
AGREES = 1e-5
"""relative gap of a directional derivative to its central difference"""
SCALES = (0.5, 0.8, 1.25, 2.0)
Point = dict[str, Tensor]
Points = list[tuple[Point, dict[int, Tensor]]]
"""values of the operands that move, and of the weights that differ from the example's"""


@dataclass(frozen=True)
class Measured(Operator):
    """What was found of one call. `relations`: one an output; `contradiction`: why they are void.

    `note` says what was measured; an elementwise operation's signature is its operand.
    """

    relations: tuple[Relation, ...] = ()
    contradiction: str = ""

    def modes(self, call: Call) -> tuple[Mode, ...]:
        """Unedited as measured; a secant where the operation is elementwise and has no degree."""
        plain = Mode(None, self.relations)
        if "secant" not in self.edits:
            return (plain,)
        domain = (1,) if self.origin else None
        return plain, Mode(
            "secant", (Relation((((self.signature, Fraction(1)),),), domain=domain),)
        )


def graph_of(
    model: Model | ComputationGraph, inputs: Inputs, leaves: Collection[LeafSpec], unknown: str
) -> ComputationGraph:
    """The model traced, its unregistered operations measured where `unknown="measure"`."""
    if unknown not in ("error", "measure"):
        raise InputError(f"unknown={unknown!r}: choose 'error' or 'measure'")
    if isinstance(model, ComputationGraph) and leaves:
        raise InputError("a traced graph has its leaves already: trace(model, inputs, leaves=...)")
    graph = model
    if not isinstance(graph, ComputationGraph):
        graph = trace(graph, inputs, leaves=leaves)
    return measure(graph) if unknown == "measure" else graph


def measure(graph: ComputationGraph, seed: int = 0) -> ComputationGraph:
    """The graph with an entry in `measured` for each call on the way that nobody registered.

    Values are those of the trace's example inputs, in float64, and random ones. Raises `InputError`
    for meta tensors, for an operation that does not run in float64, or that has no backward.
    """
    calls = unregistered(graph)
    if not calls:
        return graph
    if graph.is_meta:
        raise InputError(
            f"{', '.join(sorted({c.operator.name for c in calls.values()}))}: not registered, and "
            "meta tensors have no values to measure it with; pass a model and inputs that have "
            "values, or register it with its class and degree rule"
        )
    found: dict[str, Operator] = {}
    _Capture(graph, calls, found, seed).run(
        *pytree.tree_leaves((graph.args, graph.kwargs)), enable_io_processing=False
    )
    return replace(graph, measured={**graph.measured, **found})


class _Capture(fx.Interpreter):
    """Runs the model, and measures the calls asked for at the values that reach them."""

    def __init__(
        self,
        graph: ComputationGraph,
        calls: Mapping[str, Call],
        found: dict[str, Operator],
        seed: int,
    ) -> None:
        super().__init__(graph.fx)
        self.traced, self.calls, self.found, self.seed = graph, calls, found, seed

    def run_node(self, n: fx.Node) -> Any:
        if n.name in self.calls:
            where = self.traced.describe(n.name)
            values = self.fetch_args_kwargs_from_env(n)
            generator = torch.Generator().manual_seed(self.seed)
            box = _Box(n, self.calls[n.name], values, where, generator)
            self.found[n.name] = box.judge()
        with torch.no_grad():
            return super().run_node(n)


# --------------------------------------------------------------------------- one call


@dataclass(frozen=True)
class _Law:
    """Linear equations between degrees, as the reduced rows of a matrix over (d, e_1, ..., e_n)."""

    rows: tuple[tuple[Fraction, ...], ...]
    rational: bool = True

    @property
    def degree_free(self) -> bool:
        """Whether d can be other than 0."""
        lead = self.rows[0] if self.rows else ()
        return bool(lead) and lead[0] == 1 and any(lead[1:])

    def relation(self, names: list[str]) -> Relation:
        """d as a sum of operand degrees, once a further equation; what can only be 0 in `zero`."""
        if not self.rational or not self.rows or self.rows[0][0] != 1:
            return Relation(zero=tuple(sorted(names)))
        lead = {n: -c for n, c in zip(names, self.rows[0][1:], strict=True) if c}
        zero, ties = [], []
        for row in self.rows[1:]:
            tie = {n: c for n, c in zip(names, row[1:], strict=True) if c}
            if len(tie) == 1:
                zero.append(next(iter(tie)))
            else:
                ties.append(tie)
        sums = [lead, *(_sum(lead, tie) for tie in ties)]
        if not lead and ties:  # d = 0, and the degrees of operands are tied to each other
            sums = [scaled for tie in ties for scaled in (tie, _sum(tie, tie))]
        terms = tuple(tuple(sorted(s.items())) for s in sums if s)
        return Relation(tuple(dict.fromkeys(terms)), tuple(sorted(zero)))


def _sum(a: Mapping[str, Fraction], b: Mapping[str, Fraction]) -> dict[str, Fraction]:
    total = {n: a.get(n, Fraction(0)) + b.get(n, Fraction(0)) for n in [*a, *b]}
    return {n: c for n, c in total.items() if c}


class _Box:
    """One call as a function of the float operands that move."""

    def __init__(
        self,
        node: fx.Node,
        call: Call,
        values: tuple[Any, Any],
        where: str,
        generator: torch.Generator,
    ) -> None:
        self.node, self.call, self.where, self.generator = node, call, where, generator
        self.spots: dict[str, int] = {}
        self.others: list[int] = []
        """leaves that are float tensors and do not move: weights"""
        flat_nodes, _ = pytree.tree_flatten((node.args, node.kwargs))
        self.flat, self.spec = pytree.tree_flatten(values)
        self.hidden = False
        """whether an operand that moves is no float: nothing can be said of how"""
        by_node = {id(o.node): o.name for o in call.operands if o.name in call.moving}
        used: dict[int, list[str]] = {}
        for operand in call.operands:
            if operand.name in call.moving:
                used.setdefault(id(operand.node), []).append(operand.name)
        for i, (name, value) in enumerate(zip(flat_nodes, self.flat, strict=True)):
            floating = isinstance(value, Tensor) and value.is_floating_point()
            if floating:
                self.flat[i] = value.detach().double()
            if id(name) in by_node and floating:
                self.spots[used[id(name)].pop(0)] = i
            elif id(name) in by_node:
                self.hidden = True
            elif floating:
                self.others.append(i)
        self.names = sorted(self.spots)
        self.example: Point = {n: self.flat[i] for n, i in self.spots.items()}

    # ------------------------------------------------------------------ running it

    def __call__(self, point: Point, weights: Mapping[int, Tensor] | None = None) -> list[Any]:
        flat = list(self.flat)
        for place, tensor in (weights or {}).items():
            flat[place] = tensor
        for name, tensor in point.items():
            flat[self.spots[name]] = tensor
        args, kwargs = pytree.tree_unflatten(flat, self.spec)
        value = self.node.target(*args, **kwargs)  # type: ignore[operator]
        return list(value) if isinstance(value, (tuple, list)) else [value]

    def values(self, point: Point, output: int, weights: Mapping[int, Tensor] | None) -> Tensor:
        with torch.no_grad():
            return self(point, weights)[output].double()

    def pulled(
        self, point: Point, output: int, weights: Mapping[int, Tensor] | None, count: int
    ) -> list[tuple[Tensor, dict[str, Tensor], Tensor]]:
        """For random cotangents c of one output: c, the J_i^T c, and the output."""
        leaves = {n: t.detach().clone().requires_grad_() for n, t in point.items()}
        with torch.enable_grad():
            value = self(leaves, weights)[output]
        rows = []
        for k in range(count):
            c = self.noise(value)
            try:
                grads = torch.autograd.grad(
                    value, list(leaves.values()), c, allow_unused=True, retain_graph=k < count - 1
                )
            except (RuntimeError, NotImplementedError) as error:
                raise InputError(
                    f"{self.where}: its backward cannot be run ({str(error).splitlines()[0]}); "
                    "give it one (register_autograd), or detach what it reads"
                ) from error
            pairs = zip(leaves.items(), grads, strict=True)
            by_name = {n: torch.zeros_like(t) if g is None else g for (n, t), g in pairs}
            rows.append((c, by_name, value.detach()))
        return rows

    def noise(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator, dtype=torch.float64).to(like)

    # ------------------------------------------------------------------ points

    def near(self, step: float = 0.02) -> Point:
        return {n: u * (1.0 + step * self.noise(u)) for n, u in self.example.items()}

    def resampled(self) -> Point:
        """The example's own values in other places: whatever signs and ranges it needs it has."""

        def draw(u: Tensor) -> Tensor:
            index = torch.randint(u.numel(), (u.numel(),), generator=self.generator)
            return u.flatten()[index.to(u.device)].view(u.shape) * (1.0 + 0.1 * self.noise(u))

        return {n: draw(u) for n, u in self.example.items()}

    def normal(self) -> Point:
        size = {n: float(u.square().mean().sqrt()) or 1.0 for n, u in self.example.items()}
        return {n: size[n] * self.noise(u) for n, u in self.example.items()}

    def moved_weights(self) -> dict[int, Tensor]:
        weights = {i: self.flat[i] for i in self.others}
        return {
            i: w * (1.0 + 0.1 * self.noise(w)) + (0.0 if bool(w.any()) else 0.1 * self.noise(w))
            for i, w in weights.items()
        }

    def scaled(self, point: Point, powers: Mapping[str, Fraction], t: float) -> Point:
        return {n: u * t ** float(powers.get(n, Fraction(0))) for n, u in point.items()}

    def points(self) -> tuple[Points, Points]:
        """Points at the example, and random ones; those where nothing finite comes out are left."""
        count = len(self.names) + 2
        near: Points = [(self.example, {}), *((self.near(), {}) for _ in range(count))]
        ones = dict.fromkeys(self.names, Fraction(1))
        far: Points = [
            (self.scaled(self.near(), ones, t), self.moved_weights()) for t in (0.5, 3.0)
        ]
        far += [(self.resampled(), self.moved_weights()) for _ in range(count)]
        far += [(self.normal(), self.moved_weights()) for _ in range(count)]
        return [p for p in near if self.runs(*p)], [p for p in far if self.runs(*p)]

    def runs(self, point: Point, weights: Mapping[int, Tensor]) -> bool:
        try:
            with torch.no_grad():
                found = self(point, weights)
        except (RuntimeError, ValueError):
            return False
        return all(
            bool(torch.isfinite(v).all())
            for v in found
            if isinstance(v, Tensor) and v.is_floating_point()
        )

    # ------------------------------------------------------------------ the judgement

    def judge(self) -> Measured:
        """Everything that was found, as an entry for this call alone."""
        if not self.names:  # only integers and flags move: nothing can carry gradient
            outputs = self.node.meta.get("val")
            count = len(outputs) if isinstance(outputs, (tuple, list)) else 1
            return self.entry(Algebra.FREEZING, (Relation(frozen=True),) * count, "reads no float")
        try:
            first = self(
                {n: t.detach().clone().requires_grad_() for n, t in self.example.items()}, {}
            )
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            raise InputError(
                f"{self.where} does not run in float64, in which it would be measured "
                f"({str(error).splitlines()[0]}); register it with its class and degree rule"
            ) from error
        near, far = self.points()
        if not near:
            raise InputError(f"{self.where}: its value at the example inputs is not finite")
        laws = [
            self.output(i, len(first), near, far)
            if isinstance(v, Tensor) and v.requires_grad
            else _Found(Relation(frozen=True), Algebra.FREEZING, ["carries no gradient"])
            for i, v in enumerate(first)
        ]
        notes = [
            (f"output {i}: " if len(laws) > 1 else "") + ", ".join(law.notes)
            for i, law in enumerate(laws)
        ]
        where = f"measured at {len(near) + len(far)} points: "
        live = [law for law in laws if not law.relation.frozen]
        contradiction = "; ".join(law.contradiction for law in laws if law.contradiction)
        chosen = live[0] if live else laws[0]
        algebra = chosen.algebra
        if len(live) > 1 and any(law.algebra is not algebra for law in live):
            algebra = Algebra.SMOOTH
        return self.entry(
            algebra,
            tuple(law.relation for law in laws),
            where + "; ".join(notes),
            contradiction,
            chosen.origin,
            chosen.bias,
        )

    def entry(
        self,
        algebra: Algebra,
        relations: tuple[Relation, ...],
        note: str,
        contradiction: str = "",
        origin: float = 0.0,
        bias: str = "",
    ) -> Measured:
        secant = algebra in (Algebra.ZERO_ORIGIN, Algebra.ELEMENTWISE)
        return Measured(
            self.call.operator.name,
            algebra,
            self.names[0] if secant else _signature(relations, bias),
            origin,
            note=note,
            relations=relations,
            contradiction=contradiction,
        )

    def output(self, output: int, outputs: int, near: Points, far: Points) -> _Found:
        """What one output's backward is consistent with, and what else was seen of it."""
        rows_near, rows_far = self.rows(near, output, None), self.rows(far, output, None)
        rows = torch.cat([rows_near, rows_far])
        if not bool(rows[:, 1:].any()):
            return _Found(Relation(frozen=True), Algebra.FREEZING, ["carries no gradient"])
        gap = self.gap(output, [*near, *far])
        true = gap <= AGREES
        notes = [
            f"its backward is the derivative (gap {gap:.0e})"
            if true
            else f"its backward is NOT the derivative of its forward (gap {gap:.0e} of it)"
        ]
        law, biased = _law(rows), False
        origin = self.origin(output) if outputs == 1 else None
        if not law.degree_free and origin is not None and bool(origin.any()) and not self.hidden:
            with_bias = self.rows(near, output, 0), self.rows(far, output, 0)
            affine = _law(torch.cat(with_bias))
            if affine.degree_free and self.scales(affine, output, [*near, *far], true):
                law, biased, (rows_near, rows_far) = affine, True, with_bias
        contradiction = self.contradiction(rows_near, rows_far)
        if not contradiction and true and not self.scales(law, output, [*near, *far], True, biased):
            contradiction = "its degrees by its backward are not those that scaling shows"
        if contradiction:
            none = Relation(zero=tuple(self.names))
            return _Found(none, Algebra.SMOOTH, [*notes, contradiction], contradiction)
        relation = law.relation(self.names)
        if biased:
            relation = replace(relation, domain=(0, 1))
        if relation.terms or len(relation.zero) < len(self.names):
            algebra = self.algebra(relation, biased, output, far or near)
            notes.insert(0, f"{_words(relation)}{' and a constant f(0)' if biased else ''}")
            if algebra in (Algebra.AFFINE, Algebra.STRUCTURAL):
                notes.insert(0, "affine" if biased else "linear")
            if not true and self.is_secant(output, [*near, *far]):
                notes.append("it is the secant")
            bias = self.bias(output, origin) if biased and origin is not None else ""
            return _Found(relation, algebra, notes, bias=bias)
        notes.insert(0, "no degree" if law.rational else "no rational degree")
        if true and outputs == 1 and origin is not None and self.elementwise(output, near):
            notes.insert(1, "elementwise")
            if self.continuous(output, [*near, *far]):
                zero = float(origin.abs().max()) == 0.0
                kind = Algebra.ZERO_ORIGIN if zero else Algebra.ELEMENTWISE
                mean = 0.0 if zero else float(origin.mean()) or float(origin.abs().max())
                notes.insert(2, f"f(0) = {mean:.3g}")
                return _Found(relation, kind, notes, origin=mean)
            notes.insert(2, "with jumps")
        return _Found(relation, Algebra.SMOOTH, notes)

    def rows(self, points: Points, output: int, minus_origin: int | None) -> Tensor:
        """A row (<c, v>, -<J_1^T c, u_1>, ...) a point and cotangent, relative to the largest."""
        found = []
        for point, weights in points:
            shift: Tensor | float = 0.0
            if minus_origin is not None:
                shift = self.values(_zeroed(point), output, weights)
            for c, grads, value in self.pulled(point, output, weights, len(self.names) + 2):
                right = float((c * (value - shift)).sum())
                left = [float((grads[n] * point[n]).sum()) for n in self.names]
                size = float((c * value).abs().sum()) or 1.0
                found.append([right / size, *(-x / size for x in left)])
        return torch.tensor(found, dtype=torch.float64).reshape(-1, 1 + len(self.names))

    def contradiction(self, near: Tensor, far: Tensor) -> str:
        """Another law at the example than elsewhere; where all is zero at the example, none."""
        if not bool(near.any()) or not bool(far.any()):
            return ""
        here, there = _law(near), _law(far)
        if here == there or not (here.rational and there.rational):
            return ""
        a, b = (_words(law.relation(self.names)) for law in (here, there))
        return f"at the example inputs it has {a}, at other points {b}"

    def gap(self, output: int, points: Points) -> float:
        """The median gap of <J^T c, w> to the central difference of <c, v> along w."""
        gaps = []
        for point, weights in points:
            ((c, grads, _),) = self.pulled(point, output, weights, 1)
            way = {n: self.noise(u) * u.abs().mean() for n, u in point.items()}
            slope = sum(float((grads[n] * w).sum()) for n, w in way.items())
            best = float("inf")
            for h in (1e-4, 1e-6):
                ends = [
                    self.values({n: u + s * h * way[n] for n, u in point.items()}, output, weights)
                    for s in (1.0, -1.0)
                ]
                difference = float((c * (ends[0] - ends[1])).sum()) / (2.0 * h)
                size = max(abs(slope), abs(difference), 1e-12)
                best = min(best, abs(slope - difference) / size)
            gaps.append(best if best == best else float("inf"))
        return sorted(gaps)[len(gaps) // 2]

    def scales(
        self, law: _Law, output: int, points: Points, true: bool, biased: bool = True
    ) -> bool:
        """v(t^e u) = t^d v(u) for solutions (d, e) of the law; vacuous for an edited backward."""
        if not true or not law.rational or not law.rows or law.rows[0][0] != 1:
            return True
        for solution in _solutions(law):
            degree, powers = solution[0], dict(zip(self.names, solution[1:], strict=True))
            for point, weights in points[:3] + points[-3:]:
                value = self.values(point, output, weights)
                origin = self.values(_zeroed(point), output, weights) if biased else 0.0
                for t in SCALES:
                    moved = self.scaled(point, powers, t)
                    if not self.runs(moved, weights):
                        continue
                    wanted = (value - origin) * t ** float(degree)
                    off = (self.values(moved, output, weights) - origin - wanted).abs().max()
                    if float(off) > 1e-8 * max(float(wanted.abs().max()), float(value.abs().max())):
                        return False
        return True

    def origin(self, output: int) -> Tensor | None:
        """f(0), None where it is not finite."""
        zero = _zeroed(self.example)
        return self.values(zero, output, {}) if self.runs(zero, {}) else None

    def algebra(self, relation: Relation, biased: bool, output: int, points: Points) -> Algebra:
        powers = {p for term in relation.terms for _, p in term}
        if relation.zero or powers - {Fraction(1)} or not powers:
            return Algebra.HOMOGENEOUS if not biased else Algebra.AFFINE
        if any(len(term) > 1 for term in relation.terms):
            return Algebra.MULTILINEAR
        point, weights = points[0]
        other, _ = points[-1]
        both = {n: u + other[n] for n, u in point.items()}
        parts = [self.values(p, output, weights) for p in (both, point, other, _zeroed(point))]
        additive = (parts[0] - parts[1] - parts[2] + parts[3]).abs().max()
        linear = float(additive) <= 1e-9 * (float(parts[0].abs().max()) or 1.0)
        return Algebra.AFFINE if biased else Algebra.STRUCTURAL if linear else Algebra.HOMOGENEOUS

    def bias(self, output: int, origin: Tensor) -> str:
        """The name of the one constant operand that f(0) is linear in, '' where there is none."""
        fitting = []
        nodes, _ = pytree.tree_flatten((self.node.args, self.node.kwargs))
        names = {id(o.node): o.name for o in self.call.operands if o.node is not None}
        zero = _zeroed(self.example)
        for place in self.others:
            twice = self.values(zero, output, {place: 2.0 * self.flat[place]})
            if torch.allclose(twice, 2.0 * origin, rtol=1e-9, atol=0.0):
                fitting.append(names[id(nodes[place])])
        return fitting[0] if len(fitting) == 1 else ""

    # ------------------------------------------------------------------ elementwise

    def elementwise(self, output: int, points: Points) -> bool:
        """Whether each output depends on the one input in its place, forward and backward."""
        name = self.names[0]
        if len(self.names) > 1 or self.hidden or "[" in name:
            return False
        for point, weights in points[:3]:
            u = point[name]
            ((c, _, value),) = self.pulled(point, output, weights, 1)
            if value.shape != u.shape:
                return False
            mask = torch.rand(u.shape, generator=self.generator).to(u) < 0.5
            moved = self.values({name: torch.where(mask, u * 1.3 + 0.1, u)}, output, weights)
            if not torch.equal(moved[~mask], value[~mask]):
                return False
            leaf = u.clone().requires_grad_()
            with torch.enable_grad():
                (g,) = torch.autograd.grad(self({name: leaf}, weights)[output], leaf, c * mask)
            if bool(g[~mask].any()):
                return False
        return True

    def continuous(self, output: int, points: Points) -> bool:
        """Whether f(u) - f(0) is the integral of f' from 0, so that the secant is its mean."""
        name, steps = self.names[0], 64
        for point, weights in points:
            u, total = point[name], torch.zeros_like(point[name])
            for k in range(steps):
                leaf = (u * ((k + 0.5) / steps)).requires_grad_()
                with torch.enable_grad():
                    value = self({name: leaf}, weights)[output]
                total += torch.autograd.grad(value, leaf, torch.ones_like(value))[0] / steps
            rise = self.values(point, output, weights) - self.values(
                _zeroed(point), output, weights
            )
            off = (total * u - rise).abs().max()
            if not float(off) <= 2e-2 * (float(rise.abs().max()) or 1.0):
                return False
        return True

    def is_secant(self, output: int, points: Points) -> bool:
        """Whether J~ u = f(u) - f(0), element by element."""
        if not self.elementwise(output, points):
            return False
        name = self.names[0]
        for point, weights in points:
            leaf = point[name].clone().requires_grad_()
            with torch.enable_grad():
                value = self({name: leaf}, weights)[output]
            (g,) = torch.autograd.grad(value, leaf, torch.ones_like(value))
            rise = value.detach() - self.values(_zeroed(point), output, weights)
            if not torch.allclose(g * leaf.detach(), rise, rtol=1e-8, atol=1e-10):
                return False
        return True


@dataclass(frozen=True)
class _Found:
    """One output's share of an entry."""

    relation: Relation
    algebra: Algebra
    notes: list[str]
    contradiction: str = ""
    origin: float = 0.0
    bias: str = ""


def _zeroed(point: Point) -> Point:
    return {n: torch.zeros_like(u) for n, u in point.items()}


# --------------------------------------------------------------------------- exact equations


def _law(rows: Tensor) -> _Law:
    """The equations that hold for the degrees: the row space, reduced, in rational numbers."""
    if not bool(rows.any()):
        return _Law(())
    _, sizes, basis = torch.linalg.svd(rows, full_matrices=False)
    rank = int((sizes > ZERO_TOLERANCE * sizes[0]).sum())
    matrix = basis[:rank].clone()
    row = 0
    for column in range(matrix.shape[1]):
        if row == rank:
            break
        best = row + int(matrix[row:, column].abs().argmax())
        if float(matrix[best, column].abs()) < 1e-7:
            continue
        matrix[[row, best]] = matrix[[best, row]]
        matrix[row] /= matrix[row, column].clone()
        others = [i for i in range(rank) if i != row]
        matrix[others] -= matrix[others, column : column + 1] * matrix[row]
        row += 1
    exact = [[Fraction(float(x)).limit_denominator(24) for x in r] for r in matrix]
    rounded = torch.tensor([[float(x) for x in r] for r in exact], dtype=torch.float64)
    rational = bool(((rounded - matrix).abs() < RATIONAL_TOLERANCE).all())
    return _Law(tuple(map(tuple, exact)) if rational else (), rational)


def _solutions(law: _Law) -> list[tuple[Fraction, ...]]:
    """A basis of the solutions of reduced rows: one a column without a pivot."""
    width = len(law.rows[0])
    pivots = [next(i for i, x in enumerate(row) if x) for row in law.rows]
    found = []
    for free in (i for i in range(width) if i not in pivots):
        solution = [Fraction(int(i == free)) for i in range(width)]
        for row, pivot in zip(law.rows, pivots, strict=True):
            solution[pivot] = -row[free]
        found.append(tuple(solution))
    return found


def _signature(relations: tuple[Relation, ...], bias: str) -> str:
    """The relations in the registry's language, for a reader and for what is added at a node."""

    def of(relation: Relation) -> str:
        if relation.frozen:
            return "-"
        products = ["*".join(n if p == 1 else f"{n}^{p}" for n, p in t) for t in relation.terms]
        return " + ".join([*products, *([bias] if bias else [])])

    return " ; ".join(map(of, relations))


def _words(relation: Relation) -> str:
    """`'degree x + gate'`, `'degree 0 where y is of degree 0'`."""
    if not relation.terms and relation.zero:
        return "no degree"
    sums = [" + ".join(n if p == 1 else f"{p} {n}" for n, p in t) for t in relation.terms]
    zero = f" where {', '.join(relation.zero)} has degree 0" if relation.zero else ""
    text = (" = ".join(sums) or "0").replace("+ -", "- ").replace("- 1 ", "- ")
    return f"degree {text}{zero}"
