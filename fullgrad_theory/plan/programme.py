"""The integer programme of a piece: which degrees and decisions go together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm

from ..edits.costs import Policy
from ..edits.kinds import Prune, Scale
from ..operators.relations import Relation
from .piece import INPUT, LAST_OF_ALL, Edge, NodeProblem, Piece, PricedMode, Value
from .solution import FREE, LEAVE, Decision, Solution
from .variables import IntVar, Literal, Variables


@dataclass(frozen=True)
class SeenEdge:
    """The degree that is seen through an edge, and the literal that it is pruned (None: never)."""

    edge: Edge
    degree: IntVar
    pruned: IntVar | None = None

    @property
    def unpruned(self) -> list[Literal]:
        """What has to hold for gradient to pass it."""
        return [] if self.pruned is None else [~self.pruned]


class Programme:
    """A degree a value, a literal a decision; relations bind only what is on a gradient path.

    `any_end`: an end of a degree other than 1 is an obstacle, not impossible. `edges`: what each
    place sees; `scales`: place -> the literal that it is scaled.
    """

    def __init__(self, piece: Piece, policy: Policy, *, any_end: bool = False) -> None:
        self.piece, self.policy, self.any_end = piece, policy, any_end
        self.variables = Variables(piece.denominator)
        self.one = self.variables.one
        self.zero, of_input = (self.variables.constant(degree) for degree in (0, 1))
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
                self.variables.model.add(candidate.literal == 0)
            elif candidate.degree is not None:
                degree = int(same.degree * self.one)
                equal = self.variables.model.add(candidate.degree == degree)
                equal.only_enforce_if(candidate.literal)

    # ------------------------------------------------------------------ one node

    def _add_node(self, place: int, node: NodeProblem) -> None:
        model, alive = self.variables.model, self.alive[place]
        seen = [self._see(place, edge) for edge in node.edges]
        self.edges.append(seen)
        degrees = [
            self.variables.degree(small) if live else self.zero
            for live, small in zip(node.live, node.small, strict=True)
        ]
        natural = self._before_a_scale(place, degrees)
        taken = [self._take(place, mode, natural, seen) for mode in node.modes]
        if node.leave is not None:
            taken.append(self._leave(place, node.leave, degrees, seen))
        model.add(sum(taken) == alive)
        for degree in dict.fromkeys([*degrees, *natural]):
            if degree is not self.zero:
                model.add(degree == 0).only_enforce_if(~alive)
        self.degree |= {(place, i): degree for i, degree in enumerate(degrees)}
        if node.is_end:
            self._bind_end(place, degrees[node.live.index(True)])

    def _see(self, place: int, edge: Edge) -> SeenEdge:
        """The degree at an edge: the value's, or 0 where it is pruned."""
        self._edges_seen += 1
        model, value = self.variables.model, self.degree[edge.value]
        if edge.value is None or edge.prune is None:
            return SeenEdge(edge, value)
        # the later edge is the better one: what is behind it leaves the backward pass
        rank = self._edges_there_are - self._edges_seen
        pruned = self.variables.decide(Decision(place, Prune.kind, edge.prune, edge.argument), rank)
        model.add_implication(pruned, self.alive[place])
        seen = self.variables.degree(self.piece.is_small(edge.value))
        model.add(seen == value).only_enforce_if(~pruned)
        model.add(seen == 0).only_enforce_if(pruned)
        return SeenEdge(edge, seen, pruned)

    def _before_a_scale(self, place: int, degrees: list[IntVar]) -> list[IntVar]:
        """The degrees that the relations give, where a scale may make the only one of them 1."""
        price, node = Scale.price(self.policy), self.piece.nodes[place]
        if price is None or not node.scalable or self.piece.scales_before(place):
            return degrees
        model, natural = self.variables.model, self.variables.degree(False)
        decision = Decision(place, Scale.kind, price)
        scaled = self.variables.decide(decision, self._edges_seen, natural)
        model.add_implication(scaled, self.alive[place])
        model.add(degrees[0] == natural).only_enforce_if(~scaled)
        model.add(degrees[0] == self.one).only_enforce_if(scaled)
        model.add(natural >= 1).only_enforce_if(scaled)
        self.scales[place] = scaled
        return [natural]

    def _take(
        self, place: int, mode: PricedMode, degrees: list[IntVar], seen: list[SeenEdge]
    ) -> IntVar:
        """The literal that a node takes a mode, whose relations then hold."""
        if mode.edit is None:
            taken = self.variables.literal()
        else:
            # of plans that cost the same, rather one that makes no f(0) a bias leaf
            from_origin = any(relation.from_origin for relation in mode.relations)
            rank = self._edges_there_are if from_origin else 0
            taken = self.variables.decide(Decision(place, mode.edit, mode.cost), rank)
        live = self.piece.nodes[place].live
        for relation, degree, is_live in zip(mode.relations, degrees, live, strict=True):
            if is_live:
                self._relate(relation, degree, seen, taken)
        return taken

    def _relate(
        self, relation: Relation, degree: IntVar, seen: Sequence[SeenEdge], where: IntVar
    ) -> None:
        """A relation holds where a literal does."""
        model, by_name = self.variables.model, {s.edge.argument: s for s in seen}
        for name in relation.zero:
            model.add(by_name[name].degree == 0).only_enforce_if(where)
        if not relation.terms:
            model.add(degree == 0).only_enforce_if(where)
        for term in relation.terms:
            common = lcm(*(exponent.denominator for _, exponent in term))
            total = sum(int(exponent * common) * by_name[name].degree for name, exponent in term)
            model.add(common * degree == total).only_enforce_if(where)
        for name in relation.ray:  # moves as the output does, or is pruned or frozen
            operand = by_name[name]
            if operand.edge.value is not None:
                model.add(operand.degree == degree).only_enforce_if(where, *operand.unpruned)
        if relation.domain is not None:
            self.variables.restrict(degree, relation.domain, where)

    def _leave(
        self, place: int, cost: int, degrees: list[IntVar], seen: Sequence[SeenEdge]
    ) -> IntVar:
        """The literal that a node is left inconsistent: labelled as `degrees` labels a finding,
        and behind nothing odd."""
        node, model = self.piece.nodes[place], self.variables.model
        left = self.variables.decide(Decision(place, LEAVE, cost))
        for degree, live in zip(degrees, node.live, strict=True):
            if live:
                model.add(degree == (0 if node.eps else self.one)).only_enforce_if(left)
        if not node.eps:
            for operand in seen:
                self.variables.restrict(operand.degree, (0, 1), left)
            model.add(sum(s.degree for s in seen) >= self.one).only_enforce_if(left)
        return left

    def _bind_end(self, place: int, degree: IntVar) -> None:
        end = self.variables.model.add(degree == self.one)
        self.variables.model.add(self.alive[place] == 1)
        if self.any_end:
            free = self.variables.decide(Decision(place, FREE, LAST_OF_ALL))
            end.only_enforce_if(~free)

    # ------------------------------------------------------------------ all of them

    def _keep_alive(self) -> None:
        """What an alive node reads through an edge that is not pruned is alive."""
        for place, seen in enumerate(self.edges):
            for operand in seen:
                if operand.edge.value not in (None, INPUT):
                    source = self.alive[int(operand.edge.value[0])]
                    pruned = [] if operand.pruned is None else [operand.pruned]
                    self.variables.model.add_bool_or([source, ~self.alive[place], *pruned])
