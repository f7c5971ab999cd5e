"""The integer programme of a piece: which degrees and decisions go together. Solved by OR-tools."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import lcm

from ortools.sat.python import cp_model

from ..edits.costs import Policy
from ..edits.kinds import Prune, Scale
from ..operators.relations import Mode, Relation
from .problem import INPUT, LAST_OF_ALL, Edge, NodeProblem, Piece, Value
from .solving import FREE, LEAVE, Decision, Solution

IntVar = cp_model.IntVar
Literal = cp_model.LiteralT
"""a Boolean variable, its negation, or a truth value"""
HIGHEST = 32
"""degrees beyond +-32 are not looked for"""


@dataclass(frozen=True)
class Candidate:
    """A decision that may be made, by the literal that it is.

    `rank`: among solutions of equal cost the lowest sum of ranks wins. `degree`: the variable of
    the degree that a scale makes 1.
    """

    literal: IntVar
    decision: Decision
    rank: int
    degree: IntVar | None


class Variables:
    """Degrees (times a common denominator, `one`), literals, and the decisions among them.

    `spent`: the solver's effort so far; `exhausted`: whether it found that there is no solution.
    """

    def __init__(self, one: int) -> None:
        self.one = one
        self.model = cp_model.CpModel()
        self.candidates: list[Candidate] = []
        self.spent, self.exhausted = 0.0, False

    def degree(self, small: bool) -> IntVar:
        """A degree; a small one is 0 or 1."""
        bound = HIGHEST * self.one
        ends = [[0, 0], [self.one, self.one]] if small else [[-bound, bound]]
        return self.model.new_int_var_from_domain(cp_model.Domain.from_intervals(ends), "")

    def literal(self) -> IntVar:
        return self.model.new_bool_var("")

    def decide(self, decision: Decision, rank: int = 0, degree: IntVar | None = None) -> IntVar:
        """The literal of a decision."""
        literal = self.literal()
        self.candidates.append(Candidate(literal, decision, rank, degree))
        return literal

    def restrict(self, degree: IntVar, degrees: Iterable[int], where: IntVar) -> None:
        """Let a degree be one of `degrees` where a literal holds."""
        domain = cp_model.Domain.from_values([value * self.one for value in degrees])
        self.model.add_linear_expression_in_domain(degree, domain).only_enforce_if(where)

    def any_of(self, literals: Sequence[IntVar]) -> IntVar:
        """A literal that holds where one of `literals` does, and only there."""
        one = self.literal()
        self.model.add_bool_or(literals).only_enforce_if(one)
        self.model.add_bool_and([~literal for literal in literals]).only_enforce_if(~one)
        return one

    def all_of(self, literals: Sequence[Literal]) -> IntVar:
        """A literal that holds where all of `literals` do, and only there."""
        both = self.literal()
        self.model.add_bool_and(literals).only_enforce_if(both)
        self.model.add_bool_or([both, *(~literal for literal in literals)])  # type: ignore[operator]
        return both

    def solve(self, effort: float) -> Solution | None:
        """The cheapest decisions, in graph order; None where none were found."""
        ranks = 1 + sum(c.rank for c in self.candidates)
        prices = ((c.decision.cost * ranks + c.rank) * c.literal for c in self.candidates)
        self.model.minimize(sum(prices))
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
        decisions = []
        for made in self.candidates:
            if solver.value(made.literal):
                decisions.append(made.decision)
                if made.degree is not None:
                    degree = Fraction(solver.value(made.degree), self.one)
                    decisions[-1] = replace(made.decision, degree=degree)
        return Solution(tuple(decisions), status == cp_model.OPTIMAL)


@dataclass(frozen=True)
class SeenEdge:
    """The degree that is seen through an edge, and the literal that it is pruned, if it can be."""

    edge: Edge
    degree: IntVar
    pruned: tuple[IntVar, ...] = ()

    @property
    def unpruned(self) -> list[Literal]:
        """What has to hold for gradient to pass it."""
        return [~pruned for pruned in self.pruned]


class Programme:
    """A degree a value, a literal a decision; relations bind only what is on a gradient path.

    `any_end`: an end of a degree other than 1 is an obstacle, not impossible. `edges`: what each
    place sees; `scales`: place -> the literal that it is scaled.
    """

    def __init__(self, piece: Piece, policy: Policy, *, any_end: bool = False) -> None:
        self.piece, self.policy, self.any_end = piece, policy, any_end
        self.variables = Variables(piece.denominator)
        self.one, self.model = self.variables.one, self.variables.model
        self.zero, of_input = map(self.model.new_constant, (0, self.one))
        self.degree: dict[Value | None, IntVar] = {INPUT: of_input, None: self.zero}
        self.alive = [self.variables.literal() for _ in piece.nodes]
        self.edges: list[list[SeenEdge]] = []
        self.scales: dict[int, IntVar] = {}
        self._edges_there_are = sum(len(node.edges) for node in piece.nodes)
        self._edges_seen = 0
        for place, node in enumerate(piece.nodes):
            self._add_node(place, node)
        self._keep_alive()

    def allow_only(self, solution: Solution) -> None:
        """No decisions but these; the objective finds out which of them are needed."""
        allowed = {decision.spot: decision for decision in solution.decisions}
        for candidate in self.variables.candidates:
            same = allowed.get(candidate.decision.spot)
            if same is None:
                self.model.add(candidate.literal == 0)
            elif candidate.degree is not None:
                equal = self.model.add(candidate.degree == int(same.degree * self.one))
                equal.only_enforce_if(candidate.literal)

    def _add_node(self, place: int, node: NodeProblem) -> None:
        alive = self.alive[place]
        self.edges.append([self._see(place, edge) for edge in node.edges])
        degrees = [
            self.variables.degree(small) if live else self.zero
            for live, small in zip(node.live, node.small, strict=True)
        ]
        natural = self._before_a_scale(place, degrees)
        taken = [self._take(place, mode, cost, natural) for mode, cost in node.modes]
        if node.leave is not None:
            taken.append(self._leave(place, node.leave, degrees))
        self.model.add(sum(taken) == alive)
        for degree in dict.fromkeys([*degrees, *natural]):
            if degree is not self.zero:
                self.model.add(degree == 0).only_enforce_if(~alive)
        self.degree |= {(place, i): degree for i, degree in enumerate(degrees)}
        if node.is_end:
            end = self.model.add(degrees[node.live.index(True)] == self.one)
            self.model.add(alive == 1)
            if self.any_end:
                free = self.variables.decide(Decision(place, FREE, LAST_OF_ALL))
                end.only_enforce_if(~free)

    def _see(self, place: int, edge: Edge) -> SeenEdge:
        """The degree at an edge: the value's, or 0 where it is pruned."""
        self._edges_seen += 1
        value = self.degree[edge.value]
        if edge.value is None or edge.prune is None:
            return SeenEdge(edge, value)
        # the later edge is the better one: what is behind it leaves the backward pass
        rank = self._edges_there_are - self._edges_seen
        pruned = self.variables.decide(Decision(place, Prune.kind, edge.prune, edge.argument), rank)
        self.model.add_implication(pruned, self.alive[place])
        seen = self.variables.degree(self.piece.is_small(edge.value))
        self.model.add(seen == value).only_enforce_if(~pruned)
        self.model.add(seen == 0).only_enforce_if(pruned)
        return SeenEdge(edge, seen, (pruned,))

    def _before_a_scale(self, place: int, degrees: list[IntVar]) -> list[IntVar]:
        """The degrees that the relations give, where a scale may make the only one of them 1."""
        price, node = Scale.price(self.policy), self.piece.nodes[place]
        if price is None or not node.scalable or self.piece.scales_before(place):
            return degrees
        natural = self.variables.degree(False)
        decision = Decision(place, Scale.kind, price)
        scaled = self.variables.decide(decision, self._edges_seen, natural)
        self.model.add_implication(scaled, self.alive[place])
        self.model.add(degrees[0] == natural).only_enforce_if(~scaled)
        self.model.add(degrees[0] == self.one).only_enforce_if(scaled)
        self.model.add(natural >= 1).only_enforce_if(scaled)
        self.scales[place] = scaled
        return [natural]

    def _take(self, place: int, mode: Mode, cost: int, degrees: list[IntVar]) -> IntVar:
        """The literal that a node takes a mode, whose relations then hold."""
        if mode.edit is None:
            taken = self.variables.literal()
        else:
            # of plans that cost the same, rather one that makes no f(0) a bias leaf
            from_origin = any(relation.from_origin for relation in mode.outputs)
            rank = self._edges_there_are if from_origin else 0
            taken = self.variables.decide(Decision(place, mode.edit, cost), rank)
        live = self.piece.nodes[place].live
        for relation, degree, is_live in zip(mode.outputs, degrees, live, strict=True):
            if is_live:
                self._relate(place, relation, degree, taken)
        return taken

    def _relate(self, place: int, relation: Relation, degree: IntVar, where: IntVar) -> None:
        seen = {s.edge.argument: s for s in self.edges[place]}
        for name in relation.zero:
            self.model.add(seen[name].degree == 0).only_enforce_if(where)
        for term in relation.terms or ((),):  # no term: degree 0
            common = lcm(*(exponent.denominator for _, exponent in term))
            total = sum(int(exponent * common) * seen[name].degree for name, exponent in term)
            self.model.add(common * degree == total).only_enforce_if(where)
        for operand in (seen[name] for name in relation.ray):
            if operand.edge.value is not None:  # moves as the output does, or is held fixed
                self.model.add(operand.degree == degree).only_enforce_if(where, *operand.unpruned)
        if relation.domain is not None:
            self.variables.restrict(degree, relation.domain, where)

    def _leave(self, place: int, cost: int, degrees: list[IntVar]) -> IntVar:
        """The literal that a node is left inconsistent: labelled as `degrees` labels a finding,
        and behind nothing odd."""
        node, seen = self.piece.nodes[place], [operand.degree for operand in self.edges[place]]
        left = self.variables.decide(Decision(place, LEAVE, cost))
        for degree, live in zip(degrees, node.live, strict=True):
            if live:
                self.model.add(degree == (0 if node.eps else self.one)).only_enforce_if(left)
        if not node.eps:
            for degree in seen:
                self.variables.restrict(degree, (0, 1), left)
            self.model.add(sum(seen) >= self.one).only_enforce_if(left)
        return left

    def _keep_alive(self) -> None:
        """What an alive node reads through an edge that is not pruned is alive."""
        for alive, seen in zip(self.alive, self.edges, strict=True):
            for operand in seen:
                if operand.edge.value not in (None, INPUT):
                    source = self.alive[int(operand.edge.value[0])]
                    self.model.add_bool_or([source, ~alive, *operand.pruned])
