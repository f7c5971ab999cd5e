"""Whether a gradient is complete, found forwards and from nothing but the module that runs.

Every value carries a tangent: the inputs their own value, constants nothing. A node's tangent is
its real (edited) Jacobian times its operands', taken by a transposed vector-Jacobian product. Where
that is no multiple of the node's value, one number for all elements and all points, and the
operands that carry gradient have their own values for tangents (degree 1) or, not all of them,
nothing (degree 0), constants may be leaves: the fewest whose contributions, finite differences
along their own rays, make the tangent the value. None may contribute through a frozen operand, no
literal through any (celu's alpha does), and a tensor through a live one only where the call is not
linear in it (hypot, not a weight). A literal that reaches divisors alone is none, nor is a constant
that the input selects where the value jumps.

This decides bias leaf and coefficient by numbers alone. It shares no table, degree, signature or
residual with the library; it shares the traced graph and the rewritten module, which are what is
judged, and the definition of completeness. Which calls of the rewritten module integrate from zero,
so that f(0) is a leaf, is a matter of that module too: it is told by whoever edited it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, pairwise
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

TOLERANCE = 1e-7
STEP = 2.0**-16
NUDGE = 1e-6
ALIKE = 1e-9
FLAT = 1e-5
PATH = 48
_BLENDS = {"weight"}
"""lerp's: x + weight (end - x), so that `end` meets x first, and a frozen weight both of them"""
_SHAPE_ONLY = ("_like", "new_", "sym_")


class Unjudged(Exception):
    """This evaluation cannot say: torch lacks a derivative, or the points are not finite."""


@dataclass
class Local:
    """What was found at one value: its degree, None where it has none; the constants that are
    leaves there, and what they add at each point."""

    degree: float | None
    error: float
    leaves: tuple[str, ...] = ()
    added: tuple[Tensor, ...] = ()
    nearest: float = 0.0
    """the multiple that fits best, whether or not it is one"""

    @property
    def faint(self) -> bool:
        """Whether what its leaves add is so little that nobody sees if it moves with an operand."""
        largest = max((_top(added) for added in self.added), default=0.0)
        return 0 < NUDGE * largest < ALIKE


@dataclass
class Evaluation:
    """`complete`; `nodes[name]` one `Local` an output; `alive` nodes carry a gradient to an output;
    `wrong` are the alive ones without a degree; `unread` the inputs that no output depends on."""

    nodes: dict[str, tuple[Local, ...]] = field(default_factory=dict)
    alive: set[str] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    outputs: list[float | None] = field(default_factory=list)
    zero: bool = False
    flat: bool = False
    """an alive value does not move with the input at any of the points"""

    @property
    def complete(self) -> bool:
        right = all(d is not None and abs(d - 1.0) < TOLERANCE for d in self.outputs)
        return right and not self.wrong and not self.unread


def is_real(value: Any) -> bool:
    """Whether a value is a floating-point or complex tensor."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


@dataclass
class Place:
    """An argument position of a call that can be replaced: a tensor, or a number."""

    label: str
    value: Any
    node: fx.Node | None
    index: int


class Bound:
    """A call with its arguments at one point, so that any of them can be replaced."""

    def __init__(self, node: fx.Node, fetch: Callable[[fx.Node], Any]) -> None:
        self.target: Any = node.target
        schema = getattr(node.target, "_schema", None)
        names = [a.name for a in schema.arguments] if schema else []
        args, kwargs = list(node.args), dict(node.kwargs)
        scalars: set[str] = set()
        for i, argument in enumerate(schema.arguments if schema else ()):
            if any(word in str(argument.type) for word in ("number", "float")):
                scalars.add(argument.name)
            given = i < len(args) or argument.name in kwargs
            if not given and argument.has_default_value() and argument.name in scalars:
                kwargs[argument.name] = argument.default_value
        leaves, self.spec = pytree.tree_flatten((args, kwargs))
        labels = self._labels(args, kwargs, names)
        self.leaves = [fetch(a) if isinstance(a, fx.Node) else a for a in leaves]
        self.places = [
            Place(label, value, leaf if isinstance(leaf, fx.Node) else None, i)
            for i, (label, leaf, value) in enumerate(zip(labels, leaves, self.leaves, strict=True))
        ]
        self.scalars = scalars

    def _labels(self, args: list[Any], kwargs: dict[str, Any], names: Sequence[str]) -> list[str]:
        labels: list[str] = []
        given = [(names[i] if i < len(names) else str(i), a) for i, a in enumerate(args)]
        for name, value in [*given, *kwargs.items()]:
            inside = pytree.tree_leaves(value)
            several = isinstance(value, (list, tuple))
            labels += [f"{name}[{i}]" if several else name for i in range(len(inside))]
        return labels

    def run(self, replaced: dict[int, Any]) -> Any:
        leaves = [replaced.get(i, leaf) for i, leaf in enumerate(self.leaves)]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return self.target(*args, **kwargs)


class Tracker:
    """Runs a module at several points at once, a value and a tangent for each.

    `divisors`: nodes whose literals are no bias leaves; `from_zero`: those whose backward is an
    integral, or a difference, from zero to their operands.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        points: Sequence[Sequence[Any]],
        divisors: frozenset[str] = frozenset(),
        from_zero: frozenset[str] = frozenset(),
    ) -> None:
        self.module, self.divisors, self.from_zero = module, divisors, from_zero
        self.values: list[dict[fx.Node, Any]] = [{} for _ in points]
        self.tangents: list[dict[fx.Node, Any]] = [{} for _ in points]
        self.moving: set[fx.Node] = set()
        self.edges: dict[fx.Node, set[fx.Node]] = {}
        self.live: dict[fx.Node, tuple[bool, ...]] = {}
        self.locals: dict[fx.Node, tuple[Local, ...]] = {}
        self.sloped: set[fx.Node] = set()
        """nodes whose gradient is anything but 0 at some point"""
        self.saturated: set[str] = set()
        """nodes whose value is a constant's at every point"""
        self.points = points
        self.given = [iter(point) for point in points]
        self.count = len(points)

    # ------------------------------------------------------------------ one node

    def run(self) -> None:
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                self._placeholder(node)
            elif node.op == "get_attr":
                self._constant(node, [_attribute(self.module, str(node.target))] * self.count)
            elif node.op == "call_function":
                self._call(node)

    def _placeholder(self, node: fx.Node) -> None:
        floats = []
        for k in range(self.count):
            value = next(self.given[k])
            self.values[k][node] = value
            floats.append(is_real(value))
            self.tangents[k][node] = value if floats[-1] else None
        if all(floats):
            self.moving.add(node)
            self.live[node] = (True,)
            self.locals[node] = (Local(1.0, 0.0),)
        else:
            self.live[node] = (False,)

    def _constant(self, node: fx.Node, values: Sequence[Any]) -> None:
        for k, value in enumerate(values):
            self.values[k][node] = value
            self.tangents[k][node] = pytree.tree_map_only(Tensor, torch.zeros_like, value)
        self.live[node] = (False,) * len(_outputs(values[0]))

    def _call(self, node: fx.Node) -> None:
        moving = any(n in self.moving for n in _read(node))
        name = getattr(node.target, "__name__", str(node.target))
        source: Any = node.args[0] if node.args else None
        if node.target is operator.getitem and isinstance(
            self.values[0][source],
            (tuple, list),
        ):
            self._item(node)
            return
        bounds = [Bound(node, self.values[k].__getitem__) for k in range(self.count)]
        if not moving or any(word in name for word in _SHAPE_ONLY):
            with torch.no_grad():
                self._constant(node, [b.run({}) for b in bounds])
            return
        self.moving.add(node)
        reached: set[fx.Node] = set()
        live: list[tuple[bool, ...]] = []
        for k, bound in enumerate(bounds):
            with torch.enable_grad():
                value, tangent, alive, edges = self._push(bound, k, _read(node), node)
            reached |= edges
            live.append(alive)
            self.values[k][node], self.tangents[k][node] = value, tangent
        self.edges[node] = reached
        self.live[node] = tuple(any(flags) for flags in zip(*live, strict=True))
        self.locals[node] = tuple(
            self._judge(node, bounds, item) if is_live else Local(0.0, 0.0)
            for item, is_live in enumerate(self.live[node])
        )
        for item, found in enumerate(self.locals[node]):
            if found.leaves:
                for k in range(self.count):
                    _add(self.tangents[k], node, item, found.added[k])

    def _item(self, node: fx.Node) -> None:
        source: Any = node.args[0]
        index: Any = node.args[1]
        for k in range(self.count):
            self.values[k][node] = self.values[k][source][index]
            self.tangents[k][node] = self.tangents[k][source][index]
        self.live[node] = (self.live[source][index],)
        if source in self.moving:
            self.moving.add(node)
            self.locals[node] = (self.locals[source][index],)
        self.edges[node] = {source} if self.live[node][0] else set()

    def _push(
        self, bound: Bound, k: int, read: Sequence[fx.Node], node: fx.Node | None = None
    ) -> tuple[Any, Any, tuple[bool, ...], set[fx.Node]]:
        """A call's value, its Jacobian times its operands' tangents, which outputs carry gradient,
        and from which operands."""
        fresh: dict[int, Tensor] = {}
        places = [
            p
            for p in bound.places
            if p.node is not None and p.node in read and any(self.live[p.node]) and is_real(p.value)
        ]
        for place in places:
            fresh[place.index] = place.value.detach().requires_grad_()
        value = bound.run(dict(fresh))
        outputs = _outputs(value)
        alive = tuple(is_real(o) and o.requires_grad for o in outputs)
        plain = pytree.tree_map_only(Tensor, Tensor.detach, value)
        pushed = [torch.zeros_like(o) if is_real(o) else o for o in outputs]
        edges: set[fx.Node] = set()
        tangents = [self.tangents[k][p.node] for p in places]  # type: ignore[index]
        leaves = [fresh[p.index] for p in places]
        for i, output in enumerate(outputs):
            if alive[i]:
                pushed[i], reached, sloped = _transposed(output, leaves, tangents)
                if sloped and node is not None:
                    self.sloped.add(node)
                edges |= {p.node for p, r in zip(places, reached, strict=True) if r and p.node}
        tangent = type(plain)(pushed) if isinstance(plain, (tuple, list)) else pushed[0]
        return plain, tangent, alive, edges

    # ------------------------------------------------------------------ one verdict

    def _judge(self, node: fx.Node, bounds: list[Bound], item: int) -> Local:
        values = [_outputs(self.values[k][node])[item] for k in range(self.count)]
        tangents = [_outputs(self.tangents[k][node])[item] for k in range(self.count)]
        if any(
            bool((t.isnan() & v.isfinite()).any()) for t, v in zip(tangents, values, strict=True)
        ):
            raise Unjudged(f"the gradient of {node.name} is not finite")
        found = multiple(tangents, values)
        held = found.degree is not None and abs(found.degree) > TOLERANCE
        first = values[0]
        still = all(
            v.shape == first.shape and torch.allclose(first, v, rtol=TOLERANCE, atol=1e-12)
            for v in values[1:]  # masked_select's shapes differ
        )
        if still and self.edges[node]:
            self.saturated.add(node.name)  # softmax of equal scores, x / x: any degree fits
        # a value that moves nowhere is a bound that holds everywhere, or of degree 0
        if held or not self.edges[node] or not self._of_degree_one_or_zero(node):
            return found
        candidates, least = self._added(node, bounds, item), math.inf
        for size in range(1, len(candidates) + 1):
            for chosen in combinations(candidates, size):
                added = tuple(
                    torch.stack([c[1][k] for c in chosen]).sum(0) for k in range(self.count)
                )
                total = [t + a for t, a in zip(tangents, added, strict=True)]
                error = distance(total, values, 1.0, added)
                least = min(least, error)
                if error < TOLERANCE:
                    if found.degree is not None or distance(tangents, values, 0.0) < FLAT:
                        # a norm of two elements is a sign, but for eps
                        self.saturated.add(node.name)
                    if any(self._steps(node, c[0], c[1], item) for c in chosen):
                        return Local(None, error)
                    return Local(1.0, error, tuple(c[0] for c in chosen), added)
        here = max((_gap(t, v) for t, v in zip(tangents, values, strict=True)), default=0.0)
        here = min(here, least * 2 * max(map(_top, values)))
        degree = round(12 * found.nearest) / 12  # of a product or a root, not of any fit
        off = [_gap(t, degree * v) for t, v in zip(tangents, values, strict=True)]
        here = min(here, max(off, default=0.0))
        self._refuse_inherited(node, bounds, item, here)
        self._refuse_noise(bounds, item, values, here)
        self._refuse_jumps(node, bounds, item)
        return found

    def _made_of(self, node: fx.Node, bounds: list[Bound], item: int, gap: float) -> float:
        """How far a value moves when its operands move by a gap."""
        found = 0.0
        for bound in bounds:
            moved = {}
            for place in self._moved(bound):
                order = torch.arange(place.value.numel(), dtype=torch.float64) + 1.0
                moved[place.index] = place.value + gap * torch.cos(order).view(place.value.shape)
            with torch.no_grad():
                found = max(found, _gap(*(_outputs(bound.run(r))[item] for r in (moved, {}))))
        return found

    def _refuse_inherited(
        self,
        node: fx.Node,
        bounds: list[Bound],
        item: int,
        here: float,
    ) -> None:
        """What is missing here may be what an operand's leaves left open, of a small part of it."""
        open_there = 0.0
        for source in self.edges[node]:
            for item, known in enumerate(self.locals.get(source, ())):
                if known.degree is None or abs(known.degree - 1.0) > TOLERANCE:
                    return
                for k in range(self.count):
                    v, t = (_outputs(x[k][source])[item] for x in (self.values, self.tangents))
                    open_there = max(open_there, _gap(t, v))
        # as much as the call makes of it: a norm of nearly equal values makes more
        if here <= 10 * max(open_there, self._made_of(node, bounds, item, open_there)):
            raise Unjudged("too few digits are left of an operand that is small here")

    def _refuse_noise(self, bounds: list[Bound], item: int, values: list[Any], here: float) -> None:
        """A value that moves with the last bits of its operands is rounding: no degree is seen. Nor
        is where what is missing is less than the last bits of the operands themselves."""
        for bound, value in zip(bounds, values, strict=True):
            moving = [p for p in bound.places if p.node in self.moving and is_real(p.value)]
            if here <= 2.0**-50 * max((_top(p.value) for p in moving), default=0.0):
                raise Unjudged("what is missing is less than the operands are rounded")
            with torch.no_grad():
                moved = _outputs(bound.run(_nudged(bound, moving, 2.0**-50)))[item]
            gap = (moved - value).abs() if moved.shape == value.shape else value.abs()
            gap = torch.where(torch.isfinite(gap), gap, 0.0)
            if gap.numel() and float(gap.max()) > TOLERANCE * float(value.abs().max()):
                raise Unjudged("a value has lost its digits")

    def _refuse_jumps(self, node: fx.Node, bounds: list[Bound], item: int) -> None:
        """A contribution that depends on the step of its difference is none that was measured."""
        nothing: list[dict[int, Any]] = [{}] * self.count
        with torch.no_grad():
            for place in self._constants(node, bounds[0]):
                wide, near = (
                    _rays(bounds, place.index, item, nothing, step) for step in (STEP, STEP / 32)
                )
                for k, (a, b) in enumerate(zip(wide or (), near or (), strict=False)):
                    value = _outputs(self.values[k][node])[item]
                    size = max(1e-4 * float(a.abs().max()), 1e-7 * float(value.abs().max()))
                    if not torch.allclose(a, b, rtol=1e-4, atol=size):
                        raise Unjudged(f"a jump lies within a step of {place.label}")
                    after, before = (_side(bounds[k], place.index, item, s) for s in (STEP, -STEP))
                    if wide and not torch.allclose(after, before, rtol=1e-2, atol=100 * size):
                        raise Unjudged(f"a kink lies at {place.label}")

    # ------------------------------------------------------------------ one jump

    def _steps(self, node: fx.Node, label: str, added: Sequence[Tensor], item: int) -> bool:
        """Whether a constant's contribution jumps with the value while no operand does: where the
        input selects it so, it is no leaf. Looked for on a closed path through the points."""
        if all(a.numel() == 0 or torch.allclose(a, a.flatten()[0]) for a in added):
            return False  # a bias that is added everywhere

        @torch.no_grad()
        def at(t: float) -> Seen | None:
            bound = self._bound(node, t)
            if bound is None:
                return None
            moving = [p.value for p in bound.places if p.node in self.moving and is_real(p.value)]
            index = next((p.index for p in bound.places if p.label == label), None)
            ray = _own(bound, self._moved(bound), item) if index is None else None
            ray = ray if index is None else _ray(bound, index, item, {}, 2.0**-30)
            return None if ray is None else Seen(ray, _outputs(bound.run({}))[item], moving)

        times = [0.03 + 2 * math.pi * k / PATH for k in range(PATH + 1)]
        rises = []
        for k, (a, b) in enumerate(pairwise(map(at, times))):
            if a and b and a.added.shape == b.added.shape and a.added.numel():
                rise = torch.nan_to_num((a.added - b.added).abs().flatten(), 0.0, 0.0, 0.0)
                noise = 1e-4 * max(1.0, _top(a.value), _top(b.value))  # of a difference
                if float(rise.max()) > noise:
                    rises.append((float(rise.max()), k, int(rise.argmax())))
        return any(
            _jumps(at, times[k], times[k + 1], place, rise)
            for rise, k, place in sorted(rises, reverse=True)[:3]
        )

    def is_step(self, node: fx.Node) -> bool:
        """Whether a value moves and its gradient is 0 all the same: torch gives ceil's as zeros."""
        if node.op != "call_function" or node.target is operator.getitem or node in self.sloped:
            return False
        first, *others = (_outputs(self.values[k][node]) for k in range(self.count))
        return any(
            is_real(a) and (a.shape != b.shape or not torch.equal(a, b))
            for other in others
            for a, b in zip(first, other, strict=True)
        )

    def _moved(self, bound: Bound) -> list[Place]:
        return [
            p
            for p in bound.places
            if p.node is not None and self._is_live(p.node) and is_real(p.value)
        ]

    def _is_live(self, node: fx.Node) -> bool:
        return any(self.live.get(node, ()))

    def _bound(self, node: fx.Node, t: float) -> Bound | None:
        """A node's call at a time of the path."""
        here, there = self.points[0], self.points[-1]
        pairs = zip(here, there, strict=True)
        given = iter(3 * (a * math.cos(t) + b * math.sin(t)) if is_real(a) else a for a, b in pairs)
        env: dict[fx.Node, Any] = {}
        try:
            for n in self.module.graph.nodes:
                if n is node:
                    return Bound(node, env.__getitem__)
                if n.op == "placeholder":
                    env[n] = next(given)
                elif n.op == "get_attr":
                    env[n] = _attribute(self.module, str(n.target))
                else:
                    args, kwargs = fx.map_arg((n.args, n.kwargs), env.__getitem__)
                    env[n] = n.target(*args, **kwargs)
        except (RuntimeError, ValueError, IndexError):
            pass  # a point outside of an operation's domain
        return None

    def _of_degree_one_or_zero(self, node: fx.Node) -> bool:
        """Whether each operand that carries gradient has its own value for a tangent, or nothing;
        one at least its own value."""
        wanted = [self._has_degree(source, 1.0) for source in self.edges[node]]
        return any(wanted) and all(
            one or self._has_degree(source, 0.0)
            for one, source in zip(wanted, self.edges[node], strict=True)
        )

    def _has_degree(self, source: fx.Node, degree: float) -> bool:
        known = self.locals.get(source, ())
        if known and all(
            d.degree is not None and abs(d.degree - degree) < TOLERANCE for d in known
        ):
            return True  # judged with the digits that its leaves left it
        for k in range(self.count):
            for v, t in zip(
                _outputs(self.values[k][source]), _outputs(self.tangents[k][source]), strict=True
            ):
                if is_real(v) and distance([t], [v], degree) > TOLERANCE:
                    return False
        return True

    def _added(
        self, node: fx.Node, bounds: list[Bound], item: int
    ) -> list[tuple[str, list[Tensor]]]:
        """The constants that may be leaves, and what each contributes at every point: the same
        when a frozen operand moves."""
        found: list[tuple[str, list[Tensor]]] = []
        lerp = "lerp" in str(node.target)
        moving = [p for p in bounds[0].places if p.node in self.moving and is_real(p.value)]
        moving = [p for p in moving if not (lerp and p.label in _BLENDS)]
        frozen = [p for p in moving if p.node not in self.edges[node]]
        by_all = [_nudged(b, moving) for b in bounds]
        by_frozen = [_nudged(b, frozen) for b in bounds]
        values = [_outputs(self.values[k][node])[item] for k in range(self.count)]
        values = [torch.where(torch.isfinite(v.abs()), v.abs(), 0.0) for v in values]
        tops = [float(v.max()) if v.numel() else 0.0 for v in values]
        with torch.no_grad():
            for place in self._constants(node, bounds[0]):
                here = _rays(bounds, place.index, item, [{}] * self.count)
                there = _rays(bounds, place.index, item, by_all)
                held = _rays(bounds, place.index, item, by_frozen)
                if here is None or there is None or held is None:
                    continue
                sizes = [float(x.abs().max()) if x.numel() else 0.0 for x in here]
                if not _alike(here, held, tops):
                    continue
                same = _alike(here, there, tops)
                if not same and place.node is not None:
                    same = self._curved(bounds, place.index, item, here)
                if same and max(sizes) > 1e-12:
                    found.append((place.label, here))
            found += self._intercept(bounds, item)
        return found + self._origin(node, bounds, item)

    def _intercept(self, bounds: list[Bound], item: int) -> list[tuple[str, list[Tensor]]]:
        """The constants inside of a piecewise linear call (a hard sigmoid's 1/2): what it adds by
        itself, the same when its operand moves."""
        live = [self._moved(b) for b in bounds]
        read = sum(p.node in self.moving for p in bounds[0].places)
        if read != 1 or any(len(places) != 1 for places in live):
            return []
        here = [_own(b, places, item) for b, places in zip(bounds, live, strict=True)]
        added = [x for x in here if x is not None and x.numel()]
        if len(added) < len(bounds):
            return []
        for bound, (place,), x in zip(bounds, live, added, strict=True):
            sides = (replace(place, value=place.value * t) for t in (0.99, 1.01))
            near = [_own(bound, [side], item) for side in sides]
            # on one side at least there is no kink
            gaps = [(y - x).abs() for y in near if y is not None]
            if not gaps or float(torch.stack(gaps).amin(0).max()) > 1e-10 * max(1.0, _top(x)):
                return []
        return [("its own", added)] if max(map(_top, added)) > 1e-9 else []

    def _curved(self, bounds: list[Bound], index: int, item: int, here: list[Tensor]) -> bool:
        """Whether a call is not linear in a constant: hypot's is no coefficient, a weight is.

        Only what moves with live operands comes here; with frozen ones it is a coefficient too.
        """
        larger = _rays(bounds, index, item, [{index: 1.5 * b.leaves[index]} for b in bounds])
        if larger is None:
            return False
        return any(
            float((y - 1.5 * x).abs().max()) > 1e-6 * max(1.0, float(x.abs().max()))
            for x, y in zip(here, larger, strict=True)
            if x.numel()
        )

    def _constants(self, node: fx.Node, bound: Bound) -> Iterator[Place]:
        literals = set() if node.name in self.divisors else bound.scalars
        for place in bound.places:
            number = isinstance(place.value, (int, float)) and not isinstance(place.value, bool)
            if place.node is not None:
                held = place.node not in self.moving and is_real(place.value)
            else:
                held = number and place.label in literals and bool(place.value)
            if held:
                yield place

    def _origin(
        self, node: fx.Node, bounds: list[Bound], item: int
    ) -> list[tuple[str, list[Tensor]]]:
        """f(0) of a rule that integrates from zero: the call with its live operands at zero, but
        for the infinite entries, which are a mask's and stay."""
        if node.name not in self.from_zero:
            return []
        moving = [
            p.index
            for p in bounds[0].places
            if p.node is not None and any(self.live[p.node]) and is_real(p.value)
        ]
        made = [
            b.run({i: torch.where(b.leaves[i].isinf(), b.leaves[i], 0.0) for i in moving})
            for b in bounds
        ]
        return [("f(0)", [_outputs(m)[item].detach() for m in made])]


_LENDING = {
    "aten.view_as.default": 1,
    "aten.expand_as.default": 1,
    "aten.reshape_as.default": 1,
    "aten.type_as.default": 1,
    "aten.to.other": 1,
    "aten.fill.Tensor": 0,
    "aten.fill.Scalar": 0,
}
"""the argument that lends nothing but its shape or dtype"""


def _read(node: fx.Node) -> list[fx.Node]:
    """The operands whose values a call reads."""
    lends = _LENDING.get(str(node.target))
    kept = [a for i, a in enumerate(node.args) if i != lends]
    leaves = pytree.tree_leaves((kept, node.kwargs))
    return [n for n in leaves if isinstance(n, fx.Node)]


def _attribute(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module.detach() if isinstance(module, Tensor) else module


def _outputs(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


def _add(tangents: dict[fx.Node, Any], node: fx.Node, item: int, added: Tensor) -> None:
    old = tangents[node]
    if isinstance(old, (tuple, list)):
        tangents[node] = type(old)(t + added if i == item else t for i, t in enumerate(old))
    else:
        tangents[node] = old + added


def _transposed(
    output: Tensor, leaves: Sequence[Tensor], tangents: Sequence[Tensor]
) -> tuple[Tensor, list[bool], bool]:
    """J t of the real backward c -> J^T c, as the gradient of <J^T c, t> with respect to c; which
    operands it reaches, and whether J^T c is anything but 0."""
    # of no symmetry: ones are orthogonal to all that a softmax does
    order = torch.arange(1, output.numel() + 1, dtype=torch.float64).reshape(output.shape)
    cotangent = torch.cos(order)
    if output.is_complex():  # else what enters as an imaginary part has a slope of 0
        cotangent = torch.complex(cotangent, torch.sin(2 * order + 1))
    cotangent = cotangent.to(output.dtype).requires_grad_()
    try:
        grads = torch.autograd.grad(
            output, leaves, cotangent, create_graph=True, allow_unused=True, retain_graph=True
        )
        reached = [g is not None for g in grads]
        sloped = any(g is not None and bool(g.any()) for g in grads)
        total = sum(
            (torch.real(g.conj() * t)).sum()
            for g, t in zip(grads, tangents, strict=True)
            if g is not None
        )
        if not isinstance(total, Tensor) or not total.requires_grad:
            return torch.zeros_like(output), reached, sloped
        (pushed,) = torch.autograd.grad(total, cotangent, allow_unused=True, retain_graph=True)
        made = torch.zeros_like(output) if pushed is None else pushed.detach()
        return made, reached, sloped
    except (RuntimeError, NotImplementedError):
        return *_by_rows(output, leaves, tangents), True


def _by_rows(
    output: Tensor, leaves: Sequence[Tensor], tangents: Sequence[Tensor]
) -> tuple[Tensor, list[bool]]:
    """The same, a unit cotangent at a time: for backwards that have none of their own."""
    if output.is_complex() or any(x.is_complex() for x in leaves):
        raise Unjudged("a complex backward without one of its own")
    rows = []
    reached = [False] * len(leaves)
    for unit in torch.eye(output.numel(), dtype=output.dtype):
        try:
            grads = torch.autograd.grad(
                output, leaves, unit.reshape(output.shape), allow_unused=True, retain_graph=True
            )
        except (RuntimeError, NotImplementedError) as error:
            raise Unjudged(str(error)) from error
        reached = [g is not None for g in grads]
        pairs = zip(grads, tangents, strict=True)
        rows.append(sum(((g * t).sum() for g, t in pairs if g is not None), output.new_zeros(())))
    return torch.stack(rows).reshape(output.shape).detach(), reached


def _alike(here: list[Tensor], there: list[Tensor], tops: list[float]) -> bool:
    """Whether contributions are the same, up to the digits of a finite difference of values whose
    largest are `tops`."""
    return all(
        x.numel() == 0 or float((x - y).abs().max()) <= ALIKE * max(1.0, top)
        for x, y, top in zip(here, there, tops, strict=True)
    )


def _nudged(bound: Bound, places: Sequence[Place], by: float = NUDGE) -> dict[int, Any]:
    """The operands there, each element moved by another part of itself, `by` or less."""
    moved = {}
    for place in places:
        value = bound.leaves[place.index]
        order = torch.arange(1, value.numel() + 1, dtype=torch.float64).reshape(value.shape)
        order += 1.7 * place.index  # equal operands apart
        moved[place.index] = value * (1 + by * torch.cos(order))
    return moved


def _rays(
    bounds: list[Bound],
    index: int,
    item: int,
    replaced: list[dict[int, Any]],
    step: float = STEP,
) -> list[Tensor] | None:
    """`_ray` at every point, None where it is None at one."""
    rays = [_ray(b, index, item, r, step) for b, r in zip(bounds, replaced, strict=True)]
    found = [ray for ray in rays if ray is not None]
    return found if len(found) == len(rays) else None


def _ray(
    bound: Bound, index: int, item: int, replaced: dict[int, Any], step: float
) -> Tensor | None:
    """d/dt of a call at t = 1 with one constant times t; None where it cannot be scaled."""
    parts = []
    for k in (-2, -1, 1, 2):
        try:
            start = replaced.get(index, bound.leaves[index])
            moved = bound.run(replaced | {index: start * (1 + k * step)})
        except (RuntimeError, TypeError, ValueError, IndexError):
            return None
        parts.append(_outputs(moved)[item])
    a, b, c, d = parts
    slope = (8 * (c - b) - (d - a)) / (12 * step)
    return torch.where(torch.isfinite(slope), slope, 0.0) if not slope.is_complex() else slope


@dataclass
class Seen:
    """At one time of a path: what a constant adds to a value, the value, and the operands."""

    added: Tensor
    value: Tensor
    operands: list[Tensor]

    def apart(self, other: Seen, place: int) -> tuple[float, float]:
        pairs = ((self.added, other.added), (self.value, other.value))
        a, b = (float((x.flatten()[place] - y.flatten()[place]).abs()) for x, y in pairs)
        return a, b


def _jumps(
    at: Callable[[float], Seen | None], before: float, after: float, place: int, rise: float
) -> bool:
    """Whether, as an interval shrinks, contribution and value keep a rise, the operands none."""
    a, b = at(before), at(after)
    for _ in range(18):  # wide still beside a ray
        middle = (before + after) / 2
        m = at(middle)
        if a is None or b is None or m is None or m.added.shape != a.added.shape:
            return False
        if a.apart(m, place)[0] > m.apart(b, place)[0]:
            after, b = middle, m
        else:
            before, a = middle, m
    if a is None or b is None:
        return False
    added, value = a.apart(b, place)
    pairs = zip(a.operands, b.operands, strict=True)
    still = all(torch.allclose(u, v, rtol=1e-5, atol=1e-5) for u, v in pairs)
    return still and added > 0.1 * rise and value > 0.01 * rise


def _top(value: Tensor) -> float:
    return float(value.abs().max()) if value.numel() else 0.0


def _own(bound: Bound, live: Sequence[Place], item: int) -> Tensor | None:
    """What a call adds by itself: its value less its derivative along the ray of its operands."""

    def run(t: float) -> Tensor:
        made = bound.run({p.index: p.value * t for p in live})
        found: Tensor = _outputs(made)[item]
        return found

    try:
        a, b, c, d = (run(1 + k * STEP) for k in (-2, -1, 1, 2))
        return run(1.0) - (8 * (c - b) - (d - a)) / (12 * STEP)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None


def _gap(tangent: Any, value: Any) -> float:
    """The largest |tangent - value| where it is finite."""
    if not is_real(value) or not value.numel():
        return 0.0
    return float(torch.where(torch.isfinite(value.abs()), (tangent - value).abs(), 0.0).max())


def _side(bound: Bound, index: int, item: int, step: float) -> Tensor:
    """d/dt at t = 1 from one side, as `_ray` from both."""
    moved, here = (bound.run({index: bound.leaves[index] * t}) for t in (1 + step, 1.0))
    slope = (_outputs(moved)[item] - _outputs(here)[item]) / step
    return torch.where(torch.isfinite(slope.abs()), slope, 0.0)


def distance(
    tangents: Sequence[Tensor],
    values: Sequence[Tensor],
    degree: float,
    parts: Sequence[Tensor] | None = None,
) -> float:
    """The largest |tangent - degree * value| over all points, relative to the sizes there.

    `parts` are summands of the tangent, whose digits bound what the sum can have.
    """
    worst = 0.0
    for k, (t, v) in enumerate(zip(tangents, values, strict=True)):
        held = torch.isfinite(v.abs())
        gap = torch.where(held, (t - degree * v).abs(), 0.0)
        size = torch.where(held, v.abs() + t.abs(), 0.0)
        if gap.numel():
            top = float(size.max())
            top = max(top, float(parts[k].abs().max())) if parts else top
            worst = max(worst, float(gap.max()) / top if top > 1e-13 else 0.0)
    return worst


def multiple(tangents: Sequence[Tensor], values: Sequence[Tensor]) -> Local:
    """The one number d with tangent = d * value at all elements and points, if there is one."""
    above = below = 0.0
    sizes = []
    for t, v in zip(tangents, values, strict=True):
        held = torch.isfinite(v.abs())
        v, t = torch.where(held, v, 0.0), torch.where(held, t, 0.0)
        top = float(v.abs().max()) if v.numel() else 0.0
        sizes.append((float(t.abs().max()) if t.numel() else 0.0, top))
        if top > 1e-13:
            above += float(torch.real((t / top).conj() * (v / top)).sum())
            below += float(((v / top).abs() ** 2).sum())
    if all(t <= 1e-9 * max(v, 1e-3) for t, v in sizes):
        return Local(0.0, 0.0)
    degree = above / below if below else 0.0
    error = distance(tangents, values, degree)
    return Local(degree if error < TOLERANCE else None, error, nearest=degree)


# --------------------------------------------------------------------------- the whole


def evaluate(
    module: fx.GraphModule,
    points: Sequence[Sequence[Any]],
    divisors: frozenset[str] = frozenset(),
    from_zero: frozenset[str] = frozenset(),
) -> tuple[Evaluation, Tracker]:
    """Whether the module's gradient is complete at (all of) the points; raises `Unjudged`.

    `points`: flat inputs, float64. `divisors`, `from_zero`: nodes, see `Tracker`.
    """
    tracker = Tracker(module, points, divisors, from_zero)
    tracker.run()
    result = Evaluation({n.name: found for n, found in tracker.locals.items()})
    ends = [
        n
        for n in pytree.tree_leaves(module.graph.output_node().args)
        if isinstance(n, fx.Node) and is_real(tracker.values[0][n])
    ]
    for end in dict.fromkeys(ends):
        values = [tracker.values[k][end] for k in range(tracker.count)]
        if not all(bool(torch.isfinite(v).all()) for v in values):
            raise Unjudged("the output is not finite")
        result.zero |= not any(bool(v.any()) for v in values)
        live = tracker.live[end][0]
        result.outputs.append(tracker.locals[end][0].degree if live else None)
    queue = [n for n in dict.fromkeys(ends) if tracker.live[n][0]]
    seen = set(queue)
    for node in queue:
        reached = () if tracker.is_step(node) else tracker.edges.get(node, ())
        new = [n for n in reached if n not in seen and any(tracker.live[n])]
        queue += new
        seen |= set(new)
    result.alive = {n.name for n in seen}
    result.flat = bool(result.alive & tracker.saturated)
    result.wrong = [
        n.name
        for n in module.graph.nodes
        if n in seen and any(found.degree is None for found in tracker.locals[n])
    ]
    result.unread = [
        n.name
        for n in module.graph.nodes
        if n.op == "placeholder" and n in tracker.moving and n not in seen
    ]
    return result, tracker


def literal_divisors(tracker: Tracker) -> frozenset[str]:
    """Nodes to which a literal is added and whose value reaches divisors alone: eps is no leaf."""
    known: dict[fx.Node, bool] = {}

    def only_divides(node: fx.Node) -> bool:
        if node not in known:
            known[node] = False
            known[node] = bool(node.users) and all(divides(user, node) for user in node.users)
        return known[node]

    def divides(user: fx.Node, node: fx.Node) -> bool:
        if user.op != "call_function" or user not in tracker.moving:
            return False
        power = _power(tracker, user, node)
        if power is None or power == 0:
            return False
        others = [n for n in user.all_input_nodes if n is not node and n in tracker.moving]
        return power < 0 or (not others and only_divides(user))

    found = set()
    for node in tracker.moving:
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        bounds = [Bound(node, tracker.values[k].__getitem__) for k in range(tracker.count)]
        literals = [p for p in tracker._constants(node, bounds[0]) if p.node is None]
        if literals and only_divides(node):
            labels = {label for label, _ in tracker._added(node, bounds, 0)}
            if any(p.label in labels for p in literals):
                found.add(node.name)
    return frozenset(found)


def _power(tracker: Tracker, user: fx.Node, node: fx.Node) -> float | None:
    """p where user's value is homogeneous of degree p in `node`'s alone."""
    tangents, values = [], []
    for k in range(tracker.count):
        bound = Bound(user, tracker.values[k].__getitem__)
        places = [p for p in bound.places if p.node is node and is_real(p.value)]
        fresh = [p.value.detach().requires_grad_() for p in places]
        with torch.enable_grad():
            value = bound.run({p.index: f for p, f in zip(places, fresh, strict=True)})
            output = _outputs(value)[0]
            if not is_real(output) or not output.requires_grad:
                return None
            pushed, *_ = _transposed(output, fresh, [f.detach() for f in fresh])
        tangents.append(pushed)
        values.append(output.detach())
    return multiple(tangents, values).degree
