"""From a graph and a policy to a plan: the least-cost labelling with degrees, by OR-tools' CP-SAT.

Every live value gets a degree so that each operation's relation holds, the output has degree 1 and
the edits cost least. The graph is cut where every gradient path passes one value whose degree must
be 1 (the residual stream); the pieces are solved one by one, repeated ones once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from math import lcm

from ortools.sat.python import cp_model
from torch import fx

from .degrees import Degrees, Liveness, State, degrees, liveness
from .errors import NoPlanError
from .operators import Algebra, Call, Mode, Relation, target_name
from .operators.registry import REGION
from .plan import Plan, fingerprint
from .policies import Policy, policy
from .rules import NODE_EDITS, Edit, Integrate, Prune, Scale
from .trace import ComputationGraph, Inputs, Model, module_path, trace

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
    effort: float = 10.0,
) -> Plan:
    """The least-cost plan that makes a model, a layer or a traced graph complete under a policy.

    `effort` bounds the search per piece, about seconds but counted in deterministic steps: the same
    graph gives the same plan, and beyond it the best one so far with `optimal=False`.
    Raises `NoPlanError` naming the obstacle, `UnknownNameError`, and what `trace` raises.
    """
    chosen = _policy(policy)
    graph = model if isinstance(model, ComputationGraph) else trace(model, inputs)
    live = liveness(graph)
    before = degrees(graph, (), live)
    if not any(live.state(value) is State.LIVE for value in graph.outputs):
        raise NoPlanError(
            f"no output of {graph.name} carries gradient: all of them are constant, detached, "
            "rounded or compared; judge a value from before that"
        )
    if not before.findings or chosen.idle:
        return _plan(graph, chosen, before, before, (), True)
    problem = _Problem(graph, live, chosen)
    edits, obstacles, optimal = _solve_pieces(problem, effort)
    after = degrees(graph, edits, live)
    if obstacles:
        raise _no_plan(problem, after, obstacles)
    if chosen.complete and after.findings:
        reasons = "; ".join(f"{graph.describe(n)}: {f.reason}" for n, f in after.findings.items())
        raise AssertionError(f"error of the library: the plan derived leaves {reasons}")
    return _plan(graph, chosen, before, after, edits, optimal)


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

    `operands`: argument -> the value it reads, None where that is frozen. `live`: which outputs
    carry gradient; `small`: whose degree can only be 0 or 1. `leave`: the cost of leaving it.
    """

    options: tuple[Option, ...]
    operands: tuple[tuple[str, Ref | None], ...]
    live: tuple[bool, ...]
    small: tuple[bool, ...]
    leave: int | None
    eps: bool
    prunable: bool
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
            sites[name] = Site(
                options,
                operands[name],
                live,
                tuple(small[name, i] for i in range(len(live))),
                self.policy.leave_cost(call),
                call.eps,
                meets and self.policy.prune is not None,
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
    return 0 if call.operator is REGION else policy.mode_cost(mode)


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


def _solve_pieces(problem: _Problem, effort: float) -> tuple[tuple[Edit, ...], list[str], bool]:
    """All edits in graph order, the nodes that stand in the way, and whether all is optimal."""
    known: dict[tuple[Site, ...], tuple[list[Choice], bool]] = {}
    edits: list[Edit] = []
    obstacles: list[str] = []
    optimal = True
    for piece in problem.pieces():
        sites = problem.localise(piece)
        if sites not in known:
            known[sites] = _solve(sites, problem.policy, effort)
        choices, proven = known[sites]
        optimal &= proven
        for choice in choices:
            name = piece[choice.place]
            call = problem.live.calls[name]
            edits += _edits(choice, name, call, problem.policy)
            if choice.kind == "leave" and problem.sites[name].leave is None:
                obstacles.append(name)
    return tuple(edits), obstacles, optimal


def _edits(choice: Choice, name: str, call: Call, policy: Policy) -> list[Edit]:
    if choice.kind == "prune":
        return [Prune(name, choice.argument)]
    if choice.kind == "scale":
        return [Scale(name, 1 / choice.degree)]
    if choice.kind == "leave":
        factors = policy.edge_scales.get(call.operator.algebra, {})
        return [
            Scale(name, f, argument) for argument, f in factors.items() if argument in call.moving
        ]
    return [NODE_EDITS[choice.kind](name)]


# --------------------------------------------------------------------------- one piece, by CP-SAT


def _solve(sites: tuple[Site, ...], policy: Policy, effort: float) -> tuple[list[Choice], bool]:
    """The cheapest labelling of a piece and whether that is proven.

    Where there is none, the cheapest with nodes left that the policy does not leave: the obstacles.
    """
    answer = _Labelling(sites, policy).solve(effort)
    if answer is None:
        relaxed = tuple(replace(s, leave=s.never if s.leave is None else s.leave) for s in sites)
        answer = _Labelling(relaxed, policy).solve(effort)
    if answer is None:
        raise NoPlanError(
            f"the search found no plan within effort={effort}; raise it in derive_rules, or derive "
            "the layers of the model one by one"
        )
    return answer


class _Labelling:
    """The integer programme of a piece: a degree a value (times a common denominator), edits as
    Booleans, the sum of their costs to be least; relations bind only nodes on a gradient path."""

    def __init__(self, sites: tuple[Site, ...], policy: Policy) -> None:
        self.sites, self.policy = sites, policy
        self.model = cp_model.CpModel()
        self.one = _denominator(sites)
        self.zero_var, self.one_var = (self.model.new_constant(v) for v in (0, self.one))
        self.degree: dict[Ref | None, cp_model.IntVar] = {INPUT: self.one_var, None: self.zero_var}
        self.alive = [self.model.new_bool_var("") for _ in sites]
        self.read: list[list[tuple[Ref, cp_model.IntVar | None]]] = [[] for _ in sites]
        self.costs: list[tuple[cp_model.IntVar, int, int]] = []
        """literal, cost, and rank: among plans of equal cost the lowest sum of ranks wins"""
        self.choices: list[tuple[cp_model.IntVar, Choice]] = []
        self.natural: dict[int, cp_model.IntVar] = {}
        self.edges = sum(len(site.operands) for site in sites)
        self.edge = 0
        for place, site in enumerate(sites):
            self._add(place, site)
        self._keep_alive()

    def _add(self, place: int, site: Site) -> None:
        model, alive = self.model, self.alive[place]
        seen = {name: self._seen(place, name, ref) for name, ref in site.operands}
        reads = [name for name, ref in site.operands if ref is not None]
        edges = dict(zip(reads, (pruned for _, pruned in self.read[place]), strict=True))
        wanted = [
            self._new_degree(small) if live else self.zero_var
            for live, small in zip(site.live, site.small, strict=True)
        ]
        natural = list(wanted)
        scalable = self.policy.scale is not None and site.live == (True,) and site.small == (False,)
        if scalable:
            natural = [self._new_degree(False)]
            scaled = self._choose(Choice(place, "scale"), self.policy.scale or 0, self.edge)
            model.add_implication(scaled, alive)
            model.add(wanted[0] == natural[0]).only_enforce_if(~scaled)
            model.add(wanted[0] == self.one).only_enforce_if(scaled)
            model.add(natural[0] >= 1).only_enforce_if(scaled)
            self.natural[place] = natural[0]
        ways = []
        for option in site.options:
            way = self._choose(Choice(place, option.edit or ""), option.cost)
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
            model.add(wanted[site.live.index(True)] == self.one)
            model.add(alive == 1)

    def _seen(self, place: int, name: str, ref: Ref | None) -> cp_model.IntVar:
        """The degree at an edge: the value's, or 0 where it is pruned."""
        self.edge += 1
        value = self.degree[ref]
        if ref is None:
            return value
        if not self.sites[place].prunable:
            self.read[place].append((ref, None))
            return value
        # the later edge is the better one: what is behind it leaves the backward pass
        choice = Choice(place, "prune", name)
        pruned = self._choose(choice, self.policy.prune or 0, self.edges - self.edge)
        self.model.add_implication(pruned, self.alive[place])
        small = ref == INPUT or self.sites[int(ref[0])].small[ref[1]]
        seen = self._new_degree(small)
        self.model.add(seen == value).only_enforce_if(~pruned)
        self.model.add(seen == 0).only_enforce_if(pruned)
        self.read[place].append((ref, pruned))
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
            for (source, _), pruned in reads:
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

    def solve(self, effort: float) -> tuple[list[Choice], bool] | None:
        """The choices in graph order and whether they are optimal; None where there are none."""
        ranks = 1 + sum(rank for _, _, rank in self.costs)
        self.model.minimize(sum((cost * ranks + rank) * b for b, cost, rank in self.costs))
        solver = cp_model.CpSolver()
        solver.parameters.num_workers = 1
        solver.parameters.random_seed = 0
        solver.parameters.max_deterministic_time = effort
        solver.parameters.linearization_level = 2  # without it, large pieces are not proven
        status = solver.solve(self.model)
        if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            return None
        made = [c for literal, c in self.choices if solver.value(literal)]
        made = [
            replace(c, degree=Fraction(solver.value(self.natural[c.place]), self.one))
            if c.kind == "scale"
            else c
            for c in made
        ]
        return made, status == cp_model.OPTIMAL


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
    graph: ComputationGraph,
    policy: Policy,
    before: Degrees,
    after: Degrees,
    edits: tuple[Edit, ...],
    optimal: bool,
) -> Plan:
    left = tuple(name for name in graph.nodes if name in after.findings)
    where = {
        name: (target_name(graph.nodes[name].target), module_path(graph.nodes[name]))
        for name in dict.fromkeys([e.node for e in edits] + list(left))
    }
    reasons = {edit: _reason(edit, before, after) for edit in edits}
    cost = sum(_cost(edit, after, policy) for edit in edits)
    return Plan(edits, policy.name, reasons, cost, optimal, fingerprint(graph), left, where)


def _cost(edit: Edit, after: Degrees, policy: Policy) -> int:
    if isinstance(edit, Prune):
        return policy.prune or 0
    if isinstance(edit, Scale):
        return 0 if edit.argument else policy.scale or 0
    return _mode_cost(policy, after.live.calls[edit.node], after.modes[edit.node]) or 0


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
    name = call.operator.name
    return name.split(".")[1] if name.startswith("aten.") else name


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
