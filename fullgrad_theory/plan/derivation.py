"""From a graph and a policy to a plan: the least-cost labelling with degrees, by OR-tools' CP-SAT.

Every live value gets a degree so that each operation's relation holds, the output has degree 1 and
the edits cost least. The graph is cut where every gradient path passes one value whose degree must
be 1 (the residual stream); the pieces are solved one by one, repeated ones once.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from itertools import islice
from math import lcm

from ortools.sat.python import cp_model
from torch import fx

from ..edits.kinds import OWN, Edit, Integrate, Prune, Scale
from ..edits.policy import Policy, within
from ..edits.published import policy
from ..errors import InputError, NoPlanError, PolicyError
from ..graph.computation import ComputationGraph
from ..graph.door import Inputs, Model
from ..graph.leaves import LeafSpec
from ..graph.sources import module_path
from ..operators.algebra import Algebra
from ..operators.calls import Call, short_name, target_name
from ..operators.region import REGION
from ..operators.relations import Mode, Relation
from .labelling import Degrees, degrees
from .liveness import Liveness, State, liveness
from .measuring import graph_of
from .plan import Plan, compress, fingerprint

HIGHEST = 32
"""degrees beyond +-32, or with a denominator beyond 24, are not looked for"""
FINEST = 24
NEVER = 10**5
"""the cost of leaving a node that the policy does not leave: what is left then is the obstacle"""

Ref = tuple[str | int, int]
"""a value: its node (a name, or the place in a piece) and which of its outputs"""
INPUT: Ref = ("", 0)
"""a value of degree 1 from before: a source, or the cut that the piece starts at"""


def derive_rules(
    model: Model | ComputationGraph,
    inputs: Inputs = None,
    policy: str | Policy = "libra",
    *,
    alternatives: int = 0,
    effort: float = 10.0,
    unknown: str = "error",
    leaves: Collection[LeafSpec] = (),
) -> Plan:
    """The least-cost plan that makes a model, a layer or a traced graph complete under a policy.

    `alternatives`: how many further plans to look for, the next cheapest ones, as the plan's
    `alternatives`; each needs all of its edits, and gives another gradient than the rest.
    `effort` bounds the search per piece, for the best plan and once more for the alternatives, in
    the solver's deterministic units (a unit takes seconds, six on one hard layer): the same graph
    gives the same plan, and beyond it the best one so far with `optimal=False`. `unknown` as in
    `check_completeness`, `leaves` as in `trace`.
    Raises `NoPlanError` naming the obstacle, `UnknownNameError`, `PolicyError`, `InputError` for
    alternatives to a partial policy, and what `trace` raises.
    """
    chosen = _policy(policy)
    if alternatives < 0 or (alternatives and not chosen.complete):
        raise InputError(
            f"alternatives={alternatives}: expected a number from 0 up"
            if alternatives < 0
            else f"policy {chosen.name!r} is partial, and alternatives are plans that leave "
            "nothing incomplete; take a complete policy, such as 'libra'"
        )
    graph = graph_of(model, inputs, leaves, unknown)
    live = liveness(graph)
    before = degrees(graph, (), live)
    if not any(live.state(value) is State.LIVE for value in graph.outputs):
        raise NoPlanError(
            f"no output of {graph.name} carries gradient: all of them are constant, detached, "
            "rounded or compared; judge a value from before that"
        )
    _find_modules(graph, chosen)
    problem = _Problem(graph, live, chosen)
    if not before.findings or chosen.idle:
        return _plan(problem, before, before, (), True)
    pieces = _solve_pieces(problem, alternatives, effort)
    edits, obstacles = pieces.edits()
    after = degrees(graph, edits, live)
    if obstacles:
        raise _no_plan(problem, after, obstacles)
    best = _plan(problem, before, _judged(problem, edits, after), edits, pieces.optimal)
    others = []
    for choice in islice(pieces.next_best(), alternatives):
        edits, _ = pieces.edits(choice)
        after = _judged(problem, edits, degrees(graph, edits, live))
        others.append(_plan(problem, before, after, edits, pieces.searched))
    return replace(best, alternatives=tuple(others), stopped=not pieces.searched)


def _judged(problem: _Problem, edits: Iterable[Edit], after: Degrees) -> Degrees:
    """The labelling as `degrees` has it, which knows nothing of the search."""
    if problem.policy.complete and after.findings:
        graph = problem.graph
        reasons = "; ".join(f"{graph.describe(n)}: {f.reason}" for n, f in after.findings.items())
        raise AssertionError(f"error of the library: the plan derived leaves {reasons}")
    return after


def _find_modules(graph: ComputationGraph, policy: Policy) -> None:
    """Raise where a module that is to be kept is none of this graph's."""
    paths = dict.fromkeys(filter(None, map(module_path, graph.nodes.values())))
    for pattern in policy.keep:
        if not any(within(path, pattern) for path in paths):
            raise PolicyError(
                f"policy {policy.name!r} keeps {pattern!r}, and {graph.name} has no such module; "
                f"its modules: {', '.join(compress(paths)[:12]) or 'none'}"
            )


_policy = policy  # `derive_rules` has a parameter of that name


# --------------------------------------------------------------------------- the problem


@dataclass(frozen=True)
class Option:
    """One way a node can be consistent: its edit, what that costs, the relation of each output."""

    edit: str | None
    cost: int
    relations: tuple[Relation, ...]


@dataclass(frozen=True)
class Site:
    """A node of the labelling problem. It holds no names, so that equal layers are equal pieces.

    `operands`: argument -> the value it reads, None where that is frozen; `prune`: the cost of
    pruning each, None where that is not looked at. `live`: which outputs carry gradient; `small`:
    whose degree can only be 0 or 1. `leave`: the cost of leaving it.
    """

    options: tuple[Option, ...]
    operands: tuple[tuple[str, Ref | None], ...]
    prune: tuple[int | None, ...]
    live: tuple[bool, ...]
    small: tuple[bool, ...]
    leave: int | None
    eps: bool
    must_be_one: bool = False

    @property
    def refs(self) -> tuple[Ref, ...]:
        return tuple(ref for _, ref in self.operands if ref is not None)

    @property
    def never(self) -> int:
        """An operation without a degree is rather the obstacle than the sum it ends in."""
        has_degree = any(r.terms for r in self.options[0].relations)
        return 20 * NEVER if has_degree else NEVER


@dataclass(frozen=True)
class Choice:
    """What a solution does at one place of a piece: an edit's kind, or `leave`."""

    place: int
    kind: str
    argument: str = ""
    degree: Fraction = Fraction(1)


class _Problem:
    """A graph as sites, and the pieces it falls into."""

    def __init__(self, graph: ComputationGraph, live: Liveness, policy: Policy) -> None:
        self.graph, self.live, self.policy = graph, live, policy
        self.ends = {v.name for v in graph.outputs if live.state(v) is State.LIVE}
        self.names = self._reaching()

    def _reaching(self) -> list[str]:
        """The live calls from which an output is reached, in graph order."""
        reaching = set(self.ends)
        for name in reversed(self.graph.nodes):
            if name in reaching:
                reaching |= {str(ref[0]) for _, ref in self._operands(name) if ref is not None}
        sources = set(self.live.sources)
        return [n for n in self.graph.nodes if n in reaching and n not in sources]

    def _operands(self, name: str) -> tuple[tuple[str, Ref | None], ...]:
        call = self.live.calls.get(name)
        if call is None or name in self.live.sources:
            return ()
        node = self.graph.nodes[name]
        read = [(o.name, o.node) for o in call.operands if o.name in call.moving]
        return tuple((n, self._value(node, o)) for n, o in read if o is not None)

    def _value(self, user: fx.Node, operand: fx.Node) -> Ref | None:
        """Which output of `operand` is read; None where it is frozen. As `degrees` reads it."""
        states = self.live.states[operand.name]
        item = next((i for i, s in enumerate(states) if s is State.LIVE), 0)
        if len(states) > 1 and target_name(user.target) == "getitem":
            item = range(len(states))[user.args[1]]  # type: ignore[index]
        if states[item] is not State.LIVE:
            return None
        return INPUT if operand.name in self.live.sources else (operand.name, item)

    def prune_cost(self, name: str, argument: str) -> int | None:
        """What pruning an edge costs, by the operation whose value it holds fixed.

        A norm with a live weight rather loses the weight's gradient than its input's.
        """
        reader = self.live.calls[name]
        value = next(o.node for o in reader.operands if o.name == argument)
        cost = self._fixed_cost(name, value)
        norm = reader.operator.algebra is Algebra.NORMALISER and len(reader.moving) > 1
        if cost is None or not (norm and argument == "input"):
            return cost
        return cost + (self.policy.freeze or 0) + 1

    def _fixed_cost(self, name: str, value: fx.Node | None) -> int | None:
        modules = {module_path(self.graph.nodes[name])}
        while value is not None and (call := self.live.calls.get(value.name)):
            modules.add(module_path(value))
            if call.operator.algebra is not Algebra.STRUCTURAL or len(call.moving) != 1:
                return Prune.price(self.policy, call.operator, modules)
            value = next(o.node for o in call.operands if o.name in call.moving)
        return Prune.price(self.policy, None, modules)

    @cached_property
    def sites(self) -> dict[str, Site]:
        operands = {name: self._operands(name) for name in self.names}
        uses = Counter(r[0] for ops in operands.values() for _, r in ops if r) + Counter(self.ends)
        small: dict[Ref | None, bool] = {INPUT: True, None: True}
        sites = {}
        for name in self.names:
            call = self.live.calls[name]
            modes = [(m, _mode_cost(self.policy, call, m)) for m in call.operator.modes(call)]
            options = tuple(Option(m.edit, c, m.outputs) for m, c in modes if c is not None)
            live = tuple(state is State.LIVE for state in self.live.states[name])
            refs = dict(operands[name])
            for i in range(len(live)):
                small[name, i] = all(_is_small(o.relations[i], refs, small) for o in options)
            # the only edge into a node that is read once: pruning the reader's edge is the same
            meets = len([r for r in refs.values() if r]) > 1 or uses[name] != 1
            prices = tuple(self.prune_cost(name, argument) for argument, _ in operands[name])
            sites[name] = Site(
                options,
                operands[name],
                prices if meets else (None,) * len(prices),
                live,
                tuple(small[name, i] for i in range(len(live))),
                self.policy.leave_cost(call),
                call.eps,
                name in self.ends,
            )
        return sites

    def pieces(self) -> Iterator[list[str]]:
        """The names between one cut and the next; at a cut the degree must be 1.

        A node that no edge jumps over lies on every gradient path. Were its degree 0 the output's
        would be 0 as well; if it can only be 0 or 1, it is 1.
        """
        index = {name: i for i, name in enumerate(self.graph.nodes)}
        reach = max((index[s] for s in self.live.sources), default=-1)
        last_read = dict.fromkeys(self.names, -1)
        for name, site in self.sites.items():
            for node, _ in site.refs:
                last_read[str(node)] = index[name]
            if INPUT in site.refs:
                reach = max(reach, index[name])
        last_read |= dict.fromkeys(self.ends, len(index))
        piece: list[str] = []
        for name, site in self.sites.items():
            piece.append(name)
            if reach <= index[name] and site.small == (True,):
                yield piece
                piece = []
            reach = max(reach, last_read[name])
        if piece:
            yield piece

    def localise(self, piece: Sequence[str]) -> tuple[Site, ...]:
        """A piece's sites with places for names: the key by which repeated pieces are known."""
        place = {name: i for i, name in enumerate(piece)}

        def local(ref: Ref | None) -> Ref | None:
            return (
                ref if ref is None else (place[str(ref[0])], ref[1]) if ref[0] in place else INPUT
            )

        sites = [
            replace(self.sites[n], operands=tuple((a, local(r)) for a, r in self.sites[n].operands))
            for n in piece
        ]
        if sites[-1].small == (True,):
            sites[-1] = replace(sites[-1], must_be_one=True)
        return tuple(sites)


def _mode_cost(policy: Policy, call: Call, mode: Mode) -> int | None:
    """What the policy asks; a region was folded by the user, in order to be integrated."""
    if mode.edit is None or call.operator is REGION:
        return 0
    return OWN[mode.edit].price(policy, mode)


def _is_small(
    relation: Relation, refs: dict[str, Ref | None], small: dict[Ref | None, bool]
) -> bool:
    """Whether an output's degree can only be 0 or 1, whatever is edited before it."""
    if relation.frozen or not relation.terms or relation.domain is not None:
        return True
    for term in relation.terms:
        moving = [(refs[name], exponent) for name, exponent in term if refs[name] is not None]
        if not moving or (len(moving) == 1 and moving[0][1] == 1 and small[moving[0][0]]):
            return True
    return False


@dataclass(frozen=True)
class Solution:
    """A labelling of a piece: what it does, what that costs, whether that is proven the least."""

    choices: tuple[Choice, ...]
    cost: int
    proven: bool


@dataclass(frozen=True)
class _Pieces:
    """The pieces of a graph, for each which problem it is; for each problem its solutions in order
    of cost, and whether all that were asked for (or all there are) were found."""

    problem: _Problem
    pieces: tuple[tuple[tuple[str, ...], int], ...]
    solutions: tuple[tuple[Solution, ...], ...]
    searched: bool

    @property
    def optimal(self) -> bool:
        return all(best.proven for best, *_ in self.solutions)

    def edits(self, choice: Sequence[int] = ()) -> tuple[tuple[Edit, ...], list[str]]:
        """All edits in graph order and the nodes that stand in the way; equal pieces choose alike.

        `choice`: which of its solutions each problem takes, the first where left out.
        """
        edits: list[Edit] = []
        obstacles: list[str] = []
        for piece, which in self.pieces:
            for made in self.solutions[which][choice[which] if choice else 0].choices:
                name = piece[made.place]
                call = self.problem.live.calls[name]
                edits += _edits(made, name, call, self.problem.policy)
                if made.kind == "free" or (
                    made.kind == "leave" and self.problem.sites[name].leave is None
                ):
                    obstacles.append(name)
        return tuple(edits), obstacles

    def next_best(self) -> Iterator[tuple[int, ...]]:
        """Which solution each problem takes, by total cost, the best of all left out."""
        times = Counter(which for _, which in self.pieces)
        queue = [(0, (0,) * len(self.solutions))]
        while queue:
            cost, choice = heapq.heappop(queue)
            if any(choice):
                yield choice
            # each choice is reached from one other alone: the last that differs moves on
            last = max((i for i, c in enumerate(choice) if c), default=0)
            for i in range(last, len(choice)):
                if choice[i] + 1 < len(self.solutions[i]):
                    now, then = self.solutions[i][choice[i] : choice[i] + 2]
                    more = times[i] * (then.cost - now.cost)
                    heapq.heappush(
                        queue, (cost + more, (*choice[:i], choice[i] + 1, *choice[i + 1 :]))
                    )


def _solve_pieces(problem: _Problem, alternatives: int, effort: float) -> _Pieces:
    known: dict[tuple[Site, ...], int] = {}
    pieces: list[tuple[tuple[str, ...], int]] = []
    solutions: list[tuple[Solution, ...]] = []
    searched = True
    for piece in problem.pieces():
        sites = problem.localise(piece)
        if sites not in known:
            known[sites] = len(solutions)
            best, labelling = _solve(sites, problem.policy, effort)
            others: list[Solution] = []
            if alternatives:
                others, all_found = _others(labelling, best, alternatives, effort)
                searched &= all_found
            solutions.append((best, *others))
        pieces.append((tuple(piece), known[sites]))
    return _Pieces(problem, tuple(pieces), tuple(solutions), searched)


def _edits(choice: Choice, name: str, call: Call, policy: Policy) -> list[Edit]:
    if choice.kind == "prune":
        return [Prune(name, choice.argument)]
    if choice.kind == "scale":
        return [Scale(name, 1 / choice.degree)]
    if choice.kind == "free":
        return []
    if choice.kind == "leave":
        factors = policy.edge_factors(call)
        return [
            Scale(name, f, argument) for argument, f in factors.items() if argument in call.moving
        ]
    return [OWN[choice.kind](name)]


# --------------------------------------------------------------------------- one piece, by CP-SAT


def _solve(sites: tuple[Site, ...], policy: Policy, effort: float) -> tuple[Solution, _Labelling]:
    """The cheapest labelling of a piece.

    Where there is none, the cheapest with nodes left that the policy does not leave, or with an end
    whose degree is not 1: the obstacles.
    """
    labelling = _Labelling(sites, policy)
    answer = labelling.solve(effort)
    if answer is None:
        relaxed = tuple(replace(s, leave=s.never if s.leave is None else s.leave) for s in sites)
        answer = _Labelling(relaxed, policy, any_end=True).solve(effort)
    if answer is None:
        raise NoPlanError(
            f"the search found no plan within effort={effort}; raise it in derive_rules, or derive "
            "the layers of the model one by one"
        )
    return answer, labelling


def _others(
    labelling: _Labelling, best: Solution, count: int, effort: float
) -> tuple[list[Solution], bool]:
    """Up to `count` further solutions in order of cost, and whether the search came to its end.

    Each is minimal, and its gradient takes other ways, or is edited otherwise, than the others'.
    """
    found: list[Solution] = []
    if not best.proven:
        return found, False
    labelling.watch_flows()
    labelling.forbid(best)
    while len(found) < count:
        answer = labelling.solve(effort - labelling.spent)
        if answer is None or not answer.proven:
            return found, labelling.exhausted
        smaller = _Labelling(labelling.sites, labelling.policy, within=answer).solve(effort)
        minimal = smaller is None or smaller.cost == answer.cost
        labelling.forbid(answer if minimal or smaller is None else smaller)
        if minimal:
            found.append(answer)
    return found, True


def _flows(sites: tuple[Site, ...], choices: Iterable[Choice]) -> set[tuple[int, str]]:
    """The edges (place, argument) that carry gradient from an end to a source of the piece."""
    pruned = {(c.place, c.argument) for c in choices if c.kind == "prune"}
    carries: set[str | int] = {INPUT[0]}
    open_edges = []
    for place, site in enumerate(sites):
        for argument, ref in site.operands:
            if ref is not None and ref[0] in carries and (place, argument) not in pruned:
                open_edges.append((place, argument, ref[0]))
                carries.add(place)
    reached: set[str | int] = {place for place, site in enumerate(sites) if site.must_be_one}
    flows = set()
    for place, argument, source in reversed(open_edges):
        if place in reached:
            flows.add((place, argument))
            reached.add(source)
    return flows


class _Labelling:
    """The integer programme of a piece: a degree a value (times a common denominator), edits as
    Booleans, the sum of their costs to be least; relations bind only nodes on a gradient path."""

    def __init__(
        self,
        sites: tuple[Site, ...],
        policy: Policy,
        *,
        any_end: bool = False,
        within: Solution | None = None,
    ) -> None:
        """`any_end`: an end of a degree other than 1 is an obstacle. `within`: only these edits."""
        self.sites, self.policy, self.any_end = sites, policy, any_end
        self.spent, self.exhausted = 0.0, False
        self.model = cp_model.CpModel()
        self.one = _denominator(sites)
        self.zero_var, self.one_var = (self.model.new_constant(v) for v in (0, self.one))
        self.degree: dict[Ref | None, cp_model.IntVar] = {INPUT: self.one_var, None: self.zero_var}
        self.alive = [self.model.new_bool_var("") for _ in sites]
        self.read: list[list[tuple[str, Ref, cp_model.IntVar | None]]] = [[] for _ in sites]
        """argument, what it reads, and whether it is pruned (None: never)"""
        self.flows: dict[tuple[int, str], cp_model.IntVar] = {}
        self.costs: list[tuple[cp_model.IntVar, int, int]] = []
        """literal, cost, and rank: among plans of equal cost the lowest sum of ranks wins"""
        self.choices: list[tuple[cp_model.IntVar, Choice]] = []
        self.natural: dict[int, cp_model.IntVar] = {}
        self.scaled: dict[int, cp_model.IntVar] = {}
        self.uses = Counter(ref for site in sites for ref in site.refs)
        self.edges = sum(len(site.operands) for site in sites)
        self.edge = 0
        for place, site in enumerate(sites):
            self._add(place, site)
        self._keep_alive()
        if within is not None:
            self._only(within)

    def _add(self, place: int, site: Site) -> None:
        model, alive = self.model, self.alive[place]
        seen = {name: self._seen(place, name, ref) for name, ref in site.operands}
        edges = {argument: pruned for argument, _, pruned in self.read[place]}
        wanted = [
            self._new_degree(small) if live else self.zero_var
            for live, small in zip(site.live, site.small, strict=True)
        ]
        natural = list(wanted)
        if self._scalable(place) and not self._passes_on(place):
            natural = [self._new_degree(False)]
            scaled = self._choose(Choice(place, "scale"), self.policy.scale or 0, self.edge)
            model.add_implication(scaled, alive)
            model.add(wanted[0] == natural[0]).only_enforce_if(~scaled)
            model.add(wanted[0] == self.one).only_enforce_if(scaled)
            model.add(natural[0] >= 1).only_enforce_if(scaled)
            self.natural[place], self.scaled[place] = natural[0], scaled
        ways = []
        for option in site.options:
            # of plans that cost the same, rather one that makes no f(0) a bias leaf
            rank = self.edges if any(r.domain == (1,) for r in option.relations) else 0
            way = self._choose(Choice(place, option.edit or ""), option.cost, rank)
            for relation, value, live in zip(option.relations, natural, site.live, strict=True):
                if live:
                    self._hold(relation, value, seen, edges, way)
            ways.append(way)
        if site.leave is not None:
            way = self._choose(Choice(place, "leave"), site.leave)
            self._leave(site, wanted, list(seen.values()), way)
            ways.append(way)
        model.add(sum(ways) == alive)
        for value in {*wanted, *natural} - {self.zero_var}:
            model.add(value == 0).only_enforce_if(~alive)
        for i, value in enumerate(wanted):
            self.degree[place, i] = value
        if site.must_be_one:
            end = model.add(wanted[site.live.index(True)] == self.one)
            model.add(alive == 1)
            if self.any_end:
                end.only_enforce_if(~self._choose(Choice(place, "free"), 20 * NEVER))

    def _scalable(self, place: int) -> bool:
        site = self.sites[place]
        return self.policy.scale is not None and site.live == (True,) and site.small == (False,)

    def _passes_on(self, place: int) -> bool:
        """Whether a scale here is a scale at the only value read, which nobody else reads."""
        read = [(name, ref) for name, ref in self.sites[place].operands if ref is not None]
        return len(read) == 1 and self.uses[read[0][1]] == 1 and self._moves(place, read[0][0])

    def _moves(self, place: int, argument: str) -> bool:
        """Whether a scale here is one at the value read, if gradient takes no other edge."""
        site, ref = self.sites[place], dict(self.sites[place].operands)[argument]
        terms = [t for o in site.options for r in o.relations for t in r.terms]
        powers = [power for term in terms for name, power in term if name == argument]
        return (
            ref is not None
            and isinstance(ref[0], int)
            and not self.sites[ref[0]].must_be_one
            and self._scalable(ref[0])
            and all(power == 1 for power in powers)
        )

    def _seen(self, place: int, name: str, ref: Ref | None) -> cp_model.IntVar:
        """The degree at an edge: the value's, or 0 where it is pruned."""
        self.edge += 1
        site = self.sites[place]
        value = self.degree[ref]
        if ref is None:
            return value
        cost = dict(zip((n for n, _ in site.operands), site.prune, strict=True))[name]
        if cost is None:
            self.read[place].append((name, ref, None))
            return value
        # the later edge is the better one: what is behind it leaves the backward pass
        choice = Choice(place, "prune", name)
        pruned = self._choose(choice, cost, self.edges - self.edge)
        self.model.add_implication(pruned, self.alive[place])
        small = ref == INPUT or self.sites[int(ref[0])].small[ref[1]]
        seen = self._new_degree(small)
        self.model.add(seen == value).only_enforce_if(~pruned)
        self.model.add(seen == 0).only_enforce_if(pruned)
        self.read[place].append((name, ref, pruned))
        return seen

    def _hold(
        self,
        relation: Relation,
        value: cp_model.IntVar,
        seen: dict[str, cp_model.IntVar],
        edges: dict[str, cp_model.IntVar | None],
        way: cp_model.IntVar,
    ) -> None:
        """`edges`: the live operands, each with the literal that it is pruned (None: it cannot)."""
        for name in relation.zero:
            self.model.add(seen[name] == 0).only_enforce_if(way)
        if not relation.terms:
            self.model.add(value == 0).only_enforce_if(way)
        for term in relation.terms:
            common = lcm(*(exponent.denominator for _, exponent in term))
            total = sum(int(exponent * common) * seen[name] for name, exponent in term)
            self.model.add(common * value == total).only_enforce_if(way)
        for name in relation.ray:  # moves as the output does, or is pruned or frozen
            if name in edges:
                pruned = edges[name]
                free = [] if pruned is None else [~pruned]
                self.model.add(seen[name] == value).only_enforce_if(way, *free)
        if relation.domain is not None:
            self._restrict(value, relation.domain, way)

    def _leave(
        self,
        site: Site,
        wanted: list[cp_model.IntVar],
        seen: list[cp_model.IntVar],
        way: cp_model.IntVar,
    ) -> None:
        """Left inconsistent: labelled as `degrees` labels a finding, and behind nothing odd."""
        for value, live in zip(wanted, site.live, strict=True):
            if live:
                self.model.add(value == (0 if site.eps else self.one)).only_enforce_if(way)
        if not site.eps:
            for value in seen:
                self._restrict(value, (0, 1), way)
            self.model.add(sum(seen) >= self.one).only_enforce_if(way)

    def _keep_alive(self) -> None:
        """What an alive node reads through an edge that is not pruned is alive."""
        for place, reads in enumerate(self.read):
            for _, (source, _), pruned in reads:
                if isinstance(source, int):
                    edge = [] if pruned is None else [pruned]
                    self.model.add_bool_or([self.alive[source], ~self.alive[place], *edge])

    def _new_degree(self, small: bool) -> cp_model.IntVar:
        bound = HIGHEST * self.one
        ends = [[0, 0], [self.one, self.one]] if small else [[-bound, bound]]
        return self.model.new_int_var_from_domain(cp_model.Domain.from_intervals(ends), "")

    def _restrict(
        self, value: cp_model.IntVar, values: tuple[int, ...], way: cp_model.IntVar
    ) -> None:
        domain = cp_model.Domain.from_values([v * self.one for v in values])
        self.model.add_linear_expression_in_domain(value, domain).only_enforce_if(way)

    def _choose(self, choice: Choice, cost: int, rank: int = 0) -> cp_model.IntVar:
        literal = self.model.new_bool_var("")
        if choice.kind:
            self.choices.append((literal, choice))
            self.costs.append((literal, cost, rank))
        return literal

    # ------------------------------------------------------------------ other solutions

    def _only(self, solution: Solution) -> None:
        """No edit but these; the objective finds out which of them are needed."""
        allowed = {(c.place, c.kind, c.argument): c for c in solution.choices}
        for literal, choice in self.choices:
            same = allowed.get((choice.place, choice.kind, choice.argument))
            if same is None:
                self.model.add(literal == 0)
            elif choice.kind == "scale":
                degree = int(same.degree * self.one)
                self.model.add(self.natural[choice.place] == degree).only_enforce_if(literal)

    def watch_flows(self) -> None:
        """A literal for every edge: whether it carries gradient, from an end to a source."""
        carries: dict[str | int, cp_model.IntVar] = {INPUT[0]: self.model.new_constant(1)}
        opened: list[tuple[int, str, str | int, cp_model.IntVar]] = []
        for place, reads in enumerate(self.read):
            edges = []
            for name, (source, _), pruned in reads:
                unpruned = [] if pruned is None else [~pruned]
                edges.append(self._all([carries[source], *unpruned]))
                opened.append((place, name, source, edges[-1]))
            carries[place] = self._any(edges)
        readers: dict[str | int, list[cp_model.IntVar]] = {}
        reached: dict[int, cp_model.IntVar] = {}
        for place, name, source, edge in reversed(opened):
            if place not in reached:  # all that read it have been seen
                end = self.sites[place].must_be_one
                below = readers.get(place, [])
                reached[place] = self.model.new_constant(1) if end else self._any(below)
            self.flows[place, name] = self._all([edge, reached[place]])
            readers.setdefault(source, []).append(self.flows[place, name])
        for place, scaled in self.scaled.items():
            flows = {name: self.flows[place, name] for name, _, _ in self.read[place]}
            for name, ref, _ in self.read[place]:
                if self._moves(place, name):  # then by another edge as well, or from one
                    edges = [*flows.values(), *readers[ref[0]]]
                    others = [edge for edge in edges if edge is not flows[name]]
                    self.model.add_bool_or([~scaled, ~flows[name], *others])

    def _any(self, literals: list[cp_model.IntVar]) -> cp_model.IntVar:
        """A literal that holds where one of `literals` does, and only there."""
        one = self.model.new_bool_var("")
        self.model.add_bool_or(literals).only_enforce_if(one)
        self.model.add_bool_and([~literal for literal in literals]).only_enforce_if(~one)
        return one

    def _all(self, literals: Sequence[cp_model.LiteralT]) -> cp_model.IntVar:
        """A literal that holds where all of `literals` do, and only there."""
        both = self.model.new_bool_var("")
        self.model.add_bool_and(literals).only_enforce_if(both)
        self.model.add_bool_or([both, *(~literal for literal in literals)])  # type: ignore[operator]
        return both

    def forbid(self, solution: Solution) -> None:
        """Neither a set of edits that holds all of these, nor another with the same gradient."""
        made = {(c.place, c.kind, c.argument): c for c in solution.choices}
        clause, otherwise = [], []
        for literal, choice in self.choices:
            same = made.get((choice.place, choice.kind, choice.argument))
            if choice.kind != "prune":
                otherwise.append(literal if same is None else ~literal)
            if same is None:
                continue
            clause.append(~literal)
            if choice.kind == "scale":
                natural, degree = self.natural[choice.place], int(same.degree * self.one)
                other = self.model.new_bool_var("")
                self.model.add(natural != degree).only_enforce_if(other)
                clause.append(other)
        flows = _flows(self.sites, solution.choices)
        otherwise += [~flow if edge in flows else flow for edge, flow in self.flows.items()]
        self.model.add_bool_or(clause)
        self.model.add_bool_or(otherwise)

    def solve(self, effort: float) -> Solution | None:
        """The cheapest choices in graph order; None where none were found."""
        ranks = 1 + sum(rank for _, _, rank in self.costs)
        self.model.minimize(sum((cost * ranks + rank) * b for b, cost, rank in self.costs))
        solver = cp_model.CpSolver()
        solver.parameters.num_workers = 1
        solver.parameters.random_seed = 0
        solver.parameters.max_deterministic_time = max(effort, 0.0)
        solver.parameters.linearization_level = 2  # without it, large pieces are not proven
        status = solver.solve(self.model)
        self.spent += solver.deterministic_time
        self.exhausted = status == cp_model.INFEASIBLE
        if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            return None
        made = [c for literal, c in self.choices if solver.value(literal)]
        made = [
            replace(c, degree=Fraction(solver.value(self.natural[c.place]), self.one))
            if c.kind == "scale"
            else c
            for c in made
        ]
        cost = sum(cost for literal, cost, _ in self.costs if solver.value(literal))
        return Solution(tuple(made), cost, status == cp_model.OPTIMAL)


def _denominator(sites: tuple[Site, ...]) -> int:
    """A common denominator of the degrees in a piece."""
    finest: dict[Ref | None, int] = {INPUT: 1, None: 1}
    for place, site in enumerate(sites):
        refs = dict(site.operands)
        for i, small in enumerate(site.small):
            terms = [t for o in site.options for t in o.relations[i].terms] if not small else []
            parts = [finest[refs[name]] * e.denominator for term in terms for name, e in term]
            common = lcm(*parts)
            finest[place, i] = common if common <= FINEST else 1
    return lcm(*finest.values())


# --------------------------------------------------------------------------- what is said about it


def _plan(
    problem: _Problem, before: Degrees, after: Degrees, edits: tuple[Edit, ...], optimal: bool
) -> Plan:
    graph = problem.graph
    left = tuple(name for name in graph.nodes if name in after.findings)
    cuts: Mapping[Edit, tuple[str, ...]] = {
        e: _cut(graph, e, before, after) for e in edits if isinstance(e, Prune)
    }
    named = [*(e.node for e in edits), *left, *(n for nodes in cuts.values() for n in nodes)]
    where = {name: _where(graph.nodes[name]) for name in dict.fromkeys(named)}
    reasons = {edit: _reason(edit, before, after) for edit in edits}
    cost = sum(_cost(edit, after, problem) for edit in edits)
    mark = fingerprint(graph)
    return Plan(edits, problem.policy.name, reasons, cost, optimal, mark, left, where, cuts)


def _where(node: fx.Node) -> tuple[str, str]:
    """The operation (the name of an input) and the module path."""
    return target_name(node.target) if node.op == "call_function" else node.name, module_path(node)


def _cut(graph: ComputationGraph, edit: Prune, before: Degrees, after: Degrees) -> tuple[str, ...]:
    """The value held fixed, then all nodes that leave the backward with it, nearest first."""
    call = before.live.calls[edit.node]
    value = next(o.node for o in call.operands if o.name == edit.argument)
    assert value is not None
    queue = [value]
    for node in queue:
        if node.name not in after.alive:
            behind = [n for n in node.all_input_nodes if n.name in before.alive]
            queue += [n for n in behind if n not in queue and n.name not in after.alive]
    return (value.name, *(n.name for n in queue if n.name not in after.alive))


def _cost(edit: Edit, after: Degrees, problem: _Problem) -> int:
    if isinstance(edit, Prune):
        return problem.prune_cost(edit.node, edit.argument) or 0
    if isinstance(edit, Scale):
        return Scale.price(problem.policy, edit.argument) or 0
    call = after.live.calls[edit.node]
    return _mode_cost(problem.policy, call, after.modes[edit.node]) or 0


def _reason(edit: Edit, before: Degrees, after: Degrees) -> str:
    """Why, in one sentence without names, so that equal edits have equal reasons."""
    call = before.live.calls[edit.node]
    if isinstance(edit, Prune):
        return _why_pruned(edit, call, before, after)
    if isinstance(edit, Scale) and edit.argument:
        return "the products inside attention share what they are attributed"
    if isinstance(edit, Scale):
        what = "a product" if call.operator.algebra is Algebra.MULTILINEAR else "its output is"
        return f"{what} of degree {1 / edit.factor}, scaled to degree 1"
    if call.operator.algebra is Algebra.NORMALISER:
        return "1/sigma depends on the input; held fixed, the layer is linear in it"
    if isinstance(edit, Integrate):
        origin = "; f(0) is a bias leaf" if after.biases.get(edit.node) else ""
        return f"no closed form: its Jacobian is averaged along the ray from 0{origin}"
    origin = f"; f(0) = {call.operator.origin:.3g} is a bias leaf" if call.operator.origin else ""
    return f"not homogeneous: the secant from 0 takes the place of the derivative{origin}"


def _why_pruned(edit: Prune, call: Call, before: Degrees, after: Degrees) -> str:
    if call.operator.algebra is Algebra.ATTENTION:
        return "the attention weights depend on it; held fixed, attention is linear in its values"
    relations = after.modes[edit.node].outputs
    powers = [e for r in relations for term in r.terms for n, e in term if n == edit.argument]
    operand = next(o.node for o in call.operands if o.name == edit.argument)
    if powers and all(power < 0 for power in powers):
        return "the divisor is held fixed, as 1/sigma of a norm is"
    queue = [operand] if operand is not None else []
    for node in queue:  # what of no degree is behind this edge, and behind it alone
        if node.name in before.findings and node.name not in after.alive:
            cause = before.live.calls[node.name]
            if cause.eps:
                return "the factor is one over a norm with eps, which is held fixed"
            return f"the factor comes from {_short(cause)}, which has no degree; it is held fixed"
        if node.name not in after.alive and node.name in before.live.calls:
            queue += [n for n in node.all_input_nodes if n not in queue]
    if edit.node in before.findings:
        return f"{_short(call)} has no degree in it; it is held fixed"
    return "held fixed, so that the degrees agree"


def _short(call: Call) -> str:
    return short_name(call.operator.name)


def _no_plan(problem: _Problem, after: Degrees, obstacles: list[str]) -> NoPlanError:
    """All obstacles at once: node, module, source line, the condition that fails, the way out."""
    graph = problem.graph
    alike: dict[tuple[str, str], list[str]] = {}
    for name in dict.fromkeys([*(n for n in obstacles if n in after.findings), *after.findings]):
        reason = after.findings[name].reason + _way_out(problem, name, after)
        alike.setdefault((target_name(graph.nodes[name].target), reason), []).append(name)
    lines = [
        f"  {graph.describe(names[0])}: {reason}"
        + (f" (and {len(names) - 1} more like it)" if len(names) > 1 else "")
        for (_, reason), names in alike.items()
    ]
    lines = lines or [f"  {graph.describe(name)}: it has no degree" for name in obstacles]
    return NoPlanError(
        f"no honest plan for {graph.name} under policy {problem.policy.name!r}:\n"
        + "\n".join(lines)
        + "\nchange the layer, allow more edits in the policy (dataclasses.replace), or use a "
        "partial policy ('plain', 'attnlrp'), which reports what stays incomplete"
    )


def _way_out(problem: _Problem, name: str, after: Degrees) -> str:
    if after.findings[name].opaque:
        return "; multiply by it instead, or take it out of the model"
    if "softmax" in target_name(problem.graph.nodes[name].target) and _is_head(problem, name):
        return "; the output is a probability: judge the logits"
    return ""


def _is_head(problem: _Problem, name: str) -> bool:
    """Whether an output is this node's value, merely moved."""
    if name in problem.ends:
        return True
    users = [u.name for u in problem.graph.nodes[name].users if u.name in problem.sites]
    structural = (
        u
        for u in users
        if problem.live.calls[u].operator.algebra is Algebra.STRUCTURAL
        and len(problem.sites[u].operands) == 1
    )
    return any(_is_head(problem, user) for user in structural)
